"""Attention, once for every model: softmax(q k^T / sqrt(K)) v, computed in one of four ways.

    implementation="flash"      the registered op: memory linear in T, right under any transform
    implementation="sdpa"       torch's F.scaled_dot_product_attention, a peer
    implementation="reference"  the formula with the mask drawn out: the one that tests trust
    implementation="cuda"       the op's CUDA C++ forward kernel, the one to read

Dimension key: ... batch dims, T queries, S keys, H query heads, G key heads (H is a multiple of G),
K head dim, X value head dim.
"""

import math
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

Implementation = Literal["flash", "sdpa", "reference", "cuda"]
Segments = Int[Tensor, "... T"] | tuple[Int[Tensor, "... T"], Int[Tensor, "... S"]]


def attention_mask(
    T: int,
    S: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    key_lengths: Int[Tensor, "..."] | None = None,
    prefix_lengths: Int[Tensor, "..."] | None = None,
    segment_ids: Segments | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "... T S"]:
    """Which query (row) may attend to which key (column), drawn out as T x S booleans.

    Query i stands at position p = i + S - T among the keys, so masks align bottom right
    (torch's own `is_causal` aligns top left: the two differ when T != S).

        is_causal, T=2 S=4     is_causal, window=2, T=S=4     window=2, T=S=4
        1 1 1 .                1 . . .                        1 1 . .
        1 1 1 1                1 1 . .                        1 1 1 .
                               . 1 1 .                        . 1 1 1
                               . . 1 1                        . . 1 1

        key_lengths=3, T=2 S=4     is_causal, prefix_lengths=2, T=S=4     segment_ids=[0 0 1 1]
        1 1 1 .                    1 1 . .                                1 1 . .
        1 1 1 .                    1 1 . .                                1 1 . .
                                   1 1 1 .                                . . 1 1
                                   1 1 1 1                                . . 1 1

    Causal, window and prefix say where a query may look; key lengths and segments then take away
    keys that are not there.

    Args:
        window: keys in (p - window, p] when causal, |p - j| < window otherwise.
        key_lengths: keys j < key_lengths exist; its shape is the batch dims.
        prefix_lengths: keys j < prefix_lengths are visible to every query (prefix-LM).
        segment_ids: queries see keys of the same id only; (queries', keys') ids when T != S.
        device: of the result; default: where the given tensors are.
    """
    given = (key_lengths, prefix_lengths, segment_ids)
    if device is None:
        tensors = [x[0] if isinstance(x, tuple) else x for x in given if x is not None]
        device = tensors[0].device if tensors else None
    i = torch.arange(T, device=device)[:, None] + (S - T)
    j = torch.arange(S, device=device)
    visible = torch.ones(T, S, dtype=torch.bool, device=device)
    if is_causal:
        visible = visible & (j <= i)
    if window is not None:
        visible = visible & ((i - j < window) if is_causal else ((i - j).abs() < window))
    if prefix_lengths is not None:
        visible = visible | (j < prefix_lengths[..., None, None])
    if key_lengths is not None:
        visible = visible & (j < key_lengths[..., None, None])
    if segment_ids is not None:
        queries, keys = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
        visible = visible & (queries[..., :, None] == keys[..., None, :])
    return visible


