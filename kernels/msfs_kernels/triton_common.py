"""What the Triton attention kernels share: tile loads, scores and their masks, dropout.

Letters: B batch, H query heads, G key heads, T queries, S keys, K head dim, V value head dim. `i`
numbers queries and `j` keys; query i stands at position p = i + S - T of the key axis, so that the
last query sees the last key. Scores are kept in units of log2 (scale * log2(e) * q.k), because the
hardware's exponential is 2^x.

Every mask is a field of `Masks`. A field that is None is a compile-time constant to Triton and
costs nothing: the plain and the causal kernel carry no trace of the options. All mask functions
take `i` and `j` as broadcastable index tensors, (M, 1) and (1, N) or transposed, so that one
definition serves tiles of scores and tiles of transposed scores.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msfs_kernels.configs import Config
from msfs_kernels.options import Options

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
MOST_QUERIES = 16  # that count as decoding
LEAST_LOGITS_FOR_TMA = 1 << 18


class Masks(NamedTuple):
    """The optional inputs as the kernels take them; None means absent and compiles to nothing."""

    bias: Tensor | None = None  # (B | 1, H | 1, T | 1, S | 1) float, added to the scores (nats)
    mask: Tensor | None = None  # the same, bool, False hides
    stride_b: int = 0  # of bias or mask, 0 where it broadcasts; a nested tuple trips Triton 3.6
    stride_h: int = 0
    stride_t: int = 0
    stride_s: int = 0
    key_lengths: Tensor | None = None  # (B,) int32
    prefix_lengths: Tensor | None = None  # (B,) int32
    q_segments: Tensor | None = None  # (B, T) int32
    k_segments: Tensor | None = None  # (B, S) int32
    alibi: Tensor | None = None  # (B, H) float32
    window: int | None = None
    softcap: float | None = None  # nats
    rng: Tensor | None = None  # int64, a Philox key a row, (B, 2), or a key and a number a head
    head_rng: Tensor | None = None  # the same if it is the latter, (B, H, 3)
    threshold: int | None = None  # an entry is kept when its random word reaches this
    keep_scale: float | None = None  # 1 / (1 - dropout)


@triton.jit
def load_tile(
    x, strides, batch, head, row, rows, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
    BOUNDED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[batch, head, row : row + ROWS, :D] as a (ROWS, COLS) tile, zeros outside (rows, D).

    BOUNDED False promises that all rows exist. With TMA, x is a descriptor and the copy engine
    fills the zeros.
    """
    if TMA:
        return x.load([batch, head, row, 0]).reshape([ROWS, COLS])
    else:
        i = tl.arange(0, ROWS)
        d = tl.arange(0, COLS)
        start = (
            tl.cast(batch, tl.int64) * strides[0]
            + tl.cast(head, tl.int64) * strides[1]
            + tl.cast(row, tl.int64) * strides[2]
        )
        pointers = (x + start) + (
            i.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64)[None, :] * strides[3]
        )
        if BOUNDED and D != COLS:
            return tl.load(pointers, mask=(row + i < rows)[:, None] & (d < D)[None, :], other=0.0)
        elif BOUNDED:
            return tl.load(pointers, mask=(row + i < rows)[:, None], other=0.0)
        elif D != COLS:
            return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_tile(
    x,
    strides,
    value,
    batch,
    head,
    row,
    rows,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
):
    """x[batch, head, row : row + ROWS, :D] = value, cut at (rows, D)."""
    i = tl.arange(0, ROWS)
    d = tl.arange(0, COLS)
    start = (
        tl.cast(batch, tl.int64) * strides[0]
        + tl.cast(head, tl.int64) * strides[1]
        + tl.cast(row, tl.int64) * strides[2]
    )
    pointers = (x + start) + (
        i.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64)[None, :] * strides[3]
    )
    tl.store(
        pointers, value.to(x.dtype.element_ty), mask=(row + i < rows)[:, None] & (d < D)[None, :]
    )


