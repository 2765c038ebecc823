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

**Persistent.** One program a multiprocessor walks over the query tiles, so that the producer loads
the next tile while the consumers store the last result. `place` says in which order.

Key blocks are visited from the last to the first, those with an edge (the causal diagonal, the end
of the keys) first and with a mask. The copy engine fills what lies outside a tensor with zeros and
stores nothing there: of rows behind the last one, and of columns that a head of 40 or 80 has not.

Source: Shah et al. 2024 (FlashAttention-3), sections 3.1 and 3.2.
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
def load(x, coordinates, full, buffer):
    """Asks the copy engine for a (1, 1, rows, head dim) tile; `full` opens when it is there."""
    mbarrier.expect(full, x.block_type.nbytes)
    copy_in(x, coordinates, full, buffer)


@gluon.jit
def producer(
    q, k, v, buffers, barriers, work, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    tiles, blocks, heads, H, group, T, S, wave = work
    BN: gl.constexpr = k.block_type.shape[2]
    q_s, k_s, v_s, o_s = buffers
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
            load(q, [batch, head, row + c * ROWS, 0], q_full.index(c), q_s.index(c))
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
def round_of(
    out, p, top, total, q_t, k_s, v_s, k_full, k_free, v_full, v_free, count, start, row, T, S,
    scale_log2, CAUSAL: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One round of the loop above: block `count` of the ring by K, the one before it by V."""
    BN: gl.constexpr = k_s.shape[3]
    D: gl.constexpr = k_s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    stage = count % STAGES
    before = count - 1
    old = before % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
    zero = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    k_t = k_s.index(stage).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q_t, k_t, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
    out = warpgroup_mma(p, v_s.index(old).reshape([BN, D]), out, is_async=True)
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_free.index(stage), count=1)
    new_p, shrink, top, total = softmax(s, top, total, row, start, T, S, scale_log2, CAUSAL, MASKED)
    new_p = gl.convert_layout(new_p.to(v_s.dtype), p.type.layout)
    # This barrier is open already. The assembler likes to move the exponentials behind the wait
    # for O, where nothing runs under them; past this it does not move them.
    mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
    out, p = warpgroup_mma_wait(0, [out, p])
    mbarrier.arrive(v_free.index(old), count=1)
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return out, new_p, top, total


@gluon.jit
def consumer(
    given, C: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    o, lse, buffers, barriers, work, scale_log2 = given
    tiles, blocks, heads, H, group, T, S, wave = work
    q_s, k_s, v_s, o_s = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    BM: gl.constexpr = ROWS * CONSUMERS
    BN: gl.constexpr = k_s.shape[3]
    D: gl.constexpr = k_s.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    count = 0
    step = 0
    q_t = q_s.index(C).reshape([ROWS, D])
    o_t = o_s.index(C)
    block, flat_head = place(step, tiles, blocks, heads, wave)
    while block >= 0:
        n, full = key_blocks(block * BM, T, S, CAUSAL, BM, BN)
        row = block * BM + C * ROWS
        out = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([ROWS], gl.float32, S_ROWS)

        mbarrier.wait(q_full.index(C), step & 1)
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        zero = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
        k_t = k_s.index(stage).reshape([BN, D]).permute((1, 0))
        s = warpgroup_mma(q_t, k_t, zero, use_acc=False, is_async=True)
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
                out, p, top, total = round_of(
                    out, p, top, total, q_t, k_s, v_s, k_full, k_free, v_full, v_free, count,
                    j * BN, row, T, S, scale_log2, CAUSAL, True, STAGES,
                )  # fmt: skip
                count += 1
        for j in range(gl.minimum(n - 1, full) - 1, -1, -1):
            out, p, top, total = round_of(
                out, p, top, total, q_t, k_s, v_s, k_full, k_free, v_full, v_free, count, j * BN,
                row, T, S, scale_log2, CAUSAL, False, STAGES,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_free.index(C), count=1)
        before = count - 1
        old = before % STAGES
        mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
        out = warpgroup_mma(p, v_s.index(old).reshape([BN, D]), out, is_async=True)
        out, p = warpgroup_mma_wait(0, [out, p])
        mbarrier.arrive(v_free.index(old), count=1)

        seen = total != 0.0
        total = gl.where(seen, total, 1.0)
        i = row + gl.arange(0, ROWS, S_ROWS)
        log_sum = gl.where(seen, (top + gl.log2(total)) * LN2, float("-inf"))
        gl.store(lse + flat_head.to(gl.int64) * T + i, log_sum, mask=i < T)
        out = out * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        tma.store_wait(0)
        o_t.reshape([ROWS, D]).store(out.to(o_s.dtype))
        fence_async_shared()
        copy_out(o, [flat_head // H, flat_head % H, row, 0], o_t)
        step += 1
        block, flat_head = next_block, next_head
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["tiles", "blocks", "heads", "H", "group", "T", "S", "wave"]
)  # one compilation for all shapes
def forward_kernel(
    q, k, v, o, lse, tiles, blocks, heads, H, group, T, S, scale_log2, wave,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """q, k, v, o are descriptors of tiles of one head; tiles = blocks * heads, heads = B * H, group
    = H / G. EVEN promises that no key block has an edge.
    """
    q_s, o_s = buffers_for(q, CONSUMERS), buffers_for(o, CONSUMERS)
    k_s, v_s = buffers_for(k, STAGES), buffers_for(v, STAGES)
    q_full, q_free = barriers_for(CONSUMERS, 1)
    k_full, k_free = barriers_for(STAGES, CONSUMERS)
    v_full, v_free = barriers_for(STAGES, CONSUMERS)
    fence_async_shared()
    buffers = (q_s, k_s, v_s, o_s)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    work = (tiles, blocks, heads, H, group, T, S, wave)
    given = (o, lse, buffers, barriers, work, scale_log2)
    # A program has 512 registers for one thread of each of its warpgroups.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (given, 0, CAUSAL, STAGES, EVEN, CONSUMERS)),
                (consumer, (given, 1, CAUSAL, STAGES, EVEN, CONSUMERS)),
                (producer, (q, k, v, buffers, barriers, work, CAUSAL, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (given, 0, CAUSAL, STAGES, EVEN, CONSUMERS)),
                (consumer, (given, 1, CAUSAL, STAGES, EVEN, CONSUMERS)),
                (consumer, (given, 2, CAUSAL, STAGES, EVEN, CONSUMERS)),
                (producer, (q, k, v, buffers, barriers, work, CAUSAL, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


BLOCK = 128  # keys
STAGES = {64: 4, 128: 2}  # by the width of a tile


def consumers_of(head_dim: int, T: int, causal: bool) -> int:
    """Three are a tenth faster where their registers hold a head, from the length on where few of
    their rows are empty. Under a causal mask they spill.
    """
    return 3 if head_dim <= 64 and not causal and T >= 4096 else 2


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    consumers: int | None = None,
) -> Launch:  # fmt: skip
    width = 64 if q.shape[-1] <= 64 else 128
    consumers = consumers or consumers_of(q.shape[-1], q.shape[2], options.causal)
    programs, sizes, wave = work_of(q, v, options, 64 * consumers)
    return Launch(
        forward_kernel,
        (programs,),
        (
            descriptor(q, 64, width),
            descriptor(k, BLOCK, width),
            descriptor(v, BLOCK, width),
            descriptor(o, 64, width),
            lse,
            *sizes,
            options.scale * LOG2E.value,
            wave,
        ),
        dict(
            CAUSAL=options.causal,
            STAGES=STAGES[width],
            EVEN=not options.causal and v.shape[2] % BLOCK == 0,
            CONSUMERS=consumers,
            num_warps=4,
        ),
    )
