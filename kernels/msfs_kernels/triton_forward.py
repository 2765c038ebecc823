"""Exact attention without the T x S matrix: FlashAttention-2's Algorithm 1 in Triton.

**Online softmax.** For one query with scores s_1 .. s_S the output is sum_j e^{s_j} v_j / sum_j
e^{s_j}. Keys come in blocks, so a program keeps three running values and corrects them when a block
raises the maximum:

    m' = max(m, max_j s_j)               the running maximum: no exponential can overflow
    a  = e^{m - m'}                      what everything summed so far must shrink by
    l' = a l + sum_j e^{s_j - m'}        the running denominator
    O' = a O + sum_j e^{s_j - m'} v_j    the running numerator

After the last block o = O / l, and the row's log-sum-exp m + log(l) is all that the backward needs
to rebuild any probability: p_j = e^{s_j - lse}. A query without keys ends with l = 0: its output is
zero, its lse -inf.

**Tiling.** A program owns BM queries (one tile of Q, loaded once) and walks over key blocks of BN.
S = Q K^T and P V are matrix-unit products of tiles; m, l and O live in registers and T x S never
exists anywhere. Blocks that the masks hide whole are not visited, blocks that they show whole run a
loop without any mask (`key_range`), and only blocks on an edge pay for comparisons. The matrix
units take the probabilities in the dtype of V, sums stay in float32.

Source: Dao 2023 (FlashAttention-2), Algorithm 1; Milakov and Gimelshein 2018, online softmax.
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

from msfs_kernels.configs import Config, choose, fitted
from msfs_kernels.launching import Launch, launch
from msfs_kernels.options import Options, empty_tokens_first
from msfs_kernels.triton_common import (
    LN2,
    LOG2E,
    MOST_QUERIES,
    Masks,
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
    tile_scores,
    tile_visible,
    tiles,
    tma_ready,
)


@triton.jit
def forward_blocks(
    out, top, total, q, k, v, k_strides, v_strides, i, low, high, batch, head, kv_head, T, S, facts,
    masks, scale_log2, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    SIMPLE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Algorithm 1, lines 6 to 10, over the key blocks of [low, high); i (BM, 1) numbers the
    queries.

    head is a number, or (BM, 1) where the rows of the tile are queries of several heads (decoding).
    """
    for start in range(low, high, BN):
        start = tl.multiple_of(start, BN)
        j = (start + tl.arange(0, BN))[None, :]
        keys = load_tile(k, k_strides, batch, kv_head, start, S, BN, KP, K, MASKED, TMA)
        scores = tl.dot(q, keys.T, input_precision=PRECISION)
        if SIMPLE:  # scores stay raw products, the scale rides in the exponential's multiply-add
            if MASKED:
                scores = tl.where(
                    tile_visible(i, j, batch, head, T, S, facts, masks, CAUSAL),
                    scores,
                    float("-inf"),
                )
            new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        else:
            scores, _ = tile_scores(scores, i, j, batch, head, T, S, facts, masks, scale_log2)
            if MASKED:
                scores = tl.where(
                    tile_visible(i, j, batch, head, T, S, facts, masks, CAUSAL),
                    scores,
                    float("-inf"),
                )
            new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet keeps top = -inf; subtracting zero in its place avoids inf
        # - inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        if SIMPLE:
            p = exp2(scores * scale_log2 - base[:, None], q, PRECISION)
        else:
            p = exp2(scores - base[:, None], q, PRECISION)
        shrink = exp2(top - base, q, PRECISION)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        if masks.rng is not None:
            p = tl.where(tile_kept(i, j, facts, masks), p, 0.0)
        values = load_tile(v, v_strides, batch, kv_head, start, S, BN, VP, V, MASKED, TMA)
        out = tl.dot(p.to(values.dtype), values, out, input_precision=PRECISION)
        top = new_top
    return out, top, total