@triton.jit
def row_facts(masks, batch, head, H, S):
    """What the masks say about one (batch, head): key length, prefix length, ALiBi slope (log2),
    Philox key, NaN where a length is outside [0, S], else 0, and the head's number in the whole
    call, of which this may be a shard.

    A kernel cannot raise and the host does not wait to look, so the forward adds the NaN to its
    results: a row of wrong length is NaN, its gradients and tangents through lse too. Nothing is
    read out of bounds.
    """
    length = S
    prefix = 0
    slope = 0.0
    seed = 0
    poison = 0.0
    number = head
    if masks.key_lengths is not None:
        length = tl.load(masks.key_lengths + batch)
        wrong = (length < 0) | (length > S)
        length = tl.where(wrong, S, length)
        poison += tl.where(wrong, float("nan"), 0.0)
    if masks.prefix_lengths is not None:
        prefix = tl.load(masks.prefix_lengths + batch)
        wrong = (prefix < 0) | (prefix > S)
        prefix = tl.where(wrong, 0, tl.minimum(prefix, length))
        poison += tl.where(wrong, float("nan"), 0.0)
    if masks.alibi is not None:
        slope = tl.load(masks.alibi + batch * H + head) * LOG2E
    if masks.head_rng is not None:
        words = masks.head_rng + 3 * (batch * H + head)
        seed = tl.load(words) | (tl.load(words + 1) << 32)
        number = tl.load(words + 2).to(tl.int32)
    elif masks.rng is not None:
        seed = tl.load(masks.rng + 2 * batch) | (tl.load(masks.rng + 2 * batch + 1) << 32)
    return length, prefix, slope, seed, poison, number


