"""The op's CPU backend: torch's own flash kernels where they can express a call, the tiled path
elsewhere.

torch's CPU kernels (C++, threaded, blockwise) know a top-left causal mask and an additive mask.
That covers plain and causal attention, key lengths and a bias without gradient; T != S is cut into
parts that align:

    causal, S > T      keys [0, S - T) without a mask, keys [S - T, S) with a square one, merged by
    log-sum-exp
    causal, S < T      the first T - S queries see nothing

Grouped heads are its own: it reads a key head once for each of its query heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiled
from .checks import check_lengths
from .merge import merge_attention
from .options import Options, accumulate_dtype, empty_tokens_first
from .tiled import tangent

__all__ = ["backward", "forward", "tangent"]

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FEWEST_GROUPED_ROWS = 32  # below, the tiled path reads keys once for all heads of a group


class Part(NamedTuple):
    """A rectangle of queries and keys that one call of torch's kernel computes."""

    rows: slice
    keys: slice
    causal: bool


def expressible(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    T, repeat = q.shape[2], q.shape[1] // k.shape[1]
    return (
        min(*q.shape, *k.shape) > 0  # the kernel divides by zero
        and q.shape[3] == v.shape[3]
        and (repeat == 1 or T >= FEWEST_GROUPED_ROWS)
        and options.window < 0
        and (options.prefix_lengths is None or not options.causal)
        and options.q_segments is None
        and options.alibi is None
        and options.softcap == 0
        and options.dropout == 0
        and (options.bias is None or not (options.causal or options.key_lengths is not None))
    )


def parts(T: int, S: int, causal: bool) -> list[Part]:
    everything = Part(slice(0, T), slice(0, S), causal and T > 1)
    if not causal or T == 1 or S == T:
        return [everything]
    if S < T:
        return [Part(slice(T - S, T), slice(0, S), True)]
    return [
        Part(slice(0, T), slice(0, S - T), False),
        Part(slice(0, T), slice(S - T, S), True),
    ]


def additive_mask(q: Tensor, S: int, options: Options) -> tuple[Tensor | None, bool]:
    """The bias or the key lengths as a tensor to add, (B | 1, H | 1, T | 1, S), and whether it may
    leave a query of the whole call without a key.
    """
    if options.bias is not None:
        bias = options.bias.expand(*options.bias.shape[:3], S)
        if bias.dtype is not torch.bool:
            return bias.to(q.dtype), True
        return q.new_zeros(bias.shape).masked_fill_(~bias, -math.inf), True
    if options.key_lengths is None:
        return None, False
    shortest = int(options.key_lengths.min())
    if shortest == S:
        return None, False
    hidden = torch.arange(S) >= options.key_lengths[:, None, None, None]
    return q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf), shortest == 0


def cut(x: Tensor | None, part: Part) -> Tensor | None:
    """A mask's share of a part."""
    if x is None:
        return None
    x = x[..., part.keys]
    return x if x.shape[2] == 1 else x[:, :, part.rows]


def rows_first(x: Tensor) -> Tensor:
    """With elements of a row side by side: torch's kernel assumes it without a look."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # which takes 3 us to find nothing to do


def wide_rows(*tensors: Tensor) -> list[Tensor]:
    """For the backward, rows first and in the dtype of sums: torch's in bf16 is 7 times slower."""
    dtype = accumulate_dtype(tensors[0].dtype)
    return [rows_first(cast(x, dtype)) for x in tensors]


