"""The textbook formula with every option, the mask drawn out: what all attention tests trust.

Plain torch operations on T x S matrices, differentiable by torch itself, written without a look at
the kernels.
"""

import math

import torch
from msfs_kernels.philox import fold_in, philox_4x32
from torch import Tensor


def attention_mask(
    T: int,
    S: int,
    device=None,
    *,
    is_causal=False,
    window=None,
    key_lengths=None,
    prefix_lengths=None,
    segment_ids=None,
    bias=None,
) -> Tensor:
    """Bool (..., 1, T, S), True where query i may see key j."""
    p = torch.arange(T, device=device)[:, None] + S - T
    j = torch.arange(S, device=device)[None, :]
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if is_causal:
        seen = seen & (j <= p)
    if window is not None:
        seen = seen & ((p - j < window) if is_causal else ((p - j).abs() < window))
    if prefix_lengths is not None:
        seen = seen | (j < prefix_lengths[..., None, None, None])
    if key_lengths is not None:
        seen = seen & (j < key_lengths[..., None, None, None])
    if segment_ids is not None:
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        seen = seen & (of_q[..., None, :, None] == of_k[..., None, None, :])
    if bias is not None and bias.dtype is torch.bool:
        seen = seen & bias
    return seen


def dropout_factors(shape: tuple[int, ...], rate: float, key: Tensor) -> Tensor:
    """0 where dropped, 1 / (1 - rate) where kept, (..., H, T, S)."""
    *lead, H, T, S = shape
    rows, h, i, j = (torch.arange(n, device=key.device) for n in (math.prod(lead), H, T, S))
    k0, k1 = fold_in(key, rows).unbind(-1)
    h, i = h[:, None, None], i[:, None]
    k0, k1 = k0[:, None, None, None], k1[:, None, None, None]
    word = philox_4x32(j, i, h, torch.zeros_like(j), k0, k1)[0]
    return (
        ((word >= round(rate * 2**32)).double() / (1 - rate))
        .expand(math.prod(lead), H, T, S)
        .reshape(shape)
    )


def textbook(
    q,
    k,
    v,
    *,
    is_causal=False,
    scale=None,
    window=None,
    key_lengths=None,
    prefix_lengths=None,
    segment_ids=None,
    softcap=None,
    alibi_slopes=None,
    bias=None,
    dropout=0.0,
    dropout_key=None,
    return_lse=False,
):
    T, S, repeat = q.shape[-2], k.shape[-2], q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeat, -3), v.repeat_interleave(repeat, -3)
    s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        i, j = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
        distance = (i + S - T - j).abs()
        s = s - alibi_slopes[..., None, None] * distance
    if bias is not None and bias.dtype is not torch.bool:
        s = s + bias
    seen = attention_mask(
        T,
        S,
        q.device,
        is_causal=is_causal,
        window=window,
        key_lengths=key_lengths,
        prefix_lengths=prefix_lengths,
        segment_ids=segment_ids,
        bias=bias,
    )
    some = seen.any(-1, keepdim=True)  # rows without keys: softmax over a harmless row, then zeros
    s = s.masked_fill(~seen & some, float("-inf"))
    weights = s.softmax(-1) * some
    if dropout > 0:
        weights = weights * dropout_factors(tuple(s.shape), dropout, dropout_key).to(s.dtype)
    o = weights @ v
    if return_lse:
        return o, s.logsumexp(-1).masked_fill(~some.expand_as(s[..., :1])[..., 0], float("-inf"))
    return o
