"""The decoder-only Transformer: GPT-2, Llama 3, Qwen 3, Gemma 2, Mistral and SmolLM2 are settings.

    token ids -> embedding (+ positions) -> blocks -> norm -> logits of the token that follows

    block      x = x + post_norm(attention(norm(x)));  x = x + post_norm(feed_forward(norm(x)))
    attention  o(softmax(cap(scale q k^T) under the mask) v),  q and k normed and rotated

`decoder(config)` gives pure functions: `init(seed)` and `apply(params, ..., method=...)`. What a
block computes is one pure function, `block`, of that block's parameters; modules only hold them.

Dimension key: B batch, T tokens, D width, H heads, G key heads, K head dim, F hidden, V vocabulary,
L cache length (tokens).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from msfs_kernels import one_row as rows
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.attention import Implementation, attention
from msfs_functional.generation import LanguageModel
from msfs_functional.layers import ACTIVATIONS, Activation, site_keys
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
from msfs_functional.regions import region_of
from msfs_functional.rotary import Scaling, rotary_table, rotate

AttentionFn = Callable[..., Tensor]  # (q, k, v, **options of `attention`) -> heads
LinearFn = Callable[[Params, str, Tensor], Tensor]  # `linear`'s signature
BlockFn = Callable[..., tuple[Tensor, tuple[Tensor, Tensor] | None]]  # `block`, its config bound

# Weight decay for matrices only: norms, biases and embeddings are left alone.
DECAY: Rules[bool] = [(r"norm|bias|embedding|positions", False), (r"", True)]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options; the defaults are Llama's choices at GPT-2's smallest size."""

    vocab: int  # tokens
    width: int = 768
    depth: int = 12  # blocks
    heads: int = 12
    kv_heads: int | None = None  # key heads, each shared by heads / kv_heads; default: heads
    head_dim: int | None = None  # default: width / heads
    hidden: int = 2048  # width of the feed-forward layers
    max_length: int = 1024  # tokens; longer sequences are refused
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False  # gains are 1 + weight, weights start at zero (Gemma)
    post_norm: bool = False  # also norm what a sublayer adds (Gemma 2)
    qk_norm: bool = False  # RMSNorm of each head's queries and keys (Qwen 3)
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = 10000.0
    rotary_scaling: Scaling | None = None
    windows: tuple[int | None, ...] = (None,)  # keys a token sees; layer i takes element i, cyclic
    attention_scale: float | None = None  # of q k^T; default head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None  # the same for logits
    activation: Activation = "swish"
    gated: bool = True  # down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's last projection
    hidden_bias: bool = False  # of the feed-forward layers
    norm_bias: bool = False  # LayerNorm's
    tied: bool = True  # the embedding is the output matrix, too
    embedding_scale: float = 1.0  # Gemma: width ** 0.5
    dropout: float = 0.0  # probability, on embeddings and on what each sublayer adds
    attention_dropout: float = 0.0  # probability, on attention weights
    fused: bool = False  # q, k, v in one matrix, gate and up in another (`fuse`), gains in them

    def __post_init__(self):
        for name in ("vocab", "width", "depth", "heads", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1, or None for the default")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads ({self.heads}) must divide width ({self.width}), or head_dim be given"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rotary" and self.size_of_head % 2:
            raise ValueError(f"head_dim ({self.size_of_head}) must be even for rotary positions")
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(f"windows {self.windows} must hold sizes of at least 1, or None")
        if self.norm_bias and self.norm != "layer":
            raise ValueError("norm_bias is for norm='layer': RMSNorm has no bias")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r}) must be in {list(ACTIVATIONS)}")
        for name in ("attention_softcap", "logit_softcap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be positive, or None")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be in [0, 1)")

    @property
    def size_of_head(self) -> int:
        """K: head_dim, or what it is by default."""
        return self.head_dim or self.width // self.heads

    @property
    def projections(self) -> tuple[int, int, int]:
        """Rows of the matrices q, k and v."""
        rows = self.size_of_head * (self.kv_heads or self.heads)
        return self.size_of_head * self.heads, rows, rows

    def window(self, layer: int) -> int | None:
        """Keys that a token sees in a layer, itself included; None is all."""
        return self.windows[layer % len(self.windows)]


