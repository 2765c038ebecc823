"""Two towers that embed images and texts in one space (Radford et al. 2021, "CLIP"; Zhai et al.
2023, "SigLIP").

    image -> ViT -> pooled -> projection -> unit vector \\
                                                         scale * <u, v> (+ bias) = logit of a pair
    ids -> text tower -> pooled -> projection -> unit vector /

`text_tower(config)` is the text half alone: `hidden_states` condition a diffusion model.

Dimension key: B batch, T tokens, D width, E embedding.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation
from msfs_functional.layers import Activation, site_keys
from msfs_functional.models import encoder
from msfs_functional.models.encoder import EncoderConfig, Layer
from msfs_functional.params import Functional, functional
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
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
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
        T, config = ids.shape[-1], self.config
        if T > config.max_length:
            raise ValueError(
                f"{T} tokens exceed max_length ({config.max_length}); truncate the text"
            )
        first, rest = site_keys(key, 2)
        x = self.embedding(ids) + self.positions.weight[:T]
        x = random.dropout(first, x, config.dropout)
        mask: dict[str, Any] = {"is_causal": config.is_causal}
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
        states = self.hidden_states(ids, lengths=lengths, key=key, implementation=implementation)
        if self.config.pooling == "last":
            return states[:, -1]
        at = ids if self.config.pooling == "largest" else (ids == self.config.eos).int()
        return states.take_along_dim(at.argmax(-1)[:, None, None], 1)[:, 0]


def text_tower(config: TextConfig) -> Functional:
    """The text tower as pure functions; methods `forward`, `hidden_states` and `pooled`."""
    return functional(lambda: TextTower(config), encoder.initializers(config.depth))
