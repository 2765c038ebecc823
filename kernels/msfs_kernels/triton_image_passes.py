"""The passes of `image_passes` in Triton. Each reads what it needs once and writes its result once.

An image in memory is (B, P pixels, C); a program takes some pixels of some channels of one image.

Dimension key: B batch, P pixels, C channels, G groups, N rows, F hidden.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.image_passes import Sums
from msfs_kernels.launching import Launch
from msfs_kernels.triton_group_norm import parts_of, wide_tile

# By measured times at 16 x 320 x 64 x 64 and smaller, and at 8 x 128 x 512 x 512.
ADD_TILE = {"BP": 32, "BC": 64, "num_warps": 4}
WIDE_ADD_TILE = {"BP": 32, "BC": 128, "num_warps": 4}  # from 1024 pixels on
SUMS_TILE = {"BP": 16, "BC": 64, "num_warps": 2}
SCALED_TILE = {"BP": 32, "BC": 128, "num_warps": 4}
GEGLU_TILE = {"BR": 4, "BF": 256, "num_warps": 4}


@triton.jit(do_not_specialize=["W", "IMAGES", "PART"])
def add_kernel(
    y, bias, x, out, means, squares, P, C, W, IMAGES, PART, DOUBLED: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y + bias + x of PART pixels, and of each channel the mean and squared deviations."""
    part, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin = part * PART
    stop = tl.minimum(begin + PART, P)
    count = (stop - begin).to(tl.float32)
    near = tl.zeros([BC], tl.float32)
    total = tl.zeros([BP, BC], tl.float32)
    square = tl.zeros([BP, BC], tl.float32)
    for start in range(begin, stop, BP):
        pixels = start + tl.arange(0, BP)
        there = pixels < stop
        inside = there[:, None] & (c < C)[None, :]
        if DOUBLED:  # W is the width of the small image
            row, column = pixels // (2 * W), pixels % (2 * W)
            p, q = row % 2, column % 2
            at = b * (P // (2 * W) // 2 + 1) + row // 2 + p
            at = (at * (W + 1) + column // 2 + q) * 4 + 2 * p + q
            tile = tl.load(y + at[:, None] * C + c[None, :], mask=inside, other=0.0)
        else:
            at = b * P + pixels
            tile = tl.load(y + at[:, None] * C + c[None, :], mask=inside, other=0.0)
        tile = tile.to(tl.float32)
        if bias is not None:
            tile += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if x is not None:
            at = b % IMAGES * P + pixels
            more = tl.load(x + at[:, None] * C + c[None, :], mask=inside, other=0.0)
            tile += more.to(tl.float32)
        if out is not None:
            at = b * P + pixels
            tl.store(out + at[:, None] * C + c[None, :], tile, mask=inside)
        if start == begin:  # as in `triton_group_norm`: distances from near the mean are summed
            near = tl.sum(tl.where(inside, tile, 0.0), 0) / tl.minimum(count, BP)
        apart = tl.where(there[:, None], tile - near[None, :], 0.0)
        total += apart
        square += apart * apart
    moved = tl.sum(total, 0) / count
    at = (b * tl.num_programs(0) + part) * C + c
    tl.store(means + at, near + moved, mask=c < C)
    tl.store(squares + at, tl.sum(square, 0) - count * moved * moved, mask=c < C)


@triton.jit
def load_two(first, second, b, parts, c, there, C1, C, PARTS, FIRST, SECOND):
    """Of parts and joined channels what two images left, or one."""
    mine = there & (c < C1)
    found = tl.load(first + (b % FIRST * PARTS + parts) * C1 + c, mask=mine, other=0.0)
    if second is not None:
        at = (b % SECOND * PARTS + parts) * (C - C1) + c - C1
        found += tl.load(second + at, mask=there & (c >= C1), other=0.0)
    return found


@triton.jit(do_not_specialize=["PARTS", "PART", "FIRST", "SECOND", "SHIFTS"])
def affine_kernel(
    means, squares, more_means, more_squares, shift, gain, bias, scale, offset, P, C1, C, G, PARTS,
    PART, FIRST, SECOND, SHIFTS, shift_stride, eps, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scale and offset of one group's channels."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    size = C // G
    parts = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, WIDE)
    own = k < size
    c = g * size + k
    there = (parts < PARTS) & own[None, :]
    n = tl.where(there, tl.minimum(P - parts * PART, PART).to(tl.float32), 0.0)
    mean = load_two(means, more_means, b, parts, c[None, :], there, C1, C, PARTS, FIRST, SECOND)
    square = load_two(
        squares, more_squares, b, parts, c[None, :], there, C1, C, PARTS, FIRST, SECOND
    )
    moved = tl.zeros([WIDE], tl.float32)
    if shift is not None:
        moved = tl.load(shift + b % SHIFTS * shift_stride + c, mask=own, other=0.0).to(tl.float32)
    mean += moved[None, :]
    pixels = (P * size).to(tl.float32)
    whole = tl.sum(tl.sum(mean * n, 0), 0) / pixels
    apart = mean - whole
    variance = tl.sum(tl.sum(square + n * apart * apart, 0), 0) / pixels
    by = tl.load(gain + c, mask=own, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    more = tl.load(bias + c, mask=own, other=0.0).to(tl.float32)
    tl.store(scale + b * C + c, by, mask=own)
    tl.store(offset + b * C + c, more + (moved - whole) * by, mask=own)


@triton.jit(do_not_specialize=["FIRST", "SECOND", "silu"])
def scaled_kernel(
    x, more, scale, offset, y, P, C1, C, FIRST, SECOND, silu, BP: tl.constexpr, BC: tl.constexpr
):
    b = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (pixels < P)[:, None] & (c < C)[None, :]
    at = (b % FIRST * P + pixels)[:, None] * C1 + c[None, :]
    tile = tl.load(x + at, mask=inside & (c < C1)[None, :], other=0.0).to(tl.float32)
    if more is not None:
        at = (b % SECOND * P + pixels)[:, None] * (C - C1) + (c - C1)[None, :]
        tile += tl.load(more + at, mask=inside & (c >= C1)[None, :], other=0.0).to(tl.float32)
    by = tl.load(scale + b * C + c, mask=c < C, other=0.0)
    z = tile * by[None, :] + tl.load(offset + b * C + c, mask=c < C, other=0.0)[None, :]
    if silu:
        z = z * tl.sigmoid(z)
    tl.store(y + (b * P + pixels)[:, None] * C + c[None, :], z, mask=inside)


@triton.jit(do_not_specialize=["REPEATED"])
def add_norm_kernel(
    y, more, shift, gain, bias, out, normed, N, C, REPEATED, out_stride, eps, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y + more and the LayerNorm of it + shift; y has REPEATED rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)
    inside = (rows < N)[:, None] & (c < C)[None, :]
    at = (rows % REPEATED)[:, None] * C + c[None, :]
    total = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    at = rows[:, None] * C + c[None, :]
    if more is not None:
        total += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + rows[:, None] * out_stride + c[None, :], total, mask=inside)
    if shift is not None:
        total += tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(total, 1) / C
    apart = tl.where(inside, total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / C + eps)
    by = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    moved = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    z = apart * rstd[:, None] * by[None, :] + moved[None, :]
    tl.store(normed + at, z, mask=inside)


@triton.jit
def gelu(x):
    """x Phi(x); Phi by the complementary error function to 1e-7, in a third of libdevice's
    instructions, which take as long as the memory does (Abramowitz and Stegun, 7.1.26)."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t
            + 0.254829592) * t  # fmt: skip
    half = 0.5 * tail * tl.exp2(z * z * -1.4426950408889634)  # erfc(z) / 2
    return x * tl.where(x >= 0, 1.0 - half, half)


@triton.jit
def geglu_kernel(x, out, N, F, out_stride, BR: tl.constexpr, BF: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (rows < N)[:, None] & (f < F)[None, :]
    at = rows[:, None] * (2 * F) + f[None, :]
    up = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + at + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * out_stride + f[None, :], up * gelu(gate), mask=inside)


def add(
    y: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    *,
    doubled: bool = False,
    writes: bool = True,
) -> tuple[Tensor, Sums]:
    """See `image_passes.add` and `interleave`; without `writes` only the sums are made."""
    B, H, W, C = y.shape
    if doubled:
        H, W, C = 2 * H - 2, 2 * W - 2, C // 4
    P = H * W
    part, parts = parts_of(P)
    means, squares = torch.empty((2, B, parts, C), dtype=torch.float32, device=y.device)
    out = torch.empty((B, H, W, C), dtype=y.dtype, device=y.device) if writes else None
    tile = WIDE_ADD_TILE if P >= 1024 and not doubled else ADD_TILE
    tile = SUMS_TILE if out is None else tile
    grid = (parts, triton.cdiv(C, tile["BC"]), B)
    given = (y, bias, x, out, means, squares, P, C, W // 2, B if x is None else len(x), part)
    Launch(add_kernel, grid, given, {"DOUBLED": doubled, **tile}).run()
    return y if out is None else out, Sums(means, squares, P, part)


def affine(
    sums: Sequence[Sums],
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    groups: int,
    eps: float,
    B: int,
) -> tuple[Tensor, Tensor]:
    first, second = sums[0], sums[1] if len(sums) > 1 else None
    C, parts = gain.shape[0], first.means.shape[1]
    scale, offset = torch.empty((2, B, C), dtype=torch.float32, device=gain.device)
    more = (None, None) if second is None else (second.means, second.squares)
    given = (first.means, first.squares, *more, shift, gain, bias, scale, offset)
    sizes = (first.pixels, first.means.shape[2], C, groups, parts, first.part)
    images = (len(first.means), 1 if second is None else len(second.means))
    shifts = (1, 0) if shift is None else (len(shift), shift.stride(0))
    tile = wide_tile(parts, C // groups)
    Launch(affine_kernel, (B * groups,), (*given, *sizes, *images, *shifts, eps), tile).run()
    return scale, offset


def scaled(images: Sequence[Tensor], scale: Tensor, offset: Tensor, silu: bool) -> Tensor:
    x, more = images[0], images[1] if len(images) > 1 else None
    (B, C), (_, H, W, C1) = scale.shape, x.shape
    y = torch.empty((B, H, W, C), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(H * W, SCALED_TILE["BP"]), triton.cdiv(C, SCALED_TILE["BC"]), B)
    sizes = (H * W, C1, C, len(x), 1 if more is None else len(more), int(silu))
    Launch(scaled_kernel, grid, (x, more, scale, offset, y, *sizes), SCALED_TILE).run()
    return y


def add_norm(
    y: Tensor,
    more: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    N, C = y.shape if more is None else more.shape
    normed = torch.empty((N, C), dtype=y.dtype, device=y.device)
    if more is not None and out is None:
        out = torch.empty_like(normed)
    wide = triton.next_power_of_2(C)
    tile = {"ROWS": max(1, 2048 // wide), "WIDE": wide, "num_warps": 4}
    sizes = (N, C, len(y), 0 if out is None else out.stride(0))
    given = (y, more, shift, gain, bias, out, normed, *sizes, eps)
    Launch(add_norm_kernel, (triton.cdiv(N, tile["ROWS"]),), given, tile).run()
    return y if out is None else out, normed


def geglu(x: Tensor, out: Tensor) -> None:
    N, F = out.shape
    grid = (triton.cdiv(N, GEGLU_TILE["BR"]), triton.cdiv(F, GEGLU_TILE["BF"]))
    Launch(geglu_kernel, grid, (x, out, N, F, out.stride(0)), GEGLU_TILE).run()
