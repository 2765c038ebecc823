"""The norm of a sum equals the formula, value and gradients; its kernels by Triton's interpreter,
and compiled for Hopper without one."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
from msfs_kernels import sum_norm as norms

from msfs_functional.models import decoder as decoders

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SHAPES = [(2, 19, 24), (1, 7, 768), (3, 1, 64)]  # ..., D


def inputs(shape: tuple, device: str = "cpu", dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(shape[1])
    a, b, dy = (torch.randn(shape, generator=generator) + 1 for _ in range(3))
    gain = torch.randn(shape[-1], generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (a, b, gain)], dy.to(device, dtype)


def results(fn, given: list, dy, centred: bool) -> list:
    y = fn(*given, 1e-5, centred)
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


def error(shape: tuple, centred: bool, device: str = "cpu", dtype=torch.float32) -> float:
    """Largest error of y and the gradients, over that of the formula in the same dtype."""
    given, dy = inputs(shape, device, dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    ours = results(norms.sum_norm, given, dy, centred)
    plain, exact = (results(norms.formula, x, dy, centred) for x in (given, wide))
    found = []
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        least = torch.finfo(dtype).eps * truth.abs().max()
        found.append(float((mine - truth).abs().max() / ((theirs - truth).abs().max() + least)))
    return max(found)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_agree_with_the_formula(interpreter, shape, centred):
    assert interpreter(error, shape, centred) <= 2


def second_order() -> float:
    """Error of the gradient of a gradient's square, over the formula's."""
    given, dy = inputs((1, 3, 8))
    pairs = []
    for fn in (norms.sum_norm, norms.formula):
        y = fn(*given, 1e-5, True)
        grads = torch.autograd.grad(y, given, dy, create_graph=True)
        pairs.append(torch.autograd.grad(sum(g.square().sum() for g in grads), given))
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(*pairs, strict=True))


def test_a_gradient_of_the_gradient_is_the_formulas(interpreter):
    assert interpreter(second_order) < 1e-5


def last_norm(norm: Any, offset: bool) -> None:
    """A decoder's norm of the last sum and its gradients, by the kernel and one after another."""
    config = decoders.DecoderConfig(
        vocab=8, width=24, heads=2, hidden=8, depth=1, norm=norm, norm_offset=offset
    )
    model = decoders.decoder(config)
    (a, b, gain), dy = inputs((2, 19, 24), "cpu" if INTERPRETED else "cuda")
    params = {**model.init(0, device=dy.device), "norm.weight": gain}
    found, calls = [], []
    for by_kernel in (True, False):
        with (
            mock.patch.object(decoders, "on_gpu_alone", lambda *x, on=by_kernel: on),
            mock.patch.object(norms, "sum_norm", wraps=norms.sum_norm) as kernel,
        ):
            y = model.apply(params, (a, b), method="_final")
            calls.append(kernel.call_count)
        found.append([y.detach(), *torch.autograd.grad(y, (a, b, gain), dy)])
    assert calls == [1, 0]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("norm", "offset"), [("layer", False), ("rms", False), ("rms", True)])
def test_a_decoder_s_last_norm_is_the_same_by_the_kernel(on_kernels, norm, offset):
    on_kernels(last_norm, norm, offset)


def test_the_kernels_compile_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_sum_norm import plan_backward, plan_forward

    x, gain, moments = torch.empty(64, 768).bfloat16(), torch.empty(768), torch.empty(2, 64)
    for plan in (
        plan_forward(x, x, gain, x, moments, 1e-5, True),
        plan_backward(x, x, x, gain, moments, x, torch.empty(8, 768), True),
    ):
        assert resources(compile_launch(plan, 90), 90).spills == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_the_kernels_agree_with_the_formula(dtype):
    for shape in (*SHAPES, (4, 1024, 768)):
        for centred in (True, False):
            assert error(shape, centred, "cuda", dtype) <= 2
