"""A linear layer of every member of an ensemble, with bias and ReLU in the product's epilogue.

    y[n] = x[n] w[n]^T + b[n], or max(0, that)

cuBLAS batches products but no epilogues: bias and ReLU are a kernel of their own, which reads and
writes the result once more. With 128 to 256 numbers to a row a product takes as long as its memory
traffic, so that is most of the layer. On Hopper tiles travel through the copy engine; other
devices, and the CPU, take the steps one by one.

Dimension key: N members, M rows, K inputs, O outputs.
"""

import torch
from torch import Tensor

BM, BN, BK, WARPS, STAGES = 128, 128, 64, 8, 2


@torch.library.custom_op("msfs_kernels::members_linear", mutates_args=())
def members_linear(x: Tensor, w: Tensor, b: Tensor, relu: bool) -> Tensor:
    """x w^T + b for each member, rounded once; with `relu` its positive part.

    Args:
        x: (N, M, K).
        w: (N, O, K), of x's dtype.
        b: (N, O), of x's dtype.

    Returns:
        (N, M, O) of x's dtype.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 and fits(x, w):
        return tiled(x, w, b, relu)
    y = torch.baddbmm(b[:, None], x, w.mT)
    return y.relu_() if relu else y


@members_linear.register_fake
def _(x: Tensor, w: Tensor, b: Tensor, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], w.shape[1])


def fits(x: Tensor, w: Tensor) -> bool:
    """16 bits, rows of whole 16 bytes (what the copy engine asks), and something to do."""
    return x.itemsize == 2 and x.numel() > 0 and x.shape[2] % 8 == 0 and w.shape[1] % 8 == 0


def tiled(x: Tensor, w: Tensor, b: Tensor, relu: bool) -> Tensor:
    """The kernel of `triton_members_linear`."""
    from .triton_members_linear import plan_linear

    y = x.new_empty(x.shape[0], x.shape[1], w.shape[1])
    plan = plan_linear(rows(x), rows(w), b, y, relu, BM, BN, BK, WARPS, STAGES)
    plan.kernel[plan.grid](*plan.args, **plan.constants)
    return y


def rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    aligned = x.data_ptr() % 16 == 0 and all(n * x.itemsize % 16 == 0 for n in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()
