"""The forward and its tangent in one pass for Hopper in Gluon: `triton_dual.py` says what is
computed, `gluon_forward.py` how such a program works (roles, rings of buffers, barriers).

A consumer has 64 queries and takes 64 or 128 keys a round, for which it holds both sums (out and
t_out) and both tiles of scores in registers. Its six products of a round, and what runs under them:

    start S = Q K', M = tQ K' + Q tK'      queued on the matrix unit, one behind the other
    wait for S
    P, m, l = softmax(S); rescale both sums    under the two products of M
    wait for M
    P * M and its row sums                     under the products of the other consumer
    start out += P V, t_out += P tV + (P * M) V
    wait for all

The two consumers drift apart by themselves until one multiplies while the other takes exponentials.

Source: Dao 2023 (FlashAttention-2), Algorithm 1, differentiated; Shah et al. 2024
(FlashAttention-3), section 3.1.
"""

# Tuples are taken apart whole.
# ruff: noqa: RUF059
# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

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

from msfs_kernels.gluon_forward import softmax
from msfs_kernels.gluon_program import (
    ROWS,
    barriers_for,
    buffers_for,
    copy_in,
    copy_out,
    descriptor,
    key_blocks,
    place,
    work_of,
)
from msfs_kernels.launching import Launch
from msfs_kernels.options import Options
from msfs_kernels.triton_common import LN2, LOG2E

CONSUMERS = gl.constexpr(2)


@gluon.jit
def load_pair(x, y, coordinates, full, x_buffer, y_buffer):
    """Asks the copy engine for the same tile of x and of its tangent y; `full` opens when both are
    there.
    """
    mbarrier.expect(full, x.block_type.nbytes + y.block_type.nbytes)
    copy_in(x, coordinates, full, x_buffer)
    copy_in(y, coordinates, full, y_buffer)


