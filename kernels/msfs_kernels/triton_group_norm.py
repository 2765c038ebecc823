"""GroupNorm with what stands around it in image networks, for channels_last tensors, in Triton.

    u = x + shift          shift (B, C), of the time, or none
    z = gamma (u - mean) rstd + beta,  mean and rstd of a group of channels over all pixels
    y = silu(z), or z

In memory x is (B, P pixels, C): channels lie side by side, so a program takes some pixels of some
channels. Three launches, x is read twice:

    sums      mean and squared deviations of each channel over a part of the pixels
    combine   those of a group from its channels' (Chan et al. 1979): nothing large is subtracted
    apply     y

The backward is of the same form. With dz the gradient of z, u' = (u - mean) rstd and means over a
group's pixels and channels:

    du = rstd (gamma dz - mean(gamma dz) - u' mean(gamma dz u'))
    dbeta = sum dz,  dgamma = sum dz u',  dshift = sum of du over pixels

Dimension key: B batch, C channels, P pixels, G groups.

Source: Wu and He 2018.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels import ahead
from msfs_kernels.launching import INTERPRETED, Launch, launches_of

MOST_PARTS = 256  # of the pixels of one image
# Pixels and channels of a tile, warps; sums over all rows want many bytes on their way at once.
TILE = {"BP": 32, "BC": 64, "num_warps": 4}
WIDE_TILE = {"BP": 32, "BC": 128, "num_warps": 4}
DOUBLE_TILE = {"BP": 8, "BC": 128, "num_warps": 4}
SUMS_TILE = {"BP": 32, "BC": 32, "num_warps": 2}
ROWS_TILE = {"BP": 128, "BC": 64, "num_warps": 8}
PARTS_TILE = {"BP": 16, "BC": 64, "num_warps": 4}
PROGRAMS = 512  # about as many share a sum over all pixels of all images


@triton.jit
def load_tile(x, b, pixels, c, P, C, batch_stride, row_stride):
    """(BP, BC) of image b in float32."""
    at = b.to(tl.int64) * batch_stride + pixels.to(tl.int64)[:, None] * row_stride + c[None, :]
    inside = (pixels < P)[:, None] & (c < C)[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_channels(x, c, C):
    return tl.load(x + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def load_shift(shift, given, b, c, C):
    """Zeros if none is given: a flag, for a kernel without the argument would be compiled, too."""
    return tl.load(shift + b * C + c, mask=c < C * given, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["PART", "given"])
def sums_kernel(
    x, shift, given, means, squares, P, C, batch_stride, row_stride, PART, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each channel over PART pixels."""
    # From the end to the start: the end was written last and is in the cache, and what is read last
    # is what `apply` begins with.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.num_programs(2) - 1 - tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin = part * PART
    stop = tl.minimum(begin + PART, P)
    pixels = begin + tl.arange(0, BP)
    inside = (pixels < stop)[:, None]
    added = load_shift(shift, given, b, c, C)[None, :]
    tile = load_tile(x, b, pixels, c, P, C, batch_stride, row_stride) + added
    # Distances from the mean of the first pixels are summed, over pixels once, after the loop:
    # where the mean is far from 0, squares of x itself would lose its deviations.
    near = tl.sum(tl.where(inside, tile, 0.0), 0) / tl.minimum(stop - begin, BP)
    total = tl.where(inside, tile - near[None, :], 0.0)
    square = total * total
    for start in range(begin + BP, stop, BP):
        pixels = start + tl.arange(0, BP)
        tile = load_tile(x, b, pixels, c, P, C, batch_stride, row_stride) + added
        apart = tl.where((pixels < stop)[:, None], tile - near[None, :], 0.0)
        total += apart
        square += apart * apart
    count = stop - begin
    apart = tl.sum(total, 0) / count
    at = (b * tl.num_programs(0) + part) * C + c
    tl.store(means + at, near + apart, mask=c < C)
    tl.store(squares + at, tl.sum(square, 0) - count * apart * apart, mask=c < C)


