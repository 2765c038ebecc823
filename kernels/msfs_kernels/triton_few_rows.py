"""Triton kernels of `few_rows` for two rows and more: a token of each sequence, one layer.

Rows are one tile of the tensor cores, which costs as much for one as for 16. As in
`triton_one_row` a launch starts before its predecessor has ended: it asks for its part of the
matrix, which nobody writes, to be brought into the L2 cache, and then waits.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from msfs_kernels.launching import Launch
from msfs_kernels.triton_common import LOG2E
from msfs_kernels.triton_one_row import activate, early

LINE = 128  # bytes that one prefetch brings


@triton.jit
def prefetch(w, rows, N, K: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Asks for these rows of a matrix, line by line; waits for nothing."""
    at = tl.minimum(tl.arange(0, COUNT) * STEP, K - 1)
    places = w + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * K + at[None]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def columns(w, rows, inside, k, K: tl.constexpr, EVEN: tl.constexpr):
    """Rows of a matrix as columns of a tile."""
    mask = inside[None] if EVEN else inside[None] & (k < K)[:, None]
    return tl.load(w + rows[None].to(tl.int64) * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def linear_kernel(
    x, w, bias, gain, shift, residual, y, M, N, eps, offset, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr, STEP: tl.constexpr,
    COUNT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN of the outputs of all rows."""
    EVEN: tl.constexpr = K % BK == 0
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    m = tl.arange(0, BM)
    there = m < M
    if EARLY:
        prefetch(w, rows, N, K, STEP, COUNT)
        if GATED:
            prefetch(w + N * K, rows, N, K, STEP, COUNT)
        gdc_launch_dependents()
        gdc_wait()
    mean = tl.zeros([BM], tl.float32)
    if NORM == "layer":
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            mask = there[:, None] & (k < K)[None]
            part = tl.load(x + m[:, None] * K + k[None], mask=mask, other=0.0)
            mean += tl.sum(part.to(tl.float32), 1)
        mean /= K
    squares = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, BN], tl.float32)
    other = tl.zeros([BM, BN], tl.float32)
    moved = tl.zeros([BN], tl.float32)  # what the norm's shift adds
    moved_other = tl.zeros([BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        mask = there[:, None] if EVEN else there[:, None] & (k < K)[None]
        part = tl.load(x + m[:, None] * K + k[None], mask=mask, other=0.0)
        first = columns(w, rows, inside, k, K, EVEN)
        if GATED:
            second = columns(w + N * K, rows, inside, k, K, EVEN)
        if NORM != "none":
            # The norm divides each row by one number: that is done to its product.
            scales = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + offset
            numbers = part.to(tl.float32)
            if NORM == "layer":
                numbers = tl.where((k < K)[None], numbers - mean[:, None], 0.0)
            squares += tl.sum(numbers * numbers, 1)
            part = (numbers * scales[None]).to(part.dtype)
            if shift is not None:
                add = tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
                moved += tl.sum(first.to(tl.float32) * add, 0)
                if GATED:
                    moved_other += tl.sum(second.to(tl.float32) * add, 0)
        total = tl.dot(part, first, total, input_precision=PRECISION)
        if GATED:
            other = tl.dot(part, second, other, input_precision=PRECISION)
    if NORM != "none":
        rstd = tl.rsqrt(squares / K + eps)[:, None]
        total = total * rstd + moved[None]
        other = other * rstd + moved_other[None]
    if bias is not None:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[None]
    total = activate(total, ACTIVATION)
    if GATED:
        if bias is not None:
            other += tl.load(bias + N + rows, mask=inside, other=0.0).to(tl.float32)[None]
        total *= other
    places = m[:, None] * N + rows[None]
    mask = there[:, None] & inside[None]
    if residual is not None:
        total += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * 1.4426950408889634
    return scores


@triton.jit
def attention_kernel(
    qkv, keys, values, position, cosines, sines, out, H, G, L, scale_log2, softcap, window,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, CAPPED: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one row that share a key head: GROUP rows of a tile. Head dims are held as
    two halves, which rotary positions pair.
    """
    row = (tl.program_id(0) // G).to(tl.int64)
    kv_head = tl.program_id(0) % G
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, DP)
    within = d < HALF
    h = tl.arange(0, BM)
    at = tl.load(position + row).to(tl.int32)
    base = (row * G + kv_head) * L * D
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    here = qkv + row * (H + 2 * G) * D
    k_at = here + (H + kv_head) * D + d
    v_at = here + (H + G + kv_head) * D + d
    q_at = here + (kv_head * GROUP + h)[:, None] * D + d[None]
    both = (h < GROUP)[:, None] & within[None]
    q1 = tl.load(q_at, mask=both, other=0.0).to(tl.float32)
    q2 = tl.load(q_at + HALF, mask=both, other=0.0).to(tl.float32)
    k1 = tl.load(k_at, mask=within, other=0.0).to(tl.float32)
    k2 = tl.load(k_at + HALF, mask=within, other=0.0).to(tl.float32)
    v1 = tl.load(v_at, mask=within, other=0.0)
    v2 = tl.load(v_at + HALF, mask=within, other=0.0)
    if cosines is not None:
        c = tl.load(cosines + row * HALF + d, mask=within, other=0.0)
        s = tl.load(sines + row * HALF + d, mask=within, other=0.0)
        k1, k2 = k1 * c - k2 * s, k2 * c + k1 * s
        c = c[None]
        s = s[None]
        q1, q2 = q1 * c - q2 * s, q2 * c + q1 * s
    kind = keys.dtype.element_ty
    q1, q2, k1, k2, v1, v2 = (
        q1.to(kind),
        q2.to(kind),
        k1.to(kind),
        k2.to(kind),
        v1.to(kind),
        v2.to(kind),
    )
    own_place = base + at.to(tl.int64) * D + d
    tl.store(keys + own_place, k1, mask=within)
    tl.store(keys + own_place + HALF, k2, mask=within)
    tl.store(values + own_place, v1, mask=within)
    tl.store(values + own_place + HALF, v2, mask=within)

    # The token's own key and value come from registers, those before it from memory.
    own = tl.sum(q1.to(tl.float32) * k1.to(tl.float32)[None], 1)
    own += tl.sum(q2.to(tl.float32) * k2.to(tl.float32)[None], 1)
    top = capped(own * scale_log2, softcap, CAPPED)
    total = tl.full([BM], 1.0, tl.float32)
    o1 = tl.zeros([BM, DP], tl.float32) + v1.to(tl.float32)[None]
    o2 = tl.zeros([BM, DP], tl.float32) + v2.to(tl.float32)[None]
    low = 0
    if window > 0:
        low = tl.maximum(at - window + 1, 0)
    for start in tl.range(low, at, BN, num_stages=STAGES):
        j = start + tl.arange(0, BN)
        seen = j < at
        places = base + j[:, None].to(tl.int64) * D + d[None]
        mask = seen[:, None] & within[None]
        t1 = tl.load(keys + places, mask=mask, other=0.0)
        t2 = tl.load(keys + places + HALF, mask=mask, other=0.0)
        u1 = tl.load(values + places, mask=mask, other=0.0)
        u2 = tl.load(values + places + HALF, mask=mask, other=0.0)
        scores = tl.dot(q1, tl.trans(t1), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(t2), scores, input_precision=PRECISION)
        scores = capped(scores * scale_log2, softcap, CAPPED)
        scores = tl.where(seen[None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(kind)
        o1 = tl.dot(weights, u1, o1 * fade[:, None], input_precision=PRECISION)
        o2 = tl.dot(weights, u2, o2 * fade[:, None], input_precision=PRECISION)
        top = higher
    o_at = out + (row * H + kv_head * GROUP + h)[:, None] * D + d[None]
    tl.store(o_at, (o1 / total[:, None]).to(out.dtype.element_ty), mask=both)
    tl.store(o_at + HALF, (o2 / total[:, None]).to(out.dtype.element_ty), mask=both)


def pdl(device: torch.device) -> dict[str, bool]:
    return {"launch_pdl": True} if early(device.index or 0) else {}


def plan_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, y: Tensor, norm: str, eps: float, offset: float, activation: str,
    gated: bool, *, BN: int | None = None, BK: int | None = None, stages: int = 4, warps: int = 4,
    soon: dict[str, bool] | None = None,
) -> Launch:  # fmt: skip
    (M, K), N, size = x.shape, y.shape[1], x.element_size()
    BN = BN or (16 if N > 1024 else 8)
    BK = BK or 256 // size
    step = LINE // size
    soon = pdl(x.device) if soon is None else soon
    lines = triton.next_power_of_2(triton.cdiv(K, step))
    precision = "ieee" if x.dtype is torch.float32 else "tf32"  # of half precisions: no matter
    return Launch(
        linear_kernel,
        (triton.cdiv(N, BN),),
        (x, weight, bias, gain, shift, residual, y, M, N, eps, offset),
        {
            "K": K,
            "BM": max(triton.next_power_of_2(M), 16),
            "BN": BN,
            "BK": BK,
            "STAGES": stages,
            "NORM": norm,
            "ACTIVATION": activation,
            "GATED": gated,
            "EARLY": bool(soon),
            "STEP": step,
            "COUNT": lines,
            "PRECISION": precision,
            "num_warps": warps,
            **soon,
        },
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, norm: str, eps: float, offset: float, activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    """See `few_rows.rows_linear`."""
    y = x.new_empty(len(x), weight.shape[0] // (2 if gated else 1))
    given = (x.contiguous(), weight.contiguous(), bias, gain, shift)
    residual = None if residual is None else residual.contiguous()
    plan_linear(*given, residual, y, norm, eps, offset, activation, gated).run()
    return y


def plan_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cosines: Tensor | None,
    sines: Tensor | None, out: Tensor, heads: int, scale: float, softcap: float, window: int, *,
    BN: int = 64, stages: int = 3, warps: int = 4, soon: dict[str, bool] | None = None,
) -> Launch:  # fmt: skip
    M, G, L, D = keys.shape
    soon = pdl(qkv.device) if soon is None else soon
    scale_log2 = scale if softcap else scale * LOG2E
    args = (qkv, keys, values, position, cosines, sines, out, heads, G, L, scale_log2, softcap)
    return Launch(
        attention_kernel,
        (M * G,),
        (*args, window),
        {
            "D": D,
            "DP": max(triton.next_power_of_2(D // 2), 16),
            "GROUP": heads // G,
            "BM": max(triton.next_power_of_2(heads // G), 16),
            "BN": BN if D <= 128 else BN // 2,
            "STAGES": stages,
            "CAPPED": bool(softcap),
            "EARLY": bool(soon),
            "PRECISION": "ieee" if keys.dtype is torch.float32 else "tf32",
            "num_warps": warps,
            **soon,
        },
    )


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cosines: Tensor | None,
    sines: Tensor | None, heads: int, scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    """See `few_rows.rows_attention`."""
    out = qkv.new_empty(len(qkv), heads * keys.shape[-1])
    turns = (None, None) if cosines is None else (cosines.contiguous(), sines.contiguous())
    given = (qkv.contiguous(), keys, values, position, *turns, out)
    plan_attention(*given, heads, scale, softcap, window).run()
    return out
