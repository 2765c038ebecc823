"""The backward for Hopper in Gluon: two warpgroups of 64 keys each, a producer warp, gradients of queries by atomics."""

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

from msfs_kernels.options import Options
from msfs_kernels.triton_common import LOG2E, Launch
from msfs_kernels.triton_forward import heads_in_cache

copy_in = tma.async_load if hasattr(tma, 'async_load') else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, 'async_store') else tma.async_copy_shared_to_global
KEYS = gl.constexpr(128)  # of a program, 64 a warpgroup


@gluon.jit(do_not_specialize=['do_b', 'do_h', 'do_t', 'o_b', 'o_h', 'o_t', 'dlse_b', 'dlse_h', 'dlse_t', 'H', 'T', 'padded_T'])
def prepare_kernel(do, o, lse, dlse, log_sums, delta, do_b, do_h, do_t, o_b, o_h, o_t, dlse_b, dlse_h, dlse_t, H, T, padded_T,
                   D: gl.constexpr, ROWS: gl.constexpr):
    """delta = rowsum(do * o) - dlse and lse in log2 units, both padded; lse is +inf where there is no key or no query."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    blocks = padded_T // ROWS
    flat_head = gl.program_id(0) // blocks
    batch = (flat_head // H).to(gl.int64)
    head = (flat_head % H).to(gl.int64)
    i = (gl.program_id(0) % blocks) * ROWS + gl.arange(0, ROWS, rows)
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    inside = i < T
    at = i.to(gl.int64)[:, None]
    a = gl.load(do + batch * do_b + head * do_h + at * do_t + d[None, :], mask=inside[:, None], other=0.0)
    b = gl.load(o + batch * o_b + head * o_h + at * o_t + d[None, :], mask=inside[:, None], other=0.0)
    total = gl.sum(a.to(gl.float32) * b.to(gl.float32), 1)
    if dlse is not None:
        total -= gl.load(dlse + batch * dlse_b + head * dlse_h + i.to(gl.int64) * dlse_t, mask=inside, other=0.0).to(gl.float32)
    start = flat_head.to(gl.int64)
    sums = gl.load(lse + start * T + i, mask=inside, other=float("-inf")) * 1.4426950408889634
    sums = gl.where(sums == float("-inf"), float("inf"), sums)
    gl.store(log_sums + start * padded_T + i, sums)
    gl.store(delta + start * padded_T + i, total)


@gluon.jit
def query_range(column, T, S, CAUSAL: gl.constexpr, BM: gl.constexpr):
    """(first, first unmasked, end) query for the keys column .. column + KEYS - 1, the first two multiples of BM."""
    low = 0
    full = 0
    if CAUSAL:
        low = gl.maximum(column - (S - T), 0) // BM * BM
        full = (gl.maximum(column + KEYS - 1 - (S - T), 0) + BM - 1) // BM * BM
    high = (T + BM - 1) // BM * BM
    if column + KEYS > S:
        full = high
    low = gl.minimum(low, high)
    return low, gl.minimum(gl.maximum(full, low), high), high


@gluon.jit
def producer(q, k, v, do, log_sums, delta, buffers, barriers, batch, kv_head, column, H, T, S, group,
             CAUSAL: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):
    k_s, v_s, q_s, do_s, lse_s, delta_s, ds_s = buffers
    kv_full, q_full, q_free, do_full, do_free, ds_full, ds_free = barriers
    D: gl.constexpr = q.block_type.shape[3]
    mbarrier.expect(kv_full, 2 * KEYS * D * 2)
    copy_in(k, [batch, kv_head, column, 0], kv_full, k_s)
    copy_in(v, [batch, kv_head, column, 0], kv_full, v_s.index(0))
    copy_in(v, [batch, kv_head, column + 64, 0], kv_full, v_s.index(1))
    low, full, high = query_range(column, T, S, CAUSAL, BM)
    count = 0
    for member in range(group):
        head = kv_head * group + member
        for i in range(low, high, BM):
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(q_free.index(stage), phase)
            mbarrier.expect(q_full.index(stage), BM * D * 2 + BM * 4)
            copy_in(q, [batch, head, i, 0], q_full.index(stage), q_s.index(stage))
            copy_in(log_sums, [batch * H + head, i], q_full.index(stage), lse_s.index(stage))
            mbarrier.wait(do_free.index(stage), phase)
            mbarrier.expect(do_full.index(stage), BM * D * 2 + BM * 4)
            copy_in(do, [batch, head, i, 0], do_full.index(stage), do_s.index(stage))
            copy_in(delta, [batch * H + head, i], do_full.index(stage), delta_s.index(stage))
            count += 1


@gluon.jit
def add_to_memory(pointer, value, BM: gl.constexpr, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Adds a (64, HALF) accumulator to float32 memory, 16 bytes a thread, in the order in which threads hold it.

    Of four consecutive registers two are in one row and two eight rows below; address g * 512 + thread * 4 gets the
    g-th four of a thread. `finish_kernel` reads the same order back.
    """
    offsets = accumulator_offsets(BM, HALF, LAYOUT)
    gl.inline_asm_elementwise(
        "red.global.add.v4.f32 [$4], {$8, $9, $10, $11}; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
        [(pointer + offsets).to(gl.int64), value],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def accumulator_offsets(BM: gl.constexpr, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    row = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))[None, :]
    thread = (row // 16) * 32 + (row % 8) * 4 + (col % 8) // 2
    return (col // 8) * 512 + thread * 4


@gluon.jit
def start_share(ds_s, k_s, slot, C: gl.constexpr, BM: gl.constexpr, DQ_LAYOUT: gl.constexpr):
    """Starts this warpgroup's part of dS K: half the columns, or half the rows of 128."""
    D: gl.constexpr = k_s.shape[3]
    W: gl.constexpr = D if BM == 128 else D // 2
    ds_t = ds_s.index(slot)
    keys = k_s.reshape([KEYS, D])
    none = gl.zeros([64, W], gl.float32, DQ_LAYOUT)
    if BM == 128:
        part = ds_t.slice(C * 64, 64, 1)
        return warpgroup_mma(part.permute((1, 0)), keys, none, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(ds_t.permute((1, 0)), keys.slice(C * W, W, 1), none, use_acc=False, is_async=True)


@gluon.jit
def consumer(dq, dk_out, dv_out, buffers, barriers, batch, kv_head, column, H, T, S, group, padded_T, scale, scale_log2,
             C: gl.constexpr, CAUSAL: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):
    k_s, v_s, q_s, do_s, lse_s, delta_s, ds_s = buffers
    kv_full, q_full, q_free, do_full, do_free, ds_full, ds_free = barriers
    D: gl.constexpr = q_s.shape[4]
    W: gl.constexpr = D if BM == 128 else D // 2
    dtype: gl.constexpr = q_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    dk = gl.zeros([64, D], gl.float32, LAYOUT)
    dv = gl.zeros([64, D], gl.float32, LAYOUT)
    zero = gl.zeros([64, BM], gl.float32, S_LAYOUT)
    low, full, high = query_range(column, T, S, CAUSAL, BM)
    blocks = (high - low) // BM
    n = blocks * group
    mine = k_s.reshape([KEYS, D]).slice(C * 64, 64, 0)
    mbarrier.wait(kv_full, 0)
    head = kv_head * group
    i = low
    before = dq
    for step in range(n):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        slot = step % 2
        q_t = q_s.index(stage).reshape([BM, D])
        do_t = do_s.index(stage).reshape([BM, D])
        rows = dq + ((batch * H + head).to(gl.int64) * padded_T + i) * D

        mbarrier.wait(q_full.index(stage), phase)
        s = warpgroup_mma(mine, q_t.permute((1, 0)), zero, use_acc=False, is_async=True)
        # dQ of the step before runs under the exponentials of this one.
        mbarrier.wait(ds_full.index(slot ^ 1), ((step - 1) // 2) & 1, pred=step > 0)
        share = start_share(ds_s, k_s, slot ^ 1, C, BM, DQ_LAYOUT)
        log_sums = lse_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S_LAYOUT))
        s = warpgroup_mma_wait(1, [s])
        p = gl.exp2(s * scale_log2 - log_sums[None, :])
        if i < full or column + KEYS > S:
            j = column + C * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))[:, None]
            seen = (j < S) & (gl.arange(0, BM, gl.SliceLayout(0, S_LAYOUT))[None, :] >= 0)
            if CAUSAL:
                queries = i + (S - T) + gl.arange(0, BM, gl.SliceLayout(0, S_LAYOUT))[None, :]
                seen = seen & (j <= queries)
            p = gl.where(seen, p, 0.0)
        p_a = gl.convert_layout(p.to(dtype), A_LAYOUT)
        share = warpgroup_mma_wait(0, [share])
        mbarrier.arrive(ds_free.index(slot ^ 1), count=1, pred=step > 0)
        if step > 0:
            add_to_memory(before + C * (64 * W), share, 64, W, DQ_LAYOUT)

        mbarrier.wait(do_full.index(stage), phase)
        dp = warpgroup_mma(v_s.index(C).reshape([64, D]), do_t.permute((1, 0)), zero, use_acc=False, is_async=True)
        dv = warpgroup_mma(p_a, do_t, dv, is_async=True)
        delta = delta_s.index(stage).reshape([BM]).load(gl.SliceLayout(0, S_LAYOUT))
        dp = warpgroup_mma_wait(1, [dp])
        ds = (p * (dp - delta[None, :])).to(dtype)
        mbarrier.wait(ds_free.index(slot), ((step // 2) & 1) ^ 1)
        ds_s.index(slot).slice(C * 64, 64, 0).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slot), count=1)
        ds_a = gl.convert_layout(ds, A_LAYOUT)
        dk = warpgroup_mma(ds_a, q_t, dk, is_async=True)

        dv, p_a = warpgroup_mma_wait(1, [dv, p_a])
        mbarrier.arrive(do_free.index(stage), count=1)
        dk, ds_a = warpgroup_mma_wait(0, [dk, ds_a])
        mbarrier.arrive(q_free.index(stage), count=1)
        before = rows
        i += BM
        if i >= high:
            i = low
            head += 1
    slot = (n - 1) % 2
    mbarrier.wait(ds_full.index(slot), ((n - 1) // 2) & 1)
    share = start_share(ds_s, k_s, slot, C, BM, DQ_LAYOUT)
    share = warpgroup_mma_wait(0, [share])
    add_to_memory(before + C * (64 * W), share, 64, W, DQ_LAYOUT)
    # This warpgroup alone read its half of V: the half is free to stage the results.
    stage_s = v_s.index(C)
    stage_s.reshape([64, D]).store(dv.to(dtype))
    fence_async_shared()
    copy_out(dv_out, [batch, kv_head, column + C * 64, 0], stage_s)
    tma.store_wait(0)
    stage_s.reshape([64, D]).store((dk * scale).to(dtype))
    fence_async_shared()
    copy_out(dk_out, [batch, kv_head, column + C * 64, 0], stage_s)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=['heads', 'H', 'T', 'S', 'padded_T', 'wave', 'group'])
def backward_hopper(q, k, v, do, log_sums, delta, dq, dk, dv, heads, H, T, S, padded_T, scale, scale_log2, wave, group,
                    CAUSAL: gl.constexpr, STAGES: gl.constexpr):
    BM: gl.constexpr = q.block_type.shape[2]
    D: gl.constexpr = q.block_type.shape[3]
    dtype: gl.constexpr = q.dtype
    blocks = (S + KEYS - 1) // KEYS
    group = gl.program_id(0) // (wave * blocks)
    rest = gl.program_id(0) - group * (wave * blocks)
    size = gl.minimum(wave, heads - group * wave)
    column = rest // size * KEYS  # under a causal mask the first keys are seen by the most queries
    flat_kv_head = group * wave + rest % size
    G = H // group
    batch = flat_kv_head // G
    kv_head = flat_kv_head % G

    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_s = gl.allocate_shared_memory(dtype, k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(dtype, [2] + v.block_type.shape, v.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES] + q.block_type.shape, q.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES] + do.block_type.shape, do.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES] + log_sums.block_type.shape, log_sums.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES] + delta.block_type.shape, delta.layout)
    ds_s = gl.allocate_shared_memory(dtype, [2, KEYS, BM], gl.NVMMASharedLayout.get_default_for([KEYS, BM], dtype))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_free.index(s), count=2)
        mbarrier.init(do_full.index(s), count=1)
        mbarrier.init(do_free.index(s), count=2)
    for s in gl.static_range(2):
        mbarrier.init(ds_full.index(s), count=2)
        mbarrier.init(ds_free.index(s), count=2)
    fence_async_shared()
    buffers = (k_s, v_s, q_s, do_s, lse_s, delta_s, ds_s)
    barriers = (kv_full, q_full, q_free, do_full, do_free, ds_full, ds_free)
    gl.warp_specialize(
        [
            (consumer, (dq, dk, dv, buffers, barriers, batch, kv_head, column, H, T, S, group, padded_T, scale, scale_log2, 0, CAUSAL, BM, STAGES)),
            (consumer, (dq, dk, dv, buffers, barriers, batch, kv_head, column, H, T, S, group, padded_T, scale, scale_log2, 1, CAUSAL, BM, STAGES)),
            (producer, (q, k, v, do, log_sums, delta, buffers, barriers, batch, kv_head, column, H, T, S, group, CAUSAL, BM, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(do_not_specialize=['dq_b', 'dq_h', 'dq_t', 'H', 'T', 'padded_T'])
def finish_kernel(sums, dq, dq_b, dq_h, dq_t, H, T, padded_T, scale, D: gl.constexpr, W: gl.constexpr):
    """dq = scale * sums, out of the order in which threads added them."""
    HALF: gl.constexpr = W
    BM: gl.constexpr = 64
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    blocks = padded_T // BM
    flat_head = gl.program_id(0) // blocks
    start = (gl.program_id(0) % blocks) * BM
    batch = (flat_head // H).to(gl.int64)
    head = (flat_head % H).to(gl.int64)
    row = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))[None, :]
    offsets = accumulator_offsets(BM, HALF, LAYOUT) + ((row % 16) // 8) * 2 + col % 2
    base = sums + (flat_head.to(gl.int64) * padded_T + start) * D
    out = dq + batch * dq_b + head * dq_h
    for c in gl.static_range(D // W):
        value = gl.load(base + c * (BM * HALF) + offsets) * scale
        pointers = out + (start + row).to(gl.int64) * dq_t + (c * HALF + col)
        gl.store(pointers, value.to(dq.dtype.element_ty), mask=start + row < T)


def plan_backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_sums: Tensor, delta: Tensor, sums: Tensor, dk: Tensor, dv: Tensor,
                  options: Options, stages: int = 2, block: int = 64) -> Launch:
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16

    def rows(x: Tensor, n: int) -> TensorDescriptor:
        shape = [1, 1, n, D]
        return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))

    def vector(x: Tensor) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block], gl.NVMMASharedLayout.get_default_for([1, block], gl.float32))

    padded_T = log_sums.shape[1]
    return Launch(
        backward_hopper,
        (triton.cdiv(S, 128) * B * G,),
        (
            rows(q, block), rows(k, 128), rows(v, 64), rows(do, block), vector(log_sums), vector(delta), sums, rows(dk, 64), rows(dv, 64),
            B * G, H, T, S, padded_T, options.scale, options.scale * LOG2E.value,
            heads_in_cache(q, do, 1) if options.causal else 1, H // G,
        ),
        dict(CAUSAL=options.causal, STAGES=stages, num_warps=4),
    )


