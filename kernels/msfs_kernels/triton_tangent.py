"""The tangent of exact attention: what o and its log-sum-exp do when q, k, v (and the bias) move,
in one more pass.

With the forward done, P = e^{s - lse} is at hand, so no running maximum is needed:

    tS   = scale (tQ K^T + Q tK^T) + tBias            how the scores move
    tLse = rowsum(P * tS)                             the mean of that under each query's weights
    tO   = (P * tS) V + P tV - tLse O                 weights that rise above the mean gain, the
    others lose

Five products of tiles against the forward's two. Both products into tO share one accumulator, and
tLse is summed alongside. Dropout's factors Z multiply P in tO (o is (P * Z) V), but not in tLse; a
soft-cap multiplies tS by its slope before the bias.

**Float32.** In full float32 the rounding of lse, which leaves sum_j P_ij a little beside 1, and the
difference between the two sums of tO would be the largest errors of all. There a first pass sums
P and P * tS, and a second one sums P (tS - tLse) v with P divided by its sum: 8 products. The
rule is the derivative of Dao 2023, Algorithm 1, written out; memory is linear in T.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.configs import Config, choose, fitted
from msfs_kernels.launching import Launch, launch
from msfs_kernels.options import Options, empty_tokens_first
from msfs_kernels.triton_common import (
    LOG2E,
    broadcast_strides,
    constants,
    exp2,
    key_range,
    load_tile,
    longest_first,
    masks_of,
    padded,
    row_facts,
    store_tile,
    tile_kept,
    tile_offsets,
    tile_scores,
    tile_visible,
    tiles,
    tma_ready,
)
from msfs_kernels.triton_forward import heads_in_cache, is_even
from msfs_kernels.triton_rows import in_full_float32, load_log_sums


@triton.jit
def tangent_blocks(
    out, mean, total, centre, share, queries, t_queries, log_sums, k, v, tk, tv, tbias, k_strides,
    v_strides, tk_strides, tv_strides, tbias_strides, row, low, high, batch, head, kv_head, H, T, S,
    facts, masks, scale, scale_log2, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """PASS "means" sums P and P tS, "centred" sums tO from tS - centre and P share, "only" P tS and
    tO.
    """
    i = (row + tl.arange(0, BM))[:, None]
    for start in range(low, high, BN):
        start = tl.multiple_of(start, BN)
        j = (start + tl.arange(0, BN))[None, :]
        keys = load_tile(k, k_strides, batch, kv_head, start, S, BN, KP, K, MASKED, TMA)
        t_keys = load_tile(tk, tk_strides, batch, kv_head, start, S, BN, KP, K, MASKED, TMA)
        products = tl.dot(queries, keys.T, input_precision=PRECISION)
        moves = tl.dot(t_queries, keys.T, input_precision=PRECISION)
        moves = tl.dot(queries, t_keys.T, moves, input_precision=PRECISION) * scale
        scores, slope = tile_scores(products, i, j, batch, head, T, S, facts, masks, scale_log2)
        p = exp2(scores - log_sums[:, None], keys, PRECISION)
        if MASKED:
            p = tl.where(tile_visible(i, j, batch, head, T, S, facts, masks, CAUSAL), p, 0.0)
        if masks.softcap is not None:
            moves = moves * slope
        if tbias is not None:
            offsets = tile_offsets(
                i,
                j,
                batch,
                head,
                tbias_strides[0],
                tbias_strides[1],
                tbias_strides[2],
                tbias_strides[3],
            )
            moves += tl.load(tbias + offsets, mask=(i < T) & (j < S), other=0.0).to(tl.float32)
        if PASS == "centred":
            p *= share[:, None]
            moves -= centre[:, None]
        if PASS == "means":
            total += tl.sum(p.to(tl.float64), 1)
            mean += tl.sum(p.to(tl.float64) * moves.to(tl.float64), 1)
        moved = p * moves
        if PASS == "only":
            mean += tl.sum(moved, 1)
        if PASS != "means":
            if masks.rng is not None:
                kept = tile_kept(i, j, facts, masks)
                p = tl.where(kept, p * masks.keep_scale, 0.0)
                moved = tl.where(kept, moved * masks.keep_scale, 0.0)
            values = load_tile(v, v_strides, batch, kv_head, start, S, BN, VP, V, MASKED, TMA)
            t_values = load_tile(tv, tv_strides, batch, kv_head, start, S, BN, VP, V, MASKED, TMA)
            out = tl.dot(moved.to(values.dtype), values, out, input_precision=PRECISION)
            out = tl.dot(p.to(t_values.dtype), t_values, out, input_precision=PRECISION)
    return out, mean, total


@triton.jit
def tangent_pass(
    centre, share, queries, t_queries, log_sums, k, v, tk, tv, tbias, k_strides, v_strides,
    tk_strides, tv_strides, tbias_strides, row, batch, head, kv_head, H, T, S, facts, masks, scale,
    scale_log2, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """(sum for tO, sum of P tS, sum of P) over all keys that the queries can see."""
    low, full_low, full_high, high = key_range(row, facts, masks, batch, T, S, CAUSAL, BM, BN)
    out = tl.zeros([BM, VP], tl.float32)
    # An error of the mean is in all that it is subtracted from: in full float32 it is formed in 64.
    SUMS: tl.constexpr = tl.float64 if PASS == "means" else tl.float32
    mean = tl.zeros([BM], SUMS)
    total = tl.zeros([BM], SUMS)
    if masks.window is not None and masks.q_segments is None and masks.mask is None:
        out, mean, total = tangent_blocks(
            out, mean, total, centre, share, queries, t_queries, log_sums, k, v, tk, tv, tbias,
            k_strides, v_strides, tk_strides, tv_strides, tbias_strides, row, low,
            tl.minimum(full_low, high), batch, head, kv_head, H, T, S, facts, masks, scale,
            scale_log2, K, V, BM, BN, KP, VP, CAUSAL, True, TMA, PRECISION, PASS,
        )  # fmt: skip
    if masks.q_segments is None and masks.mask is None:
        out, mean, total = tangent_blocks(
            out, mean, total, centre, share, queries, t_queries, log_sums, k, v, tk, tv, tbias,
            k_strides, v_strides, tk_strides, tv_strides, tbias_strides, row, full_low, full_high,
            batch, head, kv_head, H, T, S, facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP,
            CAUSAL, False, TMA, PRECISION, PASS,
        )  # fmt: skip
    if not EVEN:
        out, mean, total = tangent_blocks(
            out, mean, total, centre, share, queries, t_queries, log_sums, k, v, tk, tv, tbias,
            k_strides, v_strides, tk_strides, tv_strides, tbias_strides, row, full_high, high,
            batch, head, kv_head, H, T, S, facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP,
            CAUSAL, True, TMA, PRECISION, PASS,
        )  # fmt: skip
    return out, mean, total


@triton.jit
def tangent_kernel(
    q, k, v, tq, tk, tv, tbias, o, lse, to, tlse, q_strides, k_strides, v_strides, tq_strides,
    tk_strides, tv_strides, tbias_strides, o_strides, to_strides, masks, heads, H, T, S, scale,
    scale_log2, wave, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head against all keys that they can see. heads = B * H."""
    block, flat_head = longest_first(tl.program_id(0), tl.cdiv(T, BM), heads, wave)
    batch = flat_head // H
    head = flat_head % H
    kv_head = head // GROUP
    row = block * BM
    facts = row_facts(masks, batch, head, H, S)
    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, TMA)
    t_queries = load_tile(tq, tq_strides, batch, head, row, T, BM, KP, K, True, TMA)
    log_sums = load_log_sums(lse, flat_head, row, T, BM)
    if EXACT:
        _, mean, total = tangent_pass(
            log_sums, log_sums, queries, t_queries, log_sums, k, v, tk, tv, tbias, k_strides,
            v_strides, tk_strides, tv_strides, tbias_strides, row, batch, head, kv_head, H, T, S,
            facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP, CAUSAL, EVEN, TMA, PRECISION,
            "means",
        )  # fmt: skip
        share = 1.0 / tl.where(total != 0.0, total, 1.0)
        mean = (mean * share).to(tl.float32)
        share = share.to(tl.float32)
        out, _, _ = tangent_pass(
            mean, share, queries, t_queries, log_sums, k, v, tk, tv, tbias, k_strides, v_strides,
            tk_strides, tv_strides, tbias_strides, row, batch, head, kv_head, H, T, S, facts, masks,
            scale, scale_log2, K, V, BM, BN, KP, VP, CAUSAL, EVEN, TMA, PRECISION, "centred",
        )  # fmt: skip
    else:
        out, mean, _ = tangent_pass(
            log_sums, log_sums, queries, t_queries, log_sums, k, v, tk, tv, tbias, k_strides,
            v_strides, tk_strides, tv_strides, tbias_strides, row, batch, head, kv_head, H, T, S,
            facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP, CAUSAL, EVEN, TMA, PRECISION,
            "only",
        )  # fmt: skip
        outputs = load_tile(o, o_strides, batch, head, row, T, BM, VP, V, True, False)
        out -= mean[:, None] * outputs.to(tl.float32)
    store_tile(to, to_strides, out, batch, head, row, T, BM, VP, V)
    i = row + tl.arange(0, BM)
    tl.store(tlse + tl.cast(flat_head, tl.int64) * T + i, mean, mask=i < T)


