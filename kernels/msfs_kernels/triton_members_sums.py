"""The Triton kernel of `members_sums`: one program for a block of rows, held at once."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.launching import Launch


@triton.jit
def sums_kernel(
    dy, x, mean, rstd, out, M, D, P, all_parts, strides_dy, strides_x, strides_mean, strides_rstd,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < D)[None, :]
    to = out + (n * P + part) * D + column
    at = n * strides_dy[0] + row[:, None] * strides_dy[1] + column[None, :] * strides_dy[2]
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, tl.sum(grad, 0), mask=column < D)
    if x is not None:
        at = n * strides_x[0] + row[:, None] * strides_x[1] + column[None, :] * strides_x[2]
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        at = n * strides_mean[0] + row * strides_mean[1]
        normed -= tl.load(mean + at, mask=row < M, other=0.0).to(tl.float32)[:, None]
        at = n * strides_rstd[0] + row * strides_rstd[1]
        normed *= tl.load(rstd + at, mask=row < M, other=0.0).to(tl.float32)[:, None]
        tl.store(to + all_parts, tl.sum(grad * normed, 0), mask=column < D)


def plan_sums(
    dy: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None, out: Tensor,
    rows: int, columns: int, warps: int,
) -> Launch:  # fmt: skip
    """Fills out (1 or 2, N, P, D); of any strides are dy and x (N, M, D), mean and rstd (N, M)."""
    N, M, D = dy.shape
    columns = min(columns, triton.next_power_of_2(D))
    of_rows = [None if s is None else s.stride() for s in (x, mean, rstd)]
    return Launch(
        sums_kernel,
        (triton.cdiv(M, rows), N, triton.cdiv(D, columns)),
        (dy, x, mean, rstd, out, M, D, out.shape[2], out[0].numel(), dy.stride(), *of_rows),
        dict(ROWS=rows, COLUMNS=columns, num_warps=warps),
    )
