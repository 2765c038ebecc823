"""The product of GEGLU with up * gelu(gate) in its epilogue: the hidden layer's halves stay inside.

    out = (x U' + b) * gelu(x G' + c)      weight (2 F, K) is U over G, bias (2 F,) b over c

A program makes a tile of both halves from the same rows of x, by the copy engine and the matrix
units of Hopper. PERSISTENT programs go on to the next tile, SPECIAL ones give the copies to a warp
of their own.

Dimension key: M rows, F hidden, K width.

Source: Shazeer 2020 (GEGLU).
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msfs_kernels.launching import INTERPRETED, Launch
from msfs_kernels.triton_image_passes import gelu

# By K, where it is faster than cuBLAS and a pass.
TILES: dict[int, dict[str, Any]] = {}


@triton.jit
def geglu_tile(x, w, bias, out, tile, M, F, K, out_stride, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr):  # fmt: skip
    columns = tl.cdiv(F, BN)
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


@triton.jit
def geglu_product_kernel(
    x, w, bias, out, M, F, K, out_stride, tiles, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PERSISTENT: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """x, w are descriptors; F is a multiple of BN."""
    if PERSISTENT:
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=SPECIAL, warp_specialize=SPECIAL
        ):
            geglu_tile(x, w, bias, out, tile, M, F, K, out_stride, BM, BN, BK)
    else:
        geglu_tile(x, w, bias, out, tl.program_id(0), M, F, K, out_stride, BM, BN, BK)


def tile_for(x: Tensor, weight: Tensor, out: Tensor) -> dict[str, Any] | None:
    """The tile if the kernel can do this work here, and is the faster way."""
    tile = TILES.get(x.shape[1])
    if tile is None or x.element_size() != 2 or (weight.shape[0] // 2) % tile["BN"]:
        return None
    here = INTERPRETED or torch.cuda.get_device_capability(x.device) == (9, 0)
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in (x, weight))
    return tile if here and aligned and out.stride(1) == 1 else None


def plan(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, tile: dict[str, Any]) -> Launch:
    (M, K), F = x.shape, weight.shape[0] // 2
    BM, BN, BK = (tile[name] for name in ("BM", "BN", "BK"))
    tiles = triton.cdiv(M, BM) * triton.cdiv(F, BN)
    programs = tiles
    if tile["PERSISTENT"] and x.is_cuda:
        programs = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    ahead = (
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(weight, [BN, BK]),
    )
    given = (*ahead, bias, out, M, F, K, out.stride(0), tiles)
    return Launch(geglu_product_kernel, (programs,), given, tile)