def plan_tangent(
    tq: Tensor, tk: Tensor, tv: Tensor, tbias: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, lse: Tensor, to: Tensor, tlse: Tensor, options: Options,
    config: Config | None = None,
) -> Launch:  # fmt: skip
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    masks = masks_of(options, (B, H, T, S))
    KP, VP = padded(K), padded(V)
    if config is None:
        config = fitted(choose("tangent", q.dtype, max(KP, VP), options.causal, max(T, S)), T, S)
    BM, BN = config.block_m, config.block_n
    tma = config.tma and tma_ready(q, k, v, tq, tk, tv)
    return Launch(
        tangent_kernel,
        (triton.cdiv(T, BM) * B * H,),
        (
            tiles(q, BM, KP, tma),
            tiles(k, BN, KP, tma),
            tiles(v, BN, VP, tma),
            tiles(tq, BM, KP, tma),
            tiles(tk, BN, KP, tma),
            tiles(tv, BN, VP, tma),
            tbias,
            o,
            lse,
            to,
            tlse,
            q.stride(),
            k.stride(),
            v.stride(),
            tq.stride(),
            tk.stride(),
            tv.stride(),
            broadcast_strides(tbias, (B, H, T, S)),
            o.stride(),
            to.stride(),
            masks,
            B * H,
            H,
            T,
            S,
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        constants(
            q,
            k,
            v,
            options,
            config,
            EVEN=is_even(masks, options.causal, S, BN),
            TMA=tma,
            EXACT=in_full_float32(q, options),
        ),
    )


def tangent(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tbias: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """to (B, H, T, V) in o's dtype and tlse (B, H, T) float32; zeros where a query sees no key."""
    (B, H, T, _), V = q.shape, v.shape[-1]
    to = empty_tokens_first(q, B, H, T, V)
    tlse = q.new_empty((B, H, T), dtype=torch.float32)
    if to.numel() == 0 or k.shape[2] == 0:
        return to.zero_(), tlse.zero_()
    launch(plan_tangent, (tq, tk, tv, tbias, q, k, v, o, lse.contiguous(), to, tlse), options)
    return to, tlse
