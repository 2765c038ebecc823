"""The product of GEGLU with up * gelu(gate) in its epilogue: the hidden layer's halves stay inside.

    out = (x U' + b) * gelu(x G' + c)      weight (2 F, K) is U over G, bias (2 F,) b over c

A program makes a tile of both halves from the same rows of x, by the copy engine and the matrix
units of Hopper; two programs fit on a multiprocessor, so that one multiplies while the other is in
its epilogue.

Dimension key: M rows, F hidden, K width.

Source: Shazeer 2020 (GEGLU).
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msfs_kernels.launching import Launch
from msfs_kernels.triton_image_passes import gelu

# 3 to 9% faster than cuBLAS and a pass at widths of 320 to 1280 and 4096 rows and more (LOG.md).
TILE = {"BM": 128, "BN": 64, "BK": 64, "num_stages": 3, "num_warps": 4}
LEAST_ROWS, WIDTHS = 4096, (320, 1280)


@triton.jit
def geglu_product_kernel(
    x, w, bias, out, M, F, K, out_stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """x, w are descriptors; F is a multiple of BN."""
    columns = tl.cdiv(F, BN)
    tile = tl.program_id(0)
    row, f = tile // columns * BM, tile % columns * BN
    up = tl.zeros([BM, BN], tl.float32)
    gate = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        a = x.load([row, k])
        up = tl.dot(a, w.load([f, k]).T, up)
        gate = tl.dot(a, w.load([F + f, k]).T, gate)
    c = f + tl.arange(0, BN)
    up += tl.load(bias + c).to(tl.float32)[None, :]
    gate += tl.load(bias + F + c).to(tl.float32)[None, :]
    rows = row + tl.arange(0, BM)
    at = rows.to(tl.int64)[:, None] * out_stride + c[None, :]
    y = (up * gelu(gate)).to(out.dtype.element_ty)
    tl.store(out + at, y, mask=(rows < M)[:, None] & (c < F)[None, :])


def suits(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether the kernel can do this work here, and is the faster way."""
    (M, K), F = x.shape, weight.shape[0] // 2
    return (
        x.element_size() == 2
        and M >= LEAST_ROWS
        and WIDTHS[0] <= K <= WIDTHS[1]
        and F % TILE["BN"] == 0
        and out.stride(1) == 1
        and all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in (x, weight))
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )


def plan(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Launch:
    (M, K), F = x.shape, weight.shape[0] // 2
    BM, BN, BK = (TILE[name] for name in ("BM", "BN", "BK"))
    ahead = (
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(weight, [BN, BK]),
    )
    tiles = triton.cdiv(M, BM) * triton.cdiv(F, BN)
    given = (*ahead, bias, out, M, F, K, out.stride(0))
    return Launch(geglu_product_kernel, (tiles,), given, TILE)
