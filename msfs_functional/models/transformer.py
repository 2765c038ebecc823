"""The encoder-decoder Transformer (Vaswani et al. 2017, "Attention is all you need").

    source ids -> embedding + positions -> encoder layers -> memory
    target ids -> embedding + positions -> decoder layers, which attend to memory -> logits

`transformer(config)` gives pure functions: `init(seed)` and `apply(params, ..., method=...)`.
Training uses `forward` (or `hidden` with a fused loss), decoding `encode`, `init_cache`, `decode`.

Dimension key: B batch, S source tokens, T target tokens, D width, H heads, K head dim, V target
vocabulary, R beams (hypotheses of one sentence that decode side by side), L cache length.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation
from msfs_functional.layers import (
    Activation,
    Embedding,
    FeedForward,
    MultiHeadAttention,
    sinusoidal_positions,
    site_keys,
)
from msfs_functional.params import (
    Functional,
    Initializer,
    Params,
    Rules,
    functional,
    normal,
    ones,
    xavier_uniform,
    zeros,
)
from msfs_functional.regions import Block, region

Maps = dict[str, list[Tensor]]  # where attention weights are collected, by kind

# Weight decay for matrices only: norms, biases and embeddings are left alone.
DECAY: Rules[bool] = [(r"norm|bias|embedding", False), (r"", True)]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options; the defaults are the paper's base model."""

    vocab: int  # source tokens; the target's too unless target_vocab is given
    target_vocab: int | None = None  # target tokens
    width: int = 512
    depth: int = 6  # encoder layers
    decoder_depth: int | None = None  # decoder layers; default: depth
    heads: int = 8
    hidden: int = 2048  # width of the feed-forward layers
    dropout: float = 0.1  # probability, on embeddings and on what each sublayer adds
    attention_dropout: float = 0.0  # probability, on attention weights
    hidden_dropout: float = 0.0  # probability, inside the feed-forward layers
    norm: Literal["post", "pre"] = (
        "post"  # normalise after each sum (paper) or before each sublayer
    )
    final_norm: bool | None = None  # one more norm after the last layer; default: with norm="pre"
    norm_eps: float = 1e-5
    activation: Activation = "relu"
    tie: Literal["all", "decoder", "none"] = "all"  # which embeddings share the output's matrix
    scale_embedding: bool = True  # multiply embeddings by sqrt(width) (section 3.4)
    positions: Literal["interleaved", "halves"] = "interleaved"  # layout of sines and cosines
    bias: bool = True  # in projections, feed-forward layers and norms
    output_bias: bool = False  # added to the logits
    max_length: int = 1024  # tokens; longer sequences are refused

    def __post_init__(self):
        sizes = ("vocab", "width", "depth", "heads", "hidden", "max_length")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("target_vocab", "decoder_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1, or None for the default")
        if self.width % self.heads:
            fitting = max(n for n in range(1, self.heads) if self.width % n == 0)
            unit = self.heads * (1 + self.heads % 2)  # positions ask for an even width
            raise ValueError(
                f"heads ({self.heads}) must divide width ({self.width}): use {fitting}, or a width "
                f"of {self.width + -self.width % unit}"
            )
        if self.width % 2:
            raise ValueError(f"width ({self.width}) must be even for sinusoidal positions")
        for name in ("dropout", "attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be in [0, 1)")
        if self.tie == "all" and self.target_vocab not in (None, self.vocab):
            raise ValueError(
                f"tie='all' shares one matrix, so target_vocab ({self.target_vocab}) must equal "
                f"vocab ({self.vocab}); use tie='decoder' for separate vocabularies"
            )


def tiny(vocab: int, **options: Any) -> TransformerConfig:
    """The small model that does best on Multi30k (Wu et al. 2021, "Good for misconceived reasons",
    table 2: 4 + 4 layers of 128)."""
    sizes = {"width": 128, "depth": 4, "heads": 4, "hidden": 256, "dropout": 0.3}
    return TransformerConfig(vocab, **{**sizes, **options})


