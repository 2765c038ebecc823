"""The Triton kernel of `masked_product`: one program a tile, tiles through the copy engine."""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msfs_kernels.launching import Launch

GROUP = 8  # rows of tiles that share their columns while these are in the cache


@triton.jit
def product_kernel(
    a, b, y, out, sums, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = program // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    tile_m = first + (program % (GROUP * columns)) % height
    tile_n = (program % (GROUP * columns)) // height
    m, n = tile_m * BM, tile_n * BN
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a.load([m, k]), b.load([k, n]), total)
    # Rows and columns beyond the edge come in as zeros, and zeros of y erase them.
    total = tl.where(y.load([m, n]) <= 0, 0.0, total)
    out.store([m, n], total.to(out.dtype))
    column = n + tl.arange(0, BN)
    tl.store(sums + tile_m * N + column, tl.sum(total, 0), mask=column < N)


def plan_product(
    a: Tensor, b: Tensor, y: Tensor, out: Tensor, sums: Tensor,
    BM: int, BN: int, BK: int, warps: int, stages: int,
) -> Launch:  # fmt: skip
    """Fills out (M, N) and sums (ceil(M / BM), N); all row-major, rows of whole 16 bytes."""
    (M, K), N = a.shape, b.shape[1]
    tile = [BM, BN]
    return Launch(
        product_kernel,
        (triton.cdiv(M, BM) * triton.cdiv(N, BN),),
        (
            TensorDescriptor.from_tensor(a, [BM, BK]),
            TensorDescriptor.from_tensor(b, [BK, BN]),
            TensorDescriptor.from_tensor(y, tile),
            TensorDescriptor.from_tensor(out, tile),
            sums,
            M,
            N,
            K,
        ),
        dict(BM=BM, BN=BN, BK=BK, GROUP=GROUP, num_warps=warps, num_stages=stages),
    )
