"""Linear layers of all members of an ensemble, with bias, ReLU and its mask in their products.

    members_linear            y[n] = x[n] w[n]^T + b[n], or max(0, that)
    members_masked_product    out[n] = where(y[n] > 0, a[n] b[n], 0), and its sum over rows

The second is what flows back through a ReLU, `masked_product` for members.

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


@torch.library.custom_op("msfs_kernels::members_masked_product", mutates_args=())
def members_masked_product(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(where(y <= 0, 0, a b), its sum over rows) for each member.

    Args:
        a: (N, M, K).
        b: (N, K, O), of a's dtype.
        y: (N, M, O), of a's dtype.

    Returns:
        out (N, M, O) of a's dtype; sums (N, O) float32, summed before out is rounded.
    """
    if a.is_cuda and torch.cuda.get_device_capability(a.device)[0] == 9 and fits(a, b.mT):
        return masked(a, b, y)
    out = torch.where(y <= 0, 0.0, a @ b)
    return out, out.sum(1, dtype=torch.float32)


@members_masked_product.register_fake
def _(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    N, M, O = a.shape[0], a.shape[1], b.shape[2]  # noqa: E741
    return a.new_empty(N, M, O), a.new_empty(N, O, dtype=torch.float32)


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


def masked(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The other kernel of `triton_members_linear`."""
    from .triton_members_linear import plan_masked

    N, M, O = a.shape[0], a.shape[1], b.shape[2]  # noqa: E741
    out = a.new_empty(N, M, O)
    sums = a.new_empty(N, -(-M // BM), O, dtype=torch.float32)
    plan = plan_masked(rows(a), rows(b), rows(y), out, sums, BM, BN, BK, WARPS, STAGES)
    plan.kernel[plan.grid](*plan.args, **plan.constants)
    return out, sums.sum(1)


def rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    aligned = x.data_ptr() % 16 == 0 and all(n * x.itemsize % 16 == 0 for n in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()
