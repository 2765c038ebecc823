"""The gradient of a bias that is added to the scores: dS itself, summed over what it broadcasts."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.configs import Config, choose
from msfs_kernels.launching import Launch
from msfs_kernels.options import Options
from msfs_kernels.triton_common import (
    LOG2E,
    constants,
    load_tile,
    masks_of,
    padded,
    row_facts,
)
from msfs_kernels.triton_rows import load_log_sums, load_rows, load_shares, tile_gradient


@triton.jit
def bias_kernel(
    q, k, v, do, lse, delta, share, dbias, q_strides, k_strides, v_strides, do_strides,
    dbias_strides, masks, B, H, T, S, scale_log2, b_step, h_step, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    VP: tl.constexpr, SUM_T: tl.constexpr, SUM_S: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dBias = dS, summed over the dims that the bias broadcasts; one program walks a tile's sums.

    b_step and h_step are 1 where the bias has its own row or head, B and H where all share one. A
    bias that broadcasts T or S gets one partial sum for each block of queries or keys, in dims 2
    and 3 of dbias.
    """
    row = tl.program_id(0) * BM
    column = tl.program_id(1) * BN
    own_heads = H // h_step
    own_batch = tl.program_id(2) // own_heads
    own_head = tl.program_id(2) % own_heads
    i = (row + tl.arange(0, BM))[:, None]
    j = (column + tl.arange(0, BN))[None, :]
    last = tl.minimum(row + BM, T) - 1
    reachable = True
    if CAUSAL and masks.prefix_lengths is None:
        reachable = column <= last + (S - T)
    total = tl.zeros([BM, BN], tl.float32)
    if reachable:
        for batch in range(own_batch, own_batch + b_step):
            for head in range(own_head, own_head + h_step):
                facts = row_facts(masks, batch, head, H, S)
                if column < facts[0]:
                    flat_head = batch * H + head
                    keys = load_tile(
                        k, k_strides, batch, head // GROUP, column, S, BN, KP, K, True, False
                    )
                    values = load_tile(
                        v, v_strides, batch, head // GROUP, column, S, BN, VP, V, True, False
                    )
                    queries = load_tile(q, q_strides, batch, head, row, T, BM, KP, K, True, False)
                    grads = load_tile(do, do_strides, batch, head, row, T, BM, VP, V, True, False)
                    log_sums = load_log_sums(lse, flat_head, row, T, BM)
                    row_delta = load_rows(delta, flat_head, row, T, 0.0, BM)
                    products = tl.dot(queries, keys.T, input_precision=PRECISION)
                    dp = tl.dot(grads, values.T, input_precision=PRECISION)
                    shares = load_shares(share, flat_head, row, T, BM)
                    _, ds, _ = tile_gradient(
                        products, dp, log_sums[:, None], row_delta[:, None], shares[:, None], keys,
                        i, j, batch, head, T, S, facts, masks, scale_log2, CAUSAL, True, PRECISION,
                    )  # fmt: skip
                    total += ds
    start = (
        dbias
        + tl.cast(own_batch, tl.int64) * dbias_strides[0]
        + tl.cast(own_head, tl.int64) * dbias_strides[1]
    )
    if SUM_T and SUM_S:
        pointer = (
            start
            + tl.program_id(0).to(tl.int64) * dbias_strides[2]
            + tl.program_id(1) * dbias_strides[3]
        )
        tl.store(pointer, tl.sum(tl.sum(total, 1), 0))
    elif SUM_T:
        columns = column + tl.arange(0, BN)
        pointers = (
            start + tl.program_id(0).to(tl.int64) * dbias_strides[2] + columns * dbias_strides[3]
        )
        tl.store(pointers, tl.sum(total, 0), mask=columns < S)
    elif SUM_S:
        rows = row + tl.arange(0, BM)
        pointers = (
            start + rows.to(tl.int64) * dbias_strides[2] + tl.program_id(1) * dbias_strides[3]
        )
        tl.store(pointers, tl.sum(total, 1), mask=rows < T)
    else:
        pointers = start + i.to(tl.int64) * dbias_strides[2] + j.to(tl.int64) * dbias_strides[3]
        tl.store(pointers, total, mask=(i < T) & (j < S))


def plan_bias(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, share: Tensor | None,
    options: Options, config: Config | None = None,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch and the (b, h, T or blocks, S or blocks) float32 tensor of partial sums that it
    fills.
    """
    (B, H, T, K), (_, _, S, V) = q.shape, v.shape
    assert options.bias is not None
    b, h, t, s = options.bias.shape
    config = config or choose("bias", q.dtype, padded(max(K, V)), options.causal, max(T, S))
    BM, BN = config.block_m, config.block_n
    blocks = triton.cdiv(T, BM), triton.cdiv(S, BN)
    sum_t, sum_s = t == 1 and T > 1, s == 1 and S > 1
    shape = (b, h, blocks[0] if sum_t else T, blocks[1] if sum_s else S)
    partial = q.new_empty(shape, dtype=torch.float32)
    described = Launch(
        bias_kernel,
        (*blocks, b * h),
        (
            q,
            k,
            v,
            do,
            lse,
            delta,
            share,
            partial,
            q.stride(),
            k.stride(),
            v.stride(),
            do.stride(),
            partial.stride(),
            masks_of(options, (B, H, T, S)),
            B,
            H,
            T,
            S,
            options.scale * LOG2E.value,
            1 if b == B else B,
            1 if h == H else H,
        ),
        constants(q, k, v, options, config, SUM_T=sum_t, SUM_S=sum_s),
    )
    return described, partial
