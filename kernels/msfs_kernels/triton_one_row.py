"""Triton kernels of `one_row`: one token, one layer.

Launches follow each other within microseconds, so each starts before its predecessor has ended
(programmatic dependent launch, Hopper and later): it loads its part of the matrix, which nobody
writes, and only then waits for the predecessor's result.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportPossiblyUnboundVariable=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from msfs_kernels.launching import INTERPRETED
from msfs_kernels.triton_common import LOG2E

LONGEST = 4096  # numbers of a matrix row that are held at once
HELD = 2**15  # numbers of keys and values that a program holds at once


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "swish":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def normed(x, gain, shift, k, within, mean, rstd, offset, NORM: tl.constexpr):
    """norm(x) at places k, float32; 0 beyond the row."""
    part = tl.load(x + k, mask=within, other=0.0).to(tl.float32)
    if NORM != "none":
        scales = tl.load(gain + k, mask=within, other=0.0).to(tl.float32) + offset
        part = (part - mean) * rstd * scales
        if shift is not None:
            part += tl.load(shift + k, mask=within, other=0.0).to(tl.float32)
        part = tl.where(within, part, 0.0)
    return part


@triton.jit
def tile(w, rows, inside, k, within, K: tl.constexpr):
    places = rows[:, None].to(tl.int64) * K + k[None]
    return tl.load(w + places, mask=inside[:, None] & within[None], other=0.0)


@triton.jit
def linear_kernel(
    x, w, bias, gain, shift, residual, y, N, eps, offset, K: tl.constexpr, KP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN of the outputs. A matrix row of up to BK numbers is loaded before the predecessor ends."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    k = tl.arange(0, KP)
    if KP <= BK:
        first = tile(w, rows, inside, k, k < K, K)
        if GATED:
            second = tile(w, rows + N, inside, k, k < K, K)
    total = tl.zeros([BN], tl.float32)
    if bias is not None:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    other = tl.zeros([BN], tl.float32)
    if GATED and bias is not None:
        other += tl.load(bias + N + rows, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    mean = 0.0
    rstd = 1.0
    if NORM != "none":
        whole = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM == "layer":
            mean = tl.sum(whole) / K
        whole = tl.where(k < K, whole - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(whole * whole) / K + eps)
    if KP <= BK:
        part = normed(x, gain, shift, k, k < K, mean, rstd, offset, NORM)[None]
        total += tl.sum(first.to(tl.float32) * part, 1)
        if GATED:
            other += tl.sum(second.to(tl.float32) * part, 1)
    else:
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            part = normed(x, gain, shift, k, k < K, mean, rstd, offset, NORM)[None]
            total += tl.sum(tile(w, rows, inside, k, k < K, K).to(tl.float32) * part, 1)
            if GATED:
                more = tile(w, rows + N, inside, k, k < K, K)
                other += tl.sum(more.to(tl.float32) * part, 1)
    total = activate(total, ACTIVATION)
    if GATED:
        total *= other
    if residual is not None:
        total += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    """Scores in powers of two; with a cap they come in powers of e."""
    if CAPPED:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * 1.4426950408889634
    return scores


@triton.jit
def cached(at, places, halves, j, end, within):
    """Keys or values j < end of one head, in two halves of their dims."""
    mask = (j < end)[:, None] & within[None]
    first = tl.load(at + places, mask=mask, other=0.0)
    return first, tl.load(at + places + halves, mask=mask, other=0.0)


@triton.jit
def attention_kernel(
    qkv, keys, values, position, cosines, sines, out, H, G, L, scale_log2, softcap, window,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One head. Head dims are held as two halves, which rotary positions pair.

    The first BN keys and values are loaded before the predecessor ends. It may be the launch that
    writes the key of the token before this one, which is therefore loaded after it; all before that
    had ended when the predecessor began, as an attention lets others start only then.
    """
    head = tl.program_id(0)
    group = H // G
    kv_head = head // group
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, DP)
    within = d < HALF
    at = tl.load(position).to(tl.int32)
    base = kv_head.to(tl.int64) * L * D
    low = 0
    if window > 0:
        low = tl.maximum(at - window + 1, 0)
    end = at - 1
    j = low + tl.arange(0, BN)
    places = base + j[:, None].to(tl.int64) * D + d[None]
    t1, t2 = cached(keys, places, HALF, j, end, within)
    u1, u2 = cached(values, places, HALF, j, end, within)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    q_at = qkv + head * D + d
    k_at = qkv + (H + kv_head) * D + d
    v_at = qkv + (H + G + kv_head) * D + d
    q1 = tl.load(q_at, mask=within, other=0.0).to(tl.float32)
    q2 = tl.load(q_at + HALF, mask=within, other=0.0).to(tl.float32)
    k1 = tl.load(k_at, mask=within, other=0.0).to(tl.float32)
    k2 = tl.load(k_at + HALF, mask=within, other=0.0).to(tl.float32)
    v1 = tl.load(v_at, mask=within, other=0.0)
    v2 = tl.load(v_at + HALF, mask=within, other=0.0)
    before = end >= low
    there = d < tl.where(before, HALF, 0)
    last = base + tl.maximum(end, 0).to(tl.int64) * D + d
    p1 = tl.load(keys + last, mask=there, other=0.0).to(tl.float32)
    p2 = tl.load(keys + last + HALF, mask=there, other=0.0).to(tl.float32)
    w1 = tl.load(values + last, mask=there, other=0.0).to(tl.float32)
    w2 = tl.load(values + last + HALF, mask=there, other=0.0).to(tl.float32)
    if cosines is not None:
        c = tl.load(cosines + d, mask=within, other=0.0)
        s = tl.load(sines + d, mask=within, other=0.0)
        q1, q2 = q1 * c - q2 * s, q2 * c + q1 * s
        k1, k2 = k1 * c - k2 * s, k2 * c + k1 * s
    kind = keys.dtype.element_ty
    q1, q2 = q1.to(kind).to(tl.float32), q2.to(kind).to(tl.float32)
    k1, k2, v1, v2 = k1.to(kind), k2.to(kind), v1.to(kind), v2.to(kind)
    if head % group == 0:
        here = base + at.to(tl.int64) * D + d
        tl.store(keys + here, k1, mask=within)
        tl.store(keys + here + HALF, k2, mask=within)
        tl.store(values + here, v1, mask=within)
        tl.store(values + here + HALF, v2, mask=within)

    # The token's own key and value come from registers, those before it from memory.
    own = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32)) * scale_log2
    own = capped(own, softcap, CAPPED)
    previous = capped(tl.sum(q1 * p1 + q2 * p2) * scale_log2, softcap, CAPPED)
    previous = tl.where(before, previous, float("-inf"))
    top = tl.maximum(own, previous)
    weight, more = tl.exp2(own - top), tl.exp2(previous - top)
    total = weight + more
    o1 = weight * v1.to(tl.float32) + more * w1
    o2 = weight * v2.to(tl.float32) + more * w2
    for start in range(low, end, BN):
        if start > low:
            j = start + tl.arange(0, BN)
            places = base + j[:, None].to(tl.int64) * D + d[None]
            t1, t2 = cached(keys, places, HALF, j, end, within)
            u1, u2 = cached(values, places, HALF, j, end, within)
        products = t1.to(tl.float32) * q1[None] + t2.to(tl.float32) * q2[None]
        scores = capped(tl.sum(products, 1) * scale_log2, softcap, CAPPED)
        scores = tl.where(j < end, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - higher)
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 0)
        o1 = o1 * fade + tl.sum(weights[:, None] * u1.to(tl.float32), 0)
        o2 = o2 * fade + tl.sum(weights[:, None] * u2.to(tl.float32), 0)
        top = higher
    tl.store(out + head * D + d, (o1 / total).to(out.dtype.element_ty), mask=within)
    tl.store(out + head * D + HALF + d, (o2 / total).to(out.dtype.element_ty), mask=within)


