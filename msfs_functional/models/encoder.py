"""Layers in which every token may see every other: what image and text towers are made of.

    x = x + attention(norm(x));  x = x + feed_forward(norm(x))

Dimension key: B batch, T tokens, D width, H heads, K head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation, attention, attention_weights
from msfs_functional.layers import (
    ACTIVATIONS,
    Activation,
    FeedForward,
    MultiHeadAttention,
    fused_linear,
    site_keys,
)
from msfs_functional.params import Initializer, Rules, normal, ones, zeros
from msfs_functional.regions import Block
from msfs_functional.rotary import rotate

Rotary = tuple[Tensor, Tensor]  # cosines and sines, see `rotary.rotate`


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and options that towers share."""

    width: int = 768
    depth: int = 12  # layers
    heads: int = 12
    hidden: int = 3072  # width of the feed-forward layers
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    dropout: float = 0.0  # probability, on embeddings and on what each sublayer adds
    attention_dropout: float = 0.0  # probability, on attention weights

    def __post_init__(self):
        for name in ("width", "depth", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r}) must be in {list(ACTIVATIONS)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be in [0, 1)")


class Layer(nn.Module):
    """Self-attention, then a feed-forward layer, each added to its input."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.attention = MultiHeadAttention(width, config.heads)
        self.feed_forward_norm = nn.LayerNorm(width, config.norm_eps)
        self.feed_forward = FeedForward(width, config.hidden, config.activation)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        key: Int64[Tensor, "2"] | None,
        *,
        rotary: Rotary | None = None,
        maps: list[Tensor] | None = None,
        at: Int64[Tensor, "B"] | None = None,
        implementation: Implementation = "flash",
        **mask: Any,
    ) -> Float[Tensor, "B T D"]:
        """The layer's output; with `at` that of one token of each row alone, (B, 1, D).

        A tower that reads one token of its last layer needs no more, nor its gradient. Without
        dropout, which draws by place, and without maps.
        """
        if at is not None:
            return self.one(x, at, rotary, implementation, mask)
        keys, rate = site_keys(key, 3), self.config.dropout
        y = self.attend(self.attention_norm(x), keys[0], rotary, maps, implementation, mask)
        x = x + random.dropout(keys[1], y, rate)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + random.dropout(keys[2], y, rate)

    def one(
        self,
        x: Float[Tensor, "B T D"],
        at: Int64[Tensor, "B"],
        rotary: Rotary | None,
        implementation: Implementation,
        mask: dict[str, Any],
    ) -> Float[Tensor, "B 1 D"]:
        layer, here = self.attention, at[:, None, None]
        normed = self.attention_norm(x)
        q = layer.split_heads(layer.q(normed.take_along_dim(here, 1)))
        k, v = layer.keys_values(normed)
        if rotary is not None:
            q, k = rotate(q, *(x[at][:, None, None] for x in rotary)), rotate(k, *rotary)
        seen = dict(mask)
        if seen.pop("is_causal", False):  # a token sees those up to itself
            lengths = seen.get("key_lengths")
            seen["key_lengths"] = at + 1 if lengths is None else (at + 1).minimum(lengths)
        heads = attention(q, k, v, implementation=implementation, **seen)
        x = x.take_along_dim(here, 1) + layer.o(heads.transpose(-2, -3).flatten(-2))
        return x + self.feed_forward(self.feed_forward_norm(x))

    def attend(
        self,
        x: Tensor,
        key: Tensor | None,
        rotary: Rotary | None,
        maps: list[Tensor] | None,
        implementation: Implementation,
        mask: dict[str, Any],
    ) -> Tensor:
        layer, rate = self.attention, self.config.attention_dropout
        q, k, v = map(layer.split_heads, fused_linear(x, layer.q, layer.k, layer.v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if maps is not None:
            maps.append(attention_weights(q, k, **mask))
        if key is not None and rate > 0:
            mask = {**mask, "dropout": rate, "dropout_key": key}
        heads = attention(q, k, v, implementation=implementation, **mask)
        return layer.o(heads.transpose(-2, -3).flatten(-2))


def run(
    block: Block,
    layers: Iterable[nn.Module],
    x: Float[Tensor, "B T D"],
    key: Int64[Tensor, "2"] | None,
    *,
    at: Int64[Tensor, "B"] | None = None,
    **options: Any,
) -> Float[Tensor, "B T D"]:
    """x through the layers, one after another; options as in `Layer.forward`.

    With `at` only that token of each row is returned, (B, 1, D); the last layer computes no other.
    """
    layers = list(layers)
    for layer, layer_key in zip(layers, site_keys(key, len(layers)), strict=True):
        last = {"at": at} if at is not None and layer is layers[-1] else {}
        x = block(layer, x, layer_key, **options, **last)
    return x if at is None or layers else x.take_along_dim(at[:, None, None], 1)


def drops(config: EncoderConfig, key: Tensor | None) -> bool:
    """Whether a call with this key draws dropout."""
    return key is not None and max(config.dropout, config.attention_dropout) > 0


def initializers(depth: int) -> Rules[Initializer]:
    """N(0, 0.02^2), less for matrices that write into the residual stream (Radford et al. 2019)."""
    return [
        (r"norm\.weight$", ones),
        (r"bias$", zeros),
        (r"\.(o|down)\.weight$", normal(0.02 / (2 * depth) ** 0.5)),
        (r"", normal(0.02)),
    ]