def base(vocab: int, **options: Any) -> TransformerConfig:
    """The paper's base model (table 3): 6 + 6 layers of 512, 65M parameters at 37k tokens."""
    return TransformerConfig(vocab, **options)


def big(vocab: int, **options: Any) -> TransformerConfig:
    """The paper's big model (table 3): 6 + 6 layers of 1024, 213M parameters at 37k tokens."""
    sizes = {"width": 1024, "heads": 16, "hidden": 4096, "dropout": 0.3}
    return TransformerConfig(vocab, **{**sizes, **options})


PRESETS: dict[str, Callable[..., TransformerConfig]] = {"tiny": tiny, "base": base, "big": big}


class Cache(NamedTuple):
    """What decoding one more token needs: goes into `decode`, comes out of it.

    Hypotheses of one sentence share its memory, which is never copied. Their own keys stay where
    they were written, too: `slots` says in whose row the j-th token of hypothesis r lies, and
    reordering the beam (`reorder_cache`) rearranges this small table alone.
    """

    keys: tuple[Float[Tensor, "B H R L K"], ...]  # of the target tokens, one for each layer
    values: tuple[Float[Tensor, "B H R L K"], ...]
    memory_keys: tuple[Float[Tensor, "B H S K"], ...]
    memory_values: tuple[Float[Tensor, "B H S K"], ...]
    source_lengths: Int[Tensor, "B"]
    slots: Int[Tensor, "B R L"]


def reorder_cache(cache: Cache, rows: Int[Tensor, "B*R"]) -> Cache:
    """The cache in which hypothesis n continues hypothesis rows[n] of the same sentence."""
    B, R, L = cache.slots.shape
    parents = (rows.reshape(B, R, 1) % R).expand(B, R, L)
    return cache._replace(slots=cache.slots.gather(1, parents))


@region
def with_positions(
    x: Float[Tensor, "B T D"],
    position: Int[Tensor, ""] | int,
    key: Int64[Tensor, "2"] | None,
    *,
    scale: float,
    layout: Literal["interleaved", "halves"],
    dropout: float,
) -> Float[Tensor, "B T D"]:
    """Scaled embeddings plus sinusoids from `position` on, dropped out."""
    positions = torch.arange(x.shape[-2], device=x.device) + position
    waves = sinusoidal_positions(positions, x.shape[-1], layout=layout)
    x = x * scale if scale != 1 else x
    return random.dropout(key, x + waves.to(x.dtype), dropout)


class Layer(nn.Module):
    """Self-attention, then (in the decoder) attention to the memory, then a feed-forward layer.

    Each is a residual: norm(x + f(x)) with norm="post", x + f(norm(x)) with norm="pre".
    """

    SITES = 6  # places that drop, a key for each

    def __init__(self, config: TransformerConfig, cross: bool):
        super().__init__()
        width, bias = config.width, config.bias
        self.config = config
        self.self_attention = MultiHeadAttention(width, config.heads, bias=bias)
        self.self_attention_norm = nn.LayerNorm(width, config.norm_eps, bias=bias)
        if cross:
            self.cross_attention = MultiHeadAttention(width, config.heads, bias=bias)
            self.cross_attention_norm = nn.LayerNorm(width, config.norm_eps, bias=bias)
        self.feed_forward = FeedForward(width, config.hidden, config.activation, bias=bias)
        self.feed_forward_norm = nn.LayerNorm(width, config.norm_eps, bias=bias)

    def residual(
        self, x: Tensor, f: Callable[[Tensor], Tensor], norm: nn.LayerNorm, key: Tensor | None
    ) -> Tensor:
        if self.config.norm == "pre":
            return x + random.dropout(key, f(norm(x)), self.config.dropout)
        return norm(x + random.dropout(key, f(x), self.config.dropout))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        key: Int64[Tensor, "2"] | None,
        mask: dict[str, Any],
        *,
        memory: Float[Tensor, "B S D"] | tuple[Tensor, Tensor] | None = None,
        memory_lengths: Int[Tensor, "B"] | None = None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        maps: Maps | None = None,
        implementation: Implementation,
    ) -> Float[Tensor, "B T D"]:
        """`mask` is the self-attention's; `memory` may be given as its keys and values."""
        config, maps = self.config, maps or {}
        keys = site_keys(key, self.SITES)
        if isinstance(memory, Tensor):
            memory = self.cross_attention.keys_values(memory)
        options = {"dropout": config.attention_dropout, "implementation": implementation}

        def attend_self(y: Tensor) -> Tensor:
            collect = maps.get("encoder" if memory is None else "decoder")
            return self.self_attention(y, store=store, maps=collect, key=keys[0], **mask, **options)

        def attend_memory(y: Tensor) -> Tensor:
            lengths, collect = memory_lengths, maps.get("cross")
            return self.cross_attention(
                y, memory, maps=collect, key=keys[2], key_lengths=lengths, **options
            )

        def feed_forward(y: Tensor) -> Tensor:
            return self.feed_forward(y, key=keys[4], dropout=config.hidden_dropout)

        x = self.residual(x, attend_self, self.self_attention_norm, keys[1])
        if memory is not None:
            x = self.residual(x, attend_memory, self.cross_attention_norm, keys[3])
        return self.residual(x, feed_forward, self.feed_forward_norm, keys[5])