def tokens_first(x: Tensor) -> Tensor:
    """With the memory layout of every result of the op (options.empty_tokens_first)."""
    _, H, T, K = x.shape
    if x.stride() == (T * H * K, K, H * K, 1):  # as torch's kernels write
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def in_one_call(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether torch's kernel computes this whole, without a mask beyond causal: every query sees a
    key, and nothing is cut or merged.
    """
    return (
        (not options.causal or q.shape[2] in (1, k.shape[2]))
        and (options.bias is None and options.key_lengths is None)
        and expressible(q, k, v, options)
    )


def without_keys(mask: Tensor | None) -> Tensor | None:
    """(B | 1, H | 1, T | 1), True for rows that the mask leaves no key; None if there is none."""
    if mask is None:
        return None
    empty = mask.amax(-1) == -math.inf
    return empty if bool(empty.any()) else None


def plain_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(o, lse) `in_one_call`."""
    q, k, v = rows_first(q), rows_first(k), rows_first(v)
    o, lse = FLASH(q, k, v, is_causal=options.causal and q.shape[2] > 1, scale=options.scale)
    return tokens_first(o), lse.contiguous()


def plain_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) `in_one_call`."""
    dtype, causal = q.dtype, options.causal and q.shape[2] > 1
    do, q, k, v, o = wide_rows(do, q, k, v, o)
    grads = FLASH_BACKWARD(do, q, k, v, o, lse, 0.0, causal, scale=options.scale)
    dq, dk, dv = (tokens_first(cast(d, dtype)) for d in grads)
    return dq, dk, dv


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    T, S = q.shape[2], k.shape[2]
    check_lengths("key_lengths", options.key_lengths, S)
    check_lengths("prefix_lengths", options.prefix_lengths, S)
    if in_one_call(q, k, v, options):
        return plain_forward(q, k, v, options)
    if not expressible(q, k, v, options):
        return tiled.forward(q, k, v, options)
    q, k, v = rows_first(q), rows_first(k), rows_first(v)
    mask, hides = additive_mask(q, S, options)
    todo = parts(T, S, options.causal)
    whole = len(todo) == 1 and todo[0].rows == slice(0, T)
    hides = hides or not whole

    def compute(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        o, lse = FLASH(q, k, v, is_causal=causal, attn_mask=mask, scale=options.scale)
        empty = without_keys(mask) if hides else None
        if empty is not None:
            o = o.masked_fill_(empty[..., None], 0.0)
            lse = lse.masked_fill_(empty, -math.inf)
        return o, lse

    if whole:
        o, lse = compute(q, k, v, mask, todo[0].causal)
        return tokens_first(o), lse.contiguous()
    o = empty_tokens_first(q, *q.shape)
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    hidden = slice(0, todo[0].rows.start)
    o[:, :, hidden], lse[:, :, hidden] = 0.0, -math.inf
    results = [
        compute(
            q[:, :, part.rows],
            k[:, :, part.keys],
            v[:, :, part.keys],
            cut(mask, part),
            part.causal,
        )
        for part in todo
    ]
    merged = results[0] if len(todo) == 1 else merge_attention(*zip(*results, strict=True))
    o[:, :, todo[0].rows], lse[:, :, todo[0].rows] = merged
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: Options,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if dlse is not None or need_dbias or not expressible(q, k, v, options):
        return tiled.backward(do, dlse, q, k, v, o, lse, options, need_dbias)
    if in_one_call(q, k, v, options):
        return *plain_backward(do, q, k, v, o, lse, options), None
    T, S, dtype = q.shape[2], k.shape[2], q.dtype
    do, q, k, v, o = wide_rows(do, q, k, v, o)
    mask, hides = additive_mask(q, S, options)
    todo = parts(T, S, options.causal)
    whole = len(todo) == 1 and todo[0].rows == slice(0, T)
    if hides or not whole:
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # weights are exp(s - lse) = exp(-inf) = 0

    def gradients(
        *tensors: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of do, q, k, v, o and lse."""
        return FLASH_BACKWARD(*tensors, 0.0, causal, attn_mask=mask, scale=options.scale)

    if whole:
        grads = gradients(do, q, k, v, o, lse, mask=mask, causal=todo[0].causal)
        dq, dk, dv = (tokens_first(cast(d, dtype)) for d in grads)
        return dq, dk, dv, None
    sums = [empty_tokens_first(x, *x.shape).zero_() for x in (q, k, v)]
    for part in todo:
        dq, dk, dv = gradients(
            *(x[:, :, part.rows] for x in (do, q)),
            *(x[:, :, part.keys] for x in (k, v)),
            *(x[:, :, part.rows] for x in (o, lse)),
            mask=cut(mask, part),
            causal=part.causal,
        )
        sums[0][:, :, part.rows] += dq
        sums[1][:, :, part.keys] += dk
        sums[2][:, :, part.keys] += dv
    dq, dk, dv = (cast(dx, dtype) for dx in sums)
    return dq, dk, dv, None
