"""What the kernels of the backward and the tangent share: one number a query, and dS of a tile.

    lse     of the forward, from which P = e^{s - lse}
    delta   sum_j P_ij dP_ij = do_i . o_i  (minus the gradient of lse, if it has one)
    share   1 / sum_j P_ij, in full float32 only

**Float32.** dP - delta is a difference of near-equal numbers where few keys share a row, and P
rebuilt from a rounded lse sums to 1 only nearly. Beside products of bfloat16 neither shows; in full
float32 they double the error of the gradients. There `mean_kernel` walks over the keys once more
and takes delta = sum_j P_ij dP_ij / sum_j P_ij from the very numbers it is subtracted from, and
`share` corrects P. An error of delta is in all dS of its row, so both sums are taken in float64.

Source: Dao 2023 (FlashAttention-2), Algorithm 2, lines 4 and 11.
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
from msfs_kernels.launching import Launch
from msfs_kernels.options import Options
from msfs_kernels.triton_common import (
    LOG2E,
    constants,
    exp2,
    key_range,
    load_tile,
    longest_first,
    masks_of,
    padded,
    row_facts,
    tile_kept,
    tile_scores,
    tile_visible,
)
from msfs_kernels.triton_forward import heads_in_cache


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
def delta_of(grads, outputs, dlse, dlse_strides, batch, head, row, T, BM: tl.constexpr):
    """delta = rowsum(dO * O) - dlse of BM rows (Algorithm 2, line 4)."""
    total = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    if dlse is not None:
        i = row + tl.arange(0, BM)
        start = (
            tl.cast(batch, tl.int64) * dlse_strides[0] + tl.cast(head, tl.int64) * dlse_strides[1]
        )
        total -= tl.load(dlse + start + i.to(tl.int64) * dlse_strides[2], mask=i < T, other=0.0).to(
            tl.float32
        )
    return total


@triton.jit
def delta_kernel(do, o, dlse, delta, do_strides, o_strides, dlse_strides, H, T,
                 V: tl.constexpr, BM: tl.constexpr, VP: tl.constexpr):  # fmt: skip
    """delta of BM queries of one head, where the keys' kernel comes first."""
    blocks = tl.cdiv(T, BM)
    flat_head = tl.program_id(0) // blocks
    batch = flat_head // H
    head = flat_head % H
    row = (tl.program_id(0) % blocks) * BM
    i = row + tl.arange(0, BM)
    a = load_tile(do, do_strides, batch, head, row, T, BM, VP, V, True, False)
    b = load_tile(o, o_strides, batch, head, row, T, BM, VP, V, True, False)
    total = delta_of(a, b, dlse, dlse_strides, batch, head, row, T, BM)
    tl.store(delta + tl.cast(flat_head, tl.int64) * T + i, total, mask=i < T)


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
        constants(q, k, v, options, config),
    )
