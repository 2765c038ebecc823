"""The Triton kernels of `sum_norm`: whole rows, several at a time."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.launching import Launch

ELEMENTS = 4096  # of a program at a time
WARPS = 4


@triton.jit
def forward_kernel(
    a, b, gain, y, moments, n, D, eps, CENTRED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wanted = (column < D)[None, :]
    inside = (row < n)[:, None] & wanted
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    x = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) / D
        x = tl.where(wanted, x - mean[:, None], 0.0)
        tl.store(moments + row, mean, mask=row < n)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(moments + n + row, rstd, mask=row < n)
    g = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y + at, (x * rstd[:, None] * g[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, a, b, gain, moments, dx, sums, n, D, CENTRED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    g = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < n)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        x = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(moments + n + row, mask=row < n, other=0.0)
        if CENTRED:
            x -= tl.load(moments + row, mask=row < n, other=0.0)[:, None]
        normed = x * rstd[:, None]
        total += tl.sum(grad * normed, 0)
        grad *= g[None, :]
        out = grad - normed * (tl.sum(grad * normed, 1) / D)[:, None]
        if CENTRED:
            out -= (tl.sum(grad, 1) / D)[:, None]
        tl.store(dx + at, (out * rstd[:, None]).to(dx.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * D + column, total, mask=column < D)


def tile(D: int) -> dict[str, int]:
    columns = triton.next_power_of_2(D)
    return dict(ROWS=max(1, ELEMENTS // columns), COLUMNS=columns, num_warps=WARPS)


def plan_forward(
    a: Tensor, b: Tensor, gain: Tensor, y: Tensor, moments: Tensor, eps: float, centred: bool
) -> Launch:
    """Fills y (..., D) and moments (2, n): means (unless centred is false) and 1 / deviations."""
    n, D, of = moments.shape[1], a.shape[-1], tile(a.shape[-1])
    grid = (triton.cdiv(n, of["ROWS"]),)
    return Launch(forward_kernel, grid, (a, b, gain, y, moments, n, D, eps),
                  dict(CENTRED=centred, **of))  # fmt: skip


def plan_backward(
    dy: Tensor, a: Tensor, b: Tensor, gain: Tensor, moments: Tensor, dx: Tensor, sums: Tensor,
    centred: bool,
) -> Launch:  # fmt: skip
    """Fills dx (..., D) and sums (P, D), whose sum over P is the gain's gradient."""
    n, D = moments.shape[1], a.shape[-1]
    args = (dy, a, b, gain, moments, dx, sums, n, D)
    return Launch(backward_kernel, (len(sums),), args, dict(CENTRED=centred, **tile(D)))
