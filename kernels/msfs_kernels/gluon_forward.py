"""The forward for Hopper in Gluon: the softmax of one block under the products of its neighbours.

The plain kernel (`triton_forward.py`) says what is computed; this file computes the same and says
when. A warpgroup (4 warps) starts a product with `warpgroup_mma(..., is_async=True)` and goes on;
`warpgroup_mma_wait(n)` waits until at most its n latest products run. The two products of a key
block are taken in different rounds, so that one of them runs while exponentials are taken:

    S_0 = Q K_0'    P_0 = softmax(S_0)
    for j = 1, 2, ..:
        start S_j = Q K_j'              )  both are queued on the matrix unit,
        start O  += P_{j-1} V_{j-1}     )  one behind the other
        wait for S_j
        P_j, m, l = softmax(S_j)           runs under the second product
        wait for O
        O *= e^{m_old - m}
    O += P_last V_last

**Roles.** A program is two or three consumer warpgroups with 64 queries each and one producer warp,
which does nothing but ask the copy engine (TMA) for tiles. With three, more exponentials find a
product to run under; their registers hold heads of up to 64. Tiles of keys and values go round in
rings of STAGES buffers in shared memory. Two barriers (mbarrier) guard a buffer: `full` opens when
the bytes have arrived, `free` when every reader is done with them. The n-th use of a barrier has
phase n & 1; waiting for phase 1 of a new barrier passes at once, which is how the first round finds
its buffers free. The producer needs few registers and hands its share to the consumers.

**Heads between powers of two.** Tiles are powers of two wide. The copy engine fills up with zeros
those of 64 columns that a head of 40 has not; a head of 80 is a tile of 64 and one of 16, and both
products are two, of the first columns and of the rest.

**Persistent.** One program a multiprocessor walks over the query tiles, so that the producer loads
the next tile while the consumers store the last result. `place` says in which order.

Key blocks are visited from the last to the first, those with an edge (the causal diagonal, the end
of the keys) first and with a mask. The copy engine fills what lies outside a tensor with zeros and
stores nothing there.

Source: Shah et al. 2024 (FlashAttention-3), sections 3.1 and 3.2.
"""

# Tuples are taken apart whole.
# ruff: noqa: RUF059
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


@gluon.jit
def load(x, rest, coordinates, full, buffer, rest_buffer, TWO: gl.constexpr):
    """Asks the copy engine for rows of one head, with TWO also for those of its other columns;
    `full` opens when they are there.
    """
    batch, head, row = coordinates
    if TWO:
        mbarrier.expect(full, x.block_type.nbytes + rest.block_type.nbytes)
        copy_in(rest, [batch, head, row, x.block_type.shape[3]], full, rest_buffer)
    else:
        mbarrier.expect(full, x.block_type.nbytes)
    copy_in(x, [batch, head, row, 0], full, buffer)


@gluon.jit
def producer(
    given, CAUSAL: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, TWO: gl.constexpr
):
    first, rest, buffers, rest_buffers, barriers, work = given
    tiles, blocks, heads, H, group, T, S, wave = work
    q, k, v, o = first
    q2, k2, v2, o2 = rest
    q_s, k_s, v_s, o_s = buffers
    q2_s, k2_s, v2_s, o2_s = rest_buffers
    BN: gl.constexpr = k.block_type.shape[2]
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
            at = (batch, head, row + c * ROWS)
            load(q, q2, at, q_full.index(c), q_s.index(c), q2_s.index(c), TWO)
        n, full = key_blocks(row, T, S, CAUSAL, BM, BN)
        for j in range(n - 1, -1, -1):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            at = (batch, head // group, j * BN)
            load(k, k2, at, k_full.index(stage), k_s.index(stage), k2_s.index(stage), TWO)
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            load(v, v2, at, v_full.index(stage), v_s.index(stage), v2_s.index(stage), TWO)
            count += 1
        step += 1
        block, flat_head = place(step, tiles, blocks, heads, wave)


@gluon.jit
def exp2(x):
    """2^x by the special function unit; below 2^-126 it gives 0, which saves two instructions."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def softmax(
    s, top, total, row, start, T, S, scale_log2, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """(P, a, m', l') of the next key block, as in the plain kernel; keys start at `start`."""
    if MASKED:
        j = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        seen = j < S
        if CAUSAL:
            i = row + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))[:, None]
            seen = seen & (j <= i + (S - T))
        s = gl.where(seen, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    base = new_top
    if MASKED:  # a row that has seen no key yet: -inf - 0 in place of -inf + inf
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = exp2(s * scale_log2 - base[:, None])
    shrink = exp2(top - base)
    return p, shrink, new_top, total * shrink + gl.sum(p, 1)


@gluon.jit
def scores_of(q_t, q2_t, k_s, k2_s, stage, TWO: gl.constexpr):
    """Starts S = Q K'."""
    BN: gl.constexpr = k_s.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    s = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    k_t = k_s.index(stage).reshape([BN, k_s.shape[4]]).permute((1, 0))
    s = warpgroup_mma(q_t, k_t, s, use_acc=False, is_async=True)
    if TWO:
        k_t = k2_s.index(stage).reshape([BN, k2_s.shape[4]]).permute((1, 0))
        s = warpgroup_mma(q2_t, k_t, s, is_async=True)
    return s


@gluon.jit
def values_by(p, out, rest, v_s, v2_s, stage, TWO: gl.constexpr):
    """Starts O += P V, of the first columns and of the others."""
    BN: gl.constexpr = v_s.shape[3]
    out = warpgroup_mma(p, v_s.index(stage).reshape([BN, v_s.shape[4]]), out, is_async=True)
    if TWO:
        R_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, rest.type.layout, 2)
        p = gl.convert_layout(p, R_LAYOUT)
        v_t = v2_s.index(stage).reshape([BN, v2_s.shape[4]])
        rest = warpgroup_mma(p, v_t, rest, is_async=True)
    return out, rest