@functools.cache
def early(device: int) -> bool:
    """Whether launches may start before their predecessors end."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, norm: str, eps: float, offset: float, activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    """See `one_row.row_linear`."""
    rows, K = weight.shape
    N = rows // 2 if gated else rows
    y = x.new_empty(N)
    KP = triton.next_power_of_2(K)
    BN = 1 if KP > 2048 else 2 if N < 8192 else 4
    extra = {"launch_pdl": True} if (soon := early(x.device.index or 0)) else {}
    linear_kernel[(triton.cdiv(N, BN),)](
        x, weight.contiguous(), bias, gain, shift, residual, y, N, eps, offset, K,
        KP, BN, LONGEST, norm, activation, gated, soon, num_warps=4, **extra,
    )  # fmt: skip
    return y


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cosines: Tensor | None,
    sines: Tensor | None, heads: int, scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    """See `one_row.row_attention`."""
    _, G, L, D = keys.shape
    out = qkv.new_empty(heads * D)
    extra = {"launch_pdl": True} if (soon := early(qkv.device.index or 0)) else {}
    scale_log2 = scale if softcap else scale * LOG2E
    halves = triton.next_power_of_2(D // 2)
    keys_at_once = max(16, HELD // (4 * halves))
    attention_kernel[(heads,)](
        qkv, keys, values, position, cosines, sines, out, heads, G, L, scale_log2, softcap,
        window, D, halves, keys_at_once, bool(softcap), soon, num_warps=8, **extra,
    )  # fmt: skip
    return out