def gpt2(vocab: int = 50257, **options: Any) -> DecoderConfig:
    """GPT-2 (Radford et al. 2019), 124M parameters."""
    sizes = {
        "hidden": 3072,
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu_tanh",
        "gated": False,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }
    biases = dict.fromkeys(("qkv_bias", "output_bias", "hidden_bias", "norm_bias"), True)
    return DecoderConfig(vocab, **{**sizes, **biases, **options})


def small(vocab: int = 49152, **options: Any) -> DecoderConfig:
    """SmolLM2's smallest (Allal et al. 2025), 135M parameters of Llama's kind."""
    sizes = {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "hidden": 1536}
    rotary = {"rotary_base": 100000.0, "max_length": 8192}
    return DecoderConfig(vocab, **{**sizes, **rotary, **options})


def large(vocab: int = 50257, **options: Any) -> DecoderConfig:
    """1.3B parameters of Llama's kind: 24 blocks of 2048, sequences of 4096."""
    sizes = {"width": 2048, "depth": 24, "heads": 16, "hidden": 5504, "max_length": 4096}
    return DecoderConfig(vocab, **{**sizes, **options})


def tiny(vocab: int, **options: Any) -> DecoderConfig:
    """Learns simple stories on a laptop: 4 blocks of 128, 0.8M parameters and the embedding."""
    sizes = {"width": 128, "depth": 4, "heads": 4, "kv_heads": 2, "hidden": 384, "max_length": 256}
    return DecoderConfig(vocab, **{**sizes, **options})


def nano(vocab: int, **options: Any) -> DecoderConfig:
    """Learns stories of 200 words in minutes of two CPU cores: 3 blocks of 64, 0.16M parameters.

    Gates by ReLU: with swish, Llama's choice, so small a model takes twice the steps to find out
    who is who.
    """
    sizes = {"width": 64, "depth": 3, "heads": 4, "hidden": 192, "max_length": 224}
    return DecoderConfig(vocab, **{"activation": "relu", **sizes, **options})


ALIGNED = 16  # rows of logits begin at multiples of 32 bytes

PRESETS: dict[str, Callable[..., DecoderConfig]] = {
    "nano": nano,
    "tiny": tiny,
    "small": small,
    "gpt2": gpt2,
    "large": large,
}


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x times the matrix of that name, plus its bias if there is one."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if bias is not None and x.numel() == x.shape[-1]:  # one row: a compiler fuses what stands apart
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


def unchanged(x: Tensor) -> Tensor:
    return x


# One object for all calls: compiled code is guarded on which one it is.
ATTENTIONS: dict[str, AttentionFn] = {
    name: functools.partial(attention, implementation=name) for name in get_args(Implementation)
}


def attention_by(implementation: str) -> AttentionFn:
    """`attention` with the implementation bound."""
    if implementation not in ATTENTIONS:
        raise ValueError(f"implementation ({implementation!r}) must be one of {list(ATTENTIONS)}")
    return ATTENTIONS[implementation]


class Context(NamedTuple):
    """What a block is told beside its input; the same for all blocks of one window."""

    mask: dict[str, Any]  # options of `attention`
    attention_fn: AttentionFn
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines
    slots: Int64[Tensor, "B T"] | None = None  # where in the cache the tokens go
    fresh: bool = False  # the cache holds nothing but these tokens: they attend to each other
    enter: Callable[[Tensor], Tensor] = unchanged  # before the first matrices of a sublayer
    leave: LinearFn = linear  # the last one: both know of other devices that share the work
    window: int | None = None  # keys that a token sees, itself included: `mask` says it, too
    donate: bool = False  # the cache is written in place


def within(window: int, prefix_lengths: Int[Tensor, "B"], tokens: int) -> Bool[Tensor, "B 1 T T"]:
    """Keys that a query sees: those of its window up to itself, and a prefix's tokens each other.

    `attention` shows a prefix to all queries, however far away; in a layer with a window, what
    comes after it sees it through the window alone, as it does from a cache.

        window 2, prefix 2, T = 4      1 1 0 0
                                       1 1 0 0
                                       0 1 1 0
                                       0 0 1 1
    """
    at = torch.arange(tokens, device=prefix_lengths.device)
    behind = at[:, None] - at
    in_prefix = at < prefix_lengths[:, None]
    visible = (behind >= 0) & (behind < window)
    return (visible | (in_prefix[:, :, None] & in_prefix[:, None]))[:, None]


