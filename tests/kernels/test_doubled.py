"""Convolutions of doubled pixels: values and gradients of the convolution that they stand for."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from msfs_kernels import doubled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def some(*shape: int, seed: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, memory_format=torch.channels_last if len(shape) == 4 else None)


def check(by_kernels: bool, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, bias = some(2, 5, 3, 4, seed=0), some(6, 5, 3, 3, seed=1), some(6, seed=2)
    dy = some(2, 6, 6, 8, seed=3)
    exact = [t.clone().requires_grad_() for t in (x, weight, bias)]
    big = exact[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    right = F.conv2d(big, exact[1], exact[2], padding=1)
    expected = [right, *torch.autograd.grad(right, exact, dy)]
    given = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    exact_products = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with mock.patch.object(doubled, "fused", lambda *images: by_kernels), exact_products:
        y = F.conv2d(given[0], doubled.kernel(given[1]), padding=1)
        y = doubled.interleave(y.contiguous(memory_format=torch.channels_last), given[2])
        found = [y, *torch.autograd.grad(y, given, dy.to(dtype))]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_kernels_are_the_convolution_of_doubled_pixels(on_kernels):
    on_kernels(check, True, torch.float32, 1e-5)


def test_formulas_are_the_convolution_of_doubled_pixels():
    check(False, torch.float64, 1e-12)


def test_gradients_of_gradients_are_the_formula_s(on_kernels):
    on_kernels(check_second)


def check_second() -> None:
    """Linear in each argument: the gradient's gradient is the function itself."""
    weight, bias = some(4, 3, 3, 3, seed=0).float(), some(2, seed=1).float()
    y = some(1, 8, 3, 4, seed=2).float()
    for fn, x in ((doubled.kernel, weight), (lambda y: doubled.interleave(y, 0 * bias), y)):
        with mock.patch.object(doubled, "fused", lambda *images: True):
            x = x.requires_grad_()
            out = fn(x)
            u = torch.randn_like(out).contiguous(memory_format=torch.channels_last).requires_grad_()
            (grad,) = torch.autograd.grad(out, x, u, create_graph=True)
            (second,) = torch.autograd.grad((grad * x.detach()).sum(), u)
        torch.testing.assert_close(second, out.detach())