@gluon.jit
def waited(out, rest, p, TWO: gl.constexpr):
    if TWO:
        out, rest, p = warpgroup_mma_wait(0, [out, rest, p])
    else:
        out, p = warpgroup_mma_wait(0, [out, p])
    return out, rest, p


@gluon.jit
def times(x, by):
    return x * gl.convert_layout(by, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def round_of(
    out, rest, p, top, total, q_t, q2_t, rings, barriers, count, start, row, T, S, scale_log2,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr, TWO: gl.constexpr,
):  # fmt: skip
    """One round of the loop above: block `count` of the ring by K, the one before it by V."""
    k_s, v_s, k2_s, v2_s = rings
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    stage = count % STAGES
    before = count - 1
    old = before % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
    s = scores_of(q_t, q2_t, k_s, k2_s, stage, TWO)
    mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
    out, rest = values_by(p, out, rest, v_s, v2_s, old, TWO)
    if TWO:
        s = warpgroup_mma_wait(2, [s])
    else:
        s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_free.index(stage), count=1)
    new_p, shrink, top, total = softmax(s, top, total, row, start, T, S, scale_log2, CAUSAL, MASKED)
    new_p = gl.convert_layout(new_p.to(v_s.dtype), p.type.layout)
    # This barrier is open already. The assembler likes to move the exponentials behind the wait
    # for O, where nothing runs under them; past this it does not move them.
    mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
    out, rest, p = waited(out, rest, p, TWO)
    mbarrier.arrive(v_free.index(old), count=1)
    out = times(out, shrink)
    if TWO:
        rest = times(rest, shrink)
    return out, rest, new_p, top, total


