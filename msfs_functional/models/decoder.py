"""The decoder-only Transformer: GPT-2, Llama 3, Qwen 3, Gemma 2, Mistral and SmolLM2 are settings.

    token ids -> embedding (+ positions) -> blocks -> norm -> logits of the token that follows

`decoder(config)` gives pure functions: `init(seed)` and `apply(params, ..., method=...)`. What a
block computes is a pure function of that block's parameters (`decoder_block`); modules only hold
them. Settings are `decoder_config`'s, the form for `generation` is `decoder_generation`'s.

Dimension key: B batch, T tokens, D width, G key heads, K head dim, V vocabulary, L cache length
(tokens).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from msfs_kernels import sum_norm
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation
from msfs_functional.layers import Embedding, on_gpu_alone, site_keys
from msfs_functional.models.decoder_block import (
    AttentionFn,
    BlockFn,
    Context,
    Terms,
    attention_by,
    block,
    gain_of,
    normalize,
    whole,
    within,
)
from msfs_functional.models.decoder_config import (
    PRESETS,
    DecoderConfig,
    gpt2,
    large,
    nano,
    small,
    tiny,
)
from msfs_functional.params import (
    Functional,
    Initializer,
    Params,
    Rules,
    functional,
    normal,
    ones,
    zeros,
)
from msfs_functional.regions import active, region_of
from msfs_functional.rotary import rotary_table

__all__ = [
    "DECAY",
    "PRESETS",
    "AttentionFn",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "block",
    "decoder",
    "fuse",
    "gpt2",
    "large",
    "nano",
    "output_weight",
    "small",
    "tiny",
    "unfuse",
]

# Weight decay for matrices only: norms, biases and embeddings are left alone.
DECAY: Rules[bool] = [(r"norm|bias|embedding|positions", False), (r"", True)]


class Cache(NamedTuple):
    """Keys and values of the tokens so far: goes into `decode`, comes out of it.

    The token at position p of a row lies in slot p. A token sees the slots up to its own, so what
    padding left in those beyond is never seen, and later overwritten.
    """

    keys: tuple[Float[Tensor, "B G L K"], ...]  # rotated, one for each block
    values: tuple[Float[Tensor, "B G L K"], ...]


@functools.lru_cache
def block_fn(config: DecoderConfig) -> BlockFn:
    """`block` with the config bound: one object for all blocks, so what is made of it is kept."""
    return functools.partial(block, config=config)


class Norm(nn.Module):
    """Holds the gain of a norm, and its bias."""

    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        if bias:
            self.bias = nn.Parameter(torch.empty(width))


class Block(nn.Module):
    """Holds a block's parameters; its forward is `block`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, hidden = config.width, config.hidden
        self.fn = block_fn(config)
        q, k, v = config.projections
        inner = {"qkv": q + k + v} if config.fused else {"q": q, "k": k, "v": v}
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, rows, bias=config.qkv_bias) for name, rows in inner.items()}
        )
        self.attention["o"] = nn.Linear(q, width, bias=config.output_bias)
        if config.qk_norm:
            self.attention["q_norm"] = Norm(config.size_of_head)
            self.attention["k_norm"] = Norm(config.size_of_head)
        inner = {"up": hidden}
        if config.gated:
            inner = {"gate_up": 2 * hidden} if config.fused else {"gate": hidden, "up": hidden}
        self.feed_forward = nn.ModuleDict(
            {name: nn.Linear(width, rows, bias=config.hidden_bias) for name, rows in inner.items()}
        )
        self.feed_forward["down"] = nn.Linear(hidden, width, bias=config.hidden_bias)
        for name in ("attention", "feed_forward"):
            setattr(self, f"{name}_norm", Norm(width, config.norm_bias))
            if config.post_norm:
                setattr(self, f"{name}_post_norm", Norm(width, config.norm_bias))

    def forward(
        self,
        x: Tensor | Terms,
        key: Tensor | None,
        context: Context,
        cache: tuple[Tensor, Tensor] | None = None,
        around_block: Callable[[BlockFn], BlockFn] | None = None,
    ) -> tuple[Any, tuple[Tensor, Tensor] | None]:
        fn = (around_block or region_of)(self.fn)
        return fn(dict(self.named_parameters()), x, key, context, cache)


