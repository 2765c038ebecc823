"""The Triton kernels of `scaled_columns`: whole rows, several at a time, of either matrix."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.launching import Launch

ELEMENTS, WARPS = 4096, 4  # of a program at a time


@triton.jit
def rows_scaled(w, g, out, first, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    scale = tl.load(g + column, mask=column < K, other=0.0).to(tl.float32)
    x = tl.load(w + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    w0, g0, w1, g1, out0, out1, N0, N1, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    program, blocks = tl.program_id(0), tl.cdiv(N0, ROWS)
    if program < blocks:
        rows_scaled(w0, g0, out0, program * ROWS, N0, K, ROWS, COLUMNS)
    else:
        rows_scaled(w1, g1, out1, (program - blocks) * ROWS, N1, K, ROWS, COLUMNS)


@triton.jit
def rows_back(d, w, g, out, sums, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows of one matrix, and its part of the sum over rows."""
    column = tl.arange(0, COLUMNS)
    scale = tl.load(g + column, mask=column < K, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < K)[None, :]
        at = row.to(tl.int64)[:, None] * K + column[None, :]
        grad = tl.load(d + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad * tl.load(w + at, mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(out + at, (grad * scale[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(sums + column, total, mask=column < K)


@triton.jit
def backward_kernel(
    d0, w0, g0, d1, w1, g1, out0, out1, sums, N0, N1, K, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    to = sums + tl.program_id(0) * 2 * K
    rows_back(d0, w0, g0, out0, to, N0, K, ROWS, COLUMNS)
    rows_back(d1, w1, g1, out1, to + K, N1, K, ROWS, COLUMNS)


def tile(K: int) -> dict[str, int]:
    columns = triton.next_power_of_2(K)
    return dict(ROWS=max(1, ELEMENTS // columns), COLUMNS=columns, num_warps=WARPS)


def plan_forward(
    w0: Tensor, g0: Tensor, w1: Tensor, g1: Tensor, out0: Tensor, out1: Tensor
) -> Launch:
    (N0, K), N1, of = w0.shape, len(w1), tile(w0.shape[1])
    grid = (triton.cdiv(N0, of["ROWS"]) + triton.cdiv(N1, of["ROWS"]),)
    return Launch(forward_kernel, grid, (w0, g0, w1, g1, out0, out1, N0, N1, K), dict(**of))


def plan_backward(
    d0: Tensor, w0: Tensor, g0: Tensor, d1: Tensor, w1: Tensor, g1: Tensor, out0: Tensor,
    out1: Tensor, sums: Tensor,
) -> Launch:  # fmt: skip
    """Fills out0, out1 and sums (P, 2, K) by P programs."""
    (N0, K), N1 = w0.shape, len(w1)
    args = (d0, w0, g0, d1, w1, g1, out0, out1, sums, N0, N1, K)
    return Launch(backward_kernel, (len(sums),), args, dict(**tile(K)))
