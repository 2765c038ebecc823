"""What a denoiser does between convolutions and products when nobody asks for gradients.

An image is (B, H, W, C), channels side by side. Whoever writes one leaves its `Sums`, so that the
norm after it does not read it once more:

    x, sums = add(y, bias, x)                    y + bias + x, or some of them
    x, sums = interleave(y, bias)                four phases to an image of twice the size
    scale, offset = affine([sums], gain, bias, shift, groups, eps)       GroupNorm of x + shift ..
    y = scaled([x], scale, offset, silu=True)    .. is silu(x scale + offset)
    total, normed = add_norm(y, more, gain, bias, eps)                   y + more, its LayerNorm
    geglu(x, out)                                up * gelu(gate) of both halves

`affine` and `scaled` take two images as the channels of one: joins are never written. Of fewer
images than B, all are repeated.

On a GPU these are Triton kernels (`triton_image_passes`); elsewhere the formulas, which say what
they compute. None is differentiated: `group_norm` has those that are.

Dimension key: B batch, H height, W width, C channels, P pixels, G groups, N rows, F hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sums(NamedTuple):
    """Of each channel over parts of the pixels, float32 at least."""

    means: Tensor  # (B, parts, C)
    squares: Tensor  # (B, parts, C), of distances from the part's mean
    pixels: int  # of an image
    part: int  # pixels of a part; the last may have fewer


def fused(x: Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeated(x: Tensor, count: int) -> Tensor:
    return x if len(x) == count else x.repeat(count // len(x), *(1,) * (x.ndim - 1))


def sums_of(x: Tensor) -> Sums:
    """Sums of x (B, H, W, C)."""
    if fused(x):
        from . import triton_image_passes

        return triton_image_passes.add(x, None, None, writes=False)[1]
    pixels = wide(x).flatten(1, 2)
    means = pixels.mean(1, keepdim=True)
    squares = (pixels - means).square().sum(1, keepdim=True)
    return Sums(means, squares, pixels.shape[1], pixels.shape[1])


def add(y: Tensor, bias: Tensor | None, x: Tensor | None = None) -> tuple[Tensor, Sums]:
    """y + bias + x and its sums.

    Args:
        y: (B, H, W, C).
        bias: (C,), or None.
        x: like y, or of fewer images, which are repeated; None adds nothing.
    """
    if fused(y):
        from . import triton_image_passes

        return triton_image_passes.add(y, bias, x)
    y = y if bias is None else y + bias
    y = y if x is None else y + repeated(x, len(y))
    return y, sums_of(y)


def interleave(y: Tensor, bias: Tensor) -> tuple[Tensor, Sums]:
    """(B, H + 1, W + 1, 4 C) to (B, 2 H, 2 W, C), plus the bias: pixel (2 i + p, 2 j + q) is phase
    2 p + q of position (i + p, j + q), which is how a convolution of windows of 2 x 2 leaves them.
    """
    if fused(y):
        from . import triton_image_passes

        return triton_image_passes.add(y, bias, None, doubled=True)
    B, H, W, C = y.shape[0], y.shape[1] - 1, y.shape[2] - 1, y.shape[3] // 4
    phases = y.unflatten(-1, (2, 2, C))
    rows = [torch.stack([phases[:, p : H + p, q : W + q, p, q] for q in (0, 1)], 3) for p in (0, 1)]
    out = torch.stack(rows, 2).reshape(B, 2 * H, 2 * W, C) + bias
    return out, sums_of(out)


def affine(
    sums: Sequence[Sums],
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(scale, offset), both (B, C) in float32, with which GroupNorm of x + shift is x scale +
    offset.

    Args:
        sums: of one image, or of two whose channels are joined.
        shift: (B or fewer, C), added to every pixel; or None.
    """
    B = max(len(one.means) for one in sums)
    if fused(sums[0].means):
        from . import triton_image_passes

        return triton_image_passes.affine(sums, gain, bias, shift, groups, eps, B)
    means = torch.cat([repeated(one.means, B) for one in sums], -1)
    squares = torch.cat([repeated(one.squares, B) for one in sums], -1)
    parts, pixels, part = means.shape[1], sums[0].pixels, sums[0].part
    n = (pixels - part * torch.arange(parts, device=means.device)).clamp(max=part)
    n = n.to(means.dtype)[:, None, None]
    moved = means.new_zeros(1, 1) if shift is None else repeated(shift.to(means.dtype), B)
    means = (means + moved[:, None]).unflatten(-1, (groups, -1))
    mean = (means * n).sum((1, 3), keepdim=True) / (pixels * means.shape[-1])
    apart = squares.unflatten(-1, (groups, -1)) + n * (means - mean).square()
    rstd = (apart.sum((1, 3), keepdim=True) / (pixels * means.shape[-1]) + eps).rsqrt()
    mean, rstd = (t.expand_as(means[:, :1]).flatten(1) for t in (mean, rstd))
    scale = rstd * gain
    return scale, bias + (moved - mean) * scale


def scaled(images: Sequence[Tensor], scale: Tensor, offset: Tensor, *, silu: bool) -> Tensor:
    """silu(x scale + offset), or without silu, of x or of two images' joined channels."""
    if fused(images[0]):
        from . import triton_image_passes

        return triton_image_passes.scaled(images, scale, offset, silu)
    x = torch.cat([repeated(image, len(scale)) for image in images], -1)
    y = wide(x) * scale[:, None, None] + offset[:, None, None]
    return (F.silu(y) if silu else y).to(x.dtype)


def add_norm(
    y: Tensor,
    more: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y + more, the LayerNorm of it + shift).

    Args:
        y: (N, C), or fewer rows, which are repeated.
        more: (N, C); None adds nothing and the first result is y.
        out: (N, C) of any distance between rows, where the first result goes; default: a new one.
        shift: (C,); None adds nothing.
    """
    if fused(y):
        from . import triton_image_passes

        return triton_image_passes.add_norm(y, more, gain, bias, eps, out, shift)
    total = y if more is None else repeated(y, len(more)) + more
    moved = total if shift is None else (total + shift).to(total.dtype)
    normed = F.layer_norm(moved, gain.shape, gain, bias, eps)
    return total if out is None else out.copy_(total), normed


def geglu(x: Tensor, out: Tensor) -> None:
    """x[:, :F] gelu(x[:, F:]) into out (N, F) of any distance between rows."""
    if fused(x):
        from . import triton_image_passes

        return triton_image_passes.geglu(x, out)
    up, gate = x.chunk(2, -1)
    out.copy_(up * F.gelu(gate))