class Transformer(nn.Module):
    """The skeleton behind `transformer`; every method is a pure function of the parameters."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width, vocab = config.width, config.target_vocab or config.vocab
        # A tied embedding is one module under one name: functional_call would not put a module that
        # has several names back as it was.
        self.tied = config.tie == "all"
        if self.tied:
            self.embedding = Embedding(vocab, width)
        else:
            self.source_embedding = Embedding(config.vocab, width)
            self.target_embedding = Embedding(vocab, width)
        depth, decoder_depth = config.depth, config.decoder_depth or config.depth
        self.encoder_block = Block(lambda: Layer(config, cross=False))
        self.decoder_block = Block(lambda: Layer(config, cross=True))
        self.encoder = nn.ModuleList(Layer(config, cross=False) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(config, cross=True) for _ in range(decoder_depth))
        final_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.encoder_norm, self.decoder_norm = (
            nn.LayerNorm(width, config.norm_eps, bias=config.bias) if final_norm else nn.Identity()
            for _ in range(2)
        )
        self.output = nn.Linear(width, vocab, bias=config.output_bias)
        if config.tie != "none":
            embedding = self.embedding if self.tied else self.target_embedding
            self.output.weight = embedding.weight

    def forward(
        self,
        source: Int[Tensor, "B S"],
        target_in: Int[Tensor, "B T"],
        *,
        source_lengths: Int[Tensor, "B"] | None = None,
        target_lengths: Int[Tensor, "B"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token that follows each target token.

        Args:
            source, target_in: token ids, padded at the end.
            source_lengths: tokens that are not padding; a row of length 0 stays finite.
            target_lengths: the same of target_in; saves work, changes nothing before the padding.
            key: for dropout; None evaluates without.
            implementation: of attention.

        Raises:
            ValueError: more tokens than max_length.
        """
        states = self.hidden(
            source,
            target_in,
            source_lengths=source_lengths,
            target_lengths=target_lengths,
            key=key,
            implementation=implementation,
        )
        return self.output(states)

    def hidden(
        self,
        source: Int[Tensor, "B S"],
        target_in: Int[Tensor, "B T"],
        *,
        source_lengths: Int[Tensor, "B"] | None = None,
        target_lengths: Int[Tensor, "B"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
        maps: Maps | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Decoder states, before the output projection: for `losses.linear_cross_entropy`."""
        encoder_key, decoder_key = site_keys(key, 2)
        options = {"implementation": implementation, "maps": maps}
        memory = self.encode(source, source_lengths, encoder_key, **options)
        first, *keys = site_keys(decoder_key, 1 + len(self.decoder))
        y = self.embed("target", target_in, first)
        mask = {"is_causal": True, "key_lengths": target_lengths}
        options |= {"memory": memory, "memory_lengths": source_lengths}
        for layer, layer_key in zip(self.decoder, keys, strict=True):
            y = self.decoder_block(layer, y, layer_key, mask, **options)
        return self.decoder_norm(y)

    def encode(
        self,
        source: Int[Tensor, "B S"],
        source_lengths: Int[Tensor, "B"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        *,
        implementation: Implementation = "flash",
        maps: Maps | None = None,
    ) -> Float[Tensor, "B S D"]:
        """The memory: what the encoder makes of the source."""
        first, *keys = site_keys(key, 1 + len(self.encoder))
        x = self.embed("source", source, first)
        mask, options = {"key_lengths": source_lengths}, {"implementation": implementation}
        for layer, layer_key in zip(self.encoder, keys, strict=True):
            x = self.encoder_block(layer, x, layer_key, mask, maps=maps, **options)
        return self.encoder_norm(x)

    def embed(
        self,
        side: Literal["source", "target"],
        tokens: Int[Tensor, "B T"],
        key: Int64[Tensor, "2"] | None = None,
        position: Int[Tensor, ""] | int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Embeddings plus positions from `position` on, dropped out."""
        T, config = tokens.shape[-1], self.config
        if T > config.max_length:
            raise ValueError(
                f"{T} tokens exceed max_length ({config.max_length}); split the sequence or raise "
                "max_length"
            )
        embedding = self.embedding if self.tied else getattr(self, f"{side}_embedding")
        x = embedding(tokens)
        scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        return with_positions(
            x, position, key, scale=scale, layout=config.positions, dropout=config.dropout
        )

    def init_cache(
        self,
        memory: Float[Tensor, "B S D"],
        source_lengths: Int[Tensor, "B"] | None,
        max_length: int,
        beams: int = 1,
    ) -> Cache:
        """An empty cache for `beams` hypotheses of at most max_length tokens for each sentence."""
        B, S, _ = memory.shape
        if not 1 <= max_length <= self.config.max_length:
            raise ValueError(
                f"max_length ({max_length}) must be at least 1 and at most the model's "
                f"({self.config.max_length})"
            )
        if beams < 1:
            raise ValueError(f"beams ({beams}) must be at least 1")
        if source_lengths is None:
            source_lengths = torch.full((B,), S, device=memory.device)
        pairs = [
            layer.cross_attention.keys_values(memory)
            for layer in cast(Sequence[Layer], self.decoder)
        ]
        heads = self.config.heads
        shape = (B, heads, beams, max_length, self.config.width // heads)
        empty = tuple(memory.new_zeros(shape) for _ in self.decoder)
        slots = torch.arange(beams, device=memory.device)[:, None].expand(B, -1, max_length)
        return Cache(
            keys=empty,
            values=tuple(torch.zeros_like(x) for x in empty),
            memory_keys=tuple(k for k, _ in pairs),
            memory_values=tuple(v for _, v in pairs),
            source_lengths=source_lengths,
            slots=slots.contiguous(),
        )

    def start(
        self,
        source: Int[Tensor, "B S"],
        source_lengths: Int[Tensor, "B"] | None,
        max_length: int,
        beams: int = 1,
        *,
        implementation: Implementation = "flash",
    ) -> Cache:
        """`encode` and `init_cache` in one: what decoding of these sources begins with."""
        memory = self.encode(source, source_lengths, implementation=implementation)
        return self.init_cache(memory, source_lengths, max_length, beams)

    def decode(
        self,
        tokens: Int[Tensor, "B*R T"],
        cache: Cache,
        position: Int[Tensor, ""] | int,
        *,
        implementation: Implementation = "flash",
    ) -> tuple[Float[Tensor, "B*R T V"], Cache]:
        """Logits after `tokens`, which stand at `position` onwards, and the cache that holds them.

        Equal to the last T rows of the full forward over all tokens given so far. Rows are grouped
        by sentence: hypothesis r of sentence b is row b R + r. Positions beyond the cache's length
        are the caller's mistake.
        """
        (B, R, L), T = cache.slots.shape, tokens.shape[-1]
        at = torch.arange(T, device=tokens.device) + position
        own = torch.arange(R, device=tokens.device)
        slots = cache.slots.index_copy(2, at, own[:, None].expand(B, R, T))
        past = torch.arange(L, device=tokens.device) <= at[:, None]
        if R > 1:
            # Queries of all hypotheses stand side by side before the keys of all hypotheses, and
            # each sees those on its own line of descent.
            lineage = slots[:, :, None, None, :] == own[:, None]
            mask = {"bias": (lineage & past[:, None, :]).reshape(B, 1, R * T, R * L)}
        else:
            mask = {"bias": past} if T > 1 else {"key_lengths": (at + 1).expand(B)}
        kept: list[tuple[Tensor, Tensor]] = []

        def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            old = cache.keys[len(kept)], cache.values[len(kept)]
            new = (x.unflatten(2, (R, T)) for x in (k, v))
            k, v = (x.index_copy(3, at, y) for x, y in zip(old, new, strict=True))
            kept.append((k, v))
            return k.flatten(2, 3), v.flatten(2, 3)

        y = self.embed("target", tokens, position=position).reshape(B, R * T, -1)
        pairs = zip(cache.memory_keys, cache.memory_values, strict=True)
        for layer, memory in zip(cast(Sequence[Layer], self.decoder), pairs, strict=True):
            lengths = {"memory": memory, "memory_lengths": cache.source_lengths}
            y = layer(y, None, mask, **lengths, store=store, implementation=implementation)
        logits = self.output(self.decoder_norm(y)).reshape(B * R, T, -1)
        keys, values = zip(*kept, strict=True)
        return logits, cache._replace(keys=keys, values=values, slots=slots)

    def attention_maps(
        self,
        source: Int[Tensor, "B S"],
        target_in: Int[Tensor, "B T"],
        *,
        source_lengths: Int[Tensor, "B"] | None = None,
        target_lengths: Int[Tensor, "B"] | None = None,
    ) -> dict[str, Float[Tensor, "layers B H T S"]]:
        """Weights of all layers: "encoder" (S x S), "decoder" (T x T) and "cross" (T x S)."""
        maps: Maps = {"encoder": [], "decoder": [], "cross": []}
        lengths = {"source_lengths": source_lengths, "target_lengths": target_lengths}
        self.hidden(source, target_in, **lengths, maps=maps, implementation="reference")
        return {name: torch.stack(weights) for name, weights in maps.items()}


def transformer(config: TransformerConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, ..., method="forward")`."""
    initializers: Rules[Initializer] = [
        (r"norm\.weight$", ones),
        (r"bias$", zeros),
        (r"embedding", normal(config.width**-0.5 if config.scale_embedding else 0.02)),
        (r"weight$", xavier_uniform()),
    ]
    return functional(lambda: Transformer(config), initializers, strict=False)


def decode_step(
    model: Functional, *, implementation: Implementation = "flash"
) -> Callable[[Params, Tensor, Cache, Tensor], tuple[Tensor, Cache]]:
    """`decode` in the form of module `decoding`: (params, tokens (N,), cache, position) -> ...

    functools.partial(decode_step(model), params) is the step_fn of one model,
    decoding.ensemble_step(decode_step(model), stacked_params) that of an ensemble.
    """

    def step(params: Params, tokens: Tensor, cache: Cache, position: Tensor):
        arguments = (tokens[:, None], cache, position)
        logits, cache = model.apply(
            params, *arguments, method="decode", implementation=implementation
        )
        return logits[:, -1], cache

    return step


def output_weight(params: Params) -> Float[Tensor, "V D"]:
    """The matrix of the output projection, wherever it is tied to."""
    names = ("output.weight", "target_embedding.weight", "embedding.weight")
    return next(params[name] for name in names if name in params)
