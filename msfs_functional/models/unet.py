"""The text-conditioned UNet of latent diffusion: Stable Diffusion 1.5 and 2.1 are settings.

    x (B, C, H, W), t (B,), context (B, S, X)  ->  a prediction (B, C, H, W)

    down     a level: ResNet blocks, each followed by a transformer; then half the height and width
    middle   ResNet block, transformer, ResNet block
    up       the same levels backwards, each ResNet block joined by what the way down left there

    transformer   tokens are pixels:  x = x + self_attention(norm(x))
                                      x = x + cross_attention(norm(x), context)
                                      x = x + down(up(norm(x)) * gelu(gate(norm(x))))

`unet(config)` gives pure functions: `init(seed)` and `apply(params, x, t, context)`. Transformers
are regions: a step with compile="regions" compiles one of each shape. Not the middle's, where no
other has its shape: compiling it takes as long as the others, for one of 16 and the smallest.
ResNet blocks have kernels of their own (`convolutions`).

Dimension key: B batch, C channels, H height, W width, S context tokens, X width of the context,
T tokens (pixels), D width.

Source: Rombach et al. 2022; Ho et al. 2020; Dhariwal and Nichol 2021.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msfs_functional.attention import Implementation
from msfs_functional.layers import Embedding
from msfs_functional.models.convolutions import (
    INITIALIZERS,
    Convolution,
    Enlarging,
    Norm,
    Resnet,
    for_kernels,
    group_norm,
    linear,
)
from msfs_functional.models.denoising import (
    AttentionWeights,
    TimeEmbedding,
    attend,
    check_call,
    time_embedding,
)
from msfs_functional.params import Functional, Initializer, Params, Rules, functional, normal
from msfs_functional.regions import region_of


@dataclass(frozen=True)
class UNetConfig:
    """Sizes and options; the defaults are Stable Diffusion 1.5, 860M parameters."""

    channels: int = 4  # of x
    outputs: int | None = None  # channels of the prediction; default: those of x
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level
    depth: int = 2  # ResNet blocks of a level on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers
    middle_attention: bool = True  # else the middle is one ResNet block
    heads: tuple[int, ...] = (8, 8, 8, 8)  # of each level's transformers
    transformer_depth: int = 1  # blocks of a transformer; 0: attention alone (Ho et al. 2020)
    context: int | None = 768  # width of the context; None: no cross-attention
    classes: int | None = None  # class-conditional: the class is embedded and added to the time
    interval: bool = False  # also told how far to go, for MeanFlow
    linear_projection: bool = False  # in and out of a transformer, in place of a 1 x 1 convolution
    scale_shift: bool = False  # the time scales and shifts, see `convolutions.resnet`
    groups: int = 32  # of every GroupNorm
    norm_eps: float = 1e-5  # of the ResNet blocks' norms
    cosine_first: bool = True  # see `denoising.time_embedding`
    frequency_shift: float = 0.0

    def __post_init__(self):
        levels = len(self.widths)
        if not levels or min(self.widths) < 1:
            raise ValueError(f"widths {self.widths} must hold at least one level, each at least 1")
        for name in ("attention", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} {getattr(self, name)} must have one element for each of the {levels} "
                    f"widths"
                )
        for name in ("channels", "depth", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.transformer_depth < 0 or (self.transformer_depth == 0 and self.context is not None):
            raise ValueError(
                f"transformer_depth ({self.transformer_depth}) must be at least 1, or 0 without a "
                f"context ({self.context}): attention alone sees nothing but x"
            )
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % self.groups:
                raise ValueError(f"groups ({self.groups}) must divide each width, got {width}")
            if heads < 1 or width % heads:
                raise ValueError(f"heads ({heads}) must divide their level's width ({width})")
        if self.widths[0] % 2:
            raise ValueError(
                f"the first width ({self.widths[0]}) must be even: it embeds the time as pairs"
            )
        for name in ("outputs", "context", "classes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1, or None")


def stable_diffusion_1(**options: Any) -> UNetConfig:
    """Stable Diffusion 1.1 to 1.5: 860M parameters, 8 heads at each level."""
    return UNetConfig(**options)


def stable_diffusion_2(**options: Any) -> UNetConfig:
    """Stable Diffusion 2.0 and 2.1: 866M parameters, heads of 64, context of 1024."""
    sizes = {"heads": (5, 10, 20, 20), "context": 1024, "linear_projection": True}
    return UNetConfig(**{**sizes, **options})


def pixels_32(**options: Any) -> UNetConfig:
    """For images of 32 x 32, DDPM's for CIFAR-10: 36M parameters, attention at 16 x 16 and in the
    middle; text wants a context and transformer_depth=1."""
    sizes = {
        "channels": 3,
        "widths": (128, 256, 256, 256),
        "attention": (False, True, False, False),
        "heads": (4, 4, 4, 4),
        "context": None,
        "transformer_depth": 0,
    }
    return UNetConfig(**{**sizes, **options})


def latents_8(**options: Any) -> UNetConfig:
    """For latents of 8 x 8 on a laptop: 2 levels, 2M parameters."""
    sizes = {
        "widths": (64, 128),
        "depth": 1,
        "attention": (True, True),
        "heads": (2, 4),
        "context": 64,
        "groups": 16,
    }
    return UNetConfig(**{**sizes, **options})


PRESETS = {
    "stable_diffusion_1": stable_diffusion_1,
    "stable_diffusion_2": stable_diffusion_2,
    "pixels_32": pixels_32,
    "latents_8": latents_8,
}


def blocks(
    params: Params,
    x: Float[Tensor, "B D H W"],
    normed: Float[Tensor, "B D H W"],
    context: Float[Tensor, "N S X"] | None,
    context_lengths: Int[Tensor, "N"] | None = None,
    *,
    heads: int,
    depth: int,
    implementation: Implementation = "flash",
) -> Float[Tensor, "N D H W"]:
    """x plus what `depth` transformer blocks over its pixels, or attention alone, make of it; from
    the first cross-attention on for each of N contexts, see `UNet`."""
    y = normed.flatten(2).transpose(1, 2)  # (B, T, D); a 1 x 1 convolution of pixels is linear, too
    if depth == 0:
        y = attend(params, "attention", y, None, heads, implementation)
        return x + y.transpose(1, 2).unflatten(-1, x.shape[-2:])
    y = linear(params, "project_in", y)
    each = 1 if context is None else len(context) // len(x)

    def layer_norm(name: str) -> Tensor:
        gain, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return F.layer_norm(y, gain.shape, gain, bias, 1e-5)

    for i in range(depth):
        at = f"blocks.{i}"
        inside = layer_norm(f"{at}.self_norm")
        y = y + attend(params, f"{at}.self_attention", inside, None, heads, implementation)
        if context is not None:
            y = y if len(y) == len(context) else y.repeat(each, 1, 1)
            inside = layer_norm(f"{at}.cross_norm")
            name = f"{at}.cross_attention"
            y = y + attend(params, name, inside, context, heads, implementation, context_lengths)
        inside, name = layer_norm(f"{at}.feed_forward_norm"), f"{at}.feed_forward.up_gate"
        # Two products: the gradient of one product's halves would be a copy of both.
        halves = (params[f"{name}.{part}"].chunk(2) for part in ("weight", "bias"))
        up, gate = (F.linear(inside, w, b) for w, b in zip(*halves, strict=True))
        y = y + linear(params, f"{at}.feed_forward.down", up * F.gelu(gate))
    y = linear(params, "project_out", y)
    if each > 1:
        y = (y.unflatten(0, (each, -1)) + x.flatten(2).transpose(1, 2)).flatten(0, 1)
        return y.transpose(1, 2).unflatten(-1, x.shape[-2:])
    return x + y.transpose(1, 2).unflatten(-1, x.shape[-2:])


_blocks = region_of(blocks, thrifty=True)


class Transformer(nn.Module):
    """Holds a transformer's parameters; its forward is `blocks` behind a norm."""

    def __init__(self, width: int, heads: int, config: UNetConfig, *, region: bool):
        super().__init__()
        self.run = _blocks if region else blocks
        self.context = config.context
        self.options = {"heads": heads, "depth": config.transformer_depth}
        self.groups = config.groups

        def projection() -> nn.Module:
            flat = config.linear_projection
            return nn.Linear(width, width) if flat else nn.Conv2d(width, width, 1)

        def block() -> nn.ModuleDict:
            parts: dict[str, nn.Module] = {
                "self_norm": Norm(width),
                "self_attention": AttentionWeights(width),
                "feed_forward_norm": Norm(width),
                "feed_forward": nn.ModuleDict(
                    {
                        "up_gate": nn.Linear(width, 8 * width),
                        "down": nn.Linear(4 * width, width),
                    }
                ),
            }
            if config.context is not None:
                parts["cross_norm"] = Norm(width)
                parts["cross_attention"] = AttentionWeights(width, config.context)
            return nn.ModuleDict(parts)

        self.norm = Norm(width)
        if config.transformer_depth == 0:
            self.attention = AttentionWeights(width, bias=True)
            return
        self.project_in = projection()
        self.blocks = nn.ModuleList(block() for _ in range(config.transformer_depth))
        self.project_out = projection()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        context_lengths: Tensor | None,
        implementation: Implementation,
    ) -> Tensor:
        params: Params = dict(self.named_parameters())
        options = self.options
        if self.context is None:
            context = context_lengths = None
        eps = 1e-6 if options["depth"] else 1e-5  # as published, both
        normed = group_norm(params, "norm", x, self.groups, eps)
        params = {name: p for name, p in params.items() if not name.startswith("norm.")}
        return self.run(
            *(params, x, normed, context, context_lengths),
            implementation=implementation,
            **options,
        )


