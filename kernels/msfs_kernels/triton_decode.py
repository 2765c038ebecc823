"""Decoding: a few queries against many keys, split over the keys so that the whole chip takes part
(split-KV).

With one query a head the forward kernel would start one program a head, each walking alone through
the whole cache. Here a program takes all queries of all heads that share one kv head, as rows of
one tile (so that keys and values are read once for the group), and one slice of the keys. Each
slice gives a normalised partial output and its log-sum-exp; the merge weights them by their share
of the whole sum:

    lse = log sum_c e^{lse_c}        o = sum_c e^{lse_c - lse} o_c

Source: Dao et al. 2023, Flash-Decoding.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.configs import Config, choose
from msfs_kernels.launching import Launch, launch
from msfs_kernels.options import Options, empty_tokens_first
from msfs_kernels.triton_common import (
    LN2,
    LOG2E,
    MOST_QUERIES,
    constants,
    key_range,
    masks_of,
    padded,
    row_facts,
)
from msfs_kernels.triton_forward import forward_blocks

SHORTEST_SLICE = 256  # keys
PROGRAMS = 264  # two for each of a large chip's multiprocessors


@triton.jit
def slice_kernel(
    q, k, v, o, lse, q_strides, k_strides, v_strides, o_strides, masks, B, H, T, S, scale_log2,
    GROUP: tl.constexpr, SLICES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr,
    SIMPLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of the keys of one kv head; row c * B + b of o and lse is batch row b's slice c."""
    G = H // GROUP
    part = tl.program_id(0) % SLICES
    flat_kv_head = tl.program_id(0) // SLICES
    batch = flat_kv_head // G
    kv_head = flat_kv_head % G
    r = tl.arange(0, BM)
    inside = r < GROUP * T
    i = r % T
    head = kv_head * GROUP + tl.minimum(r // T, GROUP - 1)
    facts = row_facts(masks, batch, head[:, None], H, S)
    low, _, _, high = key_range(0, facts, masks, batch, T, S, CAUSAL, BM, BN)
    share = tl.cdiv(tl.cdiv(high - low, BN), SLICES) * BN
    low += part * share
    high = tl.minimum(high, low + share)

    d = tl.arange(0, KP)
    rows = head.to(tl.int64) * q_strides[1] + i.to(tl.int64) * q_strides[2]
    pointers = (
        q + tl.cast(batch, tl.int64) * q_strides[0] + rows[:, None] + d[None, :] * q_strides[3]
    )
    queries = tl.load(pointers, mask=inside[:, None] & (d < K)[None, :], other=0.0)
    out = tl.zeros([BM, VP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out, top, total = forward_blocks(
        out, top, total, queries, k, v, k_strides, v_strides, i[:, None], low, high, batch,
        head[:, None], kv_head, T, S, facts, masks, scale_log2, K, V, BM, BN, KP, VP,
        CAUSAL, True, SIMPLE, False, PRECISION,
    )  # fmt: skip

    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    if masks.rng is not None:
        out = out * (masks.keep_scale / total)[:, None]
    else:
        out = out * (1.0 / total)[:, None]
    log_sum = tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf"))
    if masks.key_lengths is not None or masks.prefix_lengths is not None:
        out += facts[4]
        log_sum += facts[4]
    row = tl.cast(part * B + batch, tl.int64)
    d = tl.arange(0, VP)
    rows = head.to(tl.int64) * o_strides[1] + i.to(tl.int64) * o_strides[2]
    pointers = o + row * o_strides[0] + rows[:, None] + d[None, :] * o_strides[3]
    tl.store(pointers, out.to(o.dtype.element_ty), mask=inside[:, None] & (d < V)[None, :])
    tl.store(lse + row * (H * T) + head * T + i, log_sum, mask=inside)


@triton.jit
def merge_kernel(
    parts, part_lse, o, lse, part_strides, o_strides, B, H, T,
    SLICES: tl.constexpr, CP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """One query of one head: its slices weighted by e^{lse_c - lse}."""
    flat = tl.program_id(0)
    i = flat % T
    batch = flat // T // H
    head = flat // T % H
    c = tl.arange(0, CP)
    d = tl.arange(0, VP)
    log_sums = tl.load(
        part_lse + (c * B + batch).to(tl.int64) * (H * T) + head * T + i,
        mask=c < SLICES,
        other=float("-inf"),
    )
    top = tl.max(log_sums, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((log_sums - base) * LOG2E)
    total = tl.sum(weights, 0)
    rows = (
        (c * B + batch).to(tl.int64) * part_strides[0]
        + head * part_strides[1]
        + i * part_strides[2]
    )
    pointers = parts + rows[:, None] + d[None, :] * part_strides[3]
    values = tl.load(pointers, mask=(c < SLICES)[:, None] & (d < V)[None, :], other=0.0)
    out = tl.sum(values * weights[:, None], 0) / tl.where(total != 0.0, total, 1.0)
    start = tl.cast(batch, tl.int64) * o_strides[0] + tl.cast(head, tl.int64) * o_strides[1]
    start += tl.cast(i, tl.int64) * o_strides[2]
    tl.store(o + start + d * o_strides[3], out.to(o.dtype.element_ty), mask=d < V)
    log_sum = tl.where(total != 0.0, base + tl.log2(total) * LN2, float("-inf"))
    tl.store(lse + tl.cast(flat, tl.int64), log_sum)


def slices(q: Tensor, k: Tensor) -> int:
    """How many slices fill the chip without making any shorter than SHORTEST_SLICE keys."""
    rows = q.shape[0] * k.shape[1]
    return max(1, min(64, k.shape[2] // SHORTEST_SLICE, triton.cdiv(PROGRAMS, rows)))


def suits(q: Tensor, k: Tensor) -> bool:
    """Few queries, and either many keys or several heads that share them."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    return T <= MOST_QUERIES and T * group <= 64 and (slices(q, k) > 1 or group > 1)


def plan_slices(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    config: Config | None = None,
) -> Launch:  # fmt: skip
    """o (C * B, H, T, V) and lse (C * B, H, T) for C slices."""
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    masks = masks_of(options, (B, H, T, S))
    KP, VP = padded(K), padded(V)
    config = config or choose("decode", q.dtype, max(KP, VP), options.causal, S)
    config = config._replace(block_m=padded(T * H // G))
    parts = o.shape[0] // B
    simple = masks.softcap is None and masks.alibi is None and masks.bias is None
    return Launch(
        slice_kernel,
        (B * G * parts,),
        (
            q,
            k,
            v,
            o,
            lse,
            q.stride(),
            k.stride(),
            v.stride(),
            o.stride(),
            masks,
            B,
            H,
            T,
            S,
            options.scale * LOG2E.value,
        ),
        constants(q, k, v, options, config, SLICES=parts, SIMPLE=simple and options.scale > 0),
    )


def plan_merge(parts: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor, _: Options) -> Launch:
    B, H, T, V = o.shape
    count = parts.shape[0] // B
    return Launch(
        merge_kernel,
        (B * H * T,),
        (parts, part_lse, o, lse, parts.stride(), o.stride(), B, H, T),
        dict(SLICES=count, CP=triton.next_power_of_2(count), V=V, VP=padded(V), num_warps=2),
    )


def decode(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The forward for T of 1 to 16: o in q's dtype and lse float32, as `triton_forward.forward`
    gives them.
    """
    (B, H, T, _), V = q.shape, v.shape[-1]
    o = empty_tokens_first(q, B, H, T, V)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    count = slices(q, k)
    if count == 1:
        launch(plan_slices, (q, k, v, o, lse), options)
        return o, lse
    parts = q.new_empty((count * B, H, T, V), dtype=torch.float32)
    part_lse = q.new_empty((count * B, H, T), dtype=torch.float32)
    launch(plan_slices, (q, k, v, parts, part_lse), options)
    launch(plan_merge, (parts, part_lse, o, lse), Options())
    return o, lse