class Cache(NamedTuple):
    """Keys and values of the tokens so far: goes into `decode`, comes out of it.

    The token at position p of a row lies in slot p. A token sees the slots up to its own, so what
    padding left in those beyond is never seen, and later overwritten.
    """

    keys: tuple[Float[Tensor, "B G L K"], ...]  # rotated, one for each block
    values: tuple[Float[Tensor, "B G L K"], ...]


def gain_of(weight: Tensor, config: DecoderConfig) -> Tensor:
    """A norm's gain in (at least) float32, from its parameter."""
    gain = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return gain + 1 if config.norm_offset else gain


def normalize(
    params: Params, name: str, x: Float[Tensor, "... D"], config: DecoderConfig
) -> Float[Tensor, "... D"]:
    """RMSNorm or LayerNorm with the gain (and bias) of that name, computed in float32.

    Source: Zhang and Sennrich 2019; Ba et al. 2016.
    """
    weight = params.get(f"{name}.weight")
    gain = None if weight is None else gain_of(weight, config)  # None: in the matrix that follows
    if config.norm == "layer" and not name.endswith(("q_norm", "k_norm")):
        gain = None if gain is None else gain.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], gain, params.get(f"{name}.bias"), config.norm_eps)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.norm_eps)
    return (y if gain is None else y * gain).to(x.dtype)


def attend(
    params: Params,
    x: Float[Tensor, "B T D"],
    key: Int64[Tensor, "2"] | None,
    context: Context,
    cache: tuple[Tensor, Tensor] | None,
    config: DecoderConfig,
) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor] | None]:
    """Grouped-query attention (Ainslie et al. 2023) of x to itself and to what the cache holds."""
    x = context.enter(x)
    if "attention.qkv.weight" in params:
        q, k, v = linear(params, "attention.qkv", x).split(config.projections, -1)
    else:
        q, k, v = (linear(params, f"attention.{name}", x) for name in "qkv")
    q, k, v = (y.unflatten(-1, (-1, config.size_of_head)).transpose(-2, -3) for y in (q, k, v))
    if config.qk_norm:
        q = normalize(params, "attention.q_norm", q, config)
        k = normalize(params, "attention.k_norm", k, config)
    if context.rotary is not None:
        q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
    if cache is not None and context.slots is not None:
        rows, heads = (torch.arange(n, device=x.device) for n in k.shape[:2])
        where = (rows[:, None, None], heads[:, None], context.slots[:, None])
        if context.donate:
            cache[0].index_put_(where, k)
            cache[1].index_put_(where, v)
        else:
            cache = cache[0].index_put(where, k), cache[1].index_put(where, v)
        if not context.fresh:
            k, v = cache
    options = dict(context.mask)
    if key is not None and config.attention_dropout > 0:
        options |= {"dropout": config.attention_dropout, "dropout_key": key}
    scale, softcap = config.attention_scale, config.attention_softcap
    heads = context.attention_fn(q, k, v, scale=scale, softcap=softcap, **options)
    return context.leave(params, "attention.o", heads.transpose(-2, -3).flatten(-2)), cache


