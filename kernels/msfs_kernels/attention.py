"""flash_attention: the public function. Checks its arguments, brings them into canonical form,
calls the op.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import checks, ops, short  # noqa: F401, registers the ops
from .dispatch import call, is_sharded
from .options import Options, accumulate_dtype
from .philox import fold_in
from .refusal import refused


def flash_attention(
    q: Float[Tensor, "... H T K"],
    k: Float[Tensor, "... G S K"],
    v: Float[Tensor, "... G S Kv"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    key_lengths: Int[Tensor, "..."] | None = None,
    prefix_lengths: Int[Tensor, "..."] | None = None,
    segment_ids: Int[Tensor, "... T"]
    | tuple[Int[Tensor, "... T"], Int[Tensor, "... S"]]
    | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Tensor, "... H"] | None = None,
    bias: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
    dropout: float = 0.0,
    dropout_key: Int[Tensor, "2"] | None = None,
    return_lse: bool = False,
    precision: str = "ieee",
    deterministic: bool = False,
):
    """Exact softmax attention without the T x S matrix, right under every transform of torch.func.

    o[i] = sum_j softmax_j(cap(scale q[i].k[j]) + bias[i, j] + ...) v[j] over the keys j that query
    i may see (Dao 2023, Algorithm 1). Dims: H heads, G kv heads (G divides H: kv head g serves the
    query heads g H/G .. (g + 1) H/G - 1), T queries, S keys, K head dim, Kv head dim of the values;
    "..." any number of batch dims, also none. Any strides.

    Masks align bottom right: query i stands at position p = i + S - T, so the last query sees every
    key. (torch's `is_causal` aligns top left; the two differ only where T != S.) For T = 3, S = 5:

        is_causal         is_causal, window=2     window=2            is_causal, prefix_lengths=4
        1 1 1 0 0         0 1 1 0 0               0 1 1 1 0           1 1 1 1 0
        1 1 1 1 0         0 0 1 1 0               0 0 1 1 1           1 1 1 1 0
        1 1 1 1 1         0 0 0 1 1               0 0 0 1 1           1 1 1 1 1

    All options combine. A query that may see no key gives zeros, with zero gradients.

    Args:
        q, k, v: of one dtype, float16, bfloat16, float32 or float64, on one device.
        is_causal: keys j <= p only.
        scale: multiplies q.k; K ** -0.5 by default.
        window: tokens, at least 1: keys with p - j < window if causal, |p - j| < window if not.
        key_lengths: batch dims; keys j < key_lengths only (padding on the right), 0 <= key_lengths
            <= S.
        prefix_lengths: batch dims; keys j < prefix_lengths are visible whatever `is_causal` and
            `window` say.
        segment_ids: pairs of equal ids only (packed sequences); a pair of tensors where T != S or
            ids differ.
        softcap: logits become softcap * tanh(logits / softcap), before everything that is added to
            them.
        alibi_slopes: adds -slope * |p - j| (Press et al. 2022). No gradient: it raises where one is
            asked for.
        bias: broadcastable to (..., H, T, S). Floats are added to the logits and get a gradient; in
            a boolean one True means may attend.
        dropout: share of the weights that are zeroed, in [0, 1), the others growing by 1 / (1 -
            dropout).
        dropout_key: random key, Int64[2]; the same key drops the same pairs on every device and in
            every transform.
        return_lse: also return the log-sum-exp of the logits, (..., H, T), float32 (float64 for
            float64), -inf for a query without keys; differentiable.
        precision: of float32 products on a GPU's tensor cores, "ieee" or "tf32".
        deterministic: whether the backward on a GPU must give the same bits every time.

    Returns:
        (..., H, T, Kv) in q's dtype, and lse if asked for.

    Raises:
        ValueError: for what does not fit, before any kernel starts, eager, compiled and under vmap
            alike. Lengths are values, and on a GPU looking at them would make the host wait: there
            a batch row whose key or prefix length is outside [0, S] comes out as NaN, o, lse and
            derivatives, and the other rows are right.
    """
    kind = None  # of a call that asks for nothing special
    if (
        (window is None and key_lengths is None and prefix_lengths is None and segment_ids is None)
        and (softcap is None and alibi_slopes is None and bias is None)
        and (type(dropout) is float and dropout == 0 and type(is_causal) is bool)
        and (scale is None or type(scale) is float)
        and type(precision) is str
    ):
        scalars = (is_causal, scale, precision, deterministic)
        kind = short.kind_of(q, k, v, *scalars)
        if kind is not None:
            results = short.attention(q, k, v, kind)
            if results is not None:
                return tuple(results) if return_lse else results[0]
        elif not torch.compiler.is_compiling():
            results = short.attention_in_forward_mode(flash_attention, q, k, v, scalars, return_lse)
            if results is not None:
                return results
    problem = checks.find_problem(
        q,
        k,
        v,
        scale,
        window,
        key_lengths,
        prefix_lengths,
        segment_ids,
        softcap,
        alibi_slopes,
        bias,
        dropout,
        dropout_key,
        precision,
    )
    if problem is not None:
        o, lse = refused(q, v, problem)
        return (o, lse) if return_lse else o
    lead, (H, T, K), (S, Kv) = q.shape[:-3], q.shape[-3:], v.shape[-2:]
    B = math.prod(lead)

    def one_batch_dim(x: Tensor) -> Tensor:
        if x.ndim == 4 and len(lead) == 1:
            return x if x.shape[0] == B else x.expand(B, -1, -1, -1)
        return x.expand(*lead, *x.shape[-3:]).reshape(B, *x.shape[-3:])

    def per_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.int32).expand(lead).reshape(B)

    q_segments = k_segments = None
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        q_segments, k_segments = (
            x.to(torch.int32).expand(*lead, tokens).reshape(B, tokens)
            for x, tokens in zip(pair, (T, S), strict=True)
        )
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(accumulate_dtype(q.dtype)).expand(*lead, H).reshape(B, H)
    rng = None
    if dropout > 0 and dropout_key is not None:
        rng = fold_in(dropout_key, torch.arange(B, device=q.device))
        if is_sharded(q):  # a rank may hold some heads only: they keep their numbers
            numbers = torch.arange(H, device=q.device)[:, None].expand(B, H, 1)
            rng = torch.cat([rng[:, None].expand(B, H, 2), numbers], -1)
    bias = None if bias is None else canonical_bias(bias, lead)
    options = Options(
        bias,
        per_row(key_lengths),
        per_row(prefix_lengths),
        q_segments,
        k_segments,
        alibi_slopes,
        rng,
        is_causal,
        -1 if window is None else window,
        K**-0.5 if scale is None else float(scale),
        0.0 if softcap is None else float(softcap),
        float(dropout),
        precision,
        deterministic,
    )
    if is_sharded(q):
        from . import sharding  # noqa: F401, registers the ops' rules for DTensors
    canonical = (one_batch_dim(q), one_batch_dim(k), one_batch_dim(v))
    if kind is None:
        o, lse = call("attention", *canonical, *options)
    else:
        o, lse = short.remembered_attention(*canonical, kind, options)
    if len(lead) != 1:
        o, lse = o.reshape(*lead, H, T, Kv), lse.reshape(*lead, H, T)
    return (o, lse) if return_lse else o


def canonical_bias(bias: Tensor, lead: torch.Size) -> Tensor:
    """(B | 1, H | 1, T | 1, S | 1): dims that broadcast stay 1, so that gradients come out that
    small.
    """
    bias = bias[(None,) * (len(lead) + 3 - bias.ndim)]
    own = bias.shape[:-3]
    if all(n == 1 for n in own):
        return bias.reshape(1, *bias.shape[-3:])
    return bias.expand(*lead, *bias.shape[-3:]).reshape(math.prod(lead), *bias.shape[-3:])