@triton.jit
def forward_kernel(
    q, k, v, o, lse, q_strides, k_strides, v_strides, o_strides, masks, heads, H, T, S, scale_log2,
    wave, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, CAUSAL: tl.constexpr, SIMPLE: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head against all keys that they can see. heads = B * H."""
    block, flat_head = longest_first(tl.program_id(0), tl.cdiv(T, BM), heads, wave)
    batch = flat_head // H
    head = flat_head % H
    kv_head = head // GROUP
    row = block * BM
    facts = row_facts(masks, batch, head, H, S)
    low, full_low, full_high, high = key_range(row, facts, masks, batch, T, S, CAUSAL, BM, BN)

    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, TMA)
    i = (row + tl.arange(0, BM))[:, None]
    out = tl.zeros([BM, VP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if masks.window is not None and masks.q_segments is None and masks.mask is None:
        out, top, total = forward_blocks(
            out, top, total, queries, k, v, k_strides, v_strides, i, low,
            tl.minimum(full_low, high), batch, head, kv_head, T, S, facts, masks, scale_log2, K, V,
            BM, BN, KP, VP, CAUSAL, True, SIMPLE, TMA, PRECISION,
        )  # fmt: skip
    if masks.q_segments is None and masks.mask is None:
        out, top, total = forward_blocks(
            out, top, total, queries, k, v, k_strides, v_strides, i, full_low, full_high,
            batch, head, kv_head, T, S, facts, masks, scale_log2, K, V, BM, BN, KP, VP,
            CAUSAL, False, SIMPLE, TMA, PRECISION,
        )  # fmt: skip
    if not EVEN:
        out, top, total = forward_blocks(
            out, top, total, queries, k, v, k_strides, v_strides, i, full_high, high,
            batch, head, kv_head, T, S, facts, masks, scale_log2, K, V, BM, BN, KP, VP,
            CAUSAL, True, SIMPLE, TMA, PRECISION,
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
    store_tile(o, o_strides, out, batch, head, row, T, BM, VP, V)
    rows = row + tl.arange(0, BM)
    tl.store(lse + tl.cast(flat_head, tl.int64) * T + rows, log_sum, mask=rows < T)


def is_even(masks: Masks, causal: bool, keys: int, block: int) -> bool:
    """Whether no key block ever needs a mask."""
    structured = (
        masks.key_lengths,
        masks.window,
        masks.prefix_lengths,
        masks.q_segments,
        masks.mask,
    )
    return not causal and all(x is None for x in structured) and keys % block == 0


def heads_in_cache(k: Tensor, v: Tensor, group: int) -> int:
    """How many query heads run side by side so that keys and values fill half of a 50 MB cache."""
    one_head = k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    return max(1, 24_000_000 // max(one_head, 1)) * group


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    config: Config | None = None,
) -> Launch:  # fmt: skip
    """The forward launch for these tensors: configuration from the table, masks, descriptors."""
    (B, H, T, K), (_, G, S, V) = q.shape, v.shape
    masks = masks_of(options, (B, H, T, S))
    KP, VP = padded(K), padded(V)
    kind = "decode" if T <= MOST_QUERIES else "forward"  # a tall tile would be empty but for them
    if config is None:
        config = fitted(choose(kind, q.dtype, max(KP, VP), options.causal, max(T, S)), T, S)
    BM, BN = config.block_m, config.block_n
    tma = config.tma and tma_ready(q, k, v)
    simple = (
        masks.softcap is None and masks.alibi is None and masks.bias is None and options.scale > 0
    )
    return Launch(
        forward_kernel,
        (triton.cdiv(T, BM) * B * H,),
        (
            tiles(q, BM, KP, tma),
            tiles(k, BN, KP, tma),
            tiles(v, BN, VP, tma),
            o,
            lse,
            q.stride(),
            k.stride(),
            v.stride(),
            o.stride(),
            masks,
            B * H,
            H,
            T,
            S,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        constants(
            q,
            k,
            v,
            options,
            config,
            SIMPLE=simple,
            EVEN=is_even(masks, options.causal, S, BN),
            TMA=tma,
        ),
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, plan: Callable[..., Launch] = plan_forward
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) in q's dtype and lse (B, H, T) float32 in nats; zeros and -inf where a query
    sees no key. `plan` says which kernel.
    """
    (B, H, T, _), V = q.shape, v.shape[-1]
    o = empty_tokens_first(q, B, H, T, V)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    launch(plan, (q, k, v, o, lse), options)
    return o, lse
