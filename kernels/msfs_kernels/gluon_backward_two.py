"""The backward for Hopper in Gluon, as two kernels: keys (dK, dV), then queries (dQ)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msfs_kernels.gluon_forward import (
    ROWS,
    copy_in,
    copy_out,
    descriptor,
    exp2,
    key_blocks,
    load,
    place,
)
from msfs_kernels.options import Options
from msfs_kernels.triton_common import LOG2E, Launch
from msfs_kernels.triton_forward import heads_in_cache


@gluon.jit(
    do_not_specialize=[
        "do_b",
        "do_h",
        "do_t",
        "o_b",
        "o_h",
        "o_t",
        "dlse_b",
        "dlse_h",
        "dlse_t",
        "H",
        "T",
        "padded_T",
    ]
)
def prepare_kernel(
    do,
    o,
    lse,
    dlse,
    log_sums,
    delta,
    do_b,
    do_h,
    do_t,
    o_b,
    o_h,
    o_t,
    dlse_b,
    dlse_h,
    dlse_t,
    H,
    T,
    padded_T,
    D: gl.constexpr,
    BM: gl.constexpr,
):
    """delta = rowsum(do * o) - dlse and lse in log2 units, both padded; lse is +inf where there is no key or no query."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    blocks = padded_T // BM
    flat_head = gl.program_id(0) // blocks
    batch = (flat_head // H).to(gl.int64)
    head = (flat_head % H).to(gl.int64)
    i = (gl.program_id(0) % blocks) * BM + gl.arange(0, BM, rows)
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    inside = i < T
    at = i.to(gl.int64)[:, None]
    a = gl.load(
        do + batch * do_b + head * do_h + at * do_t + d[None, :], mask=inside[:, None], other=0.0
    )
    b = gl.load(
        o + batch * o_b + head * o_h + at * o_t + d[None, :], mask=inside[:, None], other=0.0
    )
    total = gl.sum(a.to(gl.float32) * b.to(gl.float32), 1)
    if dlse is not None:
        total -= gl.load(
            dlse + batch * dlse_b + head * dlse_h + i.to(gl.int64) * dlse_t, mask=inside, other=0.0
        ).to(gl.float32)
    start = flat_head.to(gl.int64)
    sums = gl.load(lse + start * T + i, mask=inside, other=float("-inf")) * 1.4426950408889634
    sums = gl.where(sums == float("-inf"), float("inf"), sums)
    gl.store(log_sums + start * padded_T + i, sums)
    gl.store(delta + start * padded_T + i, total)


@gluon.jit
def query_blocks(column, T, S, CAUSAL: gl.constexpr, BM: gl.constexpr, KEYS: gl.constexpr):
    """(first, first unmasked, end) query for keys column .. column + KEYS - 1, multiples of BM."""
    low = 0
    full = 0
    high = (T + BM - 1) // BM * BM
    if CAUSAL:
        low = gl.minimum(gl.maximum(column - (S - T), 0) // BM * BM, high - BM)
        full = (gl.maximum(column + KEYS - 1 - (S - T), 0) + BM - 1) // BM * BM
    return low, full, high


@gluon.jit
def key_producer(
    q,
    k,
    v,
    do,
    log_sums,
    delta,
    buffers,
    barriers,
    work,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    tiles, blocks, heads, H, group, T, S, wave = work
    k_s, v_s, q_s, do_s, lse_s, delta_s = buffers
    k_full, k_free, q_full, q_free, do_full, do_free = barriers
    BM: gl.constexpr = q.block_type.shape[2]
    KEYS: gl.constexpr = ROWS * CONSUMERS
    G = H // group
    count = 0
    step = 0
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        batch = flat_head // G
        kv_head = flat_head % G
        if CAUSAL:
            block = blocks - 1 - block
        column = block * KEYS
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(k_free.index(c), (step & 1) ^ 1)
            mbarrier.expect(k_full.index(c), 2 * k.block_type.nbytes)
            copy_in(k, [batch, kv_head, column + c * ROWS, 0], k_full.index(c), k_s.index(c))
            copy_in(v, [batch, kv_head, column + c * ROWS, 0], k_full.index(c), v_s.index(c))
        low, full, high = query_blocks(column, T, S, CAUSAL, BM, KEYS)
        for member in range(group):
            head = kv_head * group + member
            for i in range(low, high, BM):
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(q_free.index(stage), phase)
                mbarrier.expect(q_full.index(stage), q.block_type.nbytes + BM * 4)
                copy_in(q, [batch, head, i, 0], q_full.index(stage), q_s.index(stage))
                copy_in(log_sums, [batch * H + head, i], q_full.index(stage), lse_s.index(stage))
                mbarrier.wait(do_free.index(stage), phase)
                mbarrier.expect(do_full.index(stage), do.block_type.nbytes + BM * 4)
                copy_in(do, [batch, head, i, 0], do_full.index(stage), do_s.index(stage))
                copy_in(delta, [batch * H + head, i], do_full.index(stage), delta_s.index(stage))
                count += 1
        step += 1
        block, flat_head = place(step, tiles, blocks, heads, wave)


@gluon.jit
def key_consumer(
    dk_out,
    dv_out,
    buffers,
    barriers,
    work,
    scale,
    scale_log2,
    C: gl.constexpr,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    LATE: gl.constexpr,
):
    tiles, blocks, heads, H, group, T, S, wave = work
    k_s, v_s, q_s, do_s, lse_s, delta_s = buffers
    k_full, k_free, q_full, q_free, do_full, do_free = barriers
    BM: gl.constexpr = q_s.shape[3]
    D: gl.constexpr = q_s.shape[4]
    KEYS: gl.constexpr = ROWS * CONSUMERS
    dtype: gl.constexpr = q_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    k_t = k_s.index(C).reshape([ROWS, D])
    v_t = v_s.index(C).reshape([ROWS, D])
    count = 0
    step = 0
    G = H // group
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        if CAUSAL:
            block = blocks - 1 - block
        column = block * KEYS
        low, full, high = query_blocks(column, T, S, CAUSAL, BM, KEYS)
        if column + KEYS > S:
            full = high
        dk = gl.zeros([ROWS, D], gl.float32, LAYOUT)
        dv = gl.zeros([ROWS, D], gl.float32, LAYOUT)
        n = (high - low) // BM * group
        i = low
        mbarrier.wait(k_full.index(C), step & 1)
        if LATE:
            # The products of the step before run under this step's exponentials.
            p_a = gl.convert_layout(gl.zeros([ROWS, BM], dtype, S_LAYOUT), A_LAYOUT)
            ds_a = p_a
            for it in range(n):
                stage = count % STAGES
                phase = (count // STAGES) & 1
                old = gl.maximum(count - 1, 0) % STAGES
                q_t = q_s.index(stage).reshape([BM, D])
                do_t = do_s.index(stage).reshape([BM, D])
                zero = gl.zeros([ROWS, BM], gl.float32, S_LAYOUT)
                mbarrier.wait(q_full.index(stage), phase)
                s = warpgroup_mma(k_t, q_t.permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(do_full.index(stage), phase)
                dp = warpgroup_mma(v_t, do_t.permute((1, 0)), zero, use_acc=False, is_async=True)
                dv = warpgroup_mma(p_a, do_s.index(old).reshape([BM, D]), dv, is_async=True)
                dk = warpgroup_mma(ds_a, q_s.index(old).reshape([BM, D]), dk, is_async=True)
                log_sums = lse_s.index(stage).reshape([BM]).load(COLS)
                s = warpgroup_mma_wait(3, [s])
                p = exp2(s * scale_log2 - log_sums[None, :])
                if i < full:
                    j = column + C * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))[:, None]
                    queries = i + (S - T) + gl.arange(0, BM, COLS)[None, :]
                    p = gl.where((j < S) & ((j <= queries) | (not CAUSAL)), p, 0.0)
                delta = delta_s.index(stage).reshape([BM]).load(COLS)
                dp = warpgroup_mma_wait(2, [dp])
                ds = p * (dp - delta[None, :])
                mbarrier.wait(
                    q_full.index(stage), phase
                )  # passed already: keeps the products behind
                dv, dk, p_a, ds_a = warpgroup_mma_wait(0, [dv, dk, p_a, ds_a])
                mbarrier.arrive(do_free.index(old), count=1, pred=it > 0)
                mbarrier.arrive(q_free.index(old), count=1, pred=it > 0)
                p_a = gl.convert_layout(p.to(dtype), A_LAYOUT)
                ds_a = gl.convert_layout(ds.to(dtype), A_LAYOUT)
                count += 1
                i += BM
                if i >= high:
                    i = low
            old = (count - 1) % STAGES
            dv = warpgroup_mma(p_a, do_s.index(old).reshape([BM, D]), dv, is_async=True)
            dk = warpgroup_mma(ds_a, q_s.index(old).reshape([BM, D]), dk, is_async=True)
            dv, dk, p_a, ds_a = warpgroup_mma_wait(0, [dv, dk, p_a, ds_a])
            mbarrier.arrive(do_free.index(old), count=1)
            mbarrier.arrive(q_free.index(old), count=1)
        else:
            for it in range(n):
                stage = count % STAGES
                phase = (count // STAGES) & 1
                q_t = q_s.index(stage).reshape([BM, D])
                do_t = do_s.index(stage).reshape([BM, D])
                zero = gl.zeros([ROWS, BM], gl.float32, S_LAYOUT)
                mbarrier.wait(q_full.index(stage), phase)
                s = warpgroup_mma(k_t, q_t.permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(do_full.index(stage), phase)
                dp = warpgroup_mma(v_t, do_t.permute((1, 0)), zero, use_acc=False, is_async=True)
                log_sums = lse_s.index(stage).reshape([BM]).load(COLS)
                s = warpgroup_mma_wait(1, [s])
                p = exp2(s * scale_log2 - log_sums[None, :])
                if i < full:
                    j = column + C * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))[:, None]
                    queries = i + (S - T) + gl.arange(0, BM, COLS)[None, :]
                    p = gl.where((j < S) & ((j <= queries) | (not CAUSAL)), p, 0.0)
                p_a = gl.convert_layout(p.to(dtype), A_LAYOUT)
                delta = delta_s.index(stage).reshape([BM]).load(COLS)
                dp = warpgroup_mma_wait(0, [dp])
                dv = warpgroup_mma(p_a, do_t, dv, is_async=True)
                ds_a = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), A_LAYOUT)
                dk = warpgroup_mma(ds_a, q_t, dk, is_async=True)
                dv, p_a = warpgroup_mma_wait(1, [dv, p_a])
                mbarrier.arrive(do_free.index(stage), count=1)
                dk, ds_a = warpgroup_mma_wait(0, [dk, ds_a])
                mbarrier.arrive(q_free.index(stage), count=1)
                count += 1
                i += BM
                if i >= high:
                    i = low
        # This warpgroup alone reads its K and V: they are free to stage the results.
        batch = flat_head // G
        kv_head = flat_head % G
        v_t.store(dv.to(dtype))
        k_t.store((dk * scale).to(dtype))
        fence_async_shared()
        copy_out(dv_out, [batch, kv_head, column + C * ROWS, 0], v_s.index(C))
        copy_out(dk_out, [batch, kv_head, column + C * ROWS, 0], k_s.index(C))
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(C), count=1)
        step += 1
        block, flat_head = place(step, tiles, blocks, heads, wave)


