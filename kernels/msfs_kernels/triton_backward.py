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

**Float32.** In full float32 one more walk over the keys (`mean_kernel`) comes first: 7 products
instead of 5. `triton_rows.py` says why, and has what all these kernels share.

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
from msfs_kernels.triton_bias import plan_bias
from msfs_kernels.triton_common import (
    LOG2E,
    constants,
    key_range,
    load_tile,
    longest_first,
    masks_of,
    padded,
    query_range,
    row_facts,
    store_tile,
    tiles,
    tma_ready,
)
from msfs_kernels.triton_forward import heads_in_cache, is_even
from msfs_kernels.triton_rows import (
    delta_of,
    in_full_float32,
    load_log_sums,
    load_rows,
    load_shares,
    plan_delta,
    plan_mean,
    tile_gradient,
)


@triton.jit
def key_blocks(
    dk, dv, keys, values, q, do, o, dlse, lse, delta, share, dq, q_strides, do_strides, o_strides,
    dlse_strides, dq_strides, column, low, high, batch, head, flat_head, H, T, S, facts, masks,
    scale, scale_log2, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KP:
    tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, FUSED: tl.constexpr,
    OWN: tl.constexpr, TMA: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
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
        if o is not None:
            outputs = load_tile(o, o_strides, batch, head, start, T, BM, VP, V, True, False)
            row_delta = delta_of(grads, outputs, dlse, dlse_strides, batch, head, start, T, BM)
        else:
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
    q, k, v, do, o, dlse, lse, delta, share, dk, dv, dq, q_strides, k_strides, v_strides,
    do_strides, o_strides, dlse_strides, dk_strides, dv_strides, dq_strides, masks, heads, H, T, S,
    scale, scale_log2, wave, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM:
    tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN:
    tl.constexpr, FUSED: tl.constexpr, OWN: tl.constexpr, TMA: tl.constexpr, BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one kv head (heads = B * G); FUSED adds the shares of dq, and with
    OWN, where these are all keys, stores dq. With o, delta is computed here, once if OWN.
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
                dk_sum, dv_sum, keys, values, q, do, o, dlse, lse, delta, share, dq, q_strides,
                do_strides, o_strides, dlse_strides, dq_strides, column, low, tl.minimum(full_low,
                high), batch, head, flat_head, H, T, S, facts, masks, scale, scale_log2, K, V, BM,
                BN, KP, VP, CAUSAL, True, FUSED, OWN, TMA, BULK, PRECISION,
            )  # fmt: skip
        if masks.q_segments is None and masks.mask is None:
            dk_sum, dv_sum = key_blocks(
                dk_sum, dv_sum, keys, values, q, do, o, dlse, lse, delta, share, dq, q_strides,
                do_strides, o_strides, dlse_strides, dq_strides, column, full_low,
                tl.minimum(full_high, high), batch, head, flat_head, H, T, S, facts, masks, scale,
                scale_log2, K, V, BM, BN, KP, VP, CAUSAL, False, FUSED, OWN, TMA, BULK, PRECISION,
            )  # fmt: skip
        if masks.window is not None or masks.q_segments is not None or masks.mask is not None:
            dk_sum, dv_sum = key_blocks(
                dk_sum, dv_sum, keys, values, q, do, o, dlse, lse, delta, share, dq, q_strides,
                do_strides, o_strides, dlse_strides, dq_strides, column, full_high, high, batch,
                head, flat_head, H, T, S, facts, masks, scale, scale_log2, K, V, BM, BN, KP, VP,
                CAUSAL, True, FUSED, OWN, TMA, BULK, PRECISION,
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
    q, k, v, do, o, dlse, lse, delta, share, dq, q_strides, k_strides, v_strides, do_strides,
    o_strides, dlse_strides, dq_strides, masks, heads, H, T, S, scale, scale_log2, wave,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries of one head; the loops are the forward's. heads = B * H. With o, delta is
    computed and stored here, for the keys' kernel that comes next.
    """
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
    if o is not None:
        outputs = load_tile(o, o_strides, batch, head, row, T, BM, VP, V, True, False)
        row_delta = delta_of(grads, outputs, dlse, dlse_strides, batch, head, row, T, BM)
        rows = row + tl.arange(0, BM)
        tl.store(delta + tl.cast(flat_head, tl.int64) * T + rows, row_delta, mask=rows < T)
    else:
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
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, o: Tensor | None, dlse: Tensor | None, lse: Tensor,
    delta: Tensor | None, share: Tensor | None, dk: Tensor, dv: Tensor, dq: Tensor | None,
    options: Options, config: Config | None = None,
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
            o,
            dlse,
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
            None if o is None else o.stride(),
            None if dlse is None else dlse.stride(),
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
        constants(
            q,
            k,
            v,
            options,
            config,
            EVEN=is_even(masks, options.causal, S, BN),
            FUSED=dq is not None,
            OWN=own,
            TMA=tma,
            BULK=bulk,
        ),
    )


def plan_queries(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, o: Tensor | None, dlse: Tensor | None, lse: Tensor,
    delta: Tensor, share: Tensor | None, dq: Tensor, options: Options,
    config: Config | None = None,
) -> Launch:  # fmt: skip
    """dq; with o also delta, which is given otherwise."""
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
            o,
            dlse,
            lse,
            delta,
            share,
            dq,
            q.stride(),
            k.stride(),
            v.stride(),
            do.stride(),
            None if o is None else o.stride(),
            None if dlse is None else dlse.stride(),
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
        constants(q, k, v, options, config, EVEN=is_even(masks, options.causal, S, BN), TMA=tma),
    )


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
    exact = in_full_float32(q, options)
    one_tile = choose_keys(q, k, v, options, fused=True).block_n >= S
    two_kernels = options.deterministic or not fused_is_fastest(q, k, v, options)
    # Who meets each row once, and before others need it, makes delta on the way, if it has the
    # registers: one tile of large heads has not, nor one of many keys under a causal mask.
    on_the_way = not exact and two_kernels
    if one_tile:
        room = max(K, V) <= 64 and not (options.causal and S > 64)
        on_the_way = not exact and not need_dbias and room
    rows = (o, dlse) if on_the_way else (None, None)
    delta = None if on_the_way and one_tile else torch.empty_like(lse)
    share = torch.empty_like(lse) if exact else None
    if exact:
        launch(plan_mean, (q, k, v, do, lse, dlse, delta, share), options)
    elif not on_the_way:
        launch(plan_delta, (do, o, dlse, delta), Options())
    if one_tile:
        launch(plan_keys, (q, k, v, do, *rows, lse, delta, share, dk, dv, dq), options)
    elif two_kernels:
        launch(plan_queries, (q, k, v, do, *rows, lse, delta, share, dq), options)
        launch(plan_keys, (q, k, v, do, None, None, lse, delta, share, dk, dv, None), options)
    else:
        sums = q.new_zeros((B, H, T, K), dtype=torch.float32)
        launch(plan_keys, (q, k, v, do, None, None, lse, delta, share, dk, dv, sums), options)
        dq.copy_(sums)
    if not need_dbias or options.bias is None:
        return dq, dk, dv, None
    assert delta is not None
    described, partial = plan_bias(q, k, v, do, lse, delta, share, options)
    described.run()
    return dq, dk, dv, partial.sum_to_size(options.bias.shape).to(options.bias.dtype)
