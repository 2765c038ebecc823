"""The Vision Transformer (Dosovitskiy et al. 2021): an image is a sequence of patches.

    image -> patches -> linear (+ class token) + positions -> layers -> norm -> states
    states -> class token, mean or attention pooling -> (projection) -> one vector an image

The towers of CLIP and SigLIP and ViT-B/16 are settings. Learned positions are interpolated when an
image has another size than those trained on; sinusoidal and rotary ones are computed for any.

Dimension key: B batch, C channels, Y X patches along an image's height and width, P = Y * X
patches, T tokens (P, and 1 for the class token), D width, K head dim, E embedding.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation
from msfs_functional.layers import (
    Embedding,
    FeedForward,
    MultiHeadAttention,
    sinusoidal_positions,
    site_keys,
)
from msfs_functional.models import encoder
from msfs_functional.models.encoder import EncoderConfig, Layer, Rotary
from msfs_functional.params import (
    Functional,
    Initializer,
    Rules,
    functional,
    kaiming_normal,
    normal,
)
from msfs_functional.regions import Block
from msfs_functional.rotary import frequencies

# Weight decay for matrices only.
DECAY: Rules[bool] = [(r"norm|bias|positions|class_token|probe|embedding", False), (r"", True)]


@dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """Sizes and options; the defaults are ViT-B/16's."""

    image: int | tuple[int, int] = 224  # pixels, of a square or (height, width)
    patch: int = 16  # pixels of a side
    channels: int = 3
    class_token: bool = True
    positions: Literal["learned", "sincos", "rotary"] = "learned"
    rotary_base: float = 100.0
    # what makes a patch a vector: one linear map, or 3 x 3 convolutions of stride 2 before it,
    # which see over the patch's edge (Xiao et al. 2021)
    stem: Literal["linear", "convolutions"] = "linear"
    patch_bias: bool = True
    pre_norm: bool = False  # one more norm before the layers (CLIP)
    norm: Literal["states", "pooled"] = "states"  # where the last norm stands; CLIP: pooled
    pooling: Literal["class", "mean", "attention"] | None = "class"
    pooler: bool = False  # tanh(dense(pooled)), of the first published ViT and BERT
    projection: int | None = None  # width of the embedding, or classes; None leaves what is pooled
    projection_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("patch", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if min(self.size) < self.patch or any(n % self.patch for n in self.size):
            raise ValueError(f"patch ({self.patch}) must divide image {self.size}, in pixels")
        if self.stem == "convolutions" and self.patch & (self.patch - 1):
            raise ValueError(
                f"patch ({self.patch}) must be a power of 2 for a stem of convolutions"
            )
        if self.pooling == "class" and not self.class_token:
            raise ValueError("pooling='class' needs class_token=True; or take 'mean'")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of 4 for 2-d sinusoids")
        if self.positions == "rotary" and (self.width // self.heads) % 4:
            raise ValueError(
                f"head dim ({self.width // self.heads}) must be a multiple of 4 for 2-d rotations"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image, self.image) if isinstance(self.image, int) else self.image

    @property
    def stem_channels(self) -> list[int]:
        """Of the pixels and of what each convolution of the stem makes: the last has the width."""
        steps = self.patch.bit_length() - 1 if self.stem == "convolutions" else 0
        widths = [max(self.width >> (steps - 1 - i), 1) for i in range(steps)]
        return [self.channels, *widths]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.size[0] // self.patch, self.size[1] // self.patch


def vit_b16(**options: Any) -> ViTConfig:
    """ViT-B/16 (Dosovitskiy et al. 2021), 86M parameters; projection=1000 classifies."""
    return ViTConfig(**{"norm_eps": 1e-12, **options})


def clip_vision(**options: Any) -> ViTConfig:
    """CLIP's image tower (Radford et al. 2021); ViT-B/32 by default."""
    sizes = {"patch": 32, "activation": "quick_gelu", "norm_eps": 1e-5, "projection": 512}
    parts = {"patch_bias": False, "pre_norm": True, "norm": "pooled", "projection_bias": False}
    return ViTConfig(**{**sizes, **parts, **options})


def siglip_vision(**options: Any) -> ViTConfig:
    """SigLIP's image tower (Zhai et al. 2023); B/16 by default."""
    parts = {"activation": "gelu_tanh", "class_token": False, "pooling": "attention"}
    return ViTConfig(**{**parts, **options})


def tiny(**options: Any) -> ViTConfig:
    """Learns rendered shapes on a laptop: 4 layers of 128, 0.8M parameters."""
    sizes = {"width": 128, "depth": 4, "heads": 4, "hidden": 384, "image": 32, "patch": 4}
    return ViTConfig(**{**sizes, "class_token": False, "pooling": "mean", **options})


PRESETS: dict[str, Callable[..., ViTConfig]] = {
    "tiny": tiny,
    "vit_b16": vit_b16,
    "clip": clip_vision,
    "siglip": siglip_vision,
}


def patches(x: Float[Tensor, "B C h w"], size: int) -> Float[Tensor, "B P C*size*size"]:
    """Squares of size x size pixels, row by row; inside one: channels, then rows, then columns."""
    B, C, h, w = x.shape
    x = x.reshape(B, C, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def resized_positions(
    positions: Float[Tensor, "P D"], grid: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "Q D"]:
    """Positions of a grid's patches at the patches of another grid over the same image (bicubic).

    Source: Dosovitskiy et al. 2021, section 3.2.
    """
    if grid == new:
        return positions
    image = positions.unflatten(0, grid).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return image[0].flatten(1).T


def sincos_positions(
    grid: tuple[int, int], width: int, *, device: torch.device | None = None
) -> Float[Tensor, "P D"]:
    """Sinusoids of each patch's column, then of its row (Chen et al. 2021, "MoCo v3")."""
    rows, columns = (torch.arange(n, device=device) for n in grid)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    halves = (
        sinusoidal_positions(place.flatten(), width // 2, layout="halves")
        for place in (columns, rows)
    )
    return torch.cat(list(halves), -1)


def rotary_positions(
    grid: tuple[int, int],
    head_dim: int,
    base: float,
    *,
    extra: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """Cosines and sines (T, K/2): a quarter of a head's dims turn by row, a quarter by column.

    Args:
        extra: tokens before the patches that do not turn (the class token).
    """
    rows, columns = (torch.arange(n, device=device, dtype=torch.float64) for n in grid)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    turns = frequencies(head_dim // 2, base, device=device)
    angles = torch.cat([place.flatten()[:, None] * turns for place in (rows, columns)], -1)
    angles = F.pad(angles, (0, 0, extra, 0))
    return angles.cos().to(dtype), angles.sin().to(dtype)


class AttentionPooling(nn.Module):
    """A learned query attends to all states; then a feed-forward layer (Lee et al. 2019)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(config.width))
        self.attention = MultiHeadAttention(config.width, config.heads)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden, config.activation)

    def forward(
        self, states: Float[Tensor, "B T D"], implementation: Implementation
    ) -> Float[Tensor, "B D"]:
        query = self.probe.expand(states.shape[0], 1, -1)
        memory = self.attention.keys_values(states)
        x = self.attention(query, memory, implementation=implementation)
        return (x + self.feed_forward(self.norm(x)))[:, 0]


class ViT(nn.Module):
    """The skeleton behind `vit`; every method is a pure function of the parameters.

    Arguments that methods share:
        pixels: images, normalized; their sides are multiples of the patch's.
        layers: stop after so many, without the last norm; default: all, with it.
        key: for dropout; None evaluates without.
        maps: a list to which the attention weights of each layer (B, H, T, T) are appended.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        width, size = config.width, config.patch
        self.block = Block(lambda: Layer(config))
        channels = config.stem_channels
        if config.stem == "convolutions":
            pairs = itertools.pairwise(channels)
            self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in pairs)
            size = 1
        self.patches = nn.Conv2d(channels[-1], width, size, size, bias=config.patch_bias)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(width))
        if config.positions == "learned":
            rows, columns = config.grid
            self.positions = Embedding(config.class_token + rows * columns, width)
        if config.pre_norm:
            self.pre_norm = nn.LayerNorm(width, config.norm_eps)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, config.norm_eps)
        if config.pooling == "attention":
            self.pool = AttentionPooling(config)
        if config.pooler:
            self.pooler = nn.Linear(width, width)
        if config.projection is not None:
            self.projection = nn.Linear(width, config.projection, bias=config.projection_bias)

    def forward(self, pixels: Float[Tensor, "B C h w"], **options: Any) -> Float[Tensor, "B E"]:
        """One vector an image: what is pooled, projected. Options as in `hidden_states`."""
        pooled = self.pooled(pixels, **options)
        return pooled if self.config.projection is None else self.projection(pooled)

    def pooled(
        self,
        pixels: Float[Tensor, "B C h w"],
        *,
        layers: int | None = None,
        key: Int64[Tensor, "2"] | None = None,
        maps: list[Tensor] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B D"]:
        """What stands for the image, see `ViTConfig.pooling`.

        Raises:
            ValueError: pooling is None.
        """
        config = self.config
        alone = config.pooling == "class" and maps is None and not encoder.drops(config, key)
        states = self._states(pixels, layers, key, maps, implementation, alone)
        if config.pooling == "attention":
            x = self.pool(states, implementation)
        elif config.pooling == "mean":
            x = states[:, config.class_token :].mean(1)
        elif config.pooling == "class":
            x = states[:, 0]
        else:
            raise ValueError("a tower with pooling=None has states only: call hidden_states")
        x = self.norm(x) if config.norm == "pooled" else x
        return torch.tanh(self.pooler(x)) if config.pooler else x

    def hidden_states(
        self,
        pixels: Float[Tensor, "B C h w"],
        *,
        layers: int | None = None,
        key: Int64[Tensor, "2"] | None = None,
        maps: list[Tensor] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B T D"]:
        """The state of every token: the class token's if there is one, then the patches' by row.

        Raises:
            ValueError: pixels of another shape, more layers than there are.
        """
        return self._states(pixels, layers, key, maps, implementation, False)

    def _states(
        self,
        pixels: Tensor,
        layers: int | None,
        key: Tensor | None,
        maps: list[Tensor] | None,
        implementation: Implementation,
        alone: bool,
    ) -> Float[Tensor, "B T D"]:
        """Every token's state, or the first one's alone."""
        config = self.config
        layers = self._check(pixels, layers)
        grid = pixels.shape[-2] // config.patch, pixels.shape[-1] // config.patch
        first, rest = site_keys(key, 2)
        x = self._embed(pixels, grid)
        x = random.dropout(first, x, config.dropout)
        if config.pre_norm:
            x = self.pre_norm(x)
        rotary = None
        if config.positions == "rotary":
            rotary = rotary_positions(
                grid,
                config.width // config.heads,
                config.rotary_base,
                extra=int(config.class_token),
                device=x.device,
                dtype=torch.promote_types(x.dtype, torch.float32),
            )
        options: dict[str, Any] = {"rotary": rotary, "maps": maps, "implementation": implementation}
        if alone:
            options["at"] = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        blocks = self.blocks if layers is None else list(self.blocks)[:layers]
        x = encoder.run(self.block, blocks, x, rest, **options)
        return self.norm(x) if config.norm == "states" and layers is None else x

    def _check(self, pixels: Tensor, layers: int | None) -> int | None:
        config = self.config
        if pixels.ndim != 4 or pixels.shape[1] != config.channels:
            raise ValueError(
                f"pixels {tuple(pixels.shape)} must be (batch, {config.channels} channels, height, "
                "width); convert the image, or build a tower with its channels"
            )
        if any(n % config.patch or n == 0 for n in pixels.shape[-2:]):
            raise ValueError(
                f"height and width {tuple(pixels.shape[-2:])} must be multiples of patch "
                f"({config.patch}): resize or crop the image"
            )
        if layers is not None and not 0 <= layers <= config.depth:
            raise ValueError(f"layers ({layers}) must be at least 0 and at most {config.depth}")
        return layers

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        config, weight = self.config, self.patches.weight
        if config.stem == "convolutions":
            for convolution in self.stem:
                pixels = F.gelu(convolution(pixels))
        size = weight.shape[-1]
        x = F.linear(patches(pixels, size), weight.flatten(1), self.patches.bias)
        here = None
        if config.positions == "learned":
            own = self.positions.weight
            here = resized_positions(own[int(config.class_token) :], config.grid, grid)
        elif config.positions == "sincos":
            here = sincos_positions(grid, config.width, device=x.device).to(x.dtype)
        x = x if here is None else x + here
        if config.class_token:
            token = self.class_token
            if config.positions == "learned":
                token = token + self.positions.weight[0]
            x = torch.cat([token.expand(x.shape[0], 1, -1), x], 1)
        return x


def initializers(config: ViTConfig) -> Rules[Initializer]:
    """As for `encoder`, but patches start at LeCun's 1 / fan_in, a stem at He's 2 / fan_in."""
    fan = config.channels * config.patch**2 if config.stem == "linear" else config.width
    patches = (r"patches\.weight$", normal(fan**-0.5))
    stem = [(r"stem\.\d+\.weight$", kaiming_normal())] if config.stem == "convolutions" else []
    return [patches, *stem, *encoder.initializers(config.depth)]


def vit(config: ViTConfig) -> Functional:
    """The tower as pure functions; methods `forward`, `pooled` and `hidden_states`."""
    return functional(lambda: ViT(config), initializers(config))
