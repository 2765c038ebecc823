"""a b by the fastest of cuBLASLt's algorithms for it, which the first call of a shape measures.

torch takes the one that cuBLASLt suggests first; for products of few columns or a short inner
dimension another one is up to a tenth faster (kernels/LOG.md).

Dimension key: M rows, K inner, N columns.
"""

from typing import Any

import torch
from torch import Tensor

from . import cublaslt

PLANS: dict[Any, cublaslt.Plan | None] = {}  # by epilogue and how the matrices lie


def planned(a: Tensor, b: Tensor, epilogue: int = cublaslt.PLAIN) -> cublaslt.Plan | None:
    """cuBLASLt's plan for matrices that lie like these, or None."""
    if not fits(a, b):
        return None
    key = a.device, a.dtype, epilogue, a.shape, a.stride(), b.shape, b.stride()
    if key not in PLANS:
        out = a.new_empty(a.shape[0], b.shape[1])
        PLANS[key] = cublaslt.make_plan(a, b, out, epilogue)
    return PLANS[key]


def fits(a: Tensor, b: Tensor) -> bool:
    """16 bits on Hopper, rows of whole 16 bytes at such addresses, and something to do."""
    if not a.is_cuda or a.itemsize != 2 or a.numel() == 0 or b.numel() == 0:
        return False
    if torch.cuda.get_device_capability(a.device)[0] != 9 or b.shape[1] % 8:
        return False
    return all(
        1 in x.stride()
        and max(x.stride()) % 8 == 0
        and max(x.stride()) >= min(x.shape)
        and x.data_ptr() % 16 == 0
        for x in (a, b)
    )


@torch.library.custom_op("msfs_kernels::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) of a (M, K) and b (K, N), of one dtype."""
    plan = planned(a, b)
    if plan is None:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    cublaslt.run(plan, a, b, out)
    return out


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
