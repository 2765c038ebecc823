"""Two matrices with their columns scaled, and what flows back: one launch each.

    out[i] = W[i] * g[i]                                   W (N[i], K), g (K,), i = 0, 1
    dW[i] = dout[i] * g[i]      dg[i] = sum over rows of dout[i] * W[i]

A decoder's block has its norms' gains in the two matrices after them (`decoder_block`): as graphs'
kernels these small tensors are eight launches a block, and are read twice in the backward.

Dimension key: N rows, K columns, P parts of a sum.
"""

import torch
from torch import Tensor

from . import ahead

PARTS = 132  # of the sums over rows; a program makes one


@torch.library.custom_op("msfs_kernels::scaled_columns", mutates_args=())
def scaled_columns(w0: Tensor, g0: Tensor, w1: Tensor, g1: Tensor) -> tuple[Tensor, Tensor]:
    """(w0 * g0, w1 * g1), computed in float32 and rounded to the matrices' dtype.

    Args:
        w0, w1: (N, K) each with its own N.
        g0, g1: (K,).
    """
    if w0.is_cuda and w0.dtype is not torch.float64:
        return tiled(w0, g0, w1, g1)
    return (w0 * g0.to(wide(w0))).to(w0.dtype), (w1 * g1.to(wide(w1))).to(w1.dtype)


@scaled_columns.register_fake
def _(w0: Tensor, g0: Tensor, w1: Tensor, g1: Tensor) -> tuple[Tensor, Tensor]:
    ahead.expect(tiled, (w0, g0, w1, g1))
    return w0.new_empty(w0.shape), w1.new_empty(w1.shape)


def tiled(w0: Tensor, g0: Tensor, w1: Tensor, g1: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel of `triton_scaled_columns`."""
    from .triton_scaled_columns import plan_forward

    w0, w1 = w0.contiguous(), w1.contiguous()
    outs = torch.empty_like(w0), torch.empty_like(w1)
    plan_forward(w0, g0.contiguous(), w1, g1.contiguous(), *outs).run()
    return outs


@torch.library.custom_op("msfs_kernels::scaled_columns_gradient", mutates_args=())
def scaled_columns_gradient(
    d0: Tensor, w0: Tensor, g0: Tensor, d1: Tensor, w1: Tensor, g1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dW[0], dW[1], sums): what flows back from d0 and d1 to the matrices, and (P, 2, K) in at
    least float32, whose sum over P is what flows back to g0 and g1.

    Args:
        d0, w0, d1, w1: (N, K) each pair with its own N.
        g0, g1: (K,).
    """
    if w0.is_cuda and w0.dtype is not torch.float64:
        return tiled_gradient(d0, w0, g0, d1, w1, g1)
    sums = w0.new_empty(1, 2, w0.shape[1], dtype=wide(w0))
    for i, (d, w) in enumerate(((d0, w0), (d1, w1))):
        sums[0, i] = (d.to(sums.dtype) * w).sum(0)
    outs = [(d.to(sums.dtype) * g.to(sums.dtype)).to(d.dtype) for d, g in ((d0, g0), (d1, g1))]
    return outs[0], outs[1], sums


@scaled_columns_gradient.register_fake
def _(d0: Tensor, w0: Tensor, g0: Tensor, d1: Tensor, w1: Tensor, g1: Tensor):
    ahead.expect(tiled_gradient, (d0, w0, g0, d1, w1, g1))
    count = PARTS if w0.is_cuda and w0.dtype is not torch.float64 else 1
    sums = w0.new_empty(count, 2, w0.shape[1], dtype=wide(w0))
    return w0.new_empty(w0.shape), w1.new_empty(w1.shape), sums


def tiled_gradient(
    d0: Tensor, w0: Tensor, g0: Tensor, d1: Tensor, w1: Tensor, g1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel of `triton_scaled_columns`."""
    from .triton_scaled_columns import plan_backward

    d0, w0, d1, w1 = (x.contiguous() for x in (d0, w0, d1, w1))
    outs = torch.empty_like(w0), torch.empty_like(w1)
    sums = w0.new_empty(PARTS, 2, w0.shape[1], dtype=torch.float32)
    plan_backward(d0, w0, g0.contiguous(), d1, w1, g1.contiguous(), *outs, sums).run()
    return *outs, sums


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
