"""A linear layer of all members with its epilogue equals the formula; its kernel by Triton's
interpreter, and compiled for Hopper without one."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from msfs_kernels import members_linear as linear

SHAPES = [(2, 130, 64, 136), (3, 37, 40, 24), (1, 1, 8, 8)]  # N, M, K, O


def inputs(N: int, M: int, K: int, O: int, device: str = "cpu", dtype=torch.float16):  # noqa: E741
    """w as a part of a longer row, as parameters that lie side by side are."""
    generator = torch.Generator().manual_seed(M)
    sizes = ((N, M, K), (N, O * K + 64), (N, O))
    x, w, b = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    return x, w[:, 16 : 16 + O * K].view(N, O, K), b


def error(found: torch.Tensor, x, w, b, relu: bool) -> float:
    """Largest error over that of the plain formula in the same dtype."""
    exact, plain = x.double() @ w.double().mT + b.double()[:, None], x @ w.mT + b[:, None]
    if relu:
        exact, plain = exact.relu(), plain.relu()
    least = torch.finfo(x.dtype).eps * exact.abs().max()
    return float((found - exact).abs().max() / ((plain - exact).abs().max() + least))


def interpreted(case: tuple) -> float:
    *shape, relu = case
    return error(linear.tiled(*inputs(*shape), relu), *inputs(*shape), relu)


def test_the_kernel_agrees_with_the_formula_at_every_edge(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the child imports Triton
    cases = [(*shape, i % 2 == 0) for i, shape in enumerate(SHAPES)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        for case, found in zip(cases, child.map(interpreted, cases), strict=True):
            assert found <= 2, case


@pytest.mark.parametrize("relu", [False, True])
def test_the_op_is_the_formula_and_registered_right(relu):
    args = inputs(2, 5, 8, 16, dtype=torch.float32)
    assert error(linear.members_linear(*args, relu), *args, relu) <= 2
    torch.library.opcheck(linear.members_linear, (*args, relu), test_utils=("test_faketensor",))


def test_the_kernel_compiles_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_members_linear import plan_linear

    x, w, b = inputs(2, 256, 128, 256, dtype=torch.bfloat16)
    y = x.new_empty(2, 256, 256)
    tile = (linear.BM, linear.BN, linear.BK, linear.WARPS, linear.STAGES)
    found = resources(compile_launch(plan_linear(x, w, b, y, True, *tile), 90), 90)
    assert found.spills == 0 and found.wgmma > 0 and found.shared <= 227 * 1024


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_agrees_with_the_formula():
    for shape in (*SHAPES, (8, 3840, 128, 384)):
        for relu in (False, True):
            args = inputs(*shape, device="cuda", dtype=torch.bfloat16)
            assert error(linear.members_linear(*args, relu), *args, relu) <= 2, shape