def feed_forward(
    params: Params,
    x: Float[Tensor, "... D"],
    config: DecoderConfig,
    enter: Callable[[Tensor], Tensor] = unchanged,
    leave: LinearFn = linear,
) -> Float[Tensor, "... D"]:
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)) (Shazeer 2020)."""
    x = enter(x)
    activation = ACTIVATIONS[config.activation]
    if not config.gated:
        return leave(params, "feed_forward.down", activation(linear(params, "feed_forward.up", x)))
    if "feed_forward.gate_up.weight" in params:
        gate, up = linear(params, "feed_forward.gate_up", x).chunk(2, -1)
    else:
        gate, up = (linear(params, f"feed_forward.{name}", x) for name in ("gate", "up"))
    return leave(params, "feed_forward.down", activation(gate) * up)


def gains_in_matrices(params: Params, config: DecoderConfig) -> Params:
    """A block's parameters with the gain of each norm in the matrix that follows it.

        W (g * x + b)  =  (W diag(g)) x + W b

    The gradient of g is then a sum over the elements of a matrix's gradient, where it was a
    reduction over all tokens that reads two tensors as large as the activations.
    """
    moved = dict(params)
    up = "gate_up" if config.gated else "up"
    for norm, matrix in (("attention", "attention.qkv"), ("feed_forward", f"feed_forward.{up}")):
        gain = gain_of(moved.pop(f"{norm}_norm.weight"), config)
        shift = moved.pop(f"{norm}_norm.bias", None)
        weight = moved[f"{matrix}.weight"]
        moved[f"{matrix}.weight"] = (weight * gain).to(weight.dtype)
        if shift is not None:
            own = moved.get(f"{matrix}.bias")
            shift = weight @ shift
            moved[f"{matrix}.bias"] = shift if own is None else own + shift
    return moved


def block(
    params: Params,
    x: Float[Tensor, "B T D"],
    key: Int64[Tensor, "2"] | None,
    context: Context,
    cache: tuple[Tensor, Tensor] | None = None,
    *,
    config: DecoderConfig,
) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor] | None]:
    """One block: attention, then the feed-forward layer, each added to x.

    Args:
        params: of this block, named without "blocks.{i}.".
        key: for dropout; None is none.
        context: see `Context`.
        cache: keys and values (B, G, L, K) of this block, or None.

    Returns:
        The new x, and the cache with this call's tokens in it (None without one).
    """
    keys = site_keys(key, 3)
    if config.fused and cache is None and context.enter is unchanged:
        params = gains_in_matrices(params, config)

    def add(x: Tensor, y: Tensor, name: str, key: Tensor | None) -> Tensor:
        if config.post_norm:
            y = normalize(params, f"{name}_post_norm", y, config)
        return x + random.dropout(key, y, config.dropout)

    y = normalize(params, "attention_norm", x, config)
    y, cache = attend(params, y, keys[0], context, cache, config)
    x = add(x, y, "attention", keys[1])
    y = normalize(params, "feed_forward_norm", x, config)
    return add(
        x, feed_forward(params, y, config, context.enter, context.leave), "feed_forward", keys[2]
    ), cache


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
        x: Tensor,
        key: Tensor | None,
        context: Context,
        cache: tuple[Tensor, Tensor] | None = None,
        around_block: Callable[[BlockFn], BlockFn] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
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
        self.embedding = nn.Embedding(config.vocab, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length, config.width)
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
        x = self._inputs(tokens, embeddings)
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)

        def mask(window: int | None) -> dict[str, Any]:
            others = {"segment_ids": segment_ids, "key_lengths": key_lengths}
            if prefix_lengths is not None and window is not None and window < x.shape[-2]:
                near = within(window, prefix_lengths, x.shape[-2])
                return {"bias": near if visible is None else near & visible, **others}
            same = {"is_causal": True, "prefix_lengths": prefix_lengths, "bias": visible}
            return {**same, **others}

        keys = site_keys(key, 1 + self.config.depth)
        x = self._start(x, positions, keys.pop())
        contexts = self._contexts(x, positions, implementation, mask, None, False)
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

    def _start(self, x: Tensor, positions: Tensor, key: Tensor | None) -> Tensor:
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        return random.dropout(key, x, self.config.dropout)

    def _final(self, x: Tensor) -> Tensor:
        return normalize(dict(self.norm.named_parameters("norm")), "norm", x, self.config)

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


def one_row(config: DecoderConfig) -> Callable[[BlockFn], BlockFn] | None:
    """For `around_block`: the block for one new token of one sequence, in five launches.

    The cache it is given is written IN PLACE. None for a config that it does not know (norms of
    heads or of what a sublayer adds).
    """
    if config.qk_norm or config.post_norm or config.activation not in rows.ACTIVATIONS:
        return None
    norm = {
        "norm": config.norm,
        "eps": config.norm_eps,
        "offset": 1.0 if config.norm_offset else 0.0,
    }
    scale = config.attention_scale or config.size_of_head**-0.5

    def product(params: Params, name: str, x: Tensor, normed: str = "", **options: Any) -> Tensor:
        if normed:
            gain, shift = params[f"{normed}.weight"], params.get(f"{normed}.bias")
            options |= {"gain": gain, "shift": shift, **norm}
        return rows.row_linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"), **options)

    def run(
        params: Params, x: Tensor, key: None, context: Context, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert context.slots is not None
        parts = ["qkv"] if config.fused else ["q", "k", "v"]
        parts = [product(params, f"attention.{part}", x, "attention_norm") for part in parts]
        heads = rows.row_attention(
            torch.cat(parts, -1) if len(parts) > 1 else parts[0],
            *cache,
            context.slots[:, 0],
            context.rotary,
            heads=config.heads,
            scale=scale,
            softcap=config.attention_softcap,
            window=context.window,
        )
        x = product(params, "attention.o", heads, residual=x)
        options: dict[str, Any] = {"normed": "feed_forward_norm", "activation": config.activation}
        if not config.gated:
            y = product(params, "feed_forward.up", x, **options)
        elif config.fused:
            y = product(params, "feed_forward.gate_up", x, gated=True, **options)
        else:
            y = product(params, "feed_forward.gate", x, **options)
            y = y * product(params, "feed_forward.up", x, "feed_forward_norm")
        return product(params, "feed_forward.down", y, residual=x), cache

    return lambda fn: run


def language_model(
    model: Functional,
    params: Params,
    *,
    implementation: Implementation | AttentionFn = "flash",
    fast_row: bool | None = None,
    aligned: bool | None = None,
) -> LanguageModel:
    """The model with these parameters in the form of module `generation`.

    Prefill takes `embeddings` and `prefix_lengths` as further inputs, see `Decoder.extend`.

    Args:
        fast_row: steps of a single row by `one_row`, where the config allows; default: with flash
            attention on a GPU.
        aligned: logits through a copy of the output matrix that has a multiple of 16 rows, made
            anew by each prefill: a GPU's fast kernels write no rows that begin at odd addresses.
            Default: on a GPU, where the vocabulary is no such multiple.
    """
    some, config = params["norm.weight"], cast(Decoder, model.skeleton).config
    if fast_row is None:
        fast_row = implementation == "flash" and some.is_cuda
    around = one_row(config) if fast_row else None

    weight, vocab = output_weight(params), config.vocab
    if aligned is None:
        aligned = weight.is_cuda
    aligned = aligned and vocab % ALIGNED > 0
    matrix = weight.new_zeros(vocab + -vocab % ALIGNED, config.width) if aligned else weight

    def logits(states: Tensor) -> Tensor:
        if not aligned:
            return model.apply(params, states, method="logits")
        found = F.linear(states, matrix)[..., :vocab]
        cap = config.logit_softcap
        return found if cap is None else cap * torch.tanh(found / cap)

    def init_cache(rows: int, length: int) -> Cache:
        kind = {"dtype": some.dtype, "device": some.device}
        return model.apply(params, rows, length, **kind, method="init_cache")

    def prefill(
        tokens: Tensor, lengths: Tensor, cache: Cache, **inputs: Tensor
    ) -> tuple[Tensor, Cache]:
        given = None if "embeddings" in inputs else tokens
        options = {**inputs, "implementation": implementation, "method": "extend", "donate": True}
        if aligned:
            matrix[:vocab].copy_(weight)  # which a training step may have written into
        states, cache = model.apply(params, given, cache, **options)
        last = states.take_along_dim(lengths[:, None, None] - 1, 1)[:, 0]
        return logits(last), cache

    def step(tokens: Tensor, cache: Cache, positions: Tensor) -> tuple[Tensor, Cache]:
        fast = around is not None and tokens.shape[0] == 1
        options = {"implementation": implementation, "around_block": around if fast else None}
        options["donate"] = True
        states, cache = model.apply(
            params, tokens[:, None], cache, positions, method="extend", **options
        )
        if fast and config.logit_softcap is None:
            return rows.row_linear(states[:, 0], weight), cache
        return logits(states[:, 0]), cache

    return LanguageModel(init_cache, prefill, step, config.max_length, some.device)
