"""Blocks of image networks for sampling: `convolutions`, arranged for calls without gradients.

    image = Image(*passes.add(y, bias))            # who writes an image leaves its sums
    image = resnet(params, "down.0.resnets.0", [image, skip], shift, groups, eps)

- Norms find their sums made, and joins are never written (`msfs_kernels.image_passes`).
- A convolution of an image whose pixels were doubled is one of 2 x 2 on the small image, whose
  kernel is made once (`msfs_kernels.doubled`).

Parameters are named by their whole path. `merged` makes those that are sums of others.

Dimension key: B batch, H height, W width, C channels, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from msfs_kernels import doubled
from msfs_kernels import image_passes as passes
from torch import Tensor

from msfs_functional.params import Params


class Image(NamedTuple):
    """(B, H, W, C), and its sums for the norm after it."""

    x: Tensor
    sums: passes.Sums


def merged(params: Params) -> Params:
    """What the blocks here read beside the parameters themselves."""
    made = {}
    for name in params:
        if name.endswith(".skip.bias"):
            out = name.replace("skip", "conv_out")
            made[out] = params[out] + params[name]
        if name.endswith(".enlarge.weight"):
            weight = doubled.kernel(params[name]).contiguous(memory_format=torch.channels_last)
            made[name.replace("weight", "doubling")] = weight
    return made


def convolve(
    weight: Tensor, x: Float[Tensor, "B H W C"], *, stride: int = 1, padding: int = 1
) -> Float[Tensor, "B _ _ _"]:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=padding)
    return y.permute(0, 2, 3, 1).contiguous()


def normalized(
    params: Params,
    name: str,
    images: Sequence[Image],
    groups: int,
    eps: float,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(GroupNorm(x + shift)) of images joined."""
    gain, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    sums = [image.sums for image in images]
    scale, offset = passes.affine(sums, gain, bias, shift, groups, eps)
    return passes.scaled([image.x for image in images], scale, offset, silu=silu)


def resnet(
    params: Params,
    name: str,
    images: Sequence[Image],
    shift: Float[Tensor, "_ C"],
    groups: int,
    eps: float,
) -> Image:
    """`convolutions.resnet` of images joined.

    Args:
        shift: the time's, plus the bias of conv_in; for each image or for several.
    """
    y = normalized(params, f"{name}.norm_in", images, groups, eps)
    y = convolve(params[f"{name}.conv_in.weight"], y)
    image = Image(y, passes.sums_of(y))
    y = normalized(params, f"{name}.norm_out", [image], groups, eps, shift=shift)
    y = convolve(params[f"{name}.conv_out.weight"], y)
    bias, skip = params[f"{name}.conv_out.bias"], params.get(f"{name}.skip.weight")
    if skip is None:
        return Image(*passes.add(y, bias, images[0].x))
    widths = [image.x.shape[-1] for image in images]
    for (x, _), part in zip(images, skip.flatten(1).split(widths, 1), strict=True):
        for some in y.flatten(1, 2).split(len(x)):  # of fewer images each goes to several
            some.flatten(0, 1).addmm_(x.flatten(0, 2), part.T)
    return Image(*passes.add(y, bias))


def enlarge(params: Params, name: str, x: Tensor, size: tuple[int, ...]) -> Image:
    """x at this height and width, each pixel repeated, and its convolution."""
    bias = params[f"{name}.bias"]
    if size == (2 * x.shape[1], 2 * x.shape[2]):
        return Image(*passes.interleave(convolve(params[f"{name}.doubling"], x), bias))
    x = F.interpolate(x.permute(0, 3, 1, 2), size, mode="nearest").permute(0, 2, 3, 1)
    return Image(*passes.add(convolve(params[f"{name}.weight"], x), bias))
