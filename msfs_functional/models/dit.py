"""The diffusion transformer: a UNet's call, and inside it nothing but transformer blocks.

    x (B, C, H, W), t (B,), context (B, S, X) or classes (B,)  ->  a prediction (B, C, H, W)

    patches -> tokens + positions -> blocks -> norm, scaled and shifted by c -> patches
    c       the embedding of the time, plus that of the class

    block   shift, scale, gate (of both parts) = linear(silu(c))
            x = x + gate * self_attention(norm(x) * (1 + scale) + shift)
            x = x + cross_attention(norm(x), context)
            x = x + gate * feed_forward(norm(x) * (1 + scale) + shift)

The linear layer starts at zero, so every block starts as the identity: adaLN-zero.

Dimension key: B batch, C channels, H height, W width, S context tokens, X width of the context,
T tokens (patches), D width.

Source: Peebles and Xie 2023; cross-attention as in Chen et al. 2023 (PixArt).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msfs_functional.attention import Implementation
from msfs_functional.layers import Embedding
from msfs_functional.models.convolutions import linear
from msfs_functional.models.denoising import (
    AttentionWeights,
    TimeEmbedding,
    attend,
    check_call,
    time_embedding,
)
from msfs_functional.params import (
    Functional,
    Initializer,
    Params,
    Rules,
    functional,
    normal,
    xavier_uniform,
    zeros,
)
from msfs_functional.regions import region_of

WAVES = 256  # of the time, before its embedding


@dataclass(frozen=True)
class DiTConfig:
    """Sizes and options; the defaults are DiT-B/2 for latents, without its classes."""

    channels: int = 4  # of x
    outputs: int | None = None  # channels of the prediction; default: those of x
    patch: int = 2  # pixels along one side of a token
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    hidden: int | None = None  # of the feed-forward layers; default: 4 * width
    context: int | None = None  # width of the context; None: no cross-attention
    classes: int | None = None  # class-conditional; one more than there are where one means none
    interval: bool = False  # also told how far to go, for MeanFlow
    frequency_shift: float = 0.0  # see `denoising.time_embedding`

    def __post_init__(self):
        for name in ("channels", "patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("outputs", "hidden", "context", "classes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1, or None")
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.width % 4:
            raise ValueError(
                f"4 must divide width ({self.width}): positions are sines and cosines of x and y"
            )


def small(**options: Any) -> DiTConfig:
    """DiT-S/2, 33M parameters."""
    return DiTConfig(**{"width": 384, "heads": 6, **options})


def base(**options: Any) -> DiTConfig:
    """DiT-B/2, 130M parameters."""
    return DiTConfig(**options)


def extra_large(**options: Any) -> DiTConfig:
    """DiT-XL/2, 675M parameters."""
    return DiTConfig(**{"width": 1152, "depth": 28, "heads": 16, **options})


def tiny(**options: Any) -> DiTConfig:
    """For latents of 8 x 8 on a laptop: 4 blocks of 128, 1.3M parameters."""
    return DiTConfig(**{"width": 128, "depth": 4, "heads": 4, **options})


PRESETS = {"tiny": tiny, "small": small, "base": base, "extra_large": extra_large}


def grid_positions(
    height: int, width: int, size: int, like: Float[Tensor, "..."]
) -> Float[Tensor, "T D"]:
    """Sines and cosines of each token's column, then of its row, at geometric frequencies."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    quarter = torch.arange(size // 4, device=like.device, dtype=dtype) / (size // 4)
    frequencies = torch.exp(-math.log(10000.0) * quarter)

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, device=like.device, dtype=dtype)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    columns = waves(width).expand(height, -1, -1)
    rows = waves(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1).to(like.dtype)