@gluon.jit
def consumer(
    given, C: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    CONSUMERS: gl.constexpr, TWO: gl.constexpr,
):  # fmt: skip
    o, o2, lse, buffers, rest_buffers, barriers, work, scale_log2 = given
    tiles, blocks, heads, H, group, T, S, wave = work
    q_s, k_s, v_s, o_s = buffers
    q2_s, k2_s, v2_s, o2_s = rest_buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    BM: gl.constexpr = ROWS * CONSUMERS
    BN: gl.constexpr = k_s.shape[3]
    D: gl.constexpr = k_s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    D2: gl.constexpr = k2_s.shape[4]
    R_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2, 16])
    rings = (k_s, v_s, k2_s, v2_s)
    count = 0
    step = 0
    q_t = q_s.index(C).reshape([ROWS, D])
    q2_t = q2_s.index(C).reshape([ROWS, D2])
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        n, full = key_blocks(block * BM, T, S, CAUSAL, BM, BN)
        row = block * BM + C * ROWS
        out = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        rest = gl.zeros([ROWS, D2], gl.float32, R_LAYOUT) if TWO else 0
        top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([ROWS], gl.float32, S_ROWS)

        mbarrier.wait(q_full.index(C), step & 1)
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        s = scores_of(q_t, q2_t, k_s, k2_s, stage, TWO)
        next_block, next_head = place(step + 1, tiles, blocks, heads, wave)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(stage), count=1)
        p, shrink, top, total = softmax(
            s, top, total, row, (n - 1) * BN, T, S, scale_log2, CAUSAL, not EVEN
        )
        p = gl.convert_layout(p.to(v_s.dtype), P_LAYOUT)
        count += 1
        if CAUSAL:
            for j in range(n - 2, full - 1, -1):
                out, rest, p, top, total = round_of(
                    out, rest, p, top, total, q_t, q2_t, rings, barriers, count, j * BN, row, T, S,
                    scale_log2, CAUSAL, True, STAGES, TWO,
                )  # fmt: skip
                count += 1
        for j in range(gl.minimum(n - 1, full) - 1, -1, -1):
            out, rest, p, top, total = round_of(
                out, rest, p, top, total, q_t, q2_t, rings, barriers, count, j * BN, row, T, S,
                scale_log2, CAUSAL, False, STAGES, TWO,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_free.index(C), count=1)
        before = count - 1
        old = before % STAGES
        mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
        out, rest = values_by(p, out, rest, v_s, v2_s, old, TWO)
        out, rest, p = waited(out, rest, p, TWO)
        mbarrier.arrive(v_free.index(old), count=1)

        seen = total != 0.0
        total = gl.where(seen, total, 1.0)
        i = row + gl.arange(0, ROWS, S_ROWS)
        log_sum = gl.where(seen, (top + gl.log2(total)) * LN2, float("-inf"))
        gl.store(lse + flat_head.to(gl.int64) * T + i, log_sum, mask=i < T)
        share = 1.0 / total
        tma.store_wait(0)
        o_s.index(C).reshape([ROWS, D]).store(times(out, share).to(o_s.dtype))
        if TWO:
            o2_s.index(C).reshape([ROWS, D2]).store(times(rest, share).to(o_s.dtype))
        fence_async_shared()
        copy_out(o, [flat_head // H, flat_head % H, row, 0], o_s.index(C))
        if TWO:
            copy_out(o2, [flat_head // H, flat_head % H, row, D], o2_s.index(C))
        step += 1
        block, flat_head = next_block, next_head
    tma.store_wait(0)


@gluon.jit
def all_buffers(descriptors, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    q, k, v, o = descriptors
    q_s, o_s = buffers_for(q, CONSUMERS), buffers_for(o, CONSUMERS)
    return q_s, buffers_for(k, STAGES), buffers_for(v, STAGES), o_s


@gluon.jit(
    do_not_specialize=["tiles", "blocks", "heads", "H", "group", "T", "S", "wave"]
)  # one compilation for all shapes
def forward_kernel(
    q, k, v, o, q2, k2, v2, o2, lse, tiles, blocks, heads, H, group, T, S, scale_log2, wave,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, CONSUMERS: gl.constexpr,
    TWO: gl.constexpr,
):  # fmt: skip
    """q, k, v, o are descriptors of tiles of one head, with TWO of its first columns, q2, k2, v2,
    o2 of the others; tiles = blocks * heads, heads = B * H, group = H / G. EVEN promises that no
    key block has an edge.
    """
    first = (q, k, v, o)
    rest = first
    buffers = all_buffers(first, CONSUMERS, STAGES)
    rest_buffers = buffers
    if TWO:
        rest = (q2, k2, v2, o2)
        rest_buffers = all_buffers(rest, CONSUMERS, STAGES)
    q_full, q_free = barriers_for(CONSUMERS, 1)
    k_full, k_free = barriers_for(STAGES, CONSUMERS)
    v_full, v_free = barriers_for(STAGES, CONSUMERS)
    fence_async_shared()
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    work = (tiles, blocks, heads, H, group, T, S, wave)
    given = (o, rest[3], lse, buffers, rest_buffers, barriers, work, scale_log2)
    asks = (first, rest, buffers, rest_buffers, barriers, work)
    # A program has 512 registers for one thread of each of its warpgroups.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (given, 0, CAUSAL, STAGES, EVEN, CONSUMERS, TWO)),
                (consumer, (given, 1, CAUSAL, STAGES, EVEN, CONSUMERS, TWO)),
                (producer, (asks, CAUSAL, STAGES, CONSUMERS, TWO)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (given, 0, CAUSAL, STAGES, EVEN, CONSUMERS, TWO)),
                (consumer, (given, 1, CAUSAL, STAGES, EVEN, CONSUMERS, TWO)),
                (consumer, (given, 2, CAUSAL, STAGES, EVEN, CONSUMERS, TWO)),
                (producer, (asks, CAUSAL, STAGES, CONSUMERS, TWO)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


BLOCK = 128  # keys
# Of a head: its first tile of columns, and the second. 40 as 32 and 16 is no faster than as 64.
COLUMNS = {40: (64, 0), 64: (64, 0), 80: (64, 16), 128: (128, 0)}


def consumers_of(head_dim: int, T: int, causal: bool) -> int:
    """Three consumers are 10% faster for heads of 40, where few of their rows are empty."""
    rows_of_two, rows_of_three = (rows * triton.cdiv(T, rows) for rows in (128, 192))
    return 3 if head_dim < 64 and not causal and rows_of_three <= 1.04 * rows_of_two else 2


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    consumers: int | None = None,
) -> Launch:  # fmt: skip
    first, rest = COLUMNS[q.shape[-1]]
    consumers = consumers or consumers_of(q.shape[-1], q.shape[2], options.causal)
    programs, sizes, wave = work_of(q, v, options, 64 * consumers)
    given = ((q, 64), (k, BLOCK), (v, BLOCK), (o, 64))
    return Launch(
        forward_kernel,
        (programs,),
        (
            *(descriptor(x, rows, first) for x, rows in given),
            *(descriptor(x, rows, rest) if rest else None for x, rows in given),
            lse,
            *sizes,
            options.scale * LOG2E.value,
            wave,
        ),
        dict(
            CAUSAL=options.causal,
            STAGES=4 if first + rest == 64 else 2,
            EVEN=not options.causal and v.shape[2] % BLOCK == 0,
            CONSUMERS=consumers,
            TWO=rest > 0,
            num_warps=4,
        ),
    )
