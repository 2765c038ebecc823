"""What a block of the decoder computes, as pure functions of that block's parameters.

    block      x = x + post_norm(attention(norm(x)));  x = x + post_norm(feed_forward(norm(x)))
    attention  o(softmax(cap(scale q k^T) under the mask) v),  q and k normed and rotated

Dimension key: B batch, T tokens, D width, H heads, G key heads, K head dim, F hidden, L cache
length (tokens).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from msfs_functional import random
from msfs_functional.attention import Implementation, attention
from msfs_functional.layers import ACTIVATIONS, site_keys
from msfs_functional.models.decoder_config import DecoderConfig
from msfs_functional.params import Params
from msfs_functional.rotary import rotate

AttentionFn = Callable[..., Tensor]  # (q, k, v, **options of `attention`) -> heads
LinearFn = Callable[[Params, str, Tensor], Tensor]  # `linear`'s signature
Terms = tuple[Tensor, Tensor]  # of a sum that is still to be made
BlockFn = Callable[..., tuple[Any, tuple[Tensor, Tensor] | None]]  # `block`, its config bound


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x times the matrix of that name, plus its bias if there is one."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if bias is not None and x.numel() == x.shape[-1]:  # one row: a compiler fuses what stands apart
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


def whole(x: Tensor | Terms) -> Tensor:
    return x[0] + x[1] if isinstance(x, tuple) else x


def unchanged(x: Tensor) -> Tensor:
    return x


def bound(implementation: Any) -> AttentionFn:
    """`attention` with the implementation bound: a function, as Dynamo takes no partial through
    the vmap over an ensemble's members (torch 2.13)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return attention(q, k, v, implementation=implementation, **options)

    return attend


# One object for all calls: compiled code is guarded on which one it is.
ATTENTIONS: dict[str, AttentionFn] = {name: bound(name) for name in get_args(Implementation)}


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
    gain = weight = params.get(f"{name}.weight")  # None: in the matrix that follows
    if weight is not None and (config.norm_offset or weight.dtype != x.dtype):
        gain = gain_of(weight, config)
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
    x: Float[Tensor, "B T D"] | Terms,
    key: Int64[Tensor, "2"] | None,
    context: Context,
    cache: tuple[Tensor, Tensor] | None = None,
    *,
    config: DecoderConfig,
) -> tuple[Float[Tensor, "B T D"] | Terms, tuple[Tensor, Tensor] | None]:
    """One block: attention, then the feed-forward layer, each added to x.

    Args:
        params: of this block, named without "blocks.{i}.".
        x: or two terms of it. The last addition is then left to who takes what is returned: a block
            that is compiled alone adds while it norms, without another pass over memory.
        key: for dropout; None is none.
        context: see `Context`.
        cache: keys and values (B, G, L, K) of this block, or None.

    Returns:
        The new x (two terms of it, if x came so), and the cache with this call's tokens in it (None
        without one).
    """
    keys = site_keys(key, 3)
    if config.fused and cache is None and context.enter is unchanged:
        params = gains_in_matrices(params, config)

    def term(y: Tensor, name: str, key: Tensor | None) -> Tensor:
        if config.post_norm:
            y = normalize(params, f"{name}_post_norm", y, config)
        return random.dropout(key, y, config.dropout)

    before = whole(x)
    y = normalize(params, "attention_norm", before, config)
    y, cache = attend(params, y, keys[0], context, cache, config)
    between = before + term(y, "attention", keys[1])
    y = normalize(params, "feed_forward_norm", between, config)
    y = feed_forward(params, y, config, context.enter, context.leave)
    y = term(y, "feed_forward", keys[2])
    return ((between, y) if isinstance(x, tuple) else between + y), cache