@triton.jit
def tanh(x):
    """tanh to fp32 rounding: a series near zero, where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    tail = -0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))
    return tl.where(
        square < 0.0625, x + x * square * tail, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    )


@triton.jit
def exp2(x, inputs, PRECISION: tl.constexpr):
    """2^x by the hardware's instruction, which may be off by 2 units in the last place; to float32
    rounding where `inputs` are multiplied in full float32: 2^n 2^f, n the nearest integer, 2^f by
    its series to f^7 (the rest is below 6e-9).
    """
    if (inputs.dtype == tl.float32) & (PRECISION == "ieee"):
        x = tl.maximum(x, -150.0)  # 2^-150 is zero
        n = tl.floor(x + 0.5)
        f = x - n
        series = 1.5403530e-4 + f * 1.5252734e-5
        series = 1.3333558e-3 + f * series
        series = 9.6181291e-3 + f * series
        series = 5.5504109e-2 + f * series
        series = 2.4022651e-1 + f * series
        series = 6.9314718e-1 + f * series
        return (1.0 + f * series) * tl.exp2(n)
    else:
        return tl.exp2(x)


@triton.jit
def tile_offsets(i, j, batch, head, stride_b, stride_h, stride_t, stride_s):
    base = tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    return base + i.to(tl.int64) * stride_t + j.to(tl.int64) * stride_s


@triton.jit
def tile_scores(products, i, j, batch, head, T, S, facts, masks, scale_log2):
    """(scores in log2 units, their derivative by scale * q.k): soft-cap first, then ALiBi and bias
    (Gemma 2's order).
    """
    scores = products * scale_log2
    derivative = 1.0
    if masks.softcap is not None:
        capped = tanh(scores / (masks.softcap * LOG2E))
        scores = capped * (masks.softcap * LOG2E)
        derivative = 1.0 - capped * capped
    if masks.alibi is not None:
        scores -= facts[2] * tl.abs(i + (S - T) - j).to(tl.float32)
    if masks.bias is not None:
        offsets = tile_offsets(
            i, j, batch, head, masks.stride_b, masks.stride_h, masks.stride_t, masks.stride_s
        )
        scores += (
            tl.load(masks.bias + offsets, mask=(i < T) & (j < S), other=0.0).to(tl.float32) * LOG2E
        )
    return scores, derivative


@triton.jit
def tile_visible(i, j, batch, head, T, S, facts, masks, CAUSAL: tl.constexpr):
    """True where query i may attend to key j; keys at or beyond the row's key length never are."""
    visible = j < facts[0]
    if CAUSAL or masks.window is not None:
        position = i + (S - T)
        if CAUSAL and masks.window is not None:
            near = (j <= position) & (j > position - masks.window)
        elif CAUSAL:
            near = j <= position
        else:
            near = tl.abs(position - j) < masks.window
        if masks.prefix_lengths is not None:
            near = near | (j < facts[1])
        visible = visible & near
    if masks.q_segments is not None:
        q_segment = tl.load(
            masks.q_segments + tl.cast(batch, tl.int64) * T + i, mask=i < T, other=-1
        )
        k_segment = tl.load(
            masks.k_segments + tl.cast(batch, tl.int64) * S + j, mask=j < S, other=-2
        )
        visible = visible & (q_segment == k_segment)
    if masks.mask is not None:
        offsets = tile_offsets(
            i, j, batch, head, masks.stride_b, masks.stride_h, masks.stride_t, masks.stride_s
        )
        visible = visible & tl.load(masks.mask + offsets, mask=(i < T) & (j < S), other=0).to(
            tl.int1
        )
    return visible


@triton.jit
def tile_kept(i, j, facts, masks):
    """Dropout's verdict on each entry: word 0 of Philox4x32-10 at counter (j, i, head, 0) under the
    row's key.
    """
    zero = tl.zeros_like(i + j)
    word, _, _, _ = tl.philox(facts[3], zero + j, zero + i, zero + facts[5], zero)
    return word >= tl.full((1, 1), masks.threshold, tl.uint32)


@triton.jit
def segment_reach(
    mine,
    others,
    first,
    count,
    total_others,
    batch,
    total_mine,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The range [low, high) of the other axis whose segment ids fall within this block's smallest
    and largest id.

    Exact for packed sequences (ids in runs), never too small for any ids: the kernels skip what
    lies outside.
    """
    at = first + tl.arange(0, BLOCK)
    inside = at < first + count
    ids = mine + tl.cast(batch, tl.int64) * total_mine + at
    smallest = tl.min(tl.load(ids, mask=inside, other=2147483647), 0)
    largest = tl.max(tl.load(ids, mask=inside, other=-2147483648), 0)
    low = total_others
    high = 0
    for start in range(0, total_others, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(
            others + tl.cast(batch, tl.int64) * total_others + j, mask=j < total_others, other=0
        )
        meets = (other >= smallest) & (other <= largest) & (j < total_others)
        low = tl.minimum(low, tl.min(tl.where(meets, j, total_others), 0))
        high = tl.maximum(high, tl.max(tl.where(meets, j + 1, 0), 0))
    return low, high


@triton.jit
def key_range(
    row, facts, masks, batch, T, S, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Key blocks that queries row .. row + BM - 1 can see: [low, high), of which [full_low,
    full_high) need no mask.

    All four are multiples of BN except high. Blocks outside are never touched.
    """
    length = facts[0]
    first = row + (S - T)
    last = tl.minimum(row + BM, T) - 1 + (S - T)
    low = 0
    high = length
    full_low = 0
    full_high = length
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        full_high = tl.minimum(full_high, first + 1)
    elif masks.window is not None:
        high = tl.minimum(high, last + masks.window)
        full_high = tl.minimum(full_high, first + masks.window)
    if masks.window is not None:
        low = tl.maximum(first - masks.window + 1, 0) // BN * BN
        full_low = tl.cdiv(tl.maximum(last - masks.window + 1, 0), BN) * BN
    if masks.prefix_lengths is not None:
        high = tl.maximum(high, facts[1])
        if masks.window is not None:
            low = tl.where(facts[1] > 0, 0, low)
        else:
            full_high = tl.maximum(full_high, facts[1])
    if masks.q_segments is not None:
        count = tl.minimum(BM, T - row)
        reach_low, reach_high = segment_reach(
            masks.q_segments, masks.k_segments, row, count, S, batch, T, BM, 1024
        )
        low = tl.maximum(low, reach_low // BN * BN)
        high = tl.minimum(high, reach_high)
    if masks.q_segments is not None or masks.mask is not None:
        full_low = low
        full_high = low
    full_low = tl.maximum(full_low, low)
    full_high = tl.maximum(full_high // BN * BN, full_low)
    return low, full_low, full_high, high


@triton.jit
def query_range(
    column, facts, masks, batch, T, S, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Query blocks that keys column .. column + BN - 1 are seen by: the transpose of `key_range`.

    [low, high), of which [full_low, full_high) need no mask; multiples of BM except high.
    """
    length = facts[0]
    shift = S - T
    last = tl.minimum(column + BN, S) - 1
    low = 0
    high = T
    full_low = 0
    full_high = T
    if CAUSAL:
        low = tl.maximum(column - shift, 0)
        full_low = tl.maximum(last - shift, 0)
    elif masks.window is not None:
        low = tl.maximum(column - masks.window + 1 - shift, 0)
        full_low = tl.maximum(last - masks.window + 1 - shift, 0)
    if masks.window is not None:
        high = tl.minimum(high, tl.maximum(last + masks.window - shift, 0))
        full_high = tl.minimum(full_high, tl.maximum(column + masks.window - shift, 0))
    if masks.prefix_lengths is not None:
        low = tl.where(column < facts[1], 0, low)
        high = tl.where(column < facts[1], T, high)
        if masks.window is None:
            full_low = tl.where(last < facts[1], 0, full_low)
    if masks.q_segments is not None:
        count = tl.minimum(BN, S - column)
        reach_low, reach_high = segment_reach(
            masks.k_segments, masks.q_segments, column, count, T, batch, S, BN, 1024
        )
        low = tl.maximum(low, reach_low)
        high = tl.minimum(high, reach_high)
    low = low // BM * BM
    if masks.q_segments is not None or masks.mask is not None:
        full_low = low
        full_high = low
    else:
        full_low = tl.maximum(tl.cdiv(full_low, BM) * BM, low)
        if masks.window is None:
            full_high = tl.cdiv(full_high, BM) * BM
        full_high = tl.maximum(full_high // BM * BM, full_low)
    seen = column < length
    high = tl.where(seen, high, 0)
    full_high = tl.where(seen, full_high, 0)
    return low, full_low, full_high, high


@triton.jit
def longest_first(pid, blocks, heads, wave):
    """(block, head) of a program: heads in groups of `wave` that share the L2 cache, in each the
    last block first.

    Under a causal mask the last query block has the most keys; starting with it keeps the tail of
    the launch short.
    """
    group = pid // (wave * blocks)
    rest = pid - group * (wave * blocks)
    size = tl.minimum(wave, heads - group * wave)
    return blocks - 1 - rest // size, group * wave + rest % size


def broadcast_strides(x: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of x expanded to `shape`: 0 where it broadcasts."""
    if x is None:
        return (0,) * len(shape)
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


def masks_of(options: Options, shape: tuple[int, ...]) -> Masks:
    """The kernels' view of the op's options for scores of shape (B, H, T, S)."""
    dropping = options.dropout > 0.0
    rng = packed(options.rng) if dropping else None
    boolean = options.bias is not None and options.bias.dtype == torch.bool
    return Masks(
        None if boolean else options.bias,
        options.bias if boolean else None,
        *broadcast_strides(options.bias, shape),
        key_lengths=packed(options.key_lengths),
        prefix_lengths=packed(options.prefix_lengths),
        q_segments=packed(options.q_segments),
        k_segments=packed(options.k_segments),
        alibi=packed(options.alibi),
        window=options.window if options.window >= 0 else None,
        softcap=options.softcap if options.softcap > 0 else None,
        rng=rng,
        head_rng=rng if rng is not None and rng.ndim == 3 else None,
        threshold=options.drop_threshold if dropping else None,
        keep_scale=1.0 / (1.0 - options.dropout) if dropping else None,
    )


def packed(x: Tensor | None) -> Tensor | None:
    """The small per-row inputs are read densely; a broadcast one is copied (a few bytes)."""
    return None if x is None else x.contiguous()


def padded(dim: int) -> int:
    """Tile width of a head dim: the next power of two, at least the 16 that matrix units take."""
    return max(16, triton.next_power_of_2(dim))


def tma_ready(*tensors: Tensor) -> bool:
    """Whether the copy engine can read these (B, H, T, K) tensors, q and k the first of them: rows
    on 16-byte borders, last dim dense, no broadcast; and enough work that describing tensors to it
    at each launch, some 4 microseconds of the host for each, does not outlast the kernel.
    """
    q, k = tensors[:2]
    if q.shape[:3].numel() * k.shape[2] < LEAST_LOGITS_FOR_TMA:
        return False

    def ready(x: Tensor) -> bool:
        step = 16 // x.element_size()
        outer = [
            stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
        ]
        return (
            x.element_size() == 2
            and x.data_ptr() % 16 == 0
            and (x.stride(-1) == 1 or x.shape[-1] == 1)
            and all(stride > 0 and stride % step == 0 for stride in outer)
            and x.shape[-1] >= step
            and x.numel() > 0
        )

    return all(ready(x) for x in tensors)


def descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A copy-engine descriptor of x for tiles of (rows, cols) of one batch row and head."""
    unit = triton.cdiv(x.shape[-1], 8) * 8  # any aligned stride will do for a dim of size 1
    strides = [
        stride if size > 1 else unit
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, cols])


def tiles(x: Tensor, rows: int, cols: int, tma: bool) -> Any:
    return descriptor(x, rows, cols) if tma else x


def constants(
    q: Tensor, k: Tensor, v: Tensor, options: Options, config: Config, **more: Any
) -> dict[str, Any]:
    """What a kernel is compiled for: grouping, head dims, masks, tiles, and what is its own."""
    return dict(
        GROUP=q.shape[1] // k.shape[1],
        K=q.shape[3],
        V=v.shape[3],
        KP=padded(q.shape[3]),
        VP=padded(v.shape[3]),
        CAUSAL=options.causal,
        PRECISION=options.precision,
        BM=config.block_m,
        BN=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
        **more,
    )