@gluon.jit(do_not_specialize=["tiles", "blocks", "heads", "H", "group", "T", "S", "wave"])
def key_kernel(
    q,
    k,
    v,
    do,
    log_sums,
    delta,
    dk,
    dv,
    tiles,
    blocks,
    heads,
    H,
    group,
    T,
    S,
    scale,
    scale_log2,
    wave,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    LATE: gl.constexpr,
):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_s = gl.allocate_shared_memory(k.dtype, [CONSUMERS] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [CONSUMERS] + v.block_type.shape, v.layout)
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [STAGES] + do.block_type.shape, do.layout)
    lse_s = gl.allocate_shared_memory(
        gl.float32, [STAGES] + log_sums.block_type.shape, log_sums.layout
    )
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES] + delta.block_type.shape, delta.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(k_full.index(c), count=1)
        mbarrier.init(k_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_free.index(s), count=CONSUMERS)
        mbarrier.init(do_full.index(s), count=1)
        mbarrier.init(do_free.index(s), count=CONSUMERS)
    fence_async_shared()
    buffers = (k_s, v_s, q_s, do_s, lse_s, delta_s)
    barriers = (k_full, k_free, q_full, q_free, do_full, do_free)
    work = (tiles, blocks, heads, H, group, T, S, wave)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    key_consumer,
                    (
                        dk,
                        dv,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        0,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    key_consumer,
                    (
                        dk,
                        dv,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        1,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    key_producer,
                    (
                        q,
                        k,
                        v,
                        do,
                        log_sums,
                        delta,
                        buffers,
                        barriers,
                        work,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    key_consumer,
                    (
                        dk,
                        dv,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        0,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    key_consumer,
                    (
                        dk,
                        dv,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        1,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    key_consumer,
                    (
                        dk,
                        dv,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        2,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    key_producer,
                    (
                        q,
                        k,
                        v,
                        do,
                        log_sums,
                        delta,
                        buffers,
                        barriers,
                        work,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def query_producer(
    q,
    k,
    v,
    do,
    log_sums,
    delta,
    buffers,
    barriers,
    work,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    tiles, blocks, heads, H, group, T, S, wave = work
    q_s, do_s, k_s, v_s, lse_s, delta_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    BN: gl.constexpr = k.block_type.shape[2]
    BM: gl.constexpr = ROWS * CONSUMERS
    count = 0
    step = 0
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        batch = flat_head // H
        head = flat_head % H
        row = block * BM
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(c), (step & 1) ^ 1)
            mbarrier.expect(q_full.index(c), 2 * q.block_type.nbytes + 2 * ROWS * 4)
            copy_in(q, [batch, head, row + c * ROWS, 0], q_full.index(c), q_s.index(c))
            copy_in(do, [batch, head, row + c * ROWS, 0], q_full.index(c), do_s.index(c))
            copy_in(log_sums, [flat_head, row + c * ROWS], q_full.index(c), lse_s.index(c))
            copy_in(delta, [flat_head, row + c * ROWS], q_full.index(c), delta_s.index(c))
        n, full = key_blocks(row, T, S, CAUSAL, BM, BN)
        for j in range(n - 1, -1, -1):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            load(k, [batch, head // group, j * BN, 0], k_full.index(stage), k_s.index(stage))
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            load(v, [batch, head // group, j * BN, 0], v_full.index(stage), v_s.index(stage))
            count += 1
        step += 1
        block, flat_head = place(step, tiles, blocks, heads, wave)


@gluon.jit
def query_consumer(
    dq_out,
    buffers,
    barriers,
    work,
    scale,
    scale_log2,
    C: gl.constexpr,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    LATE: gl.constexpr,
):
    tiles, blocks, heads, H, group, T, S, wave = work
    q_s, do_s, k_s, v_s, lse_s, delta_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    BN: gl.constexpr = k_s.shape[3]
    BM: gl.constexpr = ROWS * CONSUMERS
    D: gl.constexpr = k_s.shape[4]
    dtype: gl.constexpr = q_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q_t = q_s.index(C).reshape([ROWS, D])
    do_t = do_s.index(C).reshape([ROWS, D])
    count = 0
    step = 0
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        n, full = key_blocks(block * BM, T, S, CAUSAL, BM, BN)
        row = block * BM + C * ROWS
        dq = gl.zeros([ROWS, D], gl.float32, LAYOUT)
        mbarrier.wait(q_full.index(C), step & 1)
        log_sums = lse_s.index(C).reshape([ROWS]).load(S_ROWS)
        delta = delta_s.index(C).reshape([ROWS]).load(S_ROWS)
        ds_a = gl.convert_layout(gl.zeros([ROWS, BN], dtype, S_LAYOUT), A_LAYOUT)
        for it in range(n):
            j = n - 1 - it
            stage = count % STAGES
            phase = (count // STAGES) & 1
            old = gl.maximum(count - 1, 0) % STAGES
            k_t = k_s.index(stage).reshape([BN, D])
            v_t = v_s.index(stage).reshape([BN, D])
            zero = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
            mbarrier.wait(k_full.index(stage), phase)
            s = warpgroup_mma(q_t, k_t.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            dp = warpgroup_mma(do_t, v_t.permute((1, 0)), zero, use_acc=False, is_async=True)
            if LATE:
                dq = warpgroup_mma(ds_a, k_s.index(old).reshape([BN, D]), dq, is_async=True)
                s = warpgroup_mma_wait(2, [s])
            else:
                s = warpgroup_mma_wait(1, [s])
            p = exp2(s * scale_log2 - log_sums[:, None])
            if j >= full:
                keys = j * BN + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))[None, :]
                queries = row + (S - T) + gl.arange(0, ROWS, S_ROWS)[:, None]
                p = gl.where((keys < S) & ((keys <= queries) | (not CAUSAL)), p, 0.0)
            if LATE:
                dp = warpgroup_mma_wait(1, [dp])
                mbarrier.arrive(v_free.index(stage), count=1)
                ds = p * (dp - delta[:, None])
                mbarrier.wait(
                    v_full.index(stage), phase
                )  # passed already: keeps the product behind
                dq, ds_a = warpgroup_mma_wait(0, [dq, ds_a])
                mbarrier.arrive(k_free.index(old), count=1, pred=it > 0)
                ds_a = gl.convert_layout(ds.to(dtype), A_LAYOUT)
            else:
                dp = warpgroup_mma_wait(0, [dp])
                mbarrier.arrive(v_free.index(stage), count=1)
                ds_a = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), A_LAYOUT)
                dq = warpgroup_mma(ds_a, k_t, dq, is_async=True)
                dq, ds_a = warpgroup_mma_wait(0, [dq, ds_a])
                mbarrier.arrive(k_free.index(stage), count=1)
            count += 1
        if LATE:
            old = (count - 1) % STAGES
            dq = warpgroup_mma(ds_a, k_s.index(old).reshape([BN, D]), dq, is_async=True)
            dq, ds_a = warpgroup_mma_wait(0, [dq, ds_a])
            mbarrier.arrive(k_free.index(old), count=1)
        q_t.store((dq * scale).to(dtype))
        fence_async_shared()
        copy_out(dq_out, [flat_head // H, flat_head % H, row, 0], q_s.index(C))
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(C), count=1)
        step += 1
        block, flat_head = place(step, tiles, blocks, heads, wave)


@gluon.jit(do_not_specialize=["tiles", "blocks", "heads", "H", "group", "T", "S", "wave"])
def query_kernel(
    q,
    k,
    v,
    do,
    log_sums,
    delta,
    dq,
    tiles,
    blocks,
    heads,
    H,
    group,
    T,
    S,
    scale,
    scale_log2,
    wave,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    LATE: gl.constexpr,
):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(q.dtype, [CONSUMERS] + q.block_type.shape, q.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [CONSUMERS] + do.block_type.shape, do.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    lse_s = gl.allocate_shared_memory(
        gl.float32, [CONSUMERS] + log_sums.block_type.shape, log_sums.layout
    )
    delta_s = gl.allocate_shared_memory(
        gl.float32, [CONSUMERS] + delta.block_type.shape, delta.layout
    )
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=CONSUMERS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_free.index(s), count=CONSUMERS)
    fence_async_shared()
    buffers = (q_s, do_s, k_s, v_s, lse_s, delta_s)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    work = (tiles, blocks, heads, H, group, T, S, wave)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    query_consumer,
                    (
                        dq,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        0,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    query_consumer,
                    (
                        dq,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        1,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    query_producer,
                    (
                        q,
                        k,
                        v,
                        do,
                        log_sums,
                        delta,
                        buffers,
                        barriers,
                        work,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    query_consumer,
                    (
                        dq,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        0,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    query_consumer,
                    (
                        dq,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        1,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    query_consumer,
                    (
                        dq,
                        buffers,
                        barriers,
                        work,
                        scale,
                        scale_log2,
                        2,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                        LATE,
                    ),
                ),
                (
                    query_producer,
                    (
                        q,
                        k,
                        v,
                        do,
                        log_sums,
                        delta,
                        buffers,
                        barriers,
                        work,
                        CAUSAL,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def vector(x: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([1, rows], gl.float32)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows], layout)


def plan_keys(
    q,
    k,
    v,
    do,
    log_sums,
    delta,
    dk,
    dv,
    options: Options,
    *,
    programs=132,
    block=64,
    stages=2,
    consumers=2,
    late=False,
) -> Launch:
    (B, H, T, _), (_, G, S, _) = q.shape, v.shape
    blocks = triton.cdiv(S, 64 * consumers)
    tiles = blocks * B * G
    return Launch(
        key_kernel,
        (min(programs, tiles),),
        (
            descriptor(q, block),
            descriptor(k, 64),
            descriptor(v, 64),
            descriptor(do, block),
            vector(log_sums, block),
            vector(delta, block),
            descriptor(dk, 64),
            descriptor(dv, 64),
            tiles,
            blocks,
            B * G,
            H,
            H // G,
            T,
            S,
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(q, do, 1) if options.causal else 1,
        ),
        dict(CAUSAL=options.causal, STAGES=stages, CONSUMERS=consumers, LATE=late, num_warps=4),
    )


def plan_queries(
    q,
    k,
    v,
    do,
    log_sums,
    delta,
    dq,
    options: Options,
    *,
    programs=132,
    block=128,
    stages=2,
    consumers=2,
    late=False,
) -> Launch:
    (B, H, T, _), (_, G, S, _) = q.shape, v.shape
    blocks = triton.cdiv(T, 64 * consumers)
    tiles = blocks * B * H
    return Launch(
        query_kernel,
        (min(programs, tiles),),
        (
            descriptor(q, 64),
            descriptor(k, block),
            descriptor(v, block),
            descriptor(do, 64),
            vector(log_sums, 64),
            vector(delta, 64),
            descriptor(dq, 64),
            tiles,
            blocks,
            B * H,
            H,
            H // G,
            T,
            S,
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        dict(CAUSAL=options.causal, STAGES=stages, CONSUMERS=consumers, LATE=late, num_warps=4),
    )
