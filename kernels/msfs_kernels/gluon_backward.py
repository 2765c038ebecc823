"""dK and dV for Hopper in Gluon: the sums of one query block under the softmax of the next.

`triton_backward.py` has the formulas; read `gluon_forward.py` first, whose vocabulary (consumers, a
producer, rings of buffers, `full` and `free` barriers, products that run while the program goes on)
is used here. A program owns 128 keys, 64 for each of two consumers, and walks over query blocks of
64. Scores are transposed, keys along rows, so that P' and dS' are the left sides of the sums dV and
dK straight from registers:

    for query block i:
        start S'  = K Q_i'
        start dP' = V dO_i'
        start dV += P'_{i-1} dO_{i-1}
        start dK += dS'_{i-1} Q_{i-1}
        wait for S';   P'_i = e^{S' - lse}         )  run under
        wait for dP';  dS'_i = P' (dP' - delta)    )  the two sums
        wait for dV and dK
    dV += P'_last dO_last,  dK += dS'_last Q_last

The two consumers share the ring of queries and nothing else, and every sum has one order. dQ is the
plain kernels' work. With head dim 128 the two sums leave no registers for this.

Rows of queries beyond T come as zeros from the copy engine, and so do lse and delta: they add P' dO
= 0 and dS' Q = 0. Queries without keys, whose lse is -inf, lie in masked blocks only.

Source: Dao 2023 (FlashAttention-2), Algorithm 2; Shah et al. 2024 (FlashAttention-3), section 3.
"""

# Lists have no stars in Triton's language, and tuples are taken apart whole.
# ruff: noqa: RUF005, RUF059
# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

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
    CONSUMERS,
    balanced_wave,
    copy_in,
    copy_out,
    descriptor,
    exp2,
    multiprocessors,
    place,
)
from msfs_kernels.options import Options
from msfs_kernels.triton_common import LOG2E, Launch

KEYS = gl.constexpr(64)  # of a consumer
BM = gl.constexpr(64)  # queries of a block
STAGES = 3  # of the ring of queries


@gluon.jit
def query_blocks(column, T, S, CAUSAL: gl.constexpr):
    """(first, first unmasked, end) query of a program's keys, in multiples of BM."""
    low = 0
    full = 0
    high = (T + BM - 1) // BM * BM
    if CAUSAL:
        low = gl.maximum(column - (S - T), 0) // BM * BM
        full = (gl.maximum(column + KEYS * CONSUMERS - 1 - (S - T), 0) + BM - 1) // BM * BM
    if column + KEYS * CONSUMERS > S:
        full = high
    return low, full, high


@gluon.jit
def key_block(step, tiles, blocks, heads, wave, CAUSAL: gl.constexpr):
    """(key block, flat kv head) of this program's step-th tile, those with most queries first."""
    block, flat_head = place(step, tiles, blocks, heads, wave)
    if CAUSAL:
        block = gl.where(block >= 0, blocks - 1 - block, -1)
    return block, flat_head