@gluon.jit
def producer(
    q, k, v, tq, tk, tv, buffers, barriers, work, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tiles, blocks, heads, H, group, T, S, wave = work
    BN: gl.constexpr = k.block_type.shape[2]
    q_s, tq_s, k_s, tk_s, v_s, tv_s, o_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
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
            at = [batch, head, row + c * ROWS, 0]
            load_pair(q, tq, at, q_full.index(c), q_s.index(c), tq_s.index(c))
        n, full = key_blocks(row, T, S, CAUSAL, BM, BN)
        for j in range(n - 1, -1, -1):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            at = [batch, head // group, j * BN, 0]
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            load_pair(k, tk, at, k_full.index(stage), k_s.index(stage), tk_s.index(stage))
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            load_pair(v, tv, at, v_full.index(stage), v_s.index(stage), tv_s.index(stage))
            count += 1
        step += 1
        block, flat_head = place(step, tiles, blocks, heads, wave)


@gluon.jit
def round_of(
    out, t_out, top, total, mean, q_t, tq_t, buffers, barriers, count, start, row, T, S, scale,
    scale_log2, CAUSAL: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One round of the loop above, over block `count` of the rings."""
    q_s, tq_s, k_s, tk_s, v_s, tv_s, o_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    BN: gl.constexpr = k_s.shape[3]
    D: gl.constexpr = k_s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, out.type.layout, 2)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, out.type.layout)
    stage = count % STAGES
    phase = (count // STAGES) & 1
    zero = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    mbarrier.wait(k_full.index(stage), phase)
    k_t = k_s.index(stage).reshape([BN, D]).permute((1, 0))
    tk_t = tk_s.index(stage).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q_t, k_t, zero, use_acc=False, is_async=True)
    moves = warpgroup_mma(tq_t, k_t, zero, use_acc=False, is_async=True)
    moves = warpgroup_mma(q_t, tk_t, moves, is_async=True)
    s = warpgroup_mma_wait(2, [s])
    p, shrink, top, total = softmax(s, top, total, row, start, T, S, scale_log2, CAUSAL, MASKED)
    mean = mean * shrink
    shrink = gl.convert_layout(shrink, O_ROWS)[:, None]
    out = out * shrink
    t_out = t_out * shrink
    # Open already: the assembler likes to move exponentials behind a wait for products, where
    # nothing runs under them; past this it does not move them.
    mbarrier.wait(k_full.index(stage), phase)
    moves = warpgroup_mma_wait(0, [moves])
    mbarrier.arrive(k_free.index(stage), count=1)
    moved = p * (moves * scale)
    mean = mean + gl.sum(moved, 1)
    p = gl.convert_layout(p.to(v_s.dtype), P_LAYOUT)
    moved = gl.convert_layout(moved.to(v_s.dtype), P_LAYOUT)
    mbarrier.wait(v_full.index(stage), phase)
    values = v_s.index(stage).reshape([BN, D])
    out = warpgroup_mma(p, values, out, is_async=True)
    t_out = warpgroup_mma(p, tv_s.index(stage).reshape([BN, D]), t_out, is_async=True)
    t_out = warpgroup_mma(moved, values, t_out, is_async=True)
    out, t_out, p, moved = warpgroup_mma_wait(0, [out, t_out, p, moved])
    mbarrier.arrive(v_free.index(stage), count=1)
    return out, t_out, top, total, mean


@gluon.jit
def consumer(
    given, C: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr
):
    o, to, lse, tlse, buffers, barriers, work, scale, scale_log2 = given
    tiles, blocks, heads, H, group, T, S, wave = work
    q_s, tq_s, k_s, tk_s, v_s, tv_s, o_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    BM: gl.constexpr = ROWS * CONSUMERS
    BN: gl.constexpr = k_s.shape[3]
    D: gl.constexpr = k_s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    count = 0
    step = 0
    q_t = q_s.index(C).reshape([ROWS, D])
    tq_t = tq_s.index(C).reshape([ROWS, D])
    o_t = o_s.index(C)
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        n, full = key_blocks(block * BM, T, S, CAUSAL, BM, BN)
        row = block * BM + C * ROWS
        out = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        t_out = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([ROWS], gl.float32, S_ROWS)
        mean = gl.zeros([ROWS], gl.float32, S_ROWS)
        mbarrier.wait(q_full.index(C), step & 1)
        if not EVEN:
            for j in range(n - 1, full - 1, -1):
                out, t_out, top, total, mean = round_of(
                    out, t_out, top, total, mean, q_t, tq_t, buffers, barriers, count, j * BN, row,
                    T, S, scale, scale_log2, CAUSAL, True, STAGES,
                )  # fmt: skip
                count += 1
        for j in range(full - 1, -1, -1):
            out, t_out, top, total, mean = round_of(
                out, t_out, top, total, mean, q_t, tq_t, buffers, barriers, count, j * BN, row, T,
                S, scale, scale_log2, CAUSAL, False, STAGES,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_free.index(C), count=1)
        next_block, next_head = place(step + 1, tiles, blocks, heads, wave)

        seen = total != 0.0
        total = gl.where(seen, total, 1.0)
        mean = mean / total
        i = row + gl.arange(0, ROWS, S_ROWS)
        at = flat_head.to(gl.int64) * T + i
        log_sum = gl.where(seen, (top + gl.log2(total)) * LN2, float("-inf"))
        gl.store(lse + at, log_sum, mask=i < T)
        gl.store(tlse + at, mean, mask=i < T)
        share = gl.convert_layout(1.0 / total, O_ROWS)[:, None]
        out = out * share
        t_out = t_out * share - out * gl.convert_layout(mean, O_ROWS)[:, None]
        place_out = [flat_head // H, flat_head % H, row, 0]
        tma.store_wait(0)
        o_t.reshape([ROWS, D]).store(out.to(o_s.dtype))
        fence_async_shared()
        copy_out(o, place_out, o_t)
        tma.store_wait(0)
        o_t.reshape([ROWS, D]).store(t_out.to(o_s.dtype))
        fence_async_shared()
        copy_out(to, place_out, o_t)
        step += 1
        block, flat_head = next_block, next_head
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["tiles", "blocks", "heads", "H", "group", "T", "S", "wave"]
)  # one compilation for all shapes
def dual_kernel(
    q, k, v, tq, tk, tv, o, to, lse, tlse, tiles, blocks, heads, H, group, T, S, scale, scale_log2,
    wave, CAUSAL: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """The first eight are descriptors of tiles of one head; tiles = blocks * heads, heads = B * H,
    group = H / G. EVEN promises that no key block has an edge.
    """
    q_s, tq_s, o_s = (
        buffers_for(q, CONSUMERS), buffers_for(tq, CONSUMERS), buffers_for(o, CONSUMERS)
    )  # fmt: skip
    k_s, tk_s = buffers_for(k, STAGES), buffers_for(tk, STAGES)
    v_s, tv_s = buffers_for(v, STAGES), buffers_for(tv, STAGES)
    q_full, q_free = barriers_for(CONSUMERS, 1)
    k_full, k_free = barriers_for(STAGES, CONSUMERS)
    v_full, v_free = barriers_for(STAGES, CONSUMERS)
    fence_async_shared()
    buffers = (q_s, tq_s, k_s, tk_s, v_s, tv_s, o_s)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    work = (tiles, blocks, heads, H, group, T, S, wave)
    given = (o, to, lse, tlse, buffers, barriers, work, scale, scale_log2)
    gl.warp_specialize(
        [
            (consumer, (given, 0, CAUSAL, STAGES, EVEN)),
            (consumer, (given, 1, CAUSAL, STAGES, EVEN)),
            (producer, (q, k, v, tq, tk, tv, buffers, barriers, work, CAUSAL, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


TILES = {64: (128, 2), 128: (64, 2)}  # head dim: (keys, stages)


def plan_dual(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    to: Tensor, tlse: Tensor, options: Options,
) -> Launch:  # fmt: skip
    block, stages = TILES[q.shape[-1]]
    programs, sizes, wave = work_of(q, v, options)
    return Launch(
        dual_kernel,
        (programs,),
        (
            *(descriptor(x, rows) for x, rows in ((q, 64), (k, block), (v, block))),
            *(descriptor(x, rows) for x, rows in ((tq, 64), (tk, block), (tv, block))),
            *(descriptor(x, 64) for x in (o, to)),
            lse,
            tlse,
            *sizes,
            options.scale,
            options.scale * LOG2E.value,
            wave,
        ),
        dict(
            CAUSAL=options.causal,
            STAGES=stages,
            EVEN=not options.causal and v.shape[2] % block == 0,
            num_warps=4,
        ),
    )