def modulate(
    x: Float[Tensor, "B T D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]
) -> Float[Tensor, "B T D"]:
    """LayerNorm without gain or bias, then scaled and shifted, the same for all tokens."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def block(
    params: Params,
    x: Float[Tensor, "B T D"],
    c: Float[Tensor, "B D"],
    context: Float[Tensor, "B S X"] | None = None,
    context_lengths: Int[Tensor, "B"] | None = None,
    *,
    heads: int,
    implementation: Implementation = "flash",
) -> Float[Tensor, "B T D"]:
    """One block; c is after its activation."""
    parts = linear(params, "modulation", c).chunk(6, -1)
    y = modulate(x, parts[0], parts[1])
    y = attend(params, "self_attention", y, None, heads, implementation)
    x = x + parts[2][:, None] * y
    if context is not None:
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        name = "cross_attention"
        x = x + attend(params, name, y, context, heads, implementation, context_lengths)
    y = F.gelu(linear(params, "up", modulate(x, parts[3], parts[4])), approximate="tanh")
    return x + parts[5][:, None] * linear(params, "down", y)


_block = region_of(block)


class Block(nn.Module):
    """Holds a block's parameters; its forward is `block`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.self_attention = AttentionWeights(width, bias=True)
        if config.context is not None:
            self.cross_attention = AttentionWeights(width, config.context, bias=True)
        self.up = nn.Linear(width, config.hidden or 4 * width)
        self.down = nn.Linear(config.hidden or 4 * width, width)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        context: Tensor | None,
        lengths: Tensor | None,
        implementation: Implementation,
    ) -> Tensor:
        params = dict(self.named_parameters())
        options = {"heads": self.heads, "implementation": implementation}
        return _block(params, x, c, context, lengths, **options)


class DiT(nn.Module):
    """The skeleton behind `dit`."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch
        self.input = nn.Conv2d(config.channels, width, patch, stride=patch)
        self.time = TimeEmbedding(WAVES, width)
        if config.interval:
            self.interval = TimeEmbedding(WAVES, width)
        if config.classes is not None:
            self.class_embedding = Embedding(config.classes, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, patch**2 * (config.outputs or config.channels))

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        context: Float[Tensor, "B S X"] | None = None,
        *,
        context_lengths: Int[Tensor, "B"] | None = None,
        classes: Int[Tensor, "B"] | None = None,
        interval: Float[Tensor, "B"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B C H W"]:
        """The prediction for x at time t; arguments as a UNet's (`unet.UNet.forward`).

        Raises:
            ValueError: an argument that the configuration has no use for, or that it needs; a size
                that is no multiple of the patch.
        """
        config, patch = self.config, self.config.patch
        check_call(config, x, context, classes, interval)
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"x {tuple(x.shape)} must have a height and width that patch ({patch}) divides"
            )
        options = {"frequency_shift": config.frequency_shift, "dtype": x.dtype}
        c = self.time(time_embedding(t, WAVES, **options))
        if interval is not None:
            c = c + self.interval(time_embedding(interval, WAVES, **options))
        if classes is not None:
            c = c + self.class_embedding(classes)
        c = F.silu(c)
        y = self.input(x)
        rows, columns = y.shape[-2:]
        y = y.flatten(2).transpose(1, 2)
        y = y + grid_positions(rows, columns, config.width, y)
        for layer in self.blocks:
            y = layer(y, c, context, context_lengths, implementation)
        shift, scale = self.modulation(c).chunk(2, -1)
        y = self.output(modulate(y, shift, scale))
        y = y.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def dit(config: DiTConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, x, t, context, ...)`.

    The prediction starts at zero, and every block at the identity.
    """
    initializers: Rules[Initializer] = [
        (r"bias$|modulation\.weight$|^output\.weight$|cross_attention\.o\.weight$", zeros),
        (r"^(time|interval|class_embedding).*weight$", normal(0.02)),
        (r"^input\.weight$", _as_matrix),
        (r"weight$", xavier_uniform()),
    ]
    return functional(lambda: DiT(config), initializers, strict=False)


def _as_matrix(key: Tensor, shape: torch.Size) -> Tensor:
    """Xavier's bound for the matrix that a convolution of patches is."""
    return xavier_uniform()(key, (shape[0], math.prod(shape[1:]))).view(shape)