@gluon.jit
def producer(
    q, k, v, do, lse, delta, buffers, barriers, work, CAUSAL: gl.constexpr, STAGES: gl.constexpr
):
    tiles, blocks, heads, H, group, T, S, wave = work
    k_s, v_s, q_s, do_s, lse_s, delta_s = buffers
    k_full, k_free, q_full, q_free, do_full, do_free = barriers
    G = H // group
    count = 0
    step = 0
    block, flat_head = key_block(step, tiles, blocks, heads, wave, CAUSAL)
    while block >= 0:
        batch = flat_head // G
        kv_head = flat_head % G
        column = block * (KEYS * CONSUMERS)
        for c in gl.static_range(CONSUMERS):
            at = [batch, kv_head, column + c * KEYS, 0]
            mbarrier.wait(k_free.index(c), (step & 1) ^ 1)
            mbarrier.expect(k_full.index(c), 2 * k.block_type.nbytes)
            copy_in(k, at, k_full.index(c), k_s.index(c))
            copy_in(v, at, k_full.index(c), v_s.index(c))
        low, full, high = query_blocks(column, T, S, CAUSAL)
        for member in range(group):
            head = kv_head * group + member
            for i in range(low, high, BM):
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(q_free.index(stage), phase)
                mbarrier.expect(q_full.index(stage), q.block_type.nbytes + BM * 4)
                copy_in(q, [batch, head, i, 0], q_full.index(stage), q_s.index(stage))
                copy_in(lse, [batch * H + head, i], q_full.index(stage), lse_s.index(stage))
                mbarrier.wait(do_free.index(stage), phase)
                mbarrier.expect(do_full.index(stage), do.block_type.nbytes + BM * 4)
                copy_in(do, [batch, head, i, 0], do_full.index(stage), do_s.index(stage))
                copy_in(delta, [batch * H + head, i], do_full.index(stage), delta_s.index(stage))
                count += 1
        step += 1
        block, flat_head = key_block(step, tiles, blocks, heads, wave, CAUSAL)


@gluon.jit
def consumer(
    dk_out, dv_out, buffers, barriers, work, scale, scale_log2, C: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tiles, blocks, heads, H, group, T, S, wave = work
    k_s, v_s, q_s, do_s, lse_s, delta_s = buffers
    k_full, k_free, q_full, q_free, do_full, do_free = barriers
    D: gl.constexpr = q_s.shape[4]
    dtype: gl.constexpr = q_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    keys = k_s.index(C).reshape([KEYS, D])
    values = v_s.index(C).reshape([KEYS, D])
    G = H // group
    count = 0
    step = 0
    block, flat_head = key_block(step, tiles, blocks, heads, wave, CAUSAL)
    while block >= 0:
        column = block * (KEYS * CONSUMERS)
        low, full, high = query_blocks(column, T, S, CAUSAL)
        dk = gl.zeros([KEYS, D], gl.float32, LAYOUT)
        dv = gl.zeros([KEYS, D], gl.float32, LAYOUT)
        p_left = gl.convert_layout(gl.zeros([KEYS, BM], dtype, S_LAYOUT), LEFT)
        ds_left = p_left
        begin = count  # the first round adds products of its own queries with zeros
        rounds = (high - low) // BM * group
        i = low
        mbarrier.wait(k_full.index(C), step & 1)
        for turn in range(rounds):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            old = gl.maximum(count - 1, begin) % STAGES
            queries = q_s.index(stage).reshape([BM, D])
            grads = do_s.index(stage).reshape([BM, D])
            zero = gl.zeros([KEYS, BM], gl.float32, S_LAYOUT)
            mbarrier.wait(q_full.index(stage), phase)
            s = warpgroup_mma(keys, queries.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(stage), phase)
            dp = warpgroup_mma(values, grads.permute((1, 0)), zero, use_acc=False, is_async=True)
            dv = warpgroup_mma(p_left, do_s.index(old).reshape([BM, D]), dv, is_async=True)
            dk = warpgroup_mma(ds_left, q_s.index(old).reshape([BM, D]), dk, is_async=True)
            log_sums = lse_s.index(stage).reshape([BM]).load(QUERIES) * LOG2E
            s = warpgroup_mma_wait(3, [s])
            p = exp2(s * scale_log2 - log_sums[None, :])
            if i < full:
                j = column + C * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, S_LAYOUT))[:, None]
                positions = i + (S - T) + gl.arange(0, BM, QUERIES)[None, :]
                p = gl.where((j < S) & ((j <= positions) | (not CAUSAL)), p, 0.0)
            delta = delta_s.index(stage).reshape([BM]).load(QUERIES)
            dp = warpgroup_mma_wait(2, [dp])
            ds = p * (dp - delta[None, :])
            # This barrier is open already: it keeps the wait behind the exponentials.
            mbarrier.wait(q_full.index(stage), phase)
            dv, dk, p_left, ds_left = warpgroup_mma_wait(0, [dv, dk, p_left, ds_left])
            mbarrier.arrive(do_free.index(old), count=1, pred=turn > 0)
            mbarrier.arrive(q_free.index(old), count=1, pred=turn > 0)
            p_left = gl.convert_layout(p.to(dtype), LEFT)
            ds_left = gl.convert_layout(ds.to(dtype), LEFT)
            count += 1
            i += BM
            if i >= high:
                i = low
        old = (count - 1) % STAGES
        dv = warpgroup_mma(p_left, do_s.index(old).reshape([BM, D]), dv, is_async=True)
        dk = warpgroup_mma(ds_left, q_s.index(old).reshape([BM, D]), dk, is_async=True)
        dv, dk, p_left, ds_left = warpgroup_mma_wait(0, [dv, dk, p_left, ds_left])
        mbarrier.arrive(do_free.index(old), count=1)
        mbarrier.arrive(q_free.index(old), count=1)
        # This consumer alone reads its keys and values, which now stage its results.
        at = [flat_head // G, flat_head % G, column + C * KEYS, 0]
        values.store(dv.to(dtype))
        keys.store((dk * scale).to(dtype))
        fence_async_shared()
        copy_out(dv_out, at, v_s.index(C))
        copy_out(dk_out, at, k_s.index(C))
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(C), count=1)
        step += 1
        block, flat_head = key_block(step, tiles, blocks, heads, wave, CAUSAL)