def attention_weights(
    q: Float[Tensor, "... H T K"],
    k: Float[Tensor, "... G S K"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    key_lengths: Int[Tensor, "..."] | None = None,
    prefix_lengths: Int[Tensor, "..."] | None = None,
    segment_ids: Segments | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Tensor, "... H"] | None = None,
    bias: Shaped[Tensor, "..."] | None = None,
) -> Float[Tensor, "... H T S"]:
    """The T x S matrix of attention probabilities, for pictures and for the reference formula.

        scores = scale q k^T;  scores = softcap tanh(scores / softcap);  scores -= slope |p - j|
        weights = softmax(scores + bias) over the visible keys, zeros where there is none

    Half precision is computed in float32. Arguments: see `attention`.
    """
    T, S, H = q.shape[-2], k.shape[-2], q.shape[-3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(H // k.shape[-3], dim=-3)
    scores = (q.to(dtype) @ k.to(dtype).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        p = torch.arange(T, device=q.device)[:, None] + (S - T)
        distance = (p - torch.arange(S, device=q.device)).abs()
        scores = scores - alibi_slopes[..., None, None].to(dtype) * distance
    visible = attention_mask(
        T,
        S,
        is_causal=is_causal,
        window=window,
        key_lengths=key_lengths,
        prefix_lengths=prefix_lengths,
        segment_ids=segment_ids,
        device=q.device,
    ).unsqueeze(-3)
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        scores = scores + bias.to(dtype)
    scores = torch.where(visible, scores, -math.inf)
    if S == 0:
        return scores
    # Softmax by hand: a row without keys has the maximum -inf and the sum 0, both replaced, so that
    # it comes out as zeros with zero derivatives of every order where torch's softmax says NaN.
    highest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - highest.clamp(min=torch.finfo(dtype).min)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def attention(
    q: Float[Tensor, "... H T K"],
    k: Float[Tensor, "... G S K"],
    v: Float[Tensor, "... G S X"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    key_lengths: Int[Tensor, "..."] | None = None,
    prefix_lengths: Int[Tensor, "..."] | None = None,
    segment_ids: Segments | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Tensor, "... H"] | None = None,
    bias: Shaped[Tensor, "..."] | None = None,
    dropout: float = 0.0,
    dropout_key: Int64[Tensor, "2"] | None = None,
    implementation: Implementation = "flash",
) -> Float[Tensor, "... H T X"]:
    """Scaled dot-product attention: each query's mean of the values, weighted by softmax(q k^T).

    A query that sees no key gives zeros (and zero gradients), never NaN.

    Args:
        q, k, v: same batch dims and dtype; G divides H, query head h reads key head h // (H / G).
        is_causal, window, key_lengths, prefix_lengths, segment_ids: see `attention_mask`.
        scale: of q k^T; default K ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2); default none.
        alibi_slopes: (..., H); adds -slope * |p - j| (Press et al. 2021); default none.
        bias: broadcastable to (..., H, T, S); added to the scores, or bool with True = may attend.
        dropout: probability in [0, 1) with which a weight is dropped; needs `dropout_key`.
        dropout_key: a key of `msfs_functional.random`; the same key drops the same weights in every
            implementation.
        implementation: "flash" (default), "sdpa", "reference" or "cuda".

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or that an implementation lacks.
    """
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
        "key_lengths": key_lengths,
        "prefix_lengths": prefix_lengths,
        "segment_ids": segment_ids,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "bias": bias,
    }
    if implementation == "flash":
        from msfs_kernels import flash_attention  # needs Triton on a GPU: only when asked for

        out = flash_attention(q, k, v, **options, dropout=dropout, dropout_key=dropout_key)
        return cast(Tensor, out)  # no pair without return_lse
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation ({implementation!r}) must be one of {get_args(Implementation)}"
        )
    _validate(q, k, v, dropout=dropout, dropout_key=dropout_key, **options)
    if implementation == "sdpa":
        return _sdpa(q, k, v, dropout=dropout, **options)
    if implementation == "cuda":
        return _cuda(q, k, v, dropout=dropout, **options)
    weights = attention_weights(q, k, **options)
    if dropout > 0 and dropout_key is not None:
        weights = _dropout(weights, dropout, dropout_key)
    v = v.repeat_interleave(q.shape[-3] // v.shape[-3], dim=-3)
    return (weights @ v.to(weights.dtype)).to(q.dtype)


def _dropout(
    weights: Float[Tensor, "... H T S"], rate: float, key: Int64[Tensor, "2"]
) -> Float[Tensor, "... H T S"]:
    """Drops weight (row b, h, i, j) where Philox(counter (j, i, h, 0), key fold_in(key, b)) is low.

    b counts the flattened batch dims. The op draws the same numbers in its kernels.
    """
    from msfs_kernels.philox import fold_in, philox_4x32

    *batch, H, T, S = weights.shape
    keys = fold_in(key, torch.arange(math.prod(batch), device=weights.device))[:, None, None, None]
    h, i, j = (torch.arange(n, device=weights.device) for n in (H, T, S))
    word = philox_4x32(j, i[:, None], h[:, None, None], 0, keys[..., 0], keys[..., 1])[0]
    keep = (word >= round(rate * 2**32)).reshape(weights.shape)
    return torch.where(keep, weights / (1 - rate), 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, **options) -> Tensor:
    """F.scaled_dot_product_attention, with the mask drawn out unless torch has a name for it."""
    T, S, H = q.shape[-2], k.shape[-2], q.shape[-3]
    if dropout > 0:
        raise ValueError(
            f"dropout ({dropout}) must be 0 with implementation='sdpa', which cannot draw from a "
            "key; use 'flash' or 'reference'"
        )
    if options["softcap"] is not None:
        raise ValueError(
            f"softcap ({options['softcap']}) must be None with implementation='sdpa', which has no "
            "soft-cap; use 'flash' or 'reference'"
        )
    scale, slopes, bias = options["scale"], options["alibi_slopes"], options["bias"]
    masks = ("window", "key_lengths", "prefix_lengths", "segment_ids")
    batch = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[-3], dim=-3) if x.shape[-3] < H else x for x in (k, v))
    plain = slopes is None and bias is None and all(options[name] is None for name in masks)
    if plain and (not options["is_causal"] or T == S):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=options["is_causal"], scale=scale)
        return out.reshape(*batch, *out.shape[-3:])
    visible = attention_mask(
        T,
        S,
        is_causal=options["is_causal"],
        device=q.device,
        **{name: options[name] for name in masks},
    ).unsqueeze(-3)
    if bias is not None and bias.dtype == torch.bool:
        visible, bias = visible & bias, None
    # torch's backends disagree on rows without keys (zeros or NaN): let them see all, then erase.
    empty = ~visible.any(-1, keepdim=True)
    mask = visible | empty
    if bias is not None or slopes is not None:
        added = (
            torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
        )
        if slopes is not None:
            p = torch.arange(T, device=q.device)[:, None] + (S - T)
            distance = (p - torch.arange(S, device=q.device)).abs()
            added = added - slopes[..., None, None].to(q.dtype) * distance
        mask = torch.where(mask, added, -math.inf)
    heads = mask.shape[-3]
    mask = mask.expand(*batch, heads, T, S).reshape(-1, heads, T, S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(empty, 0.0, out.reshape(*batch, *out.shape[-3:]))


def _cuda(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None, **options):
    """The CUDA C++ kernel: forward only, causal masks only."""
    given = [name for name, value in options.items() if name != "dropout" and value is not None]
    if options["dropout"] > 0:
        given.append("dropout")
    if given:
        raise ValueError(f"implementation='cuda' does not know {given}; use 'flash'")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "implementation='cuda' is a forward kernel and has no gradient, but an input requires "
            "one; call it under torch.no_grad(), or use 'flash'"
        )
    from msfs_kernels import cuda_forward
    from msfs_kernels.options import Options

    batch = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = cuda_forward.forward(q, k, v, Options(causal=is_causal, scale=factor))
    return out.reshape(*batch, *out.shape[1:])


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    segment_ids: Segments | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    dropout_key: Tensor | None,
) -> None:
    """Raises ValueError with value, rule and remedy for what the formula cannot mean."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if min(q.ndim, k.ndim, v.ndim) < 3:
        raise ValueError(
            f"{shapes}: each needs (..., heads, length, head_dim); unsqueeze the heads"
        )
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(f"{shapes}: batch dims must be equal; expand the smaller ones")
    batch, (H, T, K), (G, S) = q.shape[:-3], q.shape[-3:], k.shape[-3:-1]
    if k.shape[-1] != K:
        raise ValueError(f"{shapes}: head dims of q and k must be equal; project them to one size")
    if v.shape[-3:-1] != (G, S):
        raise ValueError(f"{shapes}: k and v must agree in heads and length")
    if G == 0 or H % G:
        raise ValueError(f"key heads ({G}) must divide query heads ({H})")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"dtypes of q, k, v ({q.dtype}, {k.dtype}, {v.dtype}) must be one floating-point type; "
            "cast them"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"devices of q, k, v ({q.device}, {k.device}, {v.device}) must be one; move them"
        )
    if window is not None and window < 1:
        raise ValueError(f"window ({window}) must be at least 1 key; None means no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap ({softcap}) must be positive; None means no soft-cap")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout ({dropout}) must be in [0, 1)")
    if dropout > 0 and dropout_key is None:
        raise ValueError(
            f"dropout ({dropout}) needs dropout_key, a key of msfs_functional.random; pass one, or "
            "dropout=0 to evaluate"
        )
    queries, keys = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    per_batch = {
        "key_lengths": (key_lengths, batch),
        "prefix_lengths": (prefix_lengths, batch),
        "segment_ids of queries": (queries, (*batch, T)),
        "segment_ids of keys": (keys, (*batch, S)),
        "alibi_slopes": (alibi_slopes, (*batch, H)),
        "bias": (bias, (*batch, H, T, S)),
    }
    for name, (value, full) in per_batch.items():
        if value is not None and not _broadcasts(value.shape, full):
            raise ValueError(
                f"{name} {tuple(value.shape)} must broadcast to {tuple(full)}; {shapes}"
            )
    if bias is not None and bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(
            f"bias dtype ({bias.dtype}) must be floating-point or bool (True = attend)"
        )


def _broadcasts(shape: torch.Size, full: tuple[int, ...] | torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to `full`."""
    return len(shape) <= len(full) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False)
    )
