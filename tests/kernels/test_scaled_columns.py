"""Columns of two matrices scaled, and what flows back: the formulas, the kernels by Triton's
interpreter, and compiled for Hopper without one."""

import pytest
import torch
from msfs_kernels import scaled_columns as columns

SHAPES = [(7, 5, 24), (40, 9, 768), (1, 130, 8)]  # N of both, K


def inputs(N0: int, N1: int, K: int, device: str = "cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(K)
    sizes = ((N0, K), (N0, K), (K,), (N1, K), (N1, K), (K,))
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def formula(d0, w0, g0, d1, w1, g1, dtype) -> list:
    outs = []
    for d, w, g in ((d0, w0, g0), (d1, w1, g1)):
        d, w, g = (x.to(dtype) for x in (d, w, g))
        outs += [w * g, d * g, (d * w).sum(0)]
    return outs


def kernels_results(d0, w0, g0, d1, w1, g1) -> list:
    from msfs_kernels.triton_scaled_columns import plan_backward, plan_forward

    outs = [torch.empty_like(x) for x in (w0, w1, w0, w1)]
    sums = torch.empty(3, 2, w0.shape[1])
    for plan in (
        plan_forward(w0, g0, w1, g1, *outs[:2]),
        plan_backward(d0, w0, g0, d1, w1, g1, *outs[2:], sums),
    ):
        plan.kernel[plan.grid](*plan.args, **plan.constants)
    dg = sums.sum(0)
    return [outs[0], outs[2], dg[0], outs[1], outs[3], dg[1]]


def op_results(d0, w0, g0, d1, w1, g1) -> list:
    out0, out1 = columns.scaled_columns(w0, g0, w1, g1)
    dw0, dw1, sums = columns.scaled_columns_gradient(d0, w0, g0, d1, w1, g1)
    dg = sums.sum(0)
    return [out0, dw0, dg[0], out1, dw1, dg[1]]


def error(fn, args: list) -> float:
    """Largest error over that of the formula in float32, rounded once."""
    found = []
    exact, plain = formula(*args, torch.float64), formula(*args, torch.float32)
    for mine, theirs, truth in zip(fn(*args), plain, exact, strict=True):
        theirs = theirs.to(mine.dtype)
        least = torch.finfo(torch.float32).eps * truth.abs().max()
        found.append(float((mine - truth).abs().max() / ((theirs - truth).abs().max() + least)))
    return max(found)


def interpreted(shape: tuple) -> float:
    return error(kernels_results, inputs(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_agree_with_the_formula(interpreter, shape):
    assert interpreter(interpreted, shape) <= 2


def test_the_ops_are_the_formulas_and_registered_right():
    args = inputs(5, 9, 16, dtype=torch.float64)
    for mine, exact in zip(op_results(*args), formula(*args, torch.float64), strict=True):
        torch.testing.assert_close(mine, exact)
    d0, w0, g0, d1, w1, g1 = inputs(5, 9, 16)
    utils = ("test_faketensor",)
    torch.library.opcheck(columns.scaled_columns, (w0, g0, w1, g1), test_utils=utils)
    args = (d0, w0, g0, d1, w1, g1)
    torch.library.opcheck(columns.scaled_columns_gradient, args, test_utils=utils)


def test_the_kernels_compile_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_scaled_columns import plan_backward, plan_forward

    d0, w0, g0, d1, w1, g1 = inputs(64, 32, 768, dtype=torch.bfloat16)
    for plan in (
        plan_forward(w0, g0, w1, g1, d0, d1),
        plan_backward(d0, w0, g0, d1, w1, g1, w0, w1, torch.empty(8, 2, 768)),
    ):
        assert resources(compile_launch(plan, 90), 90).spills == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_the_ops_agree_with_the_formula(dtype):
    for shape in (*SHAPES, (2304, 3072, 768)):
        assert error(op_results, inputs(*shape, "cuda", dtype)) <= 2
