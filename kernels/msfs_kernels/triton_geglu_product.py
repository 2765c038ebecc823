"""Experiment: x W' with GEGLU in its epilogue."""
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


@triton.jit
def product_kernel(
    x, w, bias, out, M, F, K, out_stride, PROGRAMS, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(F, BN)
    tiles = tl.cdiv(M, BM) * columns
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=SPECIAL, warp_specialize=SPECIAL):
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
        y = (up * gelu(gate)).to(tl.bfloat16)
        rows = row + tl.arange(0, BM)
        tl.store(out + rows.to(tl.int64)[:, None] * out_stride + c[None, :], y)


@triton.jit
def one_product_kernel(
    x, w, bias, out, M, F, K, out_stride, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
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
    y = (up * gelu(gate)).to(tl.bfloat16)
    rows = row + tl.arange(0, BM)
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride + c[None, :], y)


def plan(x: Tensor, w: Tensor, bias: Tensor, out: Tensor, BM=128, BN=128, BK=64, stages=3, warps=8, kind="one") -> Launch:
    (M, K), F = x.shape, w.shape[0] // 2
    xd = TensorDescriptor.from_tensor(x, [BM, BK])
    wd = TensorDescriptor.from_tensor(w, [BN, BK])
    tiles = triton.cdiv(M, BM) * triton.cdiv(F, BN)
    common = {"BM": BM, "BN": BN, "BK": BK, "num_stages": stages, "num_warps": warps}
    if kind == "one":
        return Launch(one_product_kernel, (tiles,), (xd, wd, bias, out, M, F, K, out.stride(0)), common)
    programs = min(132, tiles)
    return Launch(product_kernel, (programs,), (xd, wd, bias, out, M, F, K, out.stride(0), programs), {**common, "SPECIAL": kind == "special"})