class Level(nn.Module):
    """Holds the ResNet blocks and transformers of one level, and the convolution that leaves it."""

    def __init__(
        self,
        inputs: list[int],  # channels that each ResNet block gets
        level: int,
        config: UNetConfig,
        *,
        transformers: int,
        leave: str | None,  # "shrink", "enlarge" or None
        region: bool = True,  # whether others have transformers of these shapes
    ):
        super().__init__()
        width, heads = config.widths[level], config.heads[level]
        options = {
            "groups": config.groups,
            "eps": config.norm_eps,
            "scale_shift": config.scale_shift,
        }
        time = 4 * config.widths[0]
        self.resnets = nn.ModuleList(Resnet(n, width, time, **options) for n in inputs)
        self.transformers = nn.ModuleList(
            Transformer(width, heads, config, region=region) for _ in range(transformers)
        )
        if leave == "shrink":
            self.shrink = Convolution(width, width, 2)
        elif leave == "enlarge":
            self.enlarge = Enlarging(width)


def for_each(x: Tensor, count: int) -> Tensor:
    """The examples of x over and over, until there are `count`."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))  # which keeps its layout


class UNet(nn.Module):
    """The skeleton behind `unet`.

    Of N = R B contexts, image i goes with contexts i, B + i, .. and the prediction is that of the
    images repeated R times. What the first cross-attention has not met yet is computed once: with
    guidance, where a prompt and an empty one see the same image, 3% of Stable Diffusion's work.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, time = config.widths, 4 * config.widths[0]
        self.input = Convolution(config.channels, widths[0])

        self.time = TimeEmbedding(widths[0], time)
        if config.interval:
            self.interval = TimeEmbedding(widths[0], time)
        if config.classes is not None:
            self.class_embedding = Embedding(config.classes, time)
        last = len(widths) - 1
        left = [widths[0]]  # channels of what the way down leaves for the way up
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = [left[-1]] + [width] * (config.depth - 1)
            count = config.depth if config.attention[i] else 0
            leave = "shrink" if i < last else None
            self.down.append(Level(inputs, i, config, transformers=count, leave=leave))
            left += [width] * (config.depth + (i < last))
        inputs = [widths[-1]] * (2 if config.middle_attention else 1)
        middle: Any = {"transformers": len(inputs) - 1, "leave": None}
        region = config.attention[-1] or config.transformer_depth > 1
        self.middle = Level(inputs, last, config, **middle, region=region)
        self.up = nn.ModuleList()
        width = widths[-1]
        for i in range(last, -1, -1):
            inputs = []
            for _ in range(config.depth + 1):
                inputs.append(width + left.pop())
                width = widths[i]
            count = config.depth + 1 if config.attention[i] else 0
            leave = "enlarge" if i else None
            self.up.append(Level(inputs, i, config, transformers=count, leave=leave))
        self.output_norm = Norm(widths[0])
        self.output = Convolution(widths[0], config.outputs or config.channels)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        context: Float[Tensor, "N S X"] | None = None,
        *,
        context_lengths: Int[Tensor, "N"] | None = None,
        classes: Int[Tensor, "B"] | None = None,
        interval: Float[Tensor, "B"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "N _ H W"]:
        """The prediction for x at time t; what it predicts, training decides (`diffusion`).

        Args:
            x: any height and width; on a GPU all is computed in channels_last.
            t: in steps of a schedule of about a thousand: multiply a time in [0, 1] by 1000.
            context: what the text encoder returned, for B images or for each R times (see above).
            context_lengths: tokens of the context that are not padding; default: all.
            classes: of a class-conditional model.
            interval: of a MeanFlow model, t - r in the unit of t.

        Raises:
            ValueError: an argument that the configuration has no use for, or that it needs.
        """
        config = self.config
        check_call(config, x, context, classes, interval, several=True)
        options = {"cosine_first": config.cosine_first, "dtype": x.dtype}
        options["frequency_shift"] = config.frequency_shift
        time = self.time(time_embedding(t, config.widths[0], **options))
        if interval is not None:
            time = time + self.interval(time_embedding(interval, config.widths[0], **options))
        if classes is not None:
            time = time + self.class_embedding(classes)
        time = F.silu(time)
        conditions = (context, context_lengths, implementation)

        def run(level: Any, x: Tensor, skips: list[Tensor], joined: bool) -> Tensor:
            for i, layer in enumerate(level.resnets):
                skip = for_each(skips.pop(), len(x)) if joined else None
                x = layer(x, for_each(time, len(x)), skip)
                if i < len(level.transformers):
                    x = level.transformers[i](x, *conditions)
                if not joined:
                    skips.append(x)
            return x

        x = self.input(for_kernels(x))
        skips = [x]
        for level in cast(Any, self.down):
            x = run(level, x, skips, False)
            if hasattr(level, "shrink"):
                x = level.shrink(x)
                skips.append(x)
        x = run(self.middle, x, [], False)
        for level in cast(Any, self.up):
            x = run(level, x, skips, True)
            if hasattr(level, "enlarge"):
                x = level.enlarge(x, skips[-1].shape[-2:])
        norm: Params = dict(self.output_norm.named_parameters("norm"))
        x = group_norm(norm, "norm", x, config.groups, config.norm_eps, silu=True)
        return self.output(x)


def unet(config: UNetConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, x, t, context, ...)`.

    The prediction starts at zero, and so does what each block adds.
    """
    embedding: Rules[Initializer] = [(r"class_embedding\.weight$", normal(0.02))]
    return functional(lambda: UNet(config), [*embedding, *INITIALIZERS], strict=False)
