"""The forward for Hopper in Gluon: warp-specialised, with softmax under the matrix units' work."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
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

from msfs_kernels.configs import Config
from msfs_kernels.options import Options
from msfs_kernels.triton_common import LOG2E, Launch
from msfs_kernels.triton_forward import heads_in_cache

# Triton renamed both after 3.6.
load_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tma = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def schedule(tile, blocks, heads, wave):
    group = tile // (wave * blocks)
    rest = tile - group * (wave * blocks)
    size = gl.minimum(wave, heads - group * wave)
    return blocks - 1 - rest // size, group * wave + rest % size


@gluon.jit
def key_blocks(row, T, S, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """(all, unmasked) key blocks of the rows."""
    high = S
    full = S
    if CAUSAL:
        high = gl.minimum(S, gl.minimum(row + BM, T) + (S - T))
        full = gl.maximum(gl.minimum(S, row + 1 + (S - T)), 0)
    return gl.maximum((high + BN - 1) // BN, 1), full // BN


@gluon.jit
def producer(
    q,
    k,
    v,
    q_s,
    k_s,
    v_s,
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    tiles,
    blocks,
    heads,
    H,
    T,
    S,
    wave,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    D: gl.constexpr = q.block_type.shape[3]
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, flat_head = schedule(tile, blocks, heads, wave)
        batch = flat_head // H
        head = flat_head % H
        row = block * (BM * CONSUMERS)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(c), BM * D * 2)
            load_tma(q, [batch, head, row + c * BM, 0], q_full.index(c), q_s.index(c))
        n, _ = key_blocks(row, T, S, CAUSAL, BM * CONSUMERS, BN)
        for step in range(n):
            j = (n - 1 - step) * BN
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), BN * D * 2)
            load_tma(k, [batch, head // GROUP, j, 0], k_full.index(stage), k_s.index(stage))
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), BN * D * 2)
            load_tma(v, [batch, head // GROUP, j, 0], v_full.index(stage), v_s.index(stage))
            count += 1
        turn += 1


@gluon.jit
def softmax(
    s,
    top,
    total,
    row,
    j,
    T,
    S,
    scale,
    S_LAYOUT: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
):
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    if MASKED:
        cols = j + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))[None, :]
        seen = cols < S
        if CAUSAL:
            rows = row + (S - T) + gl.arange(0, BM, ROWS)[:, None]
            seen = seen & (cols <= rows)
        s = gl.where(seen, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(top - base)
    part = gl.sum(p.reshape([BM, BN // 8, 8]), 1)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, part.type.layout))[:, None] + part
    return p, shrink, new_top, total


@gluon.jit
def scores_step(
    out,
    p,
    top,
    total,
    q_t,
    k_s,
    v_s,
    k_full,
    k_free,
    v_full,
    v_free,
    count,
    j,
    row,
    T,
    S,
    scale,
    S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    FENCE: gl.constexpr,
):
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
    zero = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
    s = warpgroup_mma(
        q_t,
        k_s.index(stage).reshape([BN, k_s.shape[4]]).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )
    before = count - 1
    old = before % STAGES
    mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
    out = warpgroup_mma(p, v_s.index(old).reshape([BN, v_s.shape[4]]), out, is_async=True)
    (s,) = (
        warpgroup_mma_wait(
            1,
            [
                s,
            ],
        ),
    )
    mbarrier.arrive(k_free.index(stage), count=1)
    new_p, shrink, top, total = softmax(
        s, top, total, row, j, T, S, scale, S_LAYOUT, CAUSAL, MASKED, BM, BN
    )
    if FENCE:
        gl.inline_asm_elementwise(
            "{ .reg .pred q; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 q, $1, 0f00000000;"
            "@q st.shared.f32 [a], $1; mov.b32 $0, $1; }",
            "=f,f",
            [total],
            dtype=gl.float32,
            is_pure=False,
            pack=1,
        )
    out, p = warpgroup_mma_wait(0, [out, p])
    mbarrier.arrive(v_free.index(old), count=1)
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    p = gl.convert_layout(new_p.to(v_s.dtype), P_LAYOUT)
    return out, p, top, total


@gluon.jit
def consumer(
    o,
    lse,
    q_s,
    k_s,
    v_s,
    o_s,
    q_full,
    q_free,
    k_full,
    k_free,
    v_full,
    v_free,
    tiles,
    blocks,
    heads,
    H,
    T,
    S,
    scale,
    wave,
    C: gl.constexpr,
    CAUSAL: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    FENCE: gl.constexpr,
):
    D: gl.constexpr = o.block_type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    count = 0
    turn = 0
    q_t = q_s.index(C).reshape([BM, D])
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, flat_head = schedule(tile, blocks, heads, wave)
        batch = flat_head // H
        head = flat_head % H
        row = block * (BM * CONSUMERS)
        n, full = key_blocks(row, T, S, CAUSAL, BM * CONSUMERS, BN)
        row += C * BM
        out = gl.zeros([BM, D], gl.float32, O_LAYOUT)
        top = gl.full([BM], float("-inf"), gl.float32, ROWS)
        total = gl.sum(gl.zeros([BM, BN], gl.float32, S_LAYOUT).reshape([BM, BN // 8, 8]), 1)

        mbarrier.wait(q_full.index(C), turn & 1)
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        zero = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
        s = warpgroup_mma(
            q_t,
            k_s.index(stage).reshape([BN, D]).permute((1, 0)),
            zero,
            use_acc=False,
            is_async=True,
        )
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(stage), count=1)
        p32, _, top, total = softmax(
            s, top, total, row, (n - 1) * BN, T, S, scale, S_LAYOUT, CAUSAL, True, BM, BN
        )
        p = gl.convert_layout(p32.to(v_s.dtype), P_LAYOUT)
        count += 1
        if CAUSAL:
            for j in range((n - 2) * BN, full * BN - BN, -BN):
                out, p, top, total = scores_step(
                    out,
                    p,
                    top,
                    total,
                    q_t,
                    k_s,
                    v_s,
                    k_full,
                    k_free,
                    v_full,
                    v_free,
                    count,
                    j,
                    row,
                    T,
                    S,
                    scale,
                    S_LAYOUT,
                    P_LAYOUT,
                    CAUSAL,
                    True,
                    BM,
                    BN,
                    STAGES,
                    FENCE,
                )
                count += 1
        for j in range(gl.minimum(n - 1, full) * BN - BN, -BN, -BN):
            out, p, top, total = scores_step(
                out,
                p,
                top,
                total,
                q_t,
                k_s,
                v_s,
                k_full,
                k_free,
                v_full,
                v_free,
                count,
                j,
                row,
                T,
                S,
                scale,
                S_LAYOUT,
                P_LAYOUT,
                CAUSAL,
                False,
                BM,
                BN,
                STAGES,
                FENCE,
            )
            count += 1
        mbarrier.arrive(q_free.index(C), count=1)
        before = count - 1
        old = before % STAGES
        mbarrier.wait(v_full.index(old), (before // STAGES) & 1)
        out = warpgroup_mma(p, v_s.index(old).reshape([BN, D]), out, is_async=True)
        out, p = warpgroup_mma_wait(0, [out, p])
        mbarrier.arrive(v_free.index(old), count=1)

        total = gl.convert_layout(gl.sum(total, 1), ROWS)
        seen = total != 0.0
        total = gl.where(seen, total, 1.0)
        i = row + gl.arange(0, BM, ROWS)
        gl.store(
            lse + flat_head.to(gl.int64) * T + i,
            gl.where(seen, (top + gl.log2(total)) * 0.6931471805599453, float("-inf")),
            mask=i < T,
        )
        out = out * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        tma.store_wait(0)
        o_t = o_s.index(C)
        o_t.reshape([BM, D]).store(out.to(o_s.dtype))
        fence_async_shared()
        store_tma(o, [batch, head, row, 0], o_t)
        turn += 1
    tma.store_wait(0)


@gluon.jit
def forward_hopper(
    q,
    k,
    v,
    o,
    lse,
    tiles,
    blocks,
    heads,
    H,
    T,
    S,
    scale,
    wave,
    GROUP: gl.constexpr,
    CAUSAL: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    FENCE: gl.constexpr,
):
    BM: gl.constexpr = q.block_type.shape[2]
    dtype: gl.constexpr = q.dtype
    q_s = gl.allocate_shared_memory(dtype, [CONSUMERS] + q.block_type.shape, q.layout)  # noqa: RUF005
    o_s = gl.allocate_shared_memory(dtype, [CONSUMERS] + o.block_type.shape, o.layout)  # noqa: RUF005
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k.block_type.shape, k.layout)  # noqa: RUF005
    v_s = gl.allocate_shared_memory(dtype, [STAGES] + v.block_type.shape, v.layout)  # noqa: RUF005
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=CONSUMERS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_free.index(s), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        o,
                        lse,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        scale,
                        wave,
                        0,
                        CAUSAL,
                        BM,
                        BN,
                        STAGES,
                        CONSUMERS,
                        FENCE,
                    ),
                ),
                (
                    consumer,
                    (
                        o,
                        lse,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        scale,
                        wave,
                        1,
                        CAUSAL,
                        BM,
                        BN,
                        STAGES,
                        CONSUMERS,
                        FENCE,
                    ),
                ),
                (
                    producer,
                    (
                        q,
                        k,
                        v,
                        q_s,
                        k_s,
                        v_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        wave,
                        GROUP,
                        CAUSAL,
                        BM,
                        BN,
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
                    consumer,
                    (
                        o,
                        lse,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        scale,
                        wave,
                        0,
                        CAUSAL,
                        BM,
                        BN,
                        STAGES,
                        CONSUMERS,
                        FENCE,
                    ),
                ),
                (
                    consumer,
                    (
                        o,
                        lse,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        scale,
                        wave,
                        1,
                        CAUSAL,
                        BM,
                        BN,
                        STAGES,
                        CONSUMERS,
                        FENCE,
                    ),
                ),
                (
                    consumer,
                    (
                        o,
                        lse,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        scale,
                        wave,
                        2,
                        CAUSAL,
                        BM,
                        BN,
                        STAGES,
                        CONSUMERS,
                        FENCE,
                    ),
                ),
                (
                    producer,
                    (
                        q,
                        k,
                        v,
                        q_s,
                        k_s,
                        v_s,
                        q_full,
                        q_free,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        tiles,
                        blocks,
                        heads,
                        H,
                        T,
                        S,
                        wave,
                        GROUP,
                        CAUSAL,
                        BM,
                        BN,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: Options,
    config: Config,
    fence: int = 1,
    programs: int = 132,
) -> Launch:
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    consumers = config.warps // 4
    BM, BN = config.block_m // consumers, config.block_n
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16

    def rows(x: Tensor, n: int) -> TensorDescriptor:
        block = [1, 1, n, D]
        return TensorDescriptor(
            x,
            list(x.shape),
            list(x.stride()),
            block,
            gl.NVMMASharedLayout.get_default_for(block, dtype),
        )

    blocks = triton.cdiv(T, config.block_m)
    return Launch(
        forward_hopper,
        (min(blocks * B * H, programs),),
        (
            rows(q, BM),
            rows(k, BN),
            rows(v, BN),
            rows(o, BM),
            lse,
            blocks * B * H,
            blocks,
            B * H,
            H,
            T,
            S,
            options.scale * LOG2E.value,
            heads_in_cache(k, v, H // G) if options.causal else 1,
        ),
        dict(
            GROUP=H // G,
            CAUSAL=options.causal,
            BN=BN,
            STAGES=config.stages,
            CONSUMERS=consumers,
            FENCE=fence,
            num_warps=4,
        ),
    )
