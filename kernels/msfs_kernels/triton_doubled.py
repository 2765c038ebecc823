"""`doubled` in Triton: a kernel's taps added up, four phases to one image, and both gradients.

Kernels and images lie in channels_last: a program takes some channels of all taps of one output, or
of some pixels.

Dimension key: B batch, H height, W width, C channels, N positions.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels import triton_image_passes
from msfs_kernels.launching import Launch

KERNEL_TILE = {"BI": 512, "num_warps": 4}
PART_TILE = {"BP": 32, "BC": 128, "num_warps": 4}


@triton.jit
def load_taps(weight, at, inside, INPUTS, A: tl.constexpr, P: tl.constexpr, COLUMN: tl.constexpr):
    """One column of 3 x 3 taps, summed over the rows that meet row A of phase P: 0 or 1, 2 in phase
    0, 0, 1 or 2 in phase 1."""
    first: tl.constexpr = A * (1 + P)
    last: tl.constexpr = (1 - A) * P + 2 * A
    at += COLUMN * INPUTS
    total = tl.load(weight + at + 3 * first * INPUTS, mask=inside, other=0.0).to(tl.float32)
    if last > first:
        total += tl.load(weight + at + 3 * last * INPUTS, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def kernel_kernel(weight, out, OUTPUTS, INPUTS, BI: tl.constexpr):
    """3 x 3 taps of one output to 2 x 2 taps of its four phases."""
    o = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = i < INPUTS
    for p in tl.static_range(2):
        for a in tl.static_range(2):
            first = load_taps(weight, o * 9 * INPUTS + i, inside, INPUTS, a, p, 0)
            second = load_taps(weight, o * 9 * INPUTS + i, inside, INPUTS, a, p, 1)
            third = load_taps(weight, o * 9 * INPUTS + i, inside, INPUTS, a, p, 2)
            at = ((2 * p * OUTPUTS + o) * 4 + 2 * a) * INPUTS + i
            tl.store(out + at, first, mask=inside)
            tl.store(out + at + INPUTS, second + third, mask=inside)
            at += OUTPUTS * 4 * INPUTS
            tl.store(out + at, first + second, mask=inside)
            tl.store(out + at + INPUTS, third, mask=inside)


@triton.jit
def load_phase(
    grad, o, i, OUTPUTS, INPUTS, P: tl.constexpr, Q: tl.constexpr, ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):  # fmt: skip
    """The gradient of what tap (ROW, COLUMN) is part of in phase (P, Q)."""
    a: tl.constexpr = 1 if ROW > P else 0
    b: tl.constexpr = 1 if COLUMN > Q else 0
    at = (((2 * P + Q) * OUTPUTS + o) * 4 + 2 * a + b) * INPUTS + i
    return tl.load(grad + at, mask=i < INPUTS, other=0.0).to(tl.float32)


@triton.jit
def kernel_gradient_kernel(grad, out, OUTPUTS, INPUTS, BI: tl.constexpr):
    o = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    for row in tl.static_range(3):
        for column in tl.static_range(3):
            total = load_phase(grad, o, i, OUTPUTS, INPUTS, 0, 0, row, column)
            total += load_phase(grad, o, i, OUTPUTS, INPUTS, 0, 1, row, column)
            total += load_phase(grad, o, i, OUTPUTS, INPUTS, 1, 0, row, column)
            total += load_phase(grad, o, i, OUTPUTS, INPUTS, 1, 1, row, column)
            at = (o * 9 + 3 * row + column) * INPUTS + i
            tl.store(out + at, total, mask=i < INPUTS)


@triton.jit
def part_kernel(dy, out, N, H, W, C, BP: tl.constexpr, BC: tl.constexpr):
    """The gradient of `interleave`: each position's four phases, zeros where none was read."""
    at = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    column, row = at % (W + 1), at // (W + 1) % (H + 1)
    b = at // ((W + 1) * (H + 1))
    for phase in tl.static_range(4):
        y, x = row - phase // 2, column - phase % 2
        there = (at < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        pixel = (b * 2 * H + 2 * y + phase // 2) * 2 * W + 2 * x + phase % 2
        inside = there[:, None] & (c < C)[None, :]
        value = tl.load(dy + pixel[:, None] * C + c[None, :], mask=inside, other=0.0)
        to = (at * 4 + phase)[:, None] * C + c[None, :]
        tl.store(out + to, value, mask=(at < N)[:, None] & (c < C)[None, :])


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def kernel(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) in channels_last to (4 O, I, 2, 2) in channels_last."""
    outputs, inputs = weight.shape[:2]
    out = empty((4 * outputs, inputs, 2, 2), weight)
    grid = (outputs, triton.cdiv(inputs, KERNEL_TILE["BI"]))
    Launch(kernel_kernel, grid, (weight, out, outputs, inputs), KERNEL_TILE).run()
    return out


def kernel_gradient(grad: Tensor) -> Tensor:
    """The gradient of `kernel`."""
    outputs, inputs = grad.shape[0] // 4, grad.shape[1]
    out = empty((outputs, inputs, 3, 3), grad)
    grid = (outputs, triton.cdiv(inputs, KERNEL_TILE["BI"]))
    Launch(kernel_gradient_kernel, grid, (grad, out, outputs, inputs), KERNEL_TILE).run()
    return out


def interleave(y: Tensor, bias: Tensor) -> Tensor:
    """(B, 4 C, H + 1, W + 1) in channels_last to (B, C, 2 H, 2 W) in channels_last."""
    out, _ = triton_image_passes.add(y.permute(0, 2, 3, 1), bias, None, doubled=True)
    return out.permute(0, 3, 1, 2)


def part(dy: Tensor) -> Tensor:
    """The gradient of `interleave`."""
    B, C, H, W = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
    out = empty((B, 4 * C, H + 1, W + 1), dy)
    N = B * (H + 1) * (W + 1)
    grid = (triton.cdiv(N, PART_TILE["BP"]), triton.cdiv(C, PART_TILE["BC"]))
    Launch(part_kernel, grid, (dy, out, N, H, W, C), PART_TILE).run()
    return out
