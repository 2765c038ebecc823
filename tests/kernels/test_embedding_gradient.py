"""An embedding's gradient in sorted order equals the formula, for tokens that are rare and for one
that fills chunks; its kernels by Triton's interpreter, and compiled for Hopper without one."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from msfs_kernels.embedding_gradient import embedding_gradient

from msfs_functional import layers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CASES = {  # items, rows, width, how tokens are drawn
    "rare": (150, 400, 24, lambda n, V: torch.arange(n) * 7 % V),
    "often": (300, 11, 136, lambda n, V: torch.arange(n).square() % V),
    "one": (129, 5, 8, lambda n, V: torch.full((n,), 3)),
    "first and last": (96, 9, 16, lambda n, V: torch.arange(n) // 48 * (V - 1)),
    "few": (5, 3, 16, lambda n, V: torch.tensor([2, 0, 2, 2, 1])),
}


def inputs(name: str, dtype: torch.dtype, device: str = "cpu"):
    n, V, D, draw = CASES[name]
    grad = torch.randn(n, D, generator=torch.Generator().manual_seed(n)).to(device, dtype)
    return grad, draw(n, V).to(device), V


def error(found: torch.Tensor, grad: torch.Tensor, tokens: torch.Tensor, rows: int) -> float:
    """Largest error over that of the sums in float32, rounded once."""
    hot = F.one_hot(tokens.cpu(), rows).double().T
    exact = hot @ grad.cpu().double()
    plain = (hot.float() @ grad.cpu().float()).to(grad.dtype).double()
    least = torch.finfo(torch.float32).eps * (hot @ grad.cpu().double().abs())
    return float(((found.cpu() - exact).abs() / ((plain - exact).abs() + least + 1e-30)).max())


def interpreted(name: str, dtype: torch.dtype) -> float:
    args = inputs(name, dtype)
    return error(embedding_gradient(*args), *args)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_with_the_formula(interpreter, name):
    assert interpreter(interpreted, name, torch.float16) <= 2
    assert interpreter(interpreted, name, torch.float32) <= 2


def looked_up() -> None:
    """lookup's gradient, and the gradient of that, are those of F.embedding."""
    grad, tokens, rows = inputs("often", torch.float32, "cpu" if INTERPRETED else "cuda")
    weight = grad[:rows].detach().requires_grad_()
    alone = {"on_gpu_alone": lambda *x: True, "ahead": mock.Mock()}  # which would call it, too
    patched = mock.patch.multiple(layers, **alone)
    found, summed = [], []
    for fn in (layers.lookup, lambda w, t: F.embedding(t, w)):
        with mock.patch.object(layers, "embedding_gradient", wraps=embedding_gradient) as kernel:
            with patched:
                first = torch.autograd.grad(fn(weight, tokens), weight, grad)
                summed.append(kernel.call_count)
                y = fn(weight, tokens).square().sum()
            again = torch.autograd.grad(y, weight, create_graph=True)
            second = torch.autograd.grad(again[0].square().sum(), weight)
        found.append((*first, *again, *second))
    assert summed == [1, 0]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_lookup_has_its_gradient_from_the_kernels(on_kernels):
    on_kernels(looked_up)


def test_the_kernels_compile_for_hopper_without_spills():
    pytest.importorskip("triton")
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_embedding_gradient import plan_chunks, plan_joints

    grad, out = torch.empty(128, 768, dtype=torch.bfloat16), torch.empty(500, 768).bfloat16()
    found, order, parts = torch.zeros(128).int(), torch.zeros(128).long(), torch.empty(4, 2, 768)
    for plan in (plan_chunks(grad, found, order, out, parts), plan_joints(found, out, parts)):
        assert resources(compile_launch(plan, 90), 90).spills == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_the_kernels_agree_with_the_formula(dtype):
    for name in CASES:
        args = inputs(name, dtype, "cuda")
        assert error(embedding_gradient(*args), *args) <= 2
        assert torch.equal(embedding_gradient(*args), embedding_gradient(*args))
