"""The backward of exact attention: FlashAttention-2's Algorithm 2, with two ways to gather dQ.

With P_ij = e^{s_ij - lse_i} and o = P v, the chain rule through the softmax needs one scalar a
query, delta:

    dV = P^T dO     dP = dO V^T     dS = P * (dP - delta)     dQ = scale dS K     dK = scale dS^T Q
    delta_i = sum_j P_ij dP_ij = do_i . o_i              (minus the gradient of lse, if it has one)

**Why it recomputes.** P is T x S; keeping it would cost the memory that the forward saved. One
product Q K^T and the stored lse give it back exactly, and on a GPU that product is cheaper than
reading P from memory would be.

**Two orders of the loops.** dK and dV are sums over queries, so a program owns a block of keys and
walks over query blocks (Algorithm 2, lines 6 to 18); the heads of a group share their keys, so it
walks over all of them. dQ is a sum over keys: `query_kernel` owns a query block and walks over
keys, recomputing S and dP, 7 products of tiles in all, and every sum has one owner and one order:
the result is deterministic. `key_kernel` with FUSED computes each dS once, 5 products, and adds its
share of dQ to float32 memory atomically, in whatever order programs arrive. Where one tile holds
all keys (sentences, image patches), that share is all of dQ: with OWN it is stored, not added.

**Float32.** dP - delta is a difference of near-equal numbers where few keys share a row, and P
rebuilt from a rounded lse sums to 1 only nearly. Beside products of bfloat16 neither shows; in full
float32 they double the error of the gradients. There `mean_kernel` walks over the keys once more
and takes delta = sum_j P_ij dP_ij / sum_j P_ij from the very numbers it is subtracted from, and
1 / sum_j P_ij, `share`, corrects P: 7 products instead of 5. An error of delta is in all dS of its
row, so both sums are taken in float64.

Scores are transposed in the key-owning kernels (keys along rows), so that P^T and dS^T feed the
next product from registers.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.configs import Config, choose, fitted, is_fastest
from msfs_kernels.launching import Launch, launch
from msfs_kernels.options import Options, empty_tokens_first
from msfs_kernels.triton_common import (
    LOG2E,
    exp2,
    key_range,
    load_tile,
    longest_first,
    masks_of,
    padded,
    query_range,
    row_facts,
    store_tile,
    tile_kept,
    tile_scores,
    tile_visible,
    tiles,
    tma_ready,
)
from msfs_kernels.triton_forward import heads_in_cache, is_even


@triton.jit
def delta_kernel(do, o, dlse, delta, do_strides, o_strides, dlse_strides, H, T,
                 V: tl.constexpr, BM: tl.constexpr, VP: tl.constexpr):  # fmt: skip
    """delta = rowsum(dO * O) - dlse (Algorithm 2, line 4)."""
    blocks = tl.cdiv(T, BM)
    flat_head = tl.program_id(0) // blocks
    batch = flat_head // H
    head = flat_head % H
    row = (tl.program_id(0) % blocks) * BM
    i = row + tl.arange(0, BM)
    a = load_tile(do, do_strides, batch, head, row, T, BM, VP, V, True, False).to(tl.float32)
    b = load_tile(o, o_strides, batch, head, row, T, BM, VP, V, True, False).to(tl.float32)
    total = tl.sum(a * b, 1)
    if dlse is not None:
        start = (
            tl.cast(batch, tl.int64) * dlse_strides[0] + tl.cast(head, tl.int64) * dlse_strides[1]
        )
        total -= tl.load(dlse + start + i.to(tl.int64) * dlse_strides[2], mask=i < T, other=0.0).to(
            tl.float32
        )
    tl.store(delta + tl.cast(flat_head, tl.int64) * T + i, total, mask=i < T)


@triton.jit
def load_rows(x, flat_head, row, T, other, BM: tl.constexpr):
    i = row + tl.arange(0, BM)
    return tl.load(x + tl.cast(flat_head, tl.int64) * T + i, mask=i < T, other=other)


@triton.jit
def load_log_sums(lse, flat_head, row, T, BM: tl.constexpr):
    """lse in log2 units; +inf for rows without keys and rows beyond T, whose probabilities then
    come out as zero.
    """
    log_sums = load_rows(lse, flat_head, row, T, float("inf"), BM) * LOG2E
    return tl.where(log_sums == float("-inf"), float("inf"), log_sums)


@triton.jit
def load_shares(share, flat_head, row, T, BM: tl.constexpr):
    """share of BM rows, or the constant 1, which compiles to nothing."""
    if share is None:
        return tl.full([BM], 1.0, tl.float32)
    else:
        return load_rows(share, flat_head, row, T, 1.0, BM)


@triton.jit
def tile_gradient(
    products, dp, log_sums, delta, share, inputs, i, j, batch, head, T, S, facts, masks, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P with dropout, dS by scores, dS by products / scale) of one tile, in either orientation.

    log_sums, delta and share broadcast along the key dim of the tile; inputs is any tile of q or k.
    """
    scores, derivative = tile_scores(products, i, j, batch, head, T, S, facts, masks, scale_log2)
    p = exp2(scores - log_sums, inputs, PRECISION) * share
    if MASKED:
        p = tl.where(tile_visible(i, j, batch, head, T, S, facts, masks, CAUSAL), p, 0.0)
    kept_p = p
    if masks.rng is not None:
        kept = tile_kept(i, j, facts, masks)
        kept_p = tl.where(kept, p * masks.keep_scale, 0.0)
        dp = tl.where(kept, dp * masks.keep_scale, 0.0)
    ds = p * (dp - delta)
    if masks.softcap is not None:
        return kept_p, ds, ds * derivative
    else:
        return kept_p, ds, ds