@triton.jit
def load_parts(sums, b, parts, c, own, C, PARTS):
    """(parts, channels of the group) of what the programs of image b left."""
    inside = (parts < PARTS) & own
    return tl.load(sums + (b * PARTS + parts) * C + c, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["PARTS", "PART"])
def combine_kernel(
    means, squares, mean, rstd, channel_mean, P, C, G, PARTS, PART, eps, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group; the mean of each of its channels."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    size = C // G
    parts = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, WIDE)[None, :]
    own = k < size
    n = tl.minimum(P - parts * PART, PART).to(tl.float32)
    n = tl.where((parts < PARTS) & own, n, 0.0)
    part_mean = load_parts(means, b, parts, g * size + k, own, C, PARTS)
    part_square = load_parts(squares, b, parts, g * size + k, own, C, PARTS)
    by_channel = tl.sum(part_mean * n, 0) / P
    tl.store(channel_mean + b * C + g * size + tl.arange(0, WIDE), by_channel,
             mask=tl.arange(0, WIDE) < size)  # fmt: skip
    whole = tl.sum(by_channel, 0) / size
    apart = part_mean - whole
    variance = tl.sum(tl.sum(part_square + n * apart * apart, 0), 0) / (P * size)
    tl.store(mean + b * G + g, whole)
    tl.store(rstd + b * G + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def normal_tile(x, shift, given, mean, rstd, b, pixels, c, P, C, G, batch_stride, row_stride):
    """u' of a tile, and rstd of its channels."""
    tile = load_tile(x, b, pixels, c, P, C, batch_stride, row_stride)
    tile += load_shift(shift, given, b, c, C)[None, :]
    group = b * G + c // (C // G)
    center = tl.load(mean + group, mask=c < C, other=0.0)
    scale = tl.load(rstd + group, mask=c < C, other=0.0)
    return (tile - center[None, :]) * scale[None, :], scale


@triton.jit(do_not_specialize=["given", "silu"])
def apply_kernel(
    x, shift, given, gain, bias, mean, rstd, y, P, C, G, batch_stride, row_stride, silu,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    pixels = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tile = load_tile(x, b, pixels, c, P, C, batch_stride, row_stride)
    group = b * G + c // (C // G)
    center = tl.load(mean + group, mask=c < C, other=0.0) - load_shift(shift, given, b, c, C)
    scale = tl.load(rstd + group, mask=c < C, other=0.0) * load_channels(gain, c, C)
    z = (tile - center[None, :]) * scale[None, :] + load_channels(bias, c, C)[None, :]
    if silu:
        z = z * tl.sigmoid(z)
    at = (b.to(tl.int64) * P + pixels[:, None]) * C + c[None, :]
    tl.store(y + at, z, mask=(pixels < P)[:, None] & (c < C)[None, :])


@triton.jit
def gradient_tile(
    x, shift, given, gain, bias, mean, rstd, dy, b, pixels, c, P, C, G, batch_stride, row_stride,
    dy_batch_stride, dy_row_stride, silu,
):  # fmt: skip
    """u', dz, gamma and rstd of a tile; outside of the image dz is 0."""
    normal, scale = normal_tile(
        x, shift, given, mean, rstd, b, pixels, c, P, C, G, batch_stride, row_stride
    )
    dz = load_tile(dy, b, pixels, c, P, C, dy_batch_stride, dy_row_stride)
    gamma = load_channels(gain, c, C)
    if silu:
        z = normal * gamma[None, :] + load_channels(bias, c, C)[None, :]
        gate = tl.sigmoid(z)
        dz = dz * gate * (1.0 + z * (1.0 - gate))
    return normal, dz, gamma, scale


@triton.jit(do_not_specialize=["PART", "given", "silu"])
def backward_sums_kernel(
    x, shift, given, gain, bias, mean, rstd, dy, sums, P, C, G, batch_stride, row_stride,
    dy_batch_stride, dy_row_stride, PART, silu, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz u' of each channel over PART pixels."""
    part, b = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    stop = tl.minimum((part + 1) * PART, P)
    plain = tl.zeros([BP, BC], tl.float32)  # summed over pixels once, after the loop
    weighted = tl.zeros([BP, BC], tl.float32)
    for start in range(part * PART, stop, BP):
        pixels = start + tl.arange(0, BP)
        normal, dz, _, _ = gradient_tile(
            x, shift, given, gain, bias, mean, rstd, dy, b, pixels, c, P, C, G, batch_stride,
            row_stride, dy_batch_stride, dy_row_stride, silu,
        )  # fmt: skip
        plain += dz
        weighted += dz * normal
    at = (b * tl.num_programs(0) + part) * C + c
    later = tl.num_programs(2) * tl.num_programs(0) * C
    tl.store(sums + at, tl.sum(plain, 0), mask=c < C)
    tl.store(sums + later + at, tl.sum(weighted, 0), mask=c < C)


@triton.jit(do_not_specialize=["B", "PARTS"])
def backward_combine_kernel(
    sums, gain, mean, rstd, channel_mean, group_means, by_image, dshift, B, P, C, G, PARTS,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Means of gamma dz and gamma dz u' of one group; sums of its channels over the pixels."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    size = C // G
    parts = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, WIDE)
    own = k < size
    c = g * size + k
    plain = tl.sum(load_parts(sums, b, parts, c[None, :], own[None, :], C, PARTS), 0)
    later = sums + B * PARTS * C
    weighted = tl.sum(load_parts(later, b, parts, c[None, :], own[None, :], C, PARTS), 0)
    gamma = tl.load(gain + c, mask=own, other=0.0).to(tl.float32)
    first = tl.sum(gamma * plain, 0) / (P * size)
    second = tl.sum(gamma * weighted, 0) / (P * size)
    tl.store(group_means + b * G + g, first)
    tl.store(group_means + B * G + b * G + g, second)
    tl.store(by_image + b * C + c, weighted, mask=own)
    tl.store(by_image + B * C + b * C + c, plain, mask=own)
    scale = tl.load(rstd + b * G + g)
    middle = tl.load(channel_mean + b * C + c, mask=own, other=0.0)
    normal = P * scale * (middle - tl.load(mean + b * G + g))  # sum of u'
    total = scale * (gamma * plain - P * first - second * normal)
    tl.store(dshift + b * C + c, total, mask=own)


@triton.jit(do_not_specialize=["more_given", "B", "given", "silu"])
def backward_apply_kernel(
    x, shift, given, gain, bias, mean, rstd, dy, group_means, by_image, dgain, dbias, more,
    more_given, dx, B, P, C, G, batch_stride, row_stride, dy_batch_stride, dy_row_stride, silu,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx, and `more` added; by the first program of each channel dgain and dbias, over images."""
    b = tl.program_id(2)
    pixels = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    normal, dz, gamma, scale = gradient_tile(
        x, shift, given, gain, bias, mean, rstd, dy, b, pixels, c, P, C, G, batch_stride,
        row_stride, dy_batch_stride, dy_row_stride, silu,
    )  # fmt: skip
    group = b * G + c // (C // G)
    first = tl.load(group_means + group, mask=c < C, other=0.0)
    second = tl.load(group_means + B * G + group, mask=c < C, other=0.0)
    du = (dz * gamma[None, :] - first[None, :] - normal * second[None, :]) * scale[None, :]
    at = (b.to(tl.int64) * P + pixels[:, None]) * C + c[None, :]
    there = (pixels < P)[:, None] & (c < C * more_given)[None, :]
    du += tl.load(more + at, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + at, du, mask=(pixels < P)[:, None] & (c < C)[None, :])
    if (tl.program_id(0) == 0) & (b == 0):
        weighted = tl.zeros([BC], tl.float32)
        plain = tl.zeros([BC], tl.float32)
        for image in range(B):
            weighted += tl.load(by_image + image * C + c, mask=c < C, other=0.0)
            plain += tl.load(by_image + (B + image) * C + c, mask=c < C, other=0.0)
        tl.store(dgain + c, weighted, mask=c < C)
        tl.store(dbias + c, plain, mask=c < C)


@triton.jit
def residual_kernel(y, bias, x, out, N, C, BP: tl.constexpr, BC: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    at = rows[:, None] * C + c[None, :]
    inside = (rows < N)[:, None] & (c < C)[None, :]
    total = tl.load(y + at, mask=inside).to(tl.float32)
    if x is not None:
        total += tl.load(x + at, mask=inside).to(tl.float32)
    if bias is not None:
        total += load_channels(bias, c, C)[None, :]
    tl.store(out + at, total, mask=inside)


@triton.jit(do_not_specialize=["PART"])
def rows_kernel(x, sums, N, C, row_stride, PART, BP: tl.constexpr, BC: tl.constexpr):
    """Sums over PART rows of (N, C)."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin = tl.program_id(0) * PART
    stop = tl.minimum(begin + PART, N)
    total = tl.zeros([BP, BC], tl.float32)  # over rows once, after the loop
    for start in range(begin, stop, BP):
        rows = start + tl.arange(0, BP)
        inside = (rows < stop)[:, None] & (c < C)[None, :]
        at = rows.to(tl.int64)[:, None] * row_stride + c[None, :]
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=["PARTS"])
def parts_kernel(sums, out, PARTS, C, BP: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BP, BC], tl.float32)
    for start in range(0, PARTS, BP):
        parts = start + tl.arange(0, BP)
        inside = (parts < PARTS)[:, None] & (c < C)[None, :]
        total += tl.load(sums + parts[:, None] * C + c[None, :], mask=inside, other=0.0)
    tl.store(out + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def double_kernel(x, y, N, W, C, BP: tl.constexpr, BC: tl.constexpr):
    """Each of the N pixels of x four times in y: 2 x 2."""
    rows = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (rows < N)[:, None] & (c < C)[None, :]
    value = tl.load(x + rows[:, None] * C + c[None, :], mask=inside)
    corner = rows // W * (4 * W) + rows % W * 2
    for i in tl.static_range(4):
        at = corner + i // 2 * (2 * W) + i % 2
        tl.store(y + at[:, None] * C + c[None, :], value, mask=inside)


@triton.jit
def fold_kernel(y, x, N, W, C, BP: tl.constexpr, BC: tl.constexpr):
    """The sums of 2 x 2 pixels of y: the gradient of `double_kernel`."""
    rows = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (rows < N)[:, None] & (c < C)[None, :]
    corner = rows // W * (4 * W) + rows % W * 2
    total = tl.zeros([BP, BC], tl.float32)
    for i in tl.static_range(4):
        at = corner + i // 2 * (2 * W) + i % 2
        total += tl.load(y + at[:, None] * C + c[None, :], mask=inside).to(tl.float32)
    tl.store(x + rows[:, None] * C + c[None, :], total, mask=inside)


@triton.jit
def split_kernel(x, first, second, N, C, CUT, BP: tl.constexpr, BC: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)[:, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    there = rows < N
    value = tl.load(x + rows * C + c, mask=there & (c < C))
    tl.store(first + rows * CUT + c, value, mask=there & (c < CUT))
    tl.store(second + rows * (C - CUT) + c - CUT, value, mask=there & (c >= CUT) & (c < C))


class Statistics(NamedTuple):
    """What the backward needs of the forward, float32."""

    mean: Tensor  # (B, G)
    rstd: Tensor  # (B, G)
    channel_mean: Tensor  # (B, C)


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """(x, elements from image to image, from pixel to pixel); x as it is where its channels lie
    side by side and its pixels at one distance, which a slice of channels keeps."""
    if x.stride(1) != 1 or x.stride(2) != x.shape[3] * x.stride(3):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, x.stride(0), x.stride(3)


def parts_of(pixels: int) -> tuple[int, int]:
    """(pixels of a part, parts)."""
    part = max(256, triton.next_power_of_2(triton.cdiv(pixels, MOST_PARTS)))
    return part, triton.cdiv(pixels, part)


def wide_tile(parts: int, channels: int) -> dict[str, int]:
    """The tile of a group, of few sizes: each is compiled, while a start waits."""
    rows, wide = triton.next_power_of_2(parts), triton.next_power_of_2(channels)
    return {"ROWS": max(16, rows), "WIDE": 32 if wide <= 32 else max(128, wide)}


def forward(
    x: Tensor, gain: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Statistics]:
    """(y in channels_last and x's dtype, what the backward needs)."""
    x, *strides = rows_of(x)
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    part, parts = parts_of(P)
    sums = torch.empty((2, B, parts, C), dtype=torch.float32, device=x.device)
    mean, rstd = torch.empty((2, B, groups), dtype=torch.float32, device=x.device)
    found = Statistics(mean, rstd, torch.empty((B, C), dtype=torch.float32, device=x.device))
    added = (gain if shift is None else shift, int(shift is not None))
    grid = (parts, triton.cdiv(C, SUMS_TILE["BC"]), B)
    given = (x, *added, sums[0], sums[1], P, C, *strides, part)
    Launch(sums_kernel, grid, given, SUMS_TILE).run()
    given = (sums[0], sums[1], *found, P, C, groups, parts, part, eps)
    Launch(combine_kernel, (B * groups,), given, wide_tile(parts, C // groups)).run()
    y = torch.empty_like(x, memory_format=torch.channels_last)
    grid = (triton.cdiv(P, WIDE_TILE["BP"]), triton.cdiv(C, WIDE_TILE["BC"]), B)
    given = (x, *added, gain, bias, mean, rstd, y, P, C, groups, *strides, int(silu))
    Launch(apply_kernel, grid, given, WIDE_TILE).run()
    return y, found


def backward(
    dy: Tensor, x: Tensor, gain: Tensor, bias: Tensor, shift: Tensor | None, found: Statistics,
    silu: bool, more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, gain, bias and shift; `more`, another gradient of x, is added in passing."""
    x, *strides = rows_of(x)
    dy, *dy_strides = rows_of(dy)
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    groups = found.mean.shape[1]
    part, parts = parts_of(P)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    sums, group_means, by_image = new(2, B, parts, C), new(2, B, groups), new(2, B, C)
    added = (gain if shift is None else shift, int(shift is not None))
    dshift = torch.empty((B, C), dtype=added[0].dtype, device=x.device)
    mean, rstd, channel_mean = found
    given = (x, *added, gain, bias, mean, rstd, dy)
    rest = (P, C, groups, *strides, *dy_strides)
    grid = (parts, triton.cdiv(C, TILE["BC"]), B)
    Launch(backward_sums_kernel, grid, (*given, sums, *rest, part, int(silu)), TILE).run()
    combined = (sums, gain, mean, rstd, channel_mean, group_means, by_image, dshift)
    combined += (B, P, C, groups, parts)
    wide = wide_tile(parts, C // groups)
    Launch(backward_combine_kernel, (B * groups,), combined, wide).run()
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    grid = (triton.cdiv(P, TILE["BP"]), triton.cdiv(C, TILE["BC"]), B)
    dgain, dbias = torch.empty_like(gain), torch.empty_like(bias)
    has_more = more is not None
    more = dx if more is None else more.contiguous(memory_format=torch.channels_last)
    applied = (group_means, by_image, dgain, dbias, more, int(has_more), dx, B)
    Launch(backward_apply_kernel, grid, (*given, *applied, *rest, int(silu)), TILE).run()
    return dx, dgain, dbias, None if shift is None else dshift


def residual(y: Tensor, bias: Tensor | None, x: Tensor | None) -> Tensor:
    """y + bias + x, in channels_last."""
    out, C = torch.empty_like(y, memory_format=torch.channels_last), y.shape[1]
    N = y.numel() // C
    grid = (triton.cdiv(N, WIDE_TILE["BP"]), triton.cdiv(C, WIDE_TILE["BC"]))
    Launch(residual_kernel, grid, (y, bias, x, out, N, C), WIDE_TILE).run()
    return out


def sums_of_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(C,) sums over images and pixels of x in channels_last: the gradient of a bias. Torch's own
    takes twice as long, as two of its passes and a memory fill for each of small sizes."""
    x, image, row = rows_of(x)
    if image != x.shape[2] * x.shape[3] * row:
        x, image, row = rows_of(x.contiguous(memory_format=torch.channels_last))
    C = x.shape[1]
    N = x.numel() // C
    columns = triton.cdiv(C, ROWS_TILE["BC"])
    part = max(ROWS_TILE["BP"], triton.next_power_of_2(triton.cdiv(N * columns, PROGRAMS)))
    parts = triton.cdiv(N, part)
    sums = torch.empty((parts, C), dtype=torch.float32, device=x.device)
    out = torch.empty(C, dtype=dtype, device=x.device)
    Launch(rows_kernel, (parts, columns), (x, sums, N, C, row, part), ROWS_TILE).run()
    Launch(parts_kernel, (columns,), (sums, out, parts, C), PARTS_TILE).run()
    return out


def split(x: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """The first `cut` channels of x in channels_last, and the others, each in channels_last."""
    B, C, H, W = x.shape
    first, second = (
        torch.empty((B, n, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for n in (cut, C - cut)
    )
    grid = (triton.cdiv(B * H * W, TILE["BP"]), triton.cdiv(C, TILE["BC"]))
    Launch(split_kernel, grid, (x, first, second, B * H * W, C, cut), TILE).run()
    return first, second


def double(x: Tensor) -> Tensor:
    """x in channels_last at twice the height and width, each pixel four times."""
    B, C, H, W = x.shape
    y = torch.empty(
        (B, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    grid = (triton.cdiv(B * H * W, DOUBLE_TILE["BP"]), triton.cdiv(C, DOUBLE_TILE["BC"]))
    Launch(double_kernel, grid, (x, y, B * H * W, W, C), DOUBLE_TILE).run()
    return y


def fold(y: Tensor) -> Tensor:
    """Sums of 2 x 2 pixels of y in channels_last, of an even height and width."""
    B, C, H, W = y.shape
    x = torch.empty(
        (B, C, H // 2, W // 2), dtype=y.dtype, device=y.device, memory_format=torch.channels_last
    )
    N = B * H * W // 4
    grid = (triton.cdiv(N, DOUBLE_TILE["BP"]), triton.cdiv(C, DOUBLE_TILE["BC"]))
    Launch(fold_kernel, grid, (y, x, N, W // 2, C), DOUBLE_TILE).run()
    return x


EXPECTED: set[tuple] = set()


def expect(
    x: Tensor, gain: Tensor, bias: Tensor, shift: Tensor | None, groups: int, trained: bool
) -> None:
    """At the first norm of a kind: has all kernels compiled in threads (`ahead`) that a network of
    such norms will launch. One by one, as they are met, they would hold up its first step.
    """
    device = x.device
    key = (x.dtype, gain.dtype, None if shift is None else shift.dtype, trained, device)
    if INTERPRETED or key in EXPECTED:
        return
    EXPECTED.add(key)

    def all_of_them() -> None:
        from . import triton_doubled

        y, found = forward(x, gain, bias, shift, groups, 1e-5, True)
        for other in (None, x):
            residual(y, bias, other)
        C = y.shape[1]
        kernel = triton_doubled.kernel(triton_doubled.empty((C, C, 3, 3), bias))
        large = triton_doubled.interleave(triton_doubled.empty((1, 4 * C, 3, 3), y), bias)
        if trained:
            triton_doubled.kernel_gradient(kernel)
            triton_doubled.part(large)
            backward(y, x, gain, bias, shift, found, True)
            sums_of_channels(y, bias.dtype)
            split(y, y.shape[1] // 2)

    with torch.no_grad():
        ahead.start(launches_of(all_of_them), device)
