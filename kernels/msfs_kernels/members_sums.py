"""Sums over the rows of each member of an ensemble, which gradients of biases and norms are.

    members_sums         sum over m of x[n, m]
    members_norm_sums    of dy, and of dy (x - mean) rstd: gradients of a norm's bias and gain

Both give P parts of the sums, (..., N, P, D) in float32, each over ROWS rows: one small sum over
dim -2, which the compiler makes part of what comes next, is left. A general reduction over 3,800
rows of 8 x 128 columns reaches a fifth of a GPU's bandwidth; one program for a block of rows
that it holds at once reads them as a copy would.

Dimension key: N members, M rows, D columns, P parts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS, WARPS = 64, 128, 4  # of a program


def parts(M: int) -> int:
    return -(-M // ROWS)


@torch.library.custom_op("msfs_kernels::members_sums", mutates_args=())
def members_sums(x: Tensor) -> Tensor:
    """(N, P, D) float32, whose sum over P is that of x (N, M, D) over M."""
    return tiled(x, None, None, None) if x.is_cuda else in_parts(x)


@members_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], parts(x.shape[1]), x.shape[2], dtype=torch.float32)


@torch.library.custom_op("msfs_kernels::members_norm_sums", mutates_args=())
def members_norm_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(2, N, P, D) float32, whose sums over P are those of dy and of dy (x - mean) rstd over M.

    Args:
        dy, x: (N, M, D).
        mean, rstd: (N, M), of the rows of x.
    """
    if dy.is_cuda:
        return tiled(dy, x, mean, rstd)
    normed = (x.float() - mean[..., None].float()) * rstd[..., None].float()
    return torch.stack([in_parts(dy), in_parts(dy.float() * normed)])


@members_norm_sums.register_fake
def _(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return dy.new_empty(2, dy.shape[0], parts(dy.shape[1]), dy.shape[2], dtype=torch.float32)


def in_parts(x: Tensor) -> Tensor:
    """The formula."""
    N, M, D = x.shape
    padded = F.pad(x, (0, 0, 0, parts(M) * ROWS - M))
    return padded.view(N, parts(M), ROWS, D).sum(2, dtype=torch.float32)


def tiled(dy: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    """The kernel of `triton_members_sums`."""
    from .triton_members_sums import plan_sums

    N, M, D = dy.shape
    out = dy.new_empty(1 if x is None else 2, N, parts(M), D, dtype=torch.float32)
    if out.numel():
        plan = plan_sums(dy, x, mean, rstd, out, ROWS, COLUMNS, WARPS)
        plan.kernel[plan.grid](*plan.args, **plan.constants)
    return out[0] if x is None else out
