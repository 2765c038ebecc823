"""The backward for Hopper in Gluon: five products a tile, dQ of one tile under the next's softmax.

`triton_backward.py` has the formulas; read `gluon_forward.py` first, whose vocabulary (consumers, a
producer, rings of buffers, `full` and `free` barriers, products that run while the program goes on)
is used here. A program owns 128 keys, 64 for each of two consumers, and walks over query blocks of
64. Scores are transposed, keys along rows: P' and dS' of a consumer are the left sides of its sums
dV and dK, straight from registers.

    for query block i:
        start S' = K Q_i'
        start dQ_{i-1} = dS_{i-1} K            half of its columns, over all 128 keys
        wait for S';   P' = e^{S' - lse}       runs under dQ_{i-1}
        wait for dQ_{i-1}, add it to memory
        start dP' = V dO_i'
        start dV += P' dO_i
        wait for dP';  dS' = P' (dP' - delta)  runs under dV
        write dS' to shared memory, for both consumers
        start dK += dS' Q_i
        wait for dV and dK

**One dQ of two consumers.** A query's gradient sums over all keys. Each consumer writes its 64 rows
of dS' to shared memory, and each takes half of the columns of dS K from all 128: half the bytes to
add to memory of what two sums over 64 keys would be. Because dQ comes one round late, and dS' has
two buffers, neither waits for the other to finish its round.

**Atomic sums.** Programs that own different keys add to the same dQ in float32, in the order in
which they arrive. A thread adds 16 bytes at once: the four numbers that lie in consecutive
registers of its accumulator, at an address made for them; `finish_kernel` puts the numbers into
their places when it rounds the sums to 16 bits.

Source: Dao 2023 (FlashAttention-2), Algorithm 2; Shah et al. 2024 (FlashAttention-3), section 3.
"""

# Lists have no stars in Triton's language, and tuples are taken apart whole.
# ruff: noqa: RUF005, RUF059
# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

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

from msfs_kernels.gluon_forward import copy_in, copy_out, descriptor, exp2
from msfs_kernels.options import Options, empty_tokens_first
from msfs_kernels.triton_common import LOG2E, Launch, launch
from msfs_kernels.triton_forward import heads_in_cache

KEYS = gl.constexpr(64)  # of a consumer
BM = gl.constexpr(64)  # queries of a block
STAGES = {64: 3, 128: 2}  # by head dim: buffers of the ring of queries


@gluon.jit(
    do_not_specialize=["do_b", "do_h", "do_t", "o_b", "o_h", "o_t", "dlse_b", "dlse_h", "dlse_t"]
    + ["H", "T", "padded_T"]
)
def prepare_kernel(
    do, o, lse, dlse, log_sums, delta, sums, do_b, do_h, do_t, o_b, o_h, o_t, dlse_b, dlse_h,
    dlse_t, H, T, padded_T, D: gl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * o) - dlse (Algorithm 2, line 4), lse in log2 units, and dQ zeroed, of BM
    queries. lse is +inf where there is no query or no key: its probabilities then are zeros.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    blocks = padded_T // BM
    flat_head = gl.program_id(0) // blocks
    batch = (flat_head // H).to(gl.int64)
    head = (flat_head % H).to(gl.int64)
    i = (gl.program_id(0) % blocks) * BM + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    inside = i < T
    at = i.to(gl.int64)[:, None]
    grads = do + batch * do_b + head * do_h + at * do_t + d
    results = o + batch * o_b + head * o_h + at * o_t + d
    a = gl.load(grads, mask=inside[:, None], other=0.0).to(gl.float32)
    b = gl.load(results, mask=inside[:, None], other=0.0).to(gl.float32)
    total = gl.sum(a * b, 1)
    if dlse is not None:
        more = dlse + batch * dlse_b + head * dlse_h + i.to(gl.int64) * dlse_t
        total -= gl.load(more, mask=inside, other=0.0).to(gl.float32)
    log_sum = gl.load(lse + flat_head.to(gl.int64) * T + i, mask=inside, other=float("-inf"))
    log_sum = gl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E)
    rows = flat_head.to(gl.int64) * padded_T + i
    gl.store(log_sums + rows, log_sum)
    gl.store(delta + rows, total)
    gl.store(sums + rows[:, None] * D + d, gl.zeros([BM, D], gl.float32, LAYOUT))


