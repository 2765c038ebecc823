"""Matrix products that end in GELU (tanh approximation) or its derivative, written in one pass.

    product_gelu             h = a b + bias, y = gelu(h)
    product_gelu_gradient    (a b) gelu'(h)

As a product and a kernel of its own, each would bring the widest tensor of a Transformer to memory
and back once more. On Hopper GPUs, in 16 bits, both are cuBLASLt's epilogues; elsewhere they are
the formulas.

Dimension key: M rows, K inner, N columns. Source: Hendrycks and Gimpel 2016, section 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cublaslt

MOST = 1024  # plans that are kept
PLANS: dict[Any, cublaslt.Plan | None] = {}  # by epilogue and how the matrices lie


@torch.library.custom_op("msfs_kernels::product_gelu", mutates_args=())
def product_gelu(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, y) with h = a b + bias and y = gelu(h).

    Args:
        a: (M, K).
        b: (K, N), of a's dtype.
        bias: (N,), of a's dtype, or None.
    """
    epilogue = cublaslt.GELU if bias is None else cublaslt.GELU_BIAS
    plan, h = planned(a, b, epilogue), a.new_empty(a.shape[0], b.shape[1])
    if plan is not None and (bias is None or whole_and_aligned(bias)):
        y = torch.empty_like(h)
        cublaslt.run(plan, a, b, y, h, bias)
        return h, y
    h = a @ b if bias is None else torch.addmm(bias, a, b)
    return h, F.gelu(h, approximate="tanh")


@product_gelu.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = a.shape[0], b.shape[1]
    return a.new_empty(shape), a.new_empty(shape)


@torch.library.custom_op("msfs_kernels::product_gelu_gradient", mutates_args=())
def product_gelu_gradient(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """(a b) gelu'(h): what flows back to h = x W + bias from y = gelu(h), whose gradient is a b.

    Args:
        a: (M, K).
        b: (K, N), of a's dtype.
        h: (M, N), of a's dtype.
    """
    plan = planned(a, b, cublaslt.DGELU)
    if plan is not None and whole_and_aligned(h):
        out = torch.empty_like(h)
        cublaslt.run(plan, a, b, out, h)
        return out
    return torch.ops.aten.gelu_backward(a @ b, h, approximate="tanh")


@product_gelu_gradient.register_fake
def _(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def planned(a: Tensor, b: Tensor, epilogue: int) -> cublaslt.Plan | None:
    """cuBLASLt's plan for matrices that lie like these, or None."""
    if not fits(a, b):
        return None
    ways = [(x.shape, x.stride(), cublaslt.alignment(x)) for x in (a, b)]
    key = a.device, a.dtype, epilogue, *ways
    if key not in PLANS:
        if len(PLANS) == MOST:
            PLANS.clear()
        out = a.new_empty(a.shape[0], b.shape[1])
        PLANS[key] = cublaslt.make_plan(a, b, out, epilogue)
    return PLANS[key]


def whole_and_aligned(x: Tensor) -> bool:
    return x.is_contiguous() and cublaslt.alignment(x) >= 16


def fits(a: Tensor, b: Tensor) -> bool:
    """16 bits on Hopper, rows of whole 16 bytes at such addresses, and something to do."""
    if not a.is_cuda or a.dtype not in cublaslt.TYPES or a.numel() == 0 or b.numel() == 0:
        return False
    if torch.cuda.get_device_capability(a.device)[0] != 9 or b.shape[1] % 8:
        return False
    return all(
        1 in x.stride()
        and max(x.stride()) % 8 == 0
        and max(x.stride()) >= min(x.shape)
        and cublaslt.alignment(x) >= 16
        for x in (a, b)
    )
