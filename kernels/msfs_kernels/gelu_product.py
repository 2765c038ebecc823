"""Matrix products that end in GELU (tanh approximation) or its derivative, written in one pass.

    product_gelu             h = a b + bias, y = gelu(h)
    product_gelu_gradient    (a b) gelu'(h)

As a product and a kernel of its own, each would bring the widest tensor of a Transformer to memory
and back once more. On Hopper GPUs, in 16 bits, both are cuBLASLt's epilogues; elsewhere they are
the formulas.

Dimension key: M rows, K inner, N columns. Source: Hendrycks and Gimpel 2016, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cublaslt
from .product import planned


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
    if plan is not None and (bias is None or bias.is_contiguous()):
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
    if plan is not None and h.is_contiguous():
        out = torch.empty_like(h)
        cublaslt.run(plan, a, b, out, h)
        return out
    return torch.ops.aten.gelu_backward(a @ b, h, approximate="tanh")


@product_gelu_gradient.register_fake
def _(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