def plan_prepare(do: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, log_sums: Tensor, delta: Tensor) -> Launch:
    B, H, T, D = o.shape
    padded_T = log_sums.shape[1]
    return Launch(
        prepare_kernel,
        (B * H * padded_T // 64,),
        (do, o, lse, dlse, log_sums, delta, *do.stride()[:3], *o.stride()[:3], *(dlse.stride() if dlse is not None else (0, 0, 0)), H, T, padded_T),
        dict(D=D, ROWS=64, num_warps=4),
    )


def plan_finish(sums: Tensor, dq: Tensor, padded_T: int, options: Options, block: int = 64) -> Launch:
    B, H, T, D = dq.shape
    return Launch(
        finish_kernel,
        (B * H * padded_T // 64,),
        (sums, dq, *dq.stride()[:3], H, T, padded_T, options.scale),
        dict(D=D, W=D if block == 128 else D // 2, num_warps=4),
    )


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options, stages: int = 2, block: int = 64):
    B, H, T, D = q.shape
    padded_T = triton.cdiv(T, block) * block
    log_sums = q.new_empty((B * H, padded_T), dtype=torch.float32)
    delta = torch.empty_like(log_sums)
    sums = q.new_zeros((B, H, padded_T, D), dtype=torch.float32)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    plan_prepare(do, o, lse, None, log_sums, delta).run()
    plan_backward(q, k, v, do, log_sums, delta, sums, dk, dv, options, stages, block).run()
    plan_finish(sums, dq, padded_T, options, block).run()
    return dq, dk, dv
