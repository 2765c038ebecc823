"""The forward and its tangent in one pass: what torch.func.jvp of a plain call needs.

Forward and tangent, one behind the other, form the scores and their exponentials twice: 2 + 5
products of tiles. Here every block of keys gives everything that it has to give at once, under the
running maximum of the online softmax (`triton_forward.py`), 6 products:

    P = e^{s - m}    tS = scale (tQ K^T + Q tK^T)
    l' = a l + rowsum(P)           the denominator
    M' = a M + rowsum(P * tS)      the mean of tS, times l
    O' = a O + P V                 the numerator
    A' = a A + (P * tS) V + P tV   how the numerator moves

with a = e^{m - m'} where a block raises the maximum. After the last block

    o = O / l    lse = m + log l    tLse = M / l    tO = A / l - tLse o

by the quotient rule; what a shift of the maximum would add to A and M cancels there. No masks but
the causal one: all else takes the two kernels, and so does full float32, where tO is the difference
of two sums that have to be formed from the same numbers (`triton_tangent.py`).

Source: Dao 2023 (FlashAttention-2), Algorithm 1, differentiated.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels import triton_decode
from msfs_kernels.configs import Config, choose, fitted, is_fastest
from msfs_kernels.launching import Launch, launch
from msfs_kernels.options import Options, empty_tokens_first
from msfs_kernels.triton_common import (
    LN2,
    LOG2E,
    constants,
    load_tile,
    longest_first,
    padded,
    store_tile,
    tiles,
    tma_ready,
)
from msfs_kernels.triton_forward import heads_in_cache
from msfs_kernels.triton_rows import in_full_float32


@triton.jit
def dual_blocks(
    out, t_out, top, total, mean, queries, t_queries, k, v, tk, tv, k_strides, v_strides,
    tk_strides, tv_strides, i, low, high, batch, kv_head, T, S, scale, scale_log2, K: tl.constexpr,
    V: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The five sums above over the key blocks of [low, high); i (BM, 1) numbers the queries."""
    for start in range(low, high, BN):
        start = tl.multiple_of(start, BN)
        keys = load_tile(k, k_strides, batch, kv_head, start, S, BN, KP, K, MASKED, TMA)
        t_keys = load_tile(tk, tk_strides, batch, kv_head, start, S, BN, KP, K, MASKED, TMA)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        moves = tl.dot(t_queries, keys.T, input_precision=PRECISION)
        moves = tl.dot(queries, t_keys.T, moves, input_precision=PRECISION)
        if MASKED:
            j = (start + tl.arange(0, BN))[None, :]
            seen = j < S
            if CAUSAL:
                seen = seen & (j <= i + (S - T))
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        # A row that has seen no key yet: -inf - 0 in place of -inf + inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * scale_log2 - base[:, None])
        moved = p * (moves * scale)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        mean = mean * shrink + tl.sum(moved, 1)
        values = load_tile(v, v_strides, batch, kv_head, start, S, BN, VP, V, MASKED, TMA)
        t_values = load_tile(tv, tv_strides, batch, kv_head, start, S, BN, VP, V, MASKED, TMA)
        p = p.to(values.dtype)
        out = tl.dot(p, values, out * shrink[:, None], input_precision=PRECISION)
        t_out = t_out * shrink[:, None]
        t_out = tl.dot(moved.to(values.dtype), values, t_out, input_precision=PRECISION)
        t_out = tl.dot(p, t_values, t_out, input_precision=PRECISION)
        top = new_top
    return out, t_out, top, total, mean


