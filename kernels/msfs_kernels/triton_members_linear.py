"""The Triton kernels of `members_linear`: one program a tile, tiles through the copy engine."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msfs_kernels.launching import Launch


@triton.jit
def linear_kernel(
    x, w, b, y, columns, K, member_b, column_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    # Tiles of one row of tiles come one after the other: they read the same x.
    n, tile, across = tl.program_id(1), tl.program_id(0), tl.cdiv(columns, BN)
    m, o = tile // across * BM, tile % across * BN
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        left = x.load([n, m, k]).reshape(BM, BK)
        right = w.load([n, o, k]).reshape(BN, BK)
        total = tl.dot(left, right.T, total)
    column = o + tl.arange(0, BN)
    bias = tl.load(b + n * member_b + column * column_b, mask=column < columns, other=0.0)
    total += bias.to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN stays NaN
    y.store([n, m, o], total.to(y.dtype).reshape(1, BM, BN))


@triton.jit
def masked_kernel(
    a, b, y, out, sums, M, columns, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, tile, across = tl.program_id(1), tl.program_id(0), tl.cdiv(columns, BN)
    m, o = tile // across * BM, tile % across * BN
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        left = a.load([n, m, k]).reshape(BM, BK)
        total = tl.dot(left, b.load([n, k, o]).reshape(BK, BN), total)
    # Rows and columns beyond the edge come in as zeros, and zeros of y erase them.
    total = tl.where(y.load([n, m, o]).reshape(BM, BN) <= 0, 0.0, total)
    out.store([n, m, o], total.to(out.dtype).reshape(1, BM, BN))
    column = o + tl.arange(0, BN)
    row = (n * tl.cdiv(M, BM) + tile // across) * columns
    tl.store(sums + row + column, tl.sum(total, 0), mask=column < columns)


def plan_linear(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, relu: bool,
    BM: int, BN: int, BK: int, warps: int, stages: int,
) -> Launch:  # fmt: skip
    """Fills y (N, M, O); rows of x (N, M, K) and w (N, O, K) begin at multiples of 16 bytes."""
    (N, M, K), columns = x.shape, w.shape[1]
    return Launch(
        linear_kernel,
        (triton.cdiv(M, BM) * triton.cdiv(columns, BN), N),
        (
            TensorDescriptor.from_tensor(x, [1, BM, BK]),
            TensorDescriptor.from_tensor(w, [1, BN, BK]),
            b,
            TensorDescriptor.from_tensor(y, [1, BM, BN]),
            columns,
            K,
            *b.stride(),
        ),
        dict(BM=BM, BN=BN, BK=BK, RELU=relu, num_warps=warps, num_stages=stages),
    )


def plan_masked(
    a: Tensor, b: Tensor, y: Tensor, out: Tensor, sums: Tensor,
    BM: int, BN: int, BK: int, warps: int, stages: int,
) -> Launch:  # fmt: skip
    """Fills out (N, M, O) and sums (N, ceil(M / BM), O); rows begin at multiples of 16 bytes."""
    (N, M, K), columns = a.shape, b.shape[2]
    return Launch(
        masked_kernel,
        (triton.cdiv(M, BM) * triton.cdiv(columns, BN), N),
        (
            TensorDescriptor.from_tensor(a, [1, BM, BK]),
            TensorDescriptor.from_tensor(b, [1, BK, BN]),
            TensorDescriptor.from_tensor(y, [1, BM, BN]),
            TensorDescriptor.from_tensor(out, [1, BM, BN]),
            sums,
            M,
            columns,
            K,
        ),
        dict(BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages),
    )
