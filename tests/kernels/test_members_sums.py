"""Sums over each member's rows equal the formula; the kernel by Triton's interpreter, and compiled
for Hopper without one."""

import pytest
import torch
from msfs_kernels import members_sums as sums

SHAPES = [(2, 130, 136), (3, 64, 24), (1, 1, 8)]  # N, M, D


def inputs(N: int, M: int, D: int, device: str = "cpu", dtype=torch.float16):
    """dy strided, as a third of what one product gives; x, mean and rstd of its rows."""
    generator = torch.Generator().manual_seed(M)
    wide = torch.randn(N, M, 3 * D, generator=generator).to(device, dtype)
    x = (torch.randn(N, M, D, generator=generator) + 3).to(device, dtype)
    mean, std = x.float().mean(-1), x.float().std(-1, correction=0)
    return wide[..., D : 2 * D], x, mean, 1 / (std + 1e-5)


def error(found: torch.Tensor, dy, x, mean, rstd) -> float:
    """Largest error of the sums, over that of float32 sums of exact terms."""
    normed = (x.double() - mean.double()[..., None]) * rstd.double()[..., None]
    exact = torch.stack([dy.double(), dy.double() * normed])
    plain = exact.float().sum(2)
    least = torch.finfo(torch.float32).eps * exact.abs().sum(2)
    error = found.sum(-2).double() - exact.sum(2)
    return float((error.abs() / ((plain - exact.sum(2)).abs() + least)).max())


def interpreted(shape: tuple) -> float:
    args = inputs(*shape)
    alone, both = sums.tiled(args[0], None, None, None), sums.tiled(*args)
    assert torch.equal(alone, both[0])
    return error(both, *args)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_agrees_with_the_formula_at_every_edge(interpreter, shape):
    assert interpreter(interpreted, shape) <= 2


def test_the_ops_are_the_formulas_and_registered_right():
    args = inputs(2, 70, 16)
    assert error(sums.members_norm_sums(*args), *args) <= 2
    assert torch.equal(sums.members_sums(args[0]), sums.members_norm_sums(*args)[0])
    torch.library.opcheck(sums.members_norm_sums, args, test_utils=("test_faketensor",))
    torch.library.opcheck(sums.members_sums, args[:1], test_utils=("test_faketensor",))


def test_the_kernel_compiles_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_members_sums import plan_sums

    args = inputs(2, 256, 128, dtype=torch.bfloat16)
    tile = (sums.ROWS, sums.COLUMNS, sums.WARPS)
    for plan in (
        plan_sums(*args, torch.empty(2, 2, 4, 128), *tile),
        plan_sums(args[0], None, None, None, torch.empty(1, 2, 4, 128), *tile),
    ):
        assert resources(compile_launch(plan, 90), 90).spills == 0


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_agrees_with_the_formula():
    for shape in (*SHAPES, (8, 3792, 384)):
        args = inputs(*shape, device="cuda", dtype=torch.bfloat16)
        assert error(sums.members_norm_sums(*args), *args) <= 2, shape
        assert torch.equal(sums.members_sums(args[0]), sums.members_norm_sums(*args)[0])
