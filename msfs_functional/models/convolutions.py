"""What image networks are made of: convolutions, group norms and the ResNet block, of named params.

Each function takes its block's parameters in a dict, named without the block's own prefix; modules
only hold them. On a GPU what lies between convolutions runs in kernels of its own, which nothing
has to compile (`msfs_kernels.group_norm`).

Dimension key: B batch, C channels, H height, W width, D channels of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from msfs_kernels import doubled
from msfs_kernels import group_norm as fused
from torch import Tensor, nn

from msfs_functional.params import Initializer, Params, Rules, kaiming_uniform, ones, zeros

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


def for_kernels(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """x in channels_last on a GPU: convolutions and the kernels between them want it, and all that
    follows keeps it. As it is on a CPU, to a compiler, which chooses layouts by itself, and under
    torch.func transforms, which run the plain formulas."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return x
    if torch._C._functorch.get_interpreter_stack():  # pyright: ignore
        return x
    return x.contiguous(memory_format=torch.channels_last)


def convolve(
    params: Params, name: str, x: Float[Tensor, "B C H W"], *, bias: bool = True, stride: int = 1
) -> Float[Tensor, "B _ H W"]:
    """The convolution of that name, padded by half its kernel, which keeps the size.

    Args:
        bias: False leaves it to the caller, who adds it in passing: alone it is a pass over y.
    """
    weight, own = params[f"{name}.weight"], params.get(f"{name}.bias") if bias else None
    padding = weight.shape[-1] // 2
    if x.is_cuda and own is not None:  # cuDNN adds it slowly
        return fused.residual(F.conv2d(x, weight, stride=stride, padding=padding), own)
    return F.conv2d(x, weight, own, stride, padding)


def convolve_enlarged(
    params: Params, name: str, x: Float[Tensor, "B C _ _"], size: tuple[int, ...]
) -> Float[Tensor, "B _ H W"]:
    """The 3 x 3 convolution of that name of x at this height and width, its pixels repeated.

    At twice the size it adds up the same pixels several times; on a GPU it is one of 2 x 2 of x
    itself then (`msfs_kernels.doubled`).
    """
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    if tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):
        return convolve(params, name, F.interpolate(x, tuple(size), mode="nearest"))
    if not fused.fused(x, weight):
        return convolve(params, name, fused.double(x))
    return doubled.interleave(F.conv2d(x, doubled.kernel(weight), padding=1), bias)


def linear(params: Params, name: str, x: Float[Tensor, "... C"]) -> Float[Tensor, "... _"]:
    """x times the matrix of that name, plus its bias if it has one; a 1 x 1 kernel is a matrix."""
    return F.linear(x, params[f"{name}.weight"].flatten(1), params.get(f"{name}.bias"))


def group_norm(
    params: Params,
    name: str,
    x: Float[Tensor, "B C H W"],
    groups: int,
    eps: float,
    *,
    shift: Float[Tensor, "B C"] | None = None,
    silu: bool = False,
) -> Float[Tensor, "B C H W"]:
    """GroupNorm (Wu and He 2018) of x + shift with the gain and bias of that name, and its SiLU."""
    gain, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return fused.group_norm(x, gain, bias, groups, eps, shift=shift, silu=silu)


def norm_beside(
    params: Params,
    name: str,
    x: Float[Tensor, "B C H W"],
    groups: int,
    eps: float,
    *,
    silu: bool = False,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """(its GroupNorm, x itself) for a block that adds to x what it makes of the norm: where x is
    taken from here, its two gradients are added in passing."""
    gain, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return fused.group_norm(x, gain, bias, groups, eps, silu=silu, passes=True)


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

    Biases and the time are added where the next pass reads anyway; convolutions are libraries'. So
    nothing is left here that a compiler could join, and no block has to be compiled.

    Args:
        time: after its activation; added between the convolutions, or with scale_shift (Dhariwal
            and Nichol 2021) it scales and shifts what norm_out returns.
        skip: joins x as more channels.

    Source: Ho et al. 2020, appendix B.
    """
    if skip is not None:
        x = fused.join(x, skip)
    y, x = norm_beside(params, "norm_in", x, groups, eps, silu=True)
    y = convolve(params, "conv_in", y, bias=False)
    bias = params["conv_in.bias"].to(y.dtype)
    if time is None or scale_shift:
        y = group_norm(
            *(params, "norm_out", y, groups, eps),
            shift=bias.expand(len(y), -1),
            silu=time is None,
        )
    else:
        shift = linear(params, "time", time) + bias
        y = group_norm(params, "norm_out", y, groups, eps, shift=shift, silu=True)
    if time is not None and scale_shift:
        scale, shift = linear(params, "time", time)[:, :, None, None].chunk(2, 1)
        y = F.silu(y * (1 + scale) + shift)
    y = convolve(params, "conv_out", y, bias=False)
    bias = params["conv_out.bias"]
    if "skip.weight" in params:
        x, bias = convolve(params, "skip", x, bias=False), bias + params["skip.bias"]
    return fused.residual(y, bias, x)


class Norm(nn.Module):
    """Holds gain and bias of a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution that keeps the size, or halves it with stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        params = {"conv.weight": self.weight, "conv.bias": self.bias}
        return convolve(params, "conv", input, stride=self.stride[0])


class Enlarging(nn.Conv2d):
    """A 3 x 3 convolution of an image at a larger size, pixels repeated: `convolve_enlarged`."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, input: Tensor, size: tuple[int, ...]) -> Tensor:
        params = {"conv.weight": self.weight, "conv.bias": self.bias}
        return convolve_enlarged(params, "conv", input, size)


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
        return resnet(dict(self.named_parameters()), x, time, skip, **self.options)