class Decoder(nn.Module):
    """The skeleton behind `decoder`; every method is a pure function of the parameters.

    Arguments that methods share:
        tokens: ids; or give `embeddings` (B, T, D) in their place, what `embed` returns with (say)
            an image's spliced in.
        positions: (T,) or (B, T), of the tokens; default 0, 1, 2, ... Packed documents count anew
            from 0 each.
        segment_ids: (B, T); tokens see those of the same id only: packed documents, or padding on
            the left with an id of its own.
        key_lengths: (B,), tokens that are not padding on the right. What stands after them is
            nobody's: it changes nothing before.
        prefix_lengths: (B,), tokens at the start that see each other (prefix-LM).
        visible: (B, 1, T, T), true where a query may look at a key, if the rest allows it too: any
            mask that has no name here.
        key: for dropout; None evaluates without.
        implementation: of attention, or a function in place of `attention.attention` with its
            signature (ring attention over a mesh).
        around_block: a function of `block` (config bound) to a function with its signature, called
            in its place: recompute it, gather its parameters. The function that it is given is one
            and the same for all blocks. None: a region (`regions.region_of`).
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab, config.width)
        if config.positions == "learned":
            self.positions = Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = Norm(config.width, config.norm_bias)
        if not config.tied:
            self.output = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, tokens: Int[Tensor, "B T"] | None, **options: Any) -> Float[Tensor, "B T V"]:
        """Logits of the token that follows each token; options as in `hidden`."""
        return self.logits(self.hidden(tokens, **options))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"] | None,
        *,
        embeddings: Float[Tensor, "B T D"] | None = None,
        positions: Int[Tensor, "*B T"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
        key_lengths: Int[Tensor, "B"] | None = None,
        prefix_lengths: Int[Tensor, "B"] | None = None,
        visible: Bool[Tensor, "B 1 T T"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation | AttentionFn = "flash",
        around_block: Callable[[BlockFn], BlockFn] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """States after the last norm: for `losses.linear_cross_entropy` (with
        softcap=config.logit_softcap), for heads of all kinds.

        Raises:
            ValueError: more tokens than max_length; both or neither of tokens and embeddings.
        """
        x: Any = self._inputs(tokens, embeddings)
        T = x.shape[-2]
        if positions is None:
            positions = torch.arange(T, device=x.device)

        def mask(window: int | None) -> dict[str, Any]:
            others = {"segment_ids": segment_ids, "key_lengths": key_lengths}
            if prefix_lengths is not None and window is not None and window < T:
                near = within(window, prefix_lengths, T)
                return {"bias": near if visible is None else near & visible, **others}
            same = {"is_causal": True, "prefix_lengths": prefix_lengths, "bias": visible}
            return {**same, **others}

        keys = site_keys(key, 1 + self.config.depth)
        contexts = self._contexts(x, positions, implementation, mask, None, False)
        alone = around_block is None and active() is not None  # blocks compiled, each on its own
        x = self._start(x, positions, keys.pop(), apart=alone)
        if isinstance(x, tuple) and self._adds_in_norm(x):
            sum_norm.expect(x[0], *self._last_norm())
        for i, layer in enumerate(self.blocks):
            context = contexts[self.config.window(i)]
            x, _ = layer(x, keys[i], context, around_block=around_block)
        return self._final(x)

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of tokens, without positions."""
        x = self.embedding(tokens)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def logits(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits of the token that follows, from `hidden`'s states."""
        logits = F.linear(states, (self.embedding if self.config.tied else self.output).weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def init_cache(
        self,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Cache:
        """An empty cache for `batch` rows of at most max_length tokens."""
        if not 1 <= max_length <= self.config.max_length:
            raise ValueError(
                f"max_length ({max_length}) must be at least 1 and at most the model's "
                f"({self.config.max_length})"
            )
        config = self.config
        shape = (batch, config.kv_heads or config.heads, max_length, config.size_of_head)

        def empty() -> tuple[Tensor, ...]:
            zeros = (torch.zeros(shape, dtype=dtype, device=device) for _ in self.blocks)
            return tuple(zeros)

        return Cache(empty(), empty())

    def decode(
        self, tokens: Int[Tensor, "B T"] | None, cache: Cache, position: Any = 0, **options: Any
    ) -> tuple[Float[Tensor, "B T V"], Cache]:
        """Logits after `tokens`, and the cache that holds them; arguments as in `extend`."""
        states, cache = self.extend(tokens, cache, position, **options)
        return self.logits(states), cache

    def extend(
        self,
        tokens: Int[Tensor, "B T"] | None,
        cache: Cache,
        position: Int[Tensor, "*B"] | int = 0,
        *,
        pads: Int[Tensor, "B"] | None = None,
        embeddings: Float[Tensor, "B T D"] | None = None,
        prefix_lengths: Int[Tensor, "B"] | None = None,
        donate: bool = False,
        implementation: Implementation | AttentionFn = "flash",
        around_block: Callable[[BlockFn], BlockFn] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Cache]:
        """States of `tokens`, which follow what the cache holds, and the cache that holds them too.

        Equal to the last T rows of `hidden` over all tokens so far. Rows may have different
        lengths: after prompts padded on the right, go on from `position` = their lengths.

        Args:
            tokens: one for each row, or many (a prompt, the next part of one).
            position: of each row's first token; one number for all rows, or (B,). The number 0
                (no tensor) says that the cache is empty, which is faster than finding it masked.
            pads: tokens at the left of each row that are padding; `position` is that of the first
                token after them. Their own states mean nothing.
            prefix_lengths: tokens at the start, without pads, that see each other (prefix-LM); only
                with position 0, and all of them in this call.
            donate: write into the cache's own memory; the cache that goes in is then spent.

        Positions beyond the cache's length are the caller's mistake.
        """
        x = self._inputs(tokens, embeddings)
        (B, T, _), L = x.shape, cache.keys[0].shape[-2]
        fresh = isinstance(position, int) and position == 0
        if T > L:
            raise ValueError(f"{T} tokens exceed the cache's length ({L}); init_cache a longer one")
        if prefix_lengths is not None and not fresh:
            raise ValueError("prefix_lengths goes with position 0: the whole prefix in one call")
        if pads is not None:  # go to the right, where nobody sees them
            turn = torch.arange(T, device=x.device) + pads[:, None]
            x = x.take_along_dim((turn % T)[..., None], 1)
        start = position[..., None] if isinstance(position, Tensor) else position
        positions = start + torch.arange(T, device=x.device)
        slots = positions.expand(B, T)

        def mask(window: int | None) -> dict[str, Any]:
            if fresh and prefix_lengths is not None and window is not None and window < T:
                return {"bias": within(window, prefix_lengths, T)}
            if fresh:
                return {"is_causal": True, "prefix_lengths": prefix_lengths}
            if T == 1 and (window is None or window >= L):
                return {"key_lengths": slots[:, 0] + 1}
            behind = slots[:, None, :, None] - torch.arange(L, device=x.device)
            visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            return {"bias": visible}

        x = self._start(x, positions, None)
        contexts = self._contexts(x, positions, implementation, mask, slots, fresh, donate)
        pairs = []
        for i, layer in enumerate(self.blocks):
            context, pair = contexts[self.config.window(i)], (cache.keys[i], cache.values[i])
            x, new = layer(x, None, context, pair, around_block)
            pairs.append(pair if donate else new)
        x = self._final(x)
        if pads is not None:
            turn = torch.arange(T, device=x.device) - pads[:, None]
            x = x.take_along_dim((turn % T)[..., None], 1)
        keys, values = zip(*pairs, strict=True)
        return x, Cache(keys, values)

    def _inputs(self, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
        if tokens is not None and embeddings is None:
            x = self.embed(tokens)
        elif tokens is None and embeddings is not None:
            x = embeddings
        else:
            raise ValueError("give tokens, or None and embeddings in their place")
        if x.shape[-2] > self.config.max_length:
            raise ValueError(
                f"{x.shape[-2]} tokens exceed max_length ({self.config.max_length}); split the "
                "sequence or raise max_length"
            )
        return x

    def _start(
        self, x: Tensor, positions: Tensor, key: Tensor | None, *, apart: bool = False
    ) -> Any:
        """What goes into the first block: apart as two terms, where there are two."""
        if self.config.positions == "learned":
            place = self.positions(positions)
            if apart and (key is None or self.config.dropout == 0):
                return x, place.expand_as(x).contiguous()
            x = x + place
        return random.dropout(key, x, self.config.dropout)

    def _final(self, x: Tensor | Terms) -> Tensor:
        if isinstance(x, tuple) and self._adds_in_norm(x):
            return sum_norm.sum_norm(x[0], x[1], *self._last_norm())
        return normalize(dict(self.norm.named_parameters("norm")), "norm", whole(x), self.config)

    def _adds_in_norm(self, x: Terms) -> bool:
        """Whether one kernel adds the terms of x and norms the sum."""
        return not self.config.norm_bias and on_gpu_alone(*x, self.norm.weight)

    def _last_norm(self) -> tuple[Tensor, float, bool]:
        config, gain = self.config, self.norm.weight
        gain = gain_of(gain, config) if config.norm_offset else gain
        return gain, config.norm_eps, config.norm == "layer"

    def _contexts(
        self,
        x: Tensor,
        positions: Tensor,
        implementation: Implementation | AttentionFn,
        mask: Callable[[int | None], dict[str, Any]],
        slots: Tensor | None,
        fresh: bool,
        donate: bool = False,
    ) -> dict[int | None, Context]:
        """The context of each window that layers have."""
        config, rotary = self.config, None
        attention_fn: AttentionFn = (
            implementation if callable(implementation) else attention_by(implementation)
        )
        if config.positions == "rotary":
            dtype = torch.promote_types(x.dtype, torch.float32)
            base, scaling = config.rotary_base, config.rotary_scaling
            table = rotary_table(positions, config.size_of_head, base, scaling, dtype=dtype)
            cosines, sines = (y.unsqueeze(-3) for y in table)  # the same for all heads
            rotary = (cosines, sines)
        contexts = {}
        for window in config.windows:
            options = {name: value for name, value in mask(window).items() if value is not None}
            if window is not None and "is_causal" in options:
                options["window"] = window
            contexts[window] = Context(
                options, attention_fn, rotary, slots, fresh, window=window, donate=donate
            )
        return contexts


def decoder(config: DecoderConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, ..., method="forward")`.

    Matrices start as N(0, 0.02^2), those that write into the residual stream at
    1 / sqrt(2 depth) of that (Radford et al. 2019, section 2.3).
    """
    std = 0.02
    initializers: Rules[Initializer] = [
        (r"norm\.weight$", zeros if config.norm_offset else ones),
        (r"bias$", zeros),
        (r"\.(o|down)\.weight$", normal(std / math.sqrt(2 * config.depth))),
        (r"weight$", normal(std)),
    ]
    return functional(lambda: Decoder(config), initializers, strict=False)


def output_weight(params: Params) -> Float[Tensor, "V D"]:
    """The matrix of the output projection, wherever it is tied to."""
    return params["output.weight"] if "output.weight" in params else params["embedding.weight"]


def fuse(params: Params) -> Params:
    """The same parameters with q, k, v in one matrix and gate, up in another: fewer launches.

    For a model of `dataclasses.replace(config, fused=True)`; the numbers stay the same.
    """
    fused: Params = {}
    for name, value in params.items():
        head, _, last = name.rpartition(".")
        layer, _, part = head.rpartition(".")
        if part in ("k", "v") or (part == "up" and f"{layer}.gate.{last}" in params):
            continue
        parts = {"q": ("q", "k", "v"), "gate": ("gate", "up")}.get(part)
        if parts is None:
            fused[name] = value
        else:
            rows = [params[f"{layer}.{p}.{last}"] for p in parts]
            fused[f"{layer}.{'qkv' if part == 'q' else 'gate_up'}.{last}"] = torch.cat(rows)
    return fused


def unfuse(params: Params, config: DecoderConfig) -> Params:
    """The inverse of `fuse`, for parameters of a fused config: what published layouts hold."""
    apart: Params = {}
    for name, value in params.items():
        head, _, last = name.rpartition(".")
        layer, _, part = head.rpartition(".")
        if part == "qkv":
            rows = value.split(config.projections)
            apart |= {f"{layer}.{p}.{last}": x for p, x in zip("qkv", rows, strict=True)}
        elif part == "gate_up":
            rows = value.chunk(2)
            apart |= {f"{layer}.{p}.{last}": x for p, x in zip(("gate", "up"), rows, strict=True)}
        else:
            apart[name] = value
    return apart
