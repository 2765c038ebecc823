"""A linear layer of all members with its epilogue equals the formula; its kernel by Triton's
interpreter, and compiled for Hopper without one."""

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


def masked_inputs(*shape: int, **options) -> tuple[torch.Tensor, ...]:
    """a, b, y of the product with a mask; b is the layer's matrix as it lies."""
    N, M, K, O = shape  # noqa: E741
    x, w, _ = inputs(N, M, O, K, **options)  # w is (N, K, O)
    a = x.new_empty(N, M, K).copy_(torch.linspace(-1, 1, K, device=x.device).cos())
    return a, w, x.relu()


def masked_errors(found: tuple, a, b, y) -> float:
    """The larger of both results' errors, over those of the plain formula in the same dtype."""
    exact = torch.where(y <= 0, 0.0, a.double() @ b.double())
    plain = torch.where(y <= 0, 0.0, a @ b)
    ratios = []
    for ours, theirs, truth in zip(
        found, (plain, plain.sum(1)), (exact, exact.sum(1)), strict=True
    ):
        least = torch.finfo(ours.dtype).eps * truth.abs().max()
        ratios.append((ours - truth).abs().max() / ((theirs - truth).abs().max() + least))
    return float(max(ratios))


def interpreted(case: tuple) -> float:
    *shape, relu = case
    args = masked_inputs(*shape)
    return max(
        error(linear.tiled(*inputs(*shape), relu), *inputs(*shape), relu),
        masked_errors(linear.masked(*args), *args),
    )


@pytest.mark.parametrize("case", [(*shape, i % 2 == 0) for i, shape in enumerate(SHAPES)])
def test_the_kernels_agree_with_the_formulas_at_every_edge(interpreter, case):
    assert interpreter(interpreted, case) <= 2


@pytest.mark.parametrize("relu", [False, True])
def test_the_ops_are_the_formulas_and_registered_right(relu):
    args = masked_inputs(2, 5, 8, 16, dtype=torch.float32)
    assert masked_errors(linear.members_masked_product(*args), *args) <= 2
    torch.library.opcheck(linear.members_masked_product, args, test_utils=("test_faketensor",))
    args = inputs(2, 5, 8, 16, dtype=torch.float32)
    assert error(linear.members_linear(*args, relu), *args, relu) <= 2
    torch.library.opcheck(linear.members_linear, (*args, relu), test_utils=("test_faketensor",))


def test_the_kernels_compile_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_members_linear import plan_linear, plan_masked

    x, w, b = inputs(2, 256, 128, 256, dtype=torch.bfloat16)
    y, sums = x.new_empty(2, 256, 256), torch.empty(2, 2, 256)
    tile = (linear.BM, linear.BN, linear.BK, linear.WARPS, linear.STAGES)
    plans = (
        plan_linear(x, w, b, y, True, *tile),
        plan_masked(x, w.mT.contiguous(), y, y, sums, *tile),
    )
    for plan in plans:
        found = resources(compile_launch(plan, 90), 90)
        assert found.spills == 0 and found.wgmma > 0 and found.shared <= 227 * 1024


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_agree_with_the_formulas():
    for shape in (*SHAPES, (8, 3840, 128, 384)):
        args = masked_inputs(*shape, device="cuda", dtype=torch.bfloat16)
        assert masked_errors(linear.members_masked_product(*args), *args) <= 2, shape
        for relu in (False, True):
            args = inputs(*shape, device="cuda", dtype=torch.bfloat16)
            assert error(linear.members_linear(*args, relu), *args, relu) <= 2, shape
