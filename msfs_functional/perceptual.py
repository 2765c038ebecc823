"""LPIPS: how different two pictures look, by the features of a VGG-16 with weights on this disk.

    params = load("vgg16.pth", "lpips_vgg.pth")     # or one file that holds both
    perceptual_fn = functools.partial(distance, params)      # for adversarial.autoencoder_loss

    features of five levels, each pixel's scaled to length 1 -> squared differences, weighted by
    channel -> mean over the picture -> sum over the levels

Equal to the lpips package (0.1.4) to 1e-7 with its calibration and either's VGG.

Dimension key: B batch, C channels, H height, W width.

Source: Zhang et al. 2018; Simonyan and Zisserman 2015. Calibrated weights are the owners' to give.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from msfs_functional.models.weight_files import read_tensors
from msfs_functional.params import Params

# Convolutions of each level by their place in VGG-16; before a level but the first, pixels are
# halved by their maxima.
LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [-1, 1]


def load(*paths: str | Path, device: torch.device | str = "cpu") -> Params:
    """{"0.weight", "0.bias", ..., "28.bias", "level0", ..., "level4"} from one file or two.

    Known are the names of torchvision's VGG-16 ("features.0.weight"), of the lpips package's models
    ("net.slice1.0.weight") and of its calibration ("lin0.model.1.weight").

    Raises:
        ValueError: a broken file; convolutions or levels that are missing or misshapen.
    """
    params: Params = {}
    for path in paths:
        for name, value in read_tensors(path).items():
            if found := re.search(r"(?:^|\.)(?:features|slice\d)\.(\d+\.(?:weight|bias))$", name):
                params[found[1]] = value.float().to(device)
            elif found := re.search(r"(?:^|\.)lins?\.?(\d)\.model\.1\.weight$", name):
                params[f"level{found[1]}"] = value.float().flatten().to(device)
    before = 3
    for i, (level, width) in enumerate(zip(LEVELS, WIDTHS, strict=True)):
        wanted: dict[str, tuple[int, ...]] = {f"level{i}": (width,)}
        for place in level:
            wanted |= {f"{place}.weight": (width, before, 3, 3), f"{place}.bias": (width,)}
            before = width
        for name, shape in wanted.items():
            if name not in params or params[name].shape != shape:
                given = tuple(params[name].shape) if name in params else "nothing"
                raise ValueError(
                    f"{', '.join(map(str, paths))}: {name} must be {shape}, got {given}: give the "
                    f"weights of a VGG-16 and of its LPIPS calibration"
                )
    return params


def features(params: Params, image: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
    """Activations of the five levels for pictures in [-1, 1]."""
    shift, scale = (image.new_tensor(v)[:, None, None] for v in (SHIFT, SCALE))
    x, found = (image - shift) / scale, []
    for i, level in enumerate(LEVELS):
        x = F.max_pool2d(x, 2) if i else x
        for place in level:
            weight, bias = (params[f"{place}.{part}"].to(x.dtype) for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
        found.append(x)
    return found


def distance(
    params: Params, image: Float[Tensor, "B 3 H W"], other: Float[Tensor, "B 3 H W"]
) -> Float[Tensor, "B"]:
    """The distance of each pair of pictures in [-1, 1]; 0 for equal ones.

    Raises:
        ValueError: pictures of other shapes, or too small for the last level.
    """
    if image.shape != other.shape or image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"pictures {tuple(image.shape)} and {tuple(other.shape)} must both be (B, 3, H, W)"
        )
    if min(image.shape[-2:]) < 16:
        raise ValueError(
            f"pictures {tuple(image.shape)} must be at least 16 x 16: four levels halve them"
        )
    total = image.new_zeros(len(image))
    for i, (x, y) in enumerate(zip(features(params, image), features(params, other), strict=True)):
        x, y = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y))
        weight = params[f"level{i}"].to(x.dtype)[:, None, None]
        total = total + (weight * (x - y).square()).sum(1).mean((1, 2))
    return total