@triton.jit
def key_blocks(
    dk, dv, keys, values, q, do, lse, delta, share, dq, q_strides, do_strides, dq_strides, column,
    low, high, batch, head, flat_head, H, T, S, facts, masks, scale, scale_log2, K: tl.constexpr,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, FUSED: tl.constexpr, OWN: tl.constexpr,
    TMA: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, lines 8 to 16, over the query blocks of [low, high) of one head; tiles of scores
    are (BN, BM).
    """
    j = (column + tl.arange(0, BN))[:, None]
    for start in range(low, high, BM):
        start = tl.multiple_of(start, BM)
        i = (start + tl.arange(0, BM))[None, :]
        queries = load_tile(q, q_strides, batch, head, start, T, BM, KP, K, True, TMA)
        log_sums = load_log_sums(lse, flat_head, start, T, BM)
        products = tl.dot(keys, queries.T, input_precision=PRECISION)
        grads = load_tile(do, do_strides, batch, head, start, T, BM, VP, V, True, TMA)
        row_delta = load_rows(delta, flat_head, start, T, 0.0, BM)
        shares = load_shares(share, flat_head, start, T, BM)
        dp = tl.dot(values, grads.T, input_precision=PRECISION)
        p, _, ds = tile_gradient(
            products, dp, log_sums[None, :], row_delta[None, :], shares[None, :], keys, i, j, batch,
            head, T, S, facts, masks, scale_log2, CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        ds = ds.to(queries.dtype)
        dk = tl.dot(ds, queries, dk, input_precision=PRECISION)
        if FUSED:
            part = tl.dot(ds.T, keys, input_precision=PRECISION) * scale
            if OWN:
                store_tile(dq, dq_strides, part, batch, head, start, T, BM, KP, K)
            elif BULK:
                dq.atomic_add([batch, head, start, 0], part.reshape([1, 1, BM, KP]))
            else:
                d = tl.arange(0, KP)
                rows = start + tl.arange(0, BM)
                pointers = dq + (tl.cast(flat_head, tl.int64) * T + start) * K
                pointers += tl.arange(0, BM)[:, None] * K + d[None, :]
                tl.atomic_add(
                    pointers, part, mask=(rows < T)[:, None] & (d < K)[None, :], sem="relaxed"
                )
    return dk, dv


@triton.jit
def key_kernel(
    q, k, v, do, lse, delta, share, dk, dv, dq, q_strides, k_strides, v_strides, do_strides,
    dk_strides, dv_strides, dq_strides, masks, heads, H, T, S, scale, scale_log2, wave,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    FUSED: tl.constexpr, OWN: tl.constexpr, TMA: tl.constexpr, BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one kv head (heads = B * G); FUSED adds the shares of dq, and with
    OWN, where these are all keys, stores dq.
    """
    blocks = tl.cdiv(S, BN)
    block, flat_kv_head = longest_first(tl.program_id(0), blocks, heads, wave)
    if CAUSAL:  # the first keys are seen by the most queries
        block = blocks - 1 - block
    G = H // GROUP
    batch = flat_kv_head // G
    kv_head = flat_kv_head % G
    column = block * BN
    keys = load_tile(k, k_strides, batch, kv_head, column, S, BN, KP, K, True, TMA)
    values = load_tile(v, v_strides, batch, kv_head, column, S, BN, VP, V, True, TMA)
    dk_sum = tl.zeros([BN, KP], tl.float32)
    dv_sum = tl.zeros([BN, VP], tl.float32)
    length = S
    for member in range(GROUP):
        head = kv_head * GROUP + member
        flat_head = batch * H + head
        facts = row_facts(masks, batch, head, H, S)
        length = facts[0]
        low, full_low, full_high, high = query_range(
            column, facts, masks, batch, T, S, CAUSAL, BM, BN
        )
        if masks.q_segments is not None or masks.mask is not None:
            full_high = low  # one masked loop over all
        elif FUSED and not EVEN:
            # A key beyond the length has some probability; its share must not reach dq.
            full_low = tl.where(column + BN > length, high, full_low)
            full_high = tl.maximum(full_high, full_low)
        if not EVEN and masks.q_segments is None and masks.mask is None:
            dk_sum, dv_sum = key_blocks(
                dk_sum, dv_sum, keys, values, q, do, lse, delta, share, dq, q_strides, do_strides,
                dq_strides, column, low, tl.minimum(full_low, high), batch, head, flat_head, H, T,
                S, facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP, CAUSAL, True, FUSED, OWN,
                TMA, BULK, PRECISION,
            )  # fmt: skip
        if masks.q_segments is None and masks.mask is None:
            dk_sum, dv_sum = key_blocks(
                dk_sum, dv_sum, keys, values, q, do, lse, delta, share, dq, q_strides, do_strides,
                dq_strides, column, full_low, tl.minimum(full_high, high), batch, head, flat_head,
                H, T, S, facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP, CAUSAL, False,
                FUSED, OWN, TMA, BULK, PRECISION,
            )  # fmt: skip
        if masks.window is not None or masks.q_segments is not None or masks.mask is not None:
            dk_sum, dv_sum = key_blocks(
                dk_sum, dv_sum, keys, values, q, do, lse, delta, share, dq, q_strides, do_strides,
                dq_strides, column, full_high, high, batch, head, flat_head, H, T, S, facts, masks,
                scale, scale_log2, K, V, BM, BN, KP, VP, CAUSAL, True, FUSED, OWN, TMA, BULK,
                PRECISION,
            )  # fmt: skip
        if OWN:  # queries that see none of the keys
            zeros = tl.zeros([BM, KP], tl.float32)
            for start in range(0, tl.minimum(low, T), BM):
                store_tile(dq, dq_strides, zeros, batch, head, start, T, BM, KP, K)
            for start in range(tl.cdiv(high, BM) * BM, T, BM):
                store_tile(dq, dq_strides, zeros, batch, head, start, T, BM, KP, K)
    if masks.key_lengths is not None:
        hidden = (column + tl.arange(0, BN) >= length)[:, None]
        dk_sum = tl.where(hidden, 0.0, dk_sum)
        dv_sum = tl.where(hidden, 0.0, dv_sum)
    store_tile(dk, dk_strides, dk_sum * scale, batch, kv_head, column, S, BN, KP, K)
    store_tile(dv, dv_strides, dv_sum, batch, kv_head, column, S, BN, VP, V)


@triton.jit
def query_blocks(
    dq, queries, grads, log_sums, delta, shares, k, v, k_strides, v_strides, row, low, high, batch,
    head, kv_head, H, T, S, facts, masks, scale_log2, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = (row + tl.arange(0, BM))[:, None]
    for start in range(low, high, BN):
        start = tl.multiple_of(start, BN)
        j = (start + tl.arange(0, BN))[None, :]
        keys = load_tile(k, k_strides, batch, kv_head, start, S, BN, KP, K, MASKED, TMA)
        values = load_tile(v, v_strides, batch, kv_head, start, S, BN, VP, V, MASKED, TMA)
        products = tl.dot(queries, keys.T, input_precision=PRECISION)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        _, _, ds = tile_gradient(
            products, dp, log_sums[:, None], delta[:, None], shares[:, None], keys, i, j, batch,
            head, T, S, facts, masks, scale_log2, CAUSAL, MASKED, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_kernel(
    q, k, v, do, lse, delta, share, dq, q_strides, k_strides, v_strides, do_strides, dq_strides,
    masks, heads, H, T, S, scale, scale_log2, wave,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries of one head; the loops are the forward's. heads = B * H."""
    block, flat_head = longest_first(tl.program_id(0), tl.cdiv(T, BM), heads, wave)
    batch = flat_head // H
    head = flat_head % H
    kv_head = head // GROUP
    row = block * BM
    facts = row_facts(masks, batch, head, H, S)
    low, full_low, full_high, high = key_range(row, facts, masks, batch, T, S, CAUSAL, BM, BN)
    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, TMA)
    grads = load_tile(do, do_strides, batch, head, row, T, BM, VP, V, True, TMA)
    log_sums = load_log_sums(lse, flat_head, row, T, BM)
    row_delta = load_rows(delta, flat_head, row, T, 0.0, BM)
    shares = load_shares(share, flat_head, row, T, BM)
    dq_sum = tl.zeros([BM, KP], tl.float32)
    if masks.window is not None and masks.q_segments is None and masks.mask is None:
        dq_sum = query_blocks(
            dq_sum, queries, grads, log_sums, row_delta, shares, k, v, k_strides, v_strides, row,
            low, tl.minimum(full_low, high), batch, head, kv_head, H, T, S, facts, masks,
            scale_log2, K, V, BM, BN, KP, VP, CAUSAL, True, TMA, PRECISION,
        )  # fmt: skip
    if masks.q_segments is None and masks.mask is None:
        dq_sum = query_blocks(
            dq_sum, queries, grads, log_sums, row_delta, shares, k, v, k_strides, v_strides, row,
            full_low, full_high, batch, head, kv_head, H, T, S, facts, masks, scale_log2, K, V, BM,
            BN, KP, VP, CAUSAL, False, TMA, PRECISION,
        )  # fmt: skip
    if not EVEN:
        dq_sum = query_blocks(
            dq_sum, queries, grads, log_sums, row_delta, shares, k, v, k_strides, v_strides, row,
            full_high, high, batch, head, kv_head, H, T, S, facts, masks, scale_log2, K, V, BM, BN,
            KP, VP, CAUSAL, True, TMA, PRECISION,
        )  # fmt: skip
    store_tile(dq, dq_strides, dq_sum * scale, batch, head, row, T, BM, KP, K)


@triton.jit
def mean_blocks(
    mean, total, queries, grads, log_sums, k, v, k_strides, v_strides, row, low, high, batch, head,
    kv_head, H, T, S, facts, masks, scale_log2, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = (row + tl.arange(0, BM))[:, None]
    for start in range(low, high, BN):
        start = tl.multiple_of(start, BN)
        j = (start + tl.arange(0, BN))[None, :]
        keys = load_tile(k, k_strides, batch, kv_head, start, S, BN, KP, K, MASKED, False)
        values = load_tile(v, v_strides, batch, kv_head, start, S, BN, VP, V, MASKED, False)
        products = tl.dot(queries, keys.T, input_precision=PRECISION)
        dp = tl.dot(grads, values.T, input_precision=PRECISION)
        scores, _ = tile_scores(products, i, j, batch, head, T, S, facts, masks, scale_log2)
        p = exp2(scores - log_sums[:, None], keys, PRECISION)
        if MASKED:
            p = tl.where(tile_visible(i, j, batch, head, T, S, facts, masks, CAUSAL), p, 0.0)
        if masks.rng is not None:
            dp = tl.where(tile_kept(i, j, facts, masks), dp * masks.keep_scale, 0.0)
        p = p.to(tl.float64)
        total += tl.sum(p, 1)
        mean += tl.sum(p * dp.to(tl.float64), 1)
    return mean, total


@triton.jit
def mean_kernel(
    q, k, v, do, lse, dlse, delta, share, q_strides, k_strides, v_strides, do_strides,
    dlse_strides, masks, heads, H, T, S, scale_log2, wave, GROUP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta = sum_j P dP / sum_j P - dlse and share = 1 / sum_j P of BM queries of one head."""
    block, flat_head = longest_first(tl.program_id(0), tl.cdiv(T, BM), heads, wave)
    batch = flat_head // H
    head = flat_head % H
    row = block * BM
    facts = row_facts(masks, batch, head, H, S)
    low, full_low, full_high, high = key_range(row, facts, masks, batch, T, S, CAUSAL, BM, BN)
    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, False)
    grads = load_tile(do, do_strides, batch, head, row, T, BM, VP, V, True, False)
    log_sums = load_log_sums(lse, flat_head, row, T, BM)
    mean = tl.zeros([BM], tl.float64)
    total = tl.zeros([BM], tl.float64)
    mean, total = mean_blocks(
        mean, total, queries, grads, log_sums, k, v, k_strides, v_strides, row, low,
        tl.minimum(full_low, high), batch, head, head // GROUP, H, T, S, facts, masks, scale_log2,
        K, V, BM, BN, KP, VP, CAUSAL, True, PRECISION,
    )  # fmt: skip
    mean, total = mean_blocks(
        mean, total, queries, grads, log_sums, k, v, k_strides, v_strides, row, full_low, full_high,
        batch, head, head // GROUP, H, T, S, facts, masks, scale_log2, K, V, BM, BN, KP, VP, CAUSAL,
        False, PRECISION,
    )  # fmt: skip
    mean, total = mean_blocks(
        mean, total, queries, grads, log_sums, k, v, k_strides, v_strides, row, full_high, high,
        batch, head, head // GROUP, H, T, S, facts, masks, scale_log2, K, V, BM, BN, KP, VP, CAUSAL,
        True, PRECISION,
    )  # fmt: skip
    shares = 1.0 / tl.where(total != 0.0, total, 1.0)
    mean *= shares
    i = row + tl.arange(0, BM)
    if dlse is not None:
        start = (
            tl.cast(batch, tl.int64) * dlse_strides[0] + tl.cast(head, tl.int64) * dlse_strides[1]
        )
        mean -= tl.load(dlse + start + i.to(tl.int64) * dlse_strides[2], mask=i < T, other=0.0)
    rows = tl.cast(flat_head, tl.int64) * T + i
    tl.store(delta + rows, mean.to(tl.float32), mask=i < T)
    tl.store(share + rows, shares.to(tl.float32), mask=i < T)


@triton.jit
def bias_kernel(
    q, k, v, do, lse, delta, share, dbias, q_strides, k_strides, v_strides, do_strides,
    dbias_strides, masks, B, H, T, S, scale_log2, b_step, h_step, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, SUM_T: tl.constexpr, SUM_S: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dBias = dS, summed over the dims that the bias broadcasts; one program walks a tile's sums.

    b_step and h_step are 1 where the bias has its own row or head, B and H where all share one. A
    bias that broadcasts T or S gets one partial sum for each block of queries or keys, in dims 2
    and 3 of dbias.
    """
    row = tl.program_id(0) * BM
    column = tl.program_id(1) * BN
    own_heads = H // h_step
    own_batch = tl.program_id(2) // own_heads
    own_head = tl.program_id(2) % own_heads
    i = (row + tl.arange(0, BM))[:, None]
    j = (column + tl.arange(0, BN))[None, :]
    last = tl.minimum(row + BM, T) - 1
    reachable = True
    if CAUSAL and masks.prefix_lengths is None:
        reachable = column <= last + (S - T)
    total = tl.zeros([BM, BN], tl.float32)
    if reachable:
        for batch in range(own_batch, own_batch + b_step):
            for head in range(own_head, own_head + h_step):
                facts = row_facts(masks, batch, head, H, S)
                if column < facts[0]:
                    flat_head = batch * H + head
                    keys = load_tile(
                        k, k_strides, batch, head // GROUP, column, S, BN, KP, K, True, False
                    )
                    values = load_tile(
                        v, v_strides, batch, head // GROUP, column, S, BN, VP, V, True, False
                    )
                    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, False)
                    grads = load_tile(do, do_strides, batch, head, row, T, BM, VP, V, True, False)
                    log_sums = load_log_sums(lse, flat_head, row, T, BM)
                    row_delta = load_rows(delta, flat_head, row, T, 0.0, BM)
                    products = tl.dot(queries, keys.T, input_precision=PRECISION)
                    dp = tl.dot(grads, values.T, input_precision=PRECISION)
                    shares = load_shares(share, flat_head, row, T, BM)
                    _, ds, _ = tile_gradient(
                        products, dp, log_sums[:, None], row_delta[:, None], shares[:, None], keys,
                        i, j, batch, head, T, S, facts, masks, scale_log2, CAUSAL, True, PRECISION,
                    )  # fmt: skip
                    total += ds
    start = (
        dbias
        + tl.cast(own_batch, tl.int64) * dbias_strides[0]
        + tl.cast(own_head, tl.int64) * dbias_strides[1]
    )
    if SUM_T and SUM_S:
        pointer = (
            start
            + tl.program_id(0).to(tl.int64) * dbias_strides[2]
            + tl.program_id(1) * dbias_strides[3]
        )
        tl.store(pointer, tl.sum(tl.sum(total, 1), 0))
    elif SUM_T:
        columns = column + tl.arange(0, BN)
        pointers = (
            start + tl.program_id(0).to(tl.int64) * dbias_strides[2] + columns * dbias_strides[3]
        )
        tl.store(pointers, tl.sum(total, 0), mask=columns < S)
    elif SUM_S:
        rows = row + tl.arange(0, BM)
        pointers = (
            start + rows.to(tl.int64) * dbias_strides[2] + tl.program_id(1) * dbias_strides[3]
        )
        tl.store(pointers, tl.sum(total, 1), mask=rows < T)
    else:
        pointers = start + i.to(tl.int64) * dbias_strides[2] + j.to(tl.int64) * dbias_strides[3]
        tl.store(pointers, total, mask=(i < T) & (j < S))


def plan_delta(do: Tensor, o: Tensor, dlse: Tensor | None, delta: Tensor, _: Options) -> Launch:
    B, H, T, V = o.shape
    VP = padded(V)
    BM = 64 if VP <= 128 else 32
    return Launch(
        delta_kernel,
        (triton.cdiv(T, BM) * B * H,),
        (
            do,
            o,
            dlse,
            delta,
            do.stride(),
            o.stride(),
            None if dlse is None else dlse.stride(),
            H,
            T,
        ),
        dict(V=V, BM=BM, VP=VP, num_warps=4),
    )


def in_full_float32(q: Tensor, options: Options) -> bool:
    return q.dtype == torch.float32 and options.precision == "ieee"


def plan_mean(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None, delta: Tensor,
    share: Tensor, options: Options, config: Config | None = None,
) -> Launch:  # fmt: skip
    """delta and share in full float32."""
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    config = config or choose("mean", q.dtype, padded(max(K, V)), options.causal, max(T, S))
    return Launch(
        mean_kernel,
        (triton.cdiv(T, config.block_m) * B * H,),
        (
            q,
            k,
            v,
            do,
            lse,
            dlse,
            delta,
            share,
            q.stride(),
            k.stride(),
            v.stride(),
            do.stride(),
            None if dlse is None else dlse.stride(),
            masks_of(options, (B, H, T, S)),
            B * H,
            H,
            T,
            S,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        common(q, k, v, options)
        | dict(
            BM=config.block_m,
            BN=config.block_n,
            num_warps=config.warps,
            num_stages=config.stages,
        ),
    )


def common(q: Tensor, k: Tensor, v: Tensor, options: Options) -> dict:
    return dict(
        GROUP=q.shape[1] // k.shape[1],
        K=q.shape[3],
        V=v.shape[3],
        KP=padded(q.shape[3]),
        VP=padded(v.shape[3]),
        CAUSAL=options.causal,
        PRECISION=options.precision,
    )


def fused_is_fastest(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    head_dim, length = max(padded(q.shape[3]), padded(v.shape[3])), max(q.shape[2], k.shape[2])
    return is_fastest("fused", q.dtype, head_dim, options.causal, length)


def choose_keys(q: Tensor, k: Tensor, v: Tensor, options: Options, *, fused: bool) -> Config:
    """The configuration of `key_kernel`; with dq, the least tile that holds all keys, if any."""
    head_dim, length = max(padded(q.shape[3]), padded(v.shape[3])), max(q.shape[2], k.shape[2])
    names = ("fused", "keys", "own") if fused else ("keys",)
    found = [choose(name, q.dtype, head_dim, options.causal, length) for name in names]
    holding = [config for config in found if k.shape[2] <= config.block_n]
    best = min(holding, key=lambda config: config.block_n) if fused and holding else found[0]
    return fitted(best, q.shape[2], k.shape[2])


def plan_keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, share: Tensor | None,
    dk: Tensor, dv: Tensor, dq: Tensor | None, options: Options, config: Config | None = None,
) -> Launch:  # fmt: skip
    """dk and dv; with dq the fused kernel, which gives the queries' gradient too: added to a zeroed
    contiguous float32 (B, H, T, K), or stored into dq of any strides if one tile holds all keys.
    """
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    masks = masks_of(options, (B, H, T, S))
    KP, VP = padded(K), padded(V)
    config = config or choose_keys(q, k, v, options, fused=dq is not None)
    BM, BN = config.block_m, config.block_n
    own = dq is not None and S <= BN
    tma = config.tma and tma_ready(q, k, v, do)
    bulk = (
        tma and K % 4 == 0 and not own and not triton.knobs.runtime.interpret
    )  # the interpreter has no bulk sums
    return Launch(
        key_kernel,
        (triton.cdiv(S, BN) * B * G,),
        (
            tiles(q, BM, KP, tma),
            tiles(k, BN, KP, tma),
            tiles(v, BN, VP, tma),
            tiles(do, BM, VP, tma),
            lse,
            delta,
            share,
            dk,
            dv,
            None if dq is None else tiles(dq, BM, KP, bulk),
            q.stride(),
            k.stride(),
            v.stride(),
            do.stride(),
            dk.stride(),
            dv.stride(),
            None if dq is None else dq.stride(),
            masks,
            B * G,
            H,
            T,
            S,
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(q, do, 1) if options.causal else 1,
        ),
        common(q, k, v, options)
        | dict(
            BM=BM,
            BN=BN,
            EVEN=is_even(masks, options.causal, S, BN),
            FUSED=dq is not None,
            OWN=own,
            TMA=tma,
            BULK=bulk,
            num_warps=config.warps,
            num_stages=config.stages,
        ),
    )


def plan_queries(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, share: Tensor | None,
    dq: Tensor, options: Options, config: Config | None = None,
) -> Launch:  # fmt: skip
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    masks = masks_of(options, (B, H, T, S))
    KP, VP = padded(K), padded(V)
    if config is None:
        config = fitted(choose("queries", q.dtype, max(KP, VP), options.causal, max(T, S)), T, S)
    BM, BN = config.block_m, config.block_n
    tma = config.tma and tma_ready(q, k, v, do)
    return Launch(
        query_kernel,
        (triton.cdiv(T, BM) * B * H,),
        (
            tiles(q, BM, KP, tma),
            tiles(k, BN, KP, tma),
            tiles(v, BN, VP, tma),
            tiles(do, BM, VP, tma),
            lse,
            delta,
            share,
            dq,
            q.stride(),
            k.stride(),
            v.stride(),
            do.stride(),
            dq.stride(),
            masks,
            B * H,
            H,
            T,
            S,
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        common(q, k, v, options)
        | dict(
            BM=BM,
            BN=BN,
            EVEN=is_even(masks, options.causal, S, BN),
            TMA=tma,
            num_warps=config.warps,
            num_stages=config.stages,
        ),
    )


def plan_bias(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, share: Tensor | None,
    options: Options, config: Config | None = None,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch and the (b, h, T or blocks, S or blocks) float32 tensor of partial sums that it
    fills.
    """
    (B, H, T, K), (_, _, S, V) = q.shape, v.shape
    assert options.bias is not None
    b, h, t, s = options.bias.shape
    config = config or choose("bias", q.dtype, padded(max(K, V)), options.causal, max(T, S))
    BM, BN = config.block_m, config.block_n
    blocks = triton.cdiv(T, BM), triton.cdiv(S, BN)
    sum_t, sum_s = t == 1 and T > 1, s == 1 and S > 1
    shape = (b, h, blocks[0] if sum_t else T, blocks[1] if sum_s else S)
    partial = q.new_empty(shape, dtype=torch.float32)
    described = Launch(
        bias_kernel,
        (*blocks, b * h),
        (
            q,
            k,
            v,
            do,
            lse,
            delta,
            share,
            partial,
            q.stride(),
            k.stride(),
            v.stride(),
            do.stride(),
            partial.stride(),
            masks_of(options, (B, H, T, S)),
            B,
            H,
            T,
            S,
            options.scale * LOG2E.value,
            1 if b == B else B,
            1 if h == H else H,
        ),
        common(q, k, v, options)
        | dict(
            BM=BM, BN=BN, SUM_T=sum_t, SUM_S=sum_s, num_warps=config.warps, num_stages=config.stages
        ),
    )
    return described, partial


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
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv in the inputs' dtypes and dbias in the bias's own shape, from do (B, H, T, V) and
    dlse (B, H, T); dq, dk and dv in the memory of `out`, of any strides, if it is given.
    """
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    dq, dk, dv = out or (
        empty_tokens_first(q, B, H, T, K),
        empty_tokens_first(k, B, G, S, K),
        empty_tokens_first(v, B, G, S, V),
    )
    need_dbias = need_dbias and options.has_float_bias
    if q.numel() == 0 or k.numel() == 0:
        dbias = torch.zeros_like(options.bias) if need_dbias and options.bias is not None else None
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    share = None
    if in_full_float32(q, options):
        share = torch.empty_like(lse)
        launch(plan_mean, (q, k, v, do, lse, dlse, delta, share), options)
    else:
        launch(plan_delta, (do, o, dlse, delta), Options())
    if choose_keys(q, k, v, options, fused=True).block_n >= S:
        launch(plan_keys, (q, k, v, do, lse, delta, share, dk, dv, dq), options)
    elif options.deterministic or not fused_is_fastest(q, k, v, options):
        launch(plan_keys, (q, k, v, do, lse, delta, share, dk, dv, None), options)
        launch(plan_queries, (q, k, v, do, lse, delta, share, dq), options)
    else:
        sums = q.new_zeros((B, H, T, K), dtype=torch.float32)
        launch(plan_keys, (q, k, v, do, lse, delta, share, dk, dv, sums), options)
        dq.copy_(sums)
    if not need_dbias or options.bias is None:
        return dq, dk, dv, None
    described, partial = plan_bias(q, k, v, do, lse, delta, share, options)
    described.run()
    return dq, dk, dv, partial.sum_to_size(options.bias.shape).to(options.bias.dtype)
