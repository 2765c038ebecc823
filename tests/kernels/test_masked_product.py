"""The product with a mask in its epilogue equals product, mask and sum; its kernel by Triton's
interpreter, and compiled for Hopper without one."""

import pytest
import torch
from msfs_kernels import masked_product as products

SHAPES = [(130, 64, 136), (37, 40, 24), (1, 8, 8)]  # M, K, N: whole tiles, parts of them, one row


def inputs(M: int, K: int, N: int, device: str = "cpu", dtype: torch.dtype = torch.float16):
    generator = torch.Generator().manual_seed(M)
    sizes = ((M, K), (K, N), (M, N))
    a, b, y = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    return a, b, y.relu()


def errors(result: tuple, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Largest error of (out, sums) over that of the plain formula in the same dtype."""
    exact = torch.where(y <= 0, 0.0, a.double() @ b.double())
    plain = torch.where(y <= 0, 0.0, a @ b)
    found = []
    for ours, theirs, truth in zip(
        result, (plain, plain.sum(0, True)), (exact, exact.sum(0, True)), strict=True
    ):
        least = torch.finfo(ours.dtype).eps * truth.abs().max()
        found.append(float((ours - truth).abs().max() / ((theirs - truth).abs().max() + least)))
    return found


def interpreted(shape: tuple[int, int, int]) -> list[float]:
    return errors(products.tiled(*inputs(*shape)), *inputs(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_the_formula_at_every_edge(interpreter, shape):
    assert max(interpreter(interpreted, shape)) <= 2


def test_the_op_is_the_formula_and_registered_right():
    a, b, y = inputs(5, 8, 16, dtype=torch.float32)
    out, sums = products.masked_product(a, b, y)
    torch.testing.assert_close(out, torch.where(y > 0, a @ b, 0.0))
    torch.testing.assert_close(sums, out.sum(0, keepdim=True))
    torch.library.opcheck(products.masked_product, (a, b, y), test_utils=("test_faketensor",))


def test_the_kernel_compiles_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_masked_product import plan_product

    a, b, y = inputs(256, 128, 256, dtype=torch.bfloat16)
    out, sums = torch.empty_like(y), torch.empty(2, 256)
    tile = (products.BM, products.BN, products.BK, products.WARPS, products.STAGES)
    compiled = compile_launch(plan_product(a, b, y, out, sums, *tile), 90)
    found = resources(compiled, 90)
    assert found.spills == 0 and found.wgmma > 0 and found.shared <= 227 * 1024


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_agrees_with_the_formula():
    for shape in (*SHAPES, (300, 512, 2048)):
        for dtype in (torch.float16, torch.bfloat16):
            args = inputs(*shape, device="cuda", dtype=dtype)
            assert max(errors(products.masked_product(*args), *args)) <= 2, shape