@gluon.jit(do_not_specialize=["tiles", "blocks", "heads", "H", "group", "T", "S", "wave"])
def key_kernel(
    q, k, v, do, lse, delta, dk, dv, tiles, blocks, heads, H, group, T, S, scale, scale_log2, wave,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV; all tensors are descriptors of tiles of one head; tiles = blocks * heads, heads =
    B * G, group = H / G.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_s = gl.allocate_shared_memory(k.dtype, [CONSUMERS] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [CONSUMERS] + v.block_type.shape, v.layout)
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [STAGES] + do.block_type.shape, do.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES] + lse.block_type.shape, lse.layout)
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
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_free.index(stage), count=CONSUMERS)
        mbarrier.init(do_full.index(stage), count=1)
        mbarrier.init(do_free.index(stage), count=CONSUMERS)
    fence_async_shared()
    buffers = (k_s, v_s, q_s, do_s, lse_s, delta_s)
    barriers = (k_full, k_free, q_full, q_free, do_full, do_free)
    work = (tiles, blocks, heads, H, group, T, S, wave)
    gl.warp_specialize(
        [
            (consumer, (dk, dv, buffers, barriers, work, scale, scale_log2, 0, CAUSAL, STAGES)),
            (consumer, (dk, dv, buffers, barriers, work, scale, scale_log2, 1, CAUSAL, STAGES)),
            (producer, (q, k, v, do, lse, delta, buffers, barriers, work, CAUSAL, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def vector(x: Tensor) -> TensorDescriptor:
    """A copy-engine descriptor of dense (B, H, T) numbers for 64 of one head; 4 must divide T."""
    T = x.shape[-1]
    layout = gl.NVMMASharedLayout.get_default_for([1, 64], gl.float32)
    return TensorDescriptor(x, [x.numel() // T, T], [T, 1], [1, 64], layout)


def plan_keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    options: Options,
) -> Launch:  # fmt: skip
    """The launch that writes dk and dv of head dim 64; lse in nats and delta are dense."""
    (B, H, T, _), (_, G, S, _) = q.shape, v.shape
    blocks = triton.cdiv(S, 128)
    tiles = blocks * B * G
    programs = min(multiprocessors(q), tiles)
    return Launch(
        key_kernel,
        (programs,),
        (
            descriptor(q, 64),
            descriptor(k, 64),
            descriptor(v, 64),
            descriptor(do, 64),
            vector(lse),
            vector(delta),
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
            balanced_wave(blocks, programs) if options.causal else 1,
        ),
        dict(CAUSAL=options.causal, STAGES=STAGES, num_warps=4),
    )