@gluon.jit
def query_blocks(column, T, S, CAUSAL: gl.constexpr):
    """(first, first unmasked, end) query of 2 KEYS keys from column on, in multiples of BM."""
    low = 0
    full = 0
    high = (T + BM - 1) // BM * BM
    if CAUSAL:
        low = gl.maximum(column - (S - T), 0) // BM * BM
        full = (gl.maximum(column + 2 * KEYS - 1 - (S - T), 0) + BM - 1) // BM * BM
    if column + 2 * KEYS > S:
        full = high
    return low, full, high


@gluon.jit
def producer(
    q, k, v, do, log_sums, delta, buffers, barriers, work, CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    batch, kv_head, column, H, group, T, S, padded_T = work
    k_s, v_s, q_s, do_s, lse_s, delta_s, ds_s = buffers
    kv_full, q_full, q_free, do_full, do_free, ds_full, ds_free = barriers
    mbarrier.expect(kv_full, k.block_type.nbytes + 2 * v.block_type.nbytes)
    copy_in(k, [batch, kv_head, column, 0], kv_full, k_s)
    copy_in(v, [batch, kv_head, column, 0], kv_full, v_s.index(0))
    copy_in(v, [batch, kv_head, column + KEYS, 0], kv_full, v_s.index(1))
    low, full, high = query_blocks(column, T, S, CAUSAL)
    count = 0
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


@gluon.jit
def thread_order(W: gl.constexpr):
    """Where the first of each four consecutive registers of a (BM, W) accumulator goes in memory.

    A thread holds, of every 8 columns, two neighbours in one row and two in the row 8 below.
    """
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    row = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, W, gl.SliceLayout(0, LAYOUT))[None, :]
    thread = (row // 16) * 32 + (row % 8) * 4 + (column % 8) // 2
    return (column // 8) * 512 + thread * 4


@gluon.jit
def add_to_memory(pointer, value, W: gl.constexpr):
    """Adds a (BM, W) accumulator to float32 memory, 16 bytes a thread, in the order of threads."""
    places = (pointer + thread_order(W)).to(gl.int64)
    gl.inline_asm_elementwise(
        "red.global.add.v4.f32 [$4], {$8, $9, $10, $11};"
        " mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
        [places, value],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def start_dq(ds_s, k_s, slot, C: gl.constexpr):
    """Starts columns C D / 2 .. of dS K, over the keys of both consumers."""
    D: gl.constexpr = k_s.shape[3]
    HALF: gl.constexpr = D // 2
    none = gl.zeros(
        [BM, HALF], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    )
    keys = k_s.reshape([2 * KEYS, D]).slice(C * HALF, HALF, 1)
    ds = ds_s.index(slot).permute((1, 0))
    return warpgroup_mma(ds, keys, none, use_acc=False, is_async=True)


@gluon.jit
def consumer(
    sums, dk_out, dv_out, buffers, barriers, work, scale, scale_log2, C: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    batch, kv_head, column, H, group, T, S, padded_T = work
    k_s, v_s, q_s, do_s, lse_s, delta_s, ds_s = buffers
    kv_full, q_full, q_free, do_full, do_free, ds_full, ds_free = barriers
    D: gl.constexpr = k_s.shape[3]
    HALF: gl.constexpr = D // 2
    dtype: gl.constexpr = k_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dk = gl.zeros([KEYS, D], gl.float32, LAYOUT)
    dv = gl.zeros([KEYS, D], gl.float32, LAYOUT)
    zero = gl.zeros([KEYS, BM], gl.float32, S_LAYOUT)
    low, full, high = query_blocks(column, T, S, CAUSAL)
    rounds = (high - low) // BM * group
    keys = k_s.reshape([2 * KEYS, D]).slice(C * KEYS, KEYS, 0)
    values = v_s.index(C).reshape([KEYS, D])
    j = column + C * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, S_LAYOUT))[:, None]
    columns = gl.arange(0, BM, QUERIES)[None, :]
    mbarrier.wait(kv_full, 0)
    head = kv_head * group
    i = low
    last = sums
    for count in range(rounds):
        stage = count % STAGES
        phase = (count // STAGES) & 1
        slot = count % 2
        queries = q_s.index(stage).reshape([BM, D])
        grads = do_s.index(stage).reshape([BM, D])

        mbarrier.wait(q_full.index(stage), phase)
        s = warpgroup_mma(keys, queries.permute((1, 0)), zero, use_acc=False, is_async=True)
        # In the first round this is a product of nothing, which nobody adds.
        mbarrier.wait(ds_full.index(slot ^ 1), ((count - 1) // 2) & 1, pred=count > 0)
        dq = start_dq(ds_s, k_s, slot ^ 1, C)
        log_sums = lse_s.index(stage).reshape([BM]).load(QUERIES)
        s = warpgroup_mma_wait(1, [s])
        p = exp2(s * scale_log2 - log_sums[None, :])
        if i < full:
            first = gl.where(j < S, j - (i + (S - T)) if CAUSAL else 0, BM)
            p = gl.where(columns >= first, p, 0.0)
        dq = warpgroup_mma_wait(0, [dq])
        mbarrier.arrive(ds_free.index(slot ^ 1), count=1, pred=count > 0)
        if count > 0:
            add_to_memory(last + C * (BM * HALF), dq, HALF)

        p_left = gl.convert_layout(p.to(dtype), LEFT)
        mbarrier.wait(do_full.index(stage), phase)
        dp = warpgroup_mma(values, grads.permute((1, 0)), zero, use_acc=False, is_async=True)
        dv = warpgroup_mma(p_left, grads, dv, is_async=True)
        delta = delta_s.index(stage).reshape([BM]).load(QUERIES)
        dp = warpgroup_mma_wait(1, [dp])
        ds = (p * (dp - delta[None, :])).to(dtype)
        mbarrier.wait(ds_free.index(slot), ((count // 2) & 1) ^ 1)
        ds_s.index(slot).slice(C * KEYS, KEYS, 0).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slot), count=1)
        ds_left = gl.convert_layout(ds, LEFT)
        dk = warpgroup_mma(ds_left, queries, dk, is_async=True)
        dv, p_left = warpgroup_mma_wait(1, [dv, p_left])
        mbarrier.arrive(do_free.index(stage), count=1)
        dk, ds_left = warpgroup_mma_wait(0, [dk, ds_left])
        mbarrier.arrive(q_free.index(stage), count=1)

        last = sums + ((batch * H + head).to(gl.int64) * padded_T + i) * D
        i += BM
        if i >= high:
            i = low
            head += 1
    slot = (rounds - 1) % 2
    mbarrier.wait(ds_full.index(slot), ((rounds - 1) // 2) & 1)
    dq = warpgroup_mma_wait(0, [start_dq(ds_s, k_s, slot, C)])
    add_to_memory(last + C * (BM * HALF), dq, HALF)

    # This consumer alone read its half of V, which now stages its results.
    values.store(dv.to(dtype))
    fence_async_shared()
    copy_out(dv_out, [batch, kv_head, column + C * KEYS, 0], v_s.index(C))
    tma.store_wait(0)
    values.store((dk * scale).to(dtype))
    fence_async_shared()
    copy_out(dk_out, [batch, kv_head, column + C * KEYS, 0], v_s.index(C))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "H", "group", "T", "S", "padded_T", "wave"])
def key_kernel(
    q, k, v, do, log_sums, delta, sums, dk, dv, heads, H, group, T, S, padded_T, scale, scale_log2,
    wave, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 2 KEYS keys of one kv head (heads = B * G); their shares of dQ go to sums."""
    blocks = (S + 2 * KEYS - 1) // (2 * KEYS)
    pack = gl.program_id(0) // (wave * blocks)
    rest = gl.program_id(0) - pack * (wave * blocks)
    size = gl.minimum(wave, heads - pack * wave)
    column = rest // size * (2 * KEYS)  # under a causal mask the first keys have the most queries
    flat_kv_head = pack * wave + rest % size
    G = H // group
    batch = flat_kv_head // G
    kv_head = flat_kv_head % G

    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * KEYS, BM], k.dtype)
    k_s = gl.allocate_shared_memory(k.dtype, k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [2] + v.block_type.shape, v.layout)
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [STAGES] + do.block_type.shape, do.layout)
    lse_s = gl.allocate_shared_memory(
        gl.float32, [STAGES] + log_sums.block_type.shape, log_sums.layout
    )
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES] + delta.block_type.shape, delta.layout)
    ds_s = gl.allocate_shared_memory(k.dtype, [2, 2 * KEYS, BM], DS_LAYOUT)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_free.index(stage), count=2)
        mbarrier.init(do_full.index(stage), count=1)
        mbarrier.init(do_free.index(stage), count=2)
    for slot in gl.static_range(2):
        mbarrier.init(ds_full.index(slot), count=2)
        mbarrier.init(ds_free.index(slot), count=2)
    fence_async_shared()
    buffers = (k_s, v_s, q_s, do_s, lse_s, delta_s, ds_s)
    barriers = (kv_full, q_full, q_free, do_full, do_free, ds_full, ds_free)
    work = (batch, kv_head, column, H, group, T, S, padded_T)
    gl.warp_specialize(
        [
            (consumer, (sums, dk, dv, buffers, barriers, work, scale, scale_log2, 0, CAUSAL,
                        STAGES)),
            (consumer, (sums, dk, dv, buffers, barriers, work, scale, scale_log2, 1, CAUSAL,
                        STAGES)),
            (producer, (q, k, v, do, log_sums, delta, buffers, barriers, work, CAUSAL, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["dq_b", "dq_h", "dq_t", "H", "T", "padded_T"])
def finish_kernel(sums, dq, dq_b, dq_h, dq_t, H, T, padded_T, scale, D: gl.constexpr):
    """dq = scale * sums of BM queries, out of the order of threads."""
    HALF: gl.constexpr = D // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    blocks = padded_T // BM
    flat_head = gl.program_id(0) // blocks
    start = (gl.program_id(0) % blocks) * BM
    row = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))[None, :]
    places = thread_order(HALF) + ((row % 16) // 8) * 2 + column % 2
    base = sums + (flat_head.to(gl.int64) * padded_T + start) * D
    out = dq + (flat_head // H).to(gl.int64) * dq_b + (flat_head % H).to(gl.int64) * dq_h
    for c in gl.static_range(2):
        value = gl.load(base + c * (BM * HALF) + places) * scale
        pointers = out + (start + row).to(gl.int64) * dq_t + (c * HALF + column)
        gl.store(pointers, value.to(dq.dtype.element_ty), mask=start + row < T)


def vector(x: Tensor) -> TensorDescriptor:
    """A copy-engine descriptor of (heads, padded T) numbers for BM of one head."""
    layout = gl.NVMMASharedLayout.get_default_for([1, 64], gl.float32)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 64], layout)


def plan_prepare(
    do: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, log_sums: Tensor, delta: Tensor,
    sums: Tensor, _: Options,
) -> Launch:  # fmt: skip
    (_, H, T, D), padded_T = o.shape, delta.shape[1]
    return Launch(
        prepare_kernel,
        (delta.numel() // 64,),
        (
            do,
            o,
            lse,
            dlse,
            log_sums,
            delta,
            sums,
            *do.stride()[:3],
            *o.stride()[:3],
            *((0, 0, 0) if dlse is None else dlse.stride()),
            H,
            T,
            padded_T,
        ),
        dict(D=D, num_warps=4),
    )


def plan_keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_sums: Tensor, delta: Tensor, sums: Tensor,
    dk: Tensor, dv: Tensor, options: Options,
) -> Launch:  # fmt: skip
    (B, H, T, D), (_, G, S, _) = q.shape, v.shape
    return Launch(
        key_kernel,
        (triton.cdiv(S, 128) * B * G,),
        (
            descriptor(q, 64),
            descriptor(k, 128),
            descriptor(v, 64),
            descriptor(do, 64),
            vector(log_sums),
            vector(delta),
            sums,
            descriptor(dk, 64),
            descriptor(dv, 64),
            B * G,
            H,
            H // G,
            T,
            S,
            delta.shape[1],
            options.scale,
            options.scale * LOG2E.value,
            heads_in_cache(q, do, 1) if options.causal else 1,
        ),
        dict(CAUSAL=options.causal, STAGES=STAGES[D], num_warps=4),
    )


def plan_finish(sums: Tensor, dq: Tensor, options: Options) -> Launch:
    _, H, T, D = dq.shape
    padded_T = sums.shape[1]
    return Launch(
        finish_kernel,
        (sums.shape[0] * padded_T // 64,),
        (sums, dq, *dq.stride()[:3], H, T, padded_T, options.scale),
        dict(D=D, num_warps=4),
    )


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the inputs' dtypes, from do (B, H, T, K) and dlse (B, H, T)."""
    (B, H, T, D), (_, G, S, _) = q.shape, v.shape
    dq = empty_tokens_first(q, B, H, T, D)
    dk = empty_tokens_first(k, B, G, S, D)
    dv = empty_tokens_first(v, B, G, S, D)
    padded_T = triton.cdiv(T, 64) * 64
    log_sums, delta = q.new_empty((2, B * H, padded_T), dtype=torch.float32)
    sums = q.new_empty((B * H, padded_T, D), dtype=torch.float32)
    lse = lse.contiguous()
    launch(plan_prepare, (do, o, lse, dlse, log_sums, delta, sums), options)
    launch(plan_keys, (q, k, v, do, log_sums, delta, sums, dk, dv), options)
    launch(plan_finish, (sums, dq), options)
    return dq, dk, dv
