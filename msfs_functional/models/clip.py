"""Two towers that embed images and texts in one space (Radford et al. 2021, "CLIP"; Zhai et al.
2023, "SigLIP").

    image -> ViT -> pooled -> projection -> unit vector \\
                                                         scale * <u, v> (+ bias) = logit of a pair
    ids -> text tower -> pooled -> projection -> unit vector /

`text_tower(config)` is the text half alone: `hidden_states` condition a diffusion model.

Dimension key: B batch, T tokens, D width, E embedding.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation
from msfs_functional.layers import Activation, Embedding, site_keys
from msfs_functional.models import encoder
from msfs_functional.models.encoder import EncoderConfig, Layer
from msfs_functional.models.vit import ViT, ViTConfig, clip_vision, siglip_vision
from msfs_functional.models.vit import initializers as vit_initializers
from msfs_functional.params import Functional, Initializer, Rules, constant, functional
from msfs_functional.regions import Block


@dataclass(frozen=True)
class TextConfig(EncoderConfig):
    """Sizes and options of a text tower; the defaults are CLIP ViT-B's."""

    width: int = 512
    heads: int = 8
    hidden: int = 2048
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    vocab: int = 49408  # tokens
    max_length: int = 77  # tokens; longer sequences are refused
    is_causal: bool = True  # a token sees those before it only (CLIP); all of them (SigLIP)
    # Which state stands for the text: that of the first `eos`, of the largest id (the end of text
    # in CLIP's own vocabulary, and all that its first published configurations name), or the last.
    pooling: Literal["eos", "largest", "last"] = "eos"
    eos: int = 49407
    projection: int | None = 512  # width of the embedding; None leaves the pooled state
    projection_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.pooling == "eos" and not 0 <= self.eos < self.vocab:
            raise ValueError(f"eos ({self.eos}) must be an id below vocab ({self.vocab})")