@triton.jit
def dual_kernel(
    q, k, v, tq, tk, tv, o, lse, to, tlse, q_strides, k_strides, v_strides, tq_strides, tk_strides,
    tv_strides, o_strides, to_strides, heads, H, T, S, scale, scale_log2, wave, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head against all keys that they can see. heads = B * H."""
    block, flat_head = longest_first(tl.program_id(0), tl.cdiv(T, BM), heads, wave)
    batch = flat_head // H
    head = flat_head % H
    kv_head = head // GROUP
    row = block * BM
    high = S
    full = S // BN * BN
    if CAUSAL:
        high = tl.minimum(S, tl.minimum(row + BM, T) + (S - T))
        full = tl.minimum(S, tl.maximum(row + 1 + (S - T), 0)) // BN * BN
    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, TMA)
    t_queries = load_tile(tq, tq_strides, batch, head, row, T, BM, KP, K, True, TMA)
    i = (row + tl.arange(0, BM))[:, None]
    out = tl.zeros([BM, VP], tl.float32)
    t_out = tl.zeros([BM, VP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    out, t_out, top, total, mean = dual_blocks(
        out, t_out, top, total, mean, queries, t_queries, k, v, tk, tv, k_strides, v_strides,
        tk_strides, tv_strides, i, 0, full, batch, kv_head, T, S, scale, scale_log2, K, V, BN, KP,
        VP, CAUSAL, False, TMA, PRECISION,
    )  # fmt: skip
    if not EVEN:
        out, t_out, top, total, mean = dual_blocks(
            out, t_out, top, total, mean, queries, t_queries, k, v, tk, tv, k_strides, v_strides,
            tk_strides, tv_strides, i, full, high, batch, kv_head, T, S, scale, scale_log2, K, V,
            BN, KP, VP, CAUSAL, True, TMA, PRECISION,
        )  # fmt: skip
    seen = total != 0.0
    share = 1.0 / tl.where(seen, total, 1.0)
    mean *= share
    out *= share[:, None]
    t_out = t_out * share[:, None] - mean[:, None] * out
    log_sum = tl.where(seen, (top - tl.log2(share)) * LN2, float("-inf"))
    store_tile(o, o_strides, out, batch, head, row, T, BM, VP, V)
    store_tile(to, to_strides, t_out, batch, head, row, T, BM, VP, V)
    rows = row + tl.arange(0, BM)
    start = tl.cast(flat_head, tl.int64) * T
    tl.store(lse + start + rows, log_sum, mask=rows < T)
    tl.store(tlse + start + rows, mean, mask=rows < T)


def plan_dual(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    to: Tensor, tlse: Tensor, options: Options, config: Config | None = None,
) -> Launch:  # fmt: skip
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    KP, VP = padded(K), padded(V)
    if config is None:
        config = fitted(choose("dual", q.dtype, max(KP, VP), options.causal, max(T, S)), T, S)
    BM, BN = config.block_m, config.block_n
    tma = config.tma and tma_ready(q, k, v, tq, tk, tv)
    return Launch(
        dual_kernel,
        (triton.cdiv(T, BM) * B * H,),
        (
            tiles(q, BM, KP, tma),
            tiles(k, BN, KP, tma),
            tiles(v, BN, VP, tma),
            tiles(tq, BM, KP, tma),
            tiles(tk, BN, KP, tma),
            tiles(tv, BN, VP, tma),
            o,
            lse,
            to,
            tlse,
            *(x.stride() for x in (q, k, v, tq, tk, tv, o, to)),
            B * H,
            H,
            T,
            S,
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        constants(q, k, v, options, config, EVEN=not options.causal and S % BN == 0, TMA=tma),
    )


def one_pass(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether the one kernel can do this work and is the faster way."""
    head_dim = max(padded(q.shape[3]), padded(v.shape[3]))
    return (
        head_dim <= 128  # two sums of a tile's rows fit into registers
        and options.scale > 0
        and min(q.numel(), k.numel()) > 0
        and not in_full_float32(q, options)
        and not triton_decode.suits(q, k)
        and is_fastest("dual", q.dtype, head_dim, options.causal, max(q.shape[2], k.shape[2]))
    )


def dual(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options,
    plan: Callable[..., Launch] = plan_dual,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, lse and their tangents to, tlse, shapes and dtypes as of the two kernels, where `one_pass`
    says so; `options` may set causal, scale, precision and deterministic only. `plan` says which
    kernel.
    """
    (B, H, T, _), V = q.shape, v.shape[-1]
    o, to = (empty_tokens_first(q, B, H, T, V) for _ in range(2))
    lse, tlse = (q.new_empty((B, H, T), dtype=torch.float32) for _ in range(2))
    launch(plan, (tq, tk, tv, q, k, v, o, lse, to, tlse), options)
    return o, lse, to, tlse
