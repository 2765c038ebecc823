"""What image networks are made of: convolutions, group norms and the ResNet block, of named params.

Each function takes its block's parameters in a dict, named without the block's own prefix, so that
it can be compiled once for all blocks of a shape (`regions.region_of`); modules only hold them.

Dimension key: B batch, C channels, H height, W width, D channels of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msfs_functional.params import Initializer, Params, Rules, kaiming_uniform, ones, zeros
from msfs_functional.regions import region_of

# PyTorch's own start, U(+-1 / sqrt(fan_in)), but what a residual branch ends in adds nothing yet.
INITIALIZERS: Rules[Initializer] = [
    (r"norm[a-z_]*\.weight$", ones),
    (r"bias$", zeros),
    (r"(^output|\.conv_out|\.project_out|\.attention\.o)\.weight$", zeros),
    (r"weight$", kaiming_uniform(math.sqrt(1 / 3))),
]


def stored_channels_last(params: Params) -> Params:
    """Kernels (O, I, h, w) as contiguous (O, h, w, I): what channels_last has in memory.

    An optimizer sees plain contiguous tensors, and `channels_last` of them costs nothing.
    """
    return {n: x.permute(0, 2, 3, 1).contiguous() if x.ndim == 4 else x for n, x in params.items()}


def channels_last(params: Params) -> Params:
    """Kernels (O, I, h, w) in channels_last: views of what `stored_channels_last` made."""
    return {n: x.permute(0, 3, 1, 2) if x.ndim == 4 else x for n, x in params.items()}


def convolve(params: Params, name: str, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ H W"]:
    """The convolution of that name, padded by half its kernel, which keeps the size."""
    weight = params[f"{name}.weight"]
    return F.conv2d(x, weight, params.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def linear(params: Params, name: str, x: Float[Tensor, "... C"]) -> Float[Tensor, "... _"]:
    """x times the matrix of that name, plus its bias if it has one; a 1 x 1 kernel is a matrix."""
    return F.linear(x, params[f"{name}.weight"].flatten(1), params.get(f"{name}.bias"))


def group_norm(
    params: Params, name: str, x: Float[Tensor, "B C H W"], groups: int, eps: float
) -> Float[Tensor, "B C H W"]:
    """GroupNorm (Wu and He 2018) with the gain and bias of that name."""
    return F.group_norm(x, groups, params[f"{name}.weight"], params[f"{name}.bias"], eps)


def resnet(
    params: Params,
    x: Float[Tensor, "B C H W"],
    time: Float[Tensor, "B D"] | None = None,
    skip: Float[Tensor, "B _ H W"] | None = None,
    *,
    groups: int,
    eps: float,
    scale_shift: bool = False,
) -> Float[Tensor, "B _ H W"]:
    """x + conv_out(silu(norm_out(conv_in(silu(norm_in(x))) + time))), x widened where it must be.

    Args:
        time: after its activation; added between the convolutions, or with scale_shift (Dhariwal
            and Nichol 2021) it scales and shifts what norm_out returns.
        skip: joins x as more channels.

    Source: Ho et al. 2020, appendix B.
    """
    if skip is not None:
        x = torch.cat([x, skip], 1)
    y = convolve(params, "conv_in", F.silu(group_norm(params, "norm_in", x, groups, eps)))
    shift = None if time is None else linear(params, "time", time)[:, :, None, None]
    if shift is not None and not scale_shift:
        y = y + shift
    y = group_norm(params, "norm_out", y, groups, eps)
    if shift is not None and scale_shift:
        scale, shift = shift.chunk(2, 1)
        y = y * (1 + scale) + shift
    y = convolve(params, "conv_out", F.silu(y))
    return y + (convolve(params, "skip", x) if "skip.weight" in params else x)


_resnet = region_of(resnet)


class Norm(nn.Module):
    """Holds gain and bias of a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))


class Resnet(nn.Module):
    """Holds a ResNet block's parameters; its forward is `resnet`.

    Args:
        time: channels D of the time embedding; None has none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        time: int | None = None,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.options = {"groups": groups, "eps": eps, "scale_shift": scale_shift}
        self.norm_in = Norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        if time is not None:
            self.time = nn.Linear(time, outputs * (2 if scale_shift else 1))
        self.norm_out = Norm(outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        return _resnet(dict(self.named_parameters()), x, time, skip, **self.options)


def enlarge(
    x: Float[Tensor, "B C _ _"], like: Float[Tensor, "B _ H W"]
) -> Float[Tensor, "B C H W"]:
    """x at the height and width of `like`, each pixel repeated."""
    return F.interpolate(x, (like.shape[-2], like.shape[-1]), mode="nearest")


def double(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 2*H 2*W"]:
    """x at twice the height and width, each pixel repeated."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
