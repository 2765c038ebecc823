"""ResNet-20 to ResNet-110 for CIFAR-10, as published weights: a classifier and its 64 features.

    params = load("resnet56-4bfd9763.th")
    features(params, pictures)     uint8 (B, 3, 32, 32) -> (B, 64), what the last layer sees
    logits(params, pictures)       -> (B, 10): airplane automobile bird cat deer dog frog horse ...

Three levels of 16, 32 and 64 channels, each of n blocks of two convolutions (6 n + 2 layers);
shortcuts that halve the picture drop every second pixel and add channels of zeros ("option A").
Batch norms are folded into their convolutions when the file is read, so this is inference alone.

Source: He et al. 2016, section 4.2; weights of github.com/akamaster/pytorch_resnet_cifar10.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from msfs_functional.models.weight_files import read_tensors
from msfs_functional.params import Params

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the inputs, in [0, 1]
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Params:
    """The parameters {"layer1.0.conv1.weight", "layer1.0.conv1.bias", ..., "linear.bias"}.

    Raises:
        ValueError: a broken file, or another architecture.
    """
    weights = {name.removeprefix("module."): x for name, x in read_tensors(path).items()}
    params: Params = {}
    for name, value in weights.items():
        if name.startswith("linear."):
            params[name] = value
        if re.search(r"conv\d\.weight$", name):
            stem = name.removesuffix(".weight")
            norm = stem.replace("conv", "bn")
            try:
                gain, bias, mean, variance = (
                    weights[f"{norm}.{part}"]
                    for part in ("weight", "bias", "running_mean", "running_var")
                )
            except KeyError as error:
                raise ValueError(f"{path} has no {error}: it must be a ResNet for CIFAR") from None
            scale = gain / (variance + 1e-5).sqrt()
            params[name] = value * scale[:, None, None, None]
            params[f"{stem}.bias"] = bias - mean * scale
    if "linear.weight" not in params or "layer3.0.conv2.weight" not in params:
        raise ValueError(f"{path} must hold the weights of a ResNet for CIFAR: conv1, layer1 ...")
    return {name: value.float().to(device) for name, value in params.items()}


def features(params: Params, pictures: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 64"]:
    """Means over the picture of the last level's channels."""

    def convolve(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride=stride, padding=1)

    dtype = params["conv1.weight"].dtype
    mean, std = (torch.tensor(v, device=pictures.device)[:, None, None] for v in (MEAN, STD))
    x = F.relu(convolve("conv1", ((pictures.float() / 255 - mean) / std).to(dtype)))
    for level in (1, 2, 3):
        block = 0
        while f"layer{level}.{block}.conv1.weight" in params:
            at = f"layer{level}.{block}"
            stride = 2 if level > 1 and block == 0 else 1
            y = convolve(f"{at}.conv2", F.relu(convolve(f"{at}.conv1", x, stride)))
            if stride == 2:
                more = (y.shape[1] - x.shape[1]) // 2
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
            x, block = F.relu(x + y), block + 1
    return x.mean((2, 3))


def logits(params: Params, pictures: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 10"]:
    return F.linear(features(params, pictures), params["linear.weight"], params["linear.bias"])