class TextTower(nn.Module):
    """The skeleton behind `text_tower`; every method is a pure function of the parameters.

    Arguments that methods share:
        ids: tokens, padded on the right.
        lengths: (B,), tokens that are not padding, which is then seen by nobody. None: padding is
            text like any other, as CLIP and SigLIP were trained.
        key: for dropout; None evaluates without.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.block = Block(lambda: Layer(config))
        self.embedding = Embedding(config.vocab, config.width)
        self.positions = Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        if config.projection is not None:
            self.projection = nn.Linear(
                config.width, config.projection, bias=config.projection_bias
            )

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        lengths: Int[Tensor, "B"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B E"]:
        """One vector a text: the pooled state, projected; of any length, not yet 1."""
        options = {"lengths": lengths, "key": key, "implementation": implementation}
        pooled = self.pooled(ids, **options)
        return pooled if self.config.projection is None else self.projection(pooled)

    def hidden_states(
        self,
        ids: Int[Tensor, "B T"],
        *,
        lengths: Int[Tensor, "B"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B T D"]:
        """The state of every token after the last norm.

        Raises:
            ValueError: more tokens than max_length.
        """
        return self._states(ids, lengths, key, implementation, None)

    def _states(
        self,
        ids: Tensor,
        lengths: Tensor | None,
        key: Tensor | None,
        implementation: Implementation,
        at: Tensor | None,
    ) -> Float[Tensor, "B T D"]:
        """Every token's state, or that of one of each text alone."""
        T, config = ids.shape[-1], self.config
        if T > config.max_length:
            raise ValueError(
                f"{T} tokens exceed max_length ({config.max_length}); truncate the text"
            )
        first, rest = site_keys(key, 2)
        x = self.embedding(ids) + self.positions.weight[:T]
        x = random.dropout(first, x, config.dropout)
        mask: dict[str, Any] = {"is_causal": config.is_causal, "at": at}
        if lengths is not None:
            mask["key_lengths"] = lengths
        x = encoder.run(self.block, self.blocks, x, rest, implementation=implementation, **mask)
        return self.norm(x)

    def pooled(
        self,
        ids: Int[Tensor, "B T"],
        *,
        lengths: Int[Tensor, "B"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B D"]:
        """The state that stands for the text, see `TextConfig.pooling`."""
        if self.config.pooling == "last":
            at = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        else:
            chosen = ids if self.config.pooling == "largest" else (ids == self.config.eos).int()
            at = chosen.argmax(-1)
        dropping = encoder.drops(self.config, key)
        states = self._states(ids, lengths, key, implementation, None if dropping else at)
        return states.take_along_dim(at[:, None, None], 1)[:, 0] if dropping else states[:, 0]


def text_tower(config: TextConfig) -> Functional:
    """The text tower as pure functions; methods `forward`, `hidden_states` and `pooled`."""
    return functional(lambda: TextTower(config), encoder.initializers(config.depth))


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers with projections of one width, and the first values of scale and bias."""

    image: ViTConfig
    text: TextConfig
    scale: float = 1 / 0.07  # of a logit; learned as its logarithm
    bias: float | None = None  # of a logit; None has none (CLIP), -10 suits SigLIP

    def __post_init__(self):
        sides = [tower.projection or tower.width for tower in (self.image, self.text)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"the image tower embeds in {sides[0]} dims, the text tower in {sides[1]}: give "
                "both the same projection"
            )
        if self.scale <= 0:
            raise ValueError(f"scale ({self.scale}) must be positive")


def clip_b32(**options: Any) -> CLIPConfig:
    """CLIP ViT-B/32 (Radford et al. 2021), 151M parameters."""
    return CLIPConfig(clip_vision(), TextConfig(), **options)


def siglip_b16(**options: Any) -> CLIPConfig:
    """SigLIP B/16 at 224 pixels (Zhai et al. 2023), 203M parameters."""
    sizes = {"width": 768, "heads": 12, "hidden": 3072, "vocab": 32000, "max_length": 64}
    parts = {"activation": "gelu_tanh", "norm_eps": 1e-6, "is_causal": False, "pooling": "last"}
    text = TextConfig(**{**sizes, **parts, "projection": 768, "projection_bias": True})
    return CLIPConfig(siglip_vision(), text, **{"scale": 10.0, "bias": -10.0, **options})


class CLIP(nn.Module):
    """The skeleton behind `clip`; every method is a pure function of the parameters."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.image = ViT(config.image)
        self.text = TextTower(config.text)
        self.logit_scale = nn.Parameter(torch.empty(()))
        if config.bias is not None:
            self.logit_bias = nn.Parameter(torch.empty(()))

    def forward(
        self, pixels: Float[Tensor, "B C h w"], ids: Int[Tensor, "N T"], **options: Any
    ) -> Float[Tensor, "B N"]:
        """The logit of every pair: scale * cosine (+ bias)."""
        u, v = self.embed_image(pixels, **options), self.embed_text(ids, **options)
        logits = self.logit_scale.exp() * (u @ v.mT)
        return logits if self.config.bias is None else logits + self.logit_bias

    def embed_image(self, pixels: Float[Tensor, "B C h w"], **options: Any) -> Float[Tensor, "B E"]:
        """Unit vectors of images; options as in `ViT.hidden_states`."""
        return unit(self.image(pixels, **options))

    def embed_text(self, ids: Int[Tensor, "B T"], **options: Any) -> Float[Tensor, "B E"]:
        """Unit vectors of texts; options as in `TextTower`."""
        return unit(self.text(ids, **options))


def unit(x: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """x divided by its length, computed in float32; zeros stay zeros."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(x.dtype)


def clip(config: CLIPConfig) -> Functional:
    """Both towers as pure functions; methods `forward`, `embed_image` and `embed_text`."""
    depth = max(config.image.depth, config.text.depth)
    rules: Rules[Initializer] = [
        (r"^logit_scale$", constant(math.log(config.scale))),
        (r"^logit_bias$", constant(config.bias or 0.0)),
        (r"^image\.patches\.weight$", vit_initializers(config.image)[0][1]),
        *encoder.initializers(depth),
    ]
    return functional(lambda: CLIP(config), rules, strict=False)
