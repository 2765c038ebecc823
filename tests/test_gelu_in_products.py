"""GELU in the products beside it: the rewritten graph is the formula, value and gradient, with and
without a bias; what is not the pattern stays."""

import pytest
import torch
import torch.nn.functional as F
from graph_passes import Watched
from msfs_kernels import cublaslt
from msfs_kernels import gelu_product as kernel

from msfs_functional.compiling import inductor_options
from msfs_functional.gelu_in_products import GeluInProducts
from msfs_functional.regions import Regions, region_of

OPS = torch.ops.msfs_kernels


def mlp(params, x):
    h = F.linear(x, params["up"], params.get("bias"))
    return F.linear(F.gelu(h, approximate="tanh"), params["down"])


def inputs(bias: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (32, 16), "down": (16, 32)} | ({"bias": (32,)} if bias else {})
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(2, 8, 16, generator=generator)
    return {name: value.to(device, dtype) for name, value in params.items()}, x.to(device, dtype)


def gradients(fn, params, x):
    params = {name: value.detach().requires_grad_() for name, value in params.items()}
    x = x.detach().requires_grad_()
    y = fn(params, x)
    grads = torch.autograd.grad(y.float().square().sum(), [*params.values(), x])
    return [y.detach(), *grads]


def compiled(fn, watched):
    options = inductor_options() | {"joint_custom_pre_pass": watched}
    return torch.compile(fn, options=options, fullgraph=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rewritten_graph_is_the_formula(bias, dtype):
    params, x = inputs(bias, dtype)
    watched = Watched(GeluInProducts(everywhere=True))
    ours = gradients(compiled(mlp, watched), params, x)
    assert watched.calls.count(OPS.product_gelu.default) == 1
    assert watched.calls.count(OPS.product_gelu_gradient.default) == 1
    assert torch.ops.aten.tanh.default not in watched.calls
    plain = gradients(mlp, params, x)
    exact = gradients(mlp, {name: value.double() for name, value in params.items()}, x.double())
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        least = torch.finfo(dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + least


def test_another_gelu_and_another_product_stay():
    def erf(params, x):
        return F.linear(F.gelu(F.linear(x, params["up"])), params["down"])

    def scaled(params, x):
        h = 2 * F.linear(x, params["up"])
        return F.linear(F.gelu(h, approximate="tanh"), params["down"])

    params, x = inputs(False)
    for fn in (erf, scaled):
        watched = Watched(GeluInProducts(everywhere=True))
        for mine, theirs in zip(
            gradients(compiled(fn, watched), params, x), gradients(fn, params, x), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
        assert OPS.product_gelu.default not in watched.calls


@pytest.mark.parametrize("thrifty", [False, True])
def test_a_thrifty_region_keeps_what_it_makes_anew(thrifty, monkeypatch):
    watched = Watched(GeluInProducts(everywhere=True))
    options = inductor_options() | {"joint_custom_pre_pass": watched}
    monkeypatch.setattr("msfs_functional.compiling.inductor_options", lambda: options)
    params, x = inputs(False)
    with Regions(False).compiled():
        gradients(region_of(mlp, thrifty=thrifty), params, x)
    assert (OPS.product_gelu.default in watched.calls) is not thrifty


def test_the_ops_are_the_formulas_and_registered_right():
    params, x = inputs(True)
    a, b, bias = x.flatten(0, 1), params["up"].T, params["bias"]
    h, y = kernel.product_gelu(a, b, bias)
    torch.testing.assert_close(h, a @ b + bias)
    torch.testing.assert_close(y, F.gelu(h, approximate="tanh"))
    leaf = h.detach().requires_grad_()
    dy = a @ b
    (exact,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, dy)
    torch.testing.assert_close(kernel.product_gelu_gradient(a, b, h), exact)
    for op, args in (
        (kernel.product_gelu, (a, b, bias)),
        (kernel.product_gelu_gradient, (a, b, h)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_faketensor",))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_on_a_gpu_the_epilogues_are_as_exact_as_separate_kernels(bias):
    for dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        make = lambda *s: torch.randn(s, generator=generator).to("cuda", dtype)  # noqa: E731, B023
        a, w, v, vector = make(272, 64), make(128, 64), make(64, 128), make(128)
        vector = vector if bias else None
        assert kernel.planned(a, w.T, cublaslt.GELU) is not None
        for b in (w.T, v):
            h, y = kernel.product_gelu(a, b, vector)
            dh = kernel.product_gelu_gradient(a, b, h)
            exact_h = a.double() @ b.double() + (0 if vector is None else vector.double())
            plain_h = a @ b if vector is None else torch.addmm(vector, a, b)
            leaf = h.double().requires_grad_()
            exact_y = F.gelu(exact_h, approximate="tanh")
            (exact_dh,) = torch.autograd.grad(
                F.gelu(leaf, approximate="tanh"), leaf, a.double() @ b.double()
            )
            plain_dh = torch.ops.aten.gelu_backward(a @ b, h, approximate="tanh")
            plain = (plain_h, F.gelu(plain_h, approximate="tanh"), plain_dh)
            for mine, theirs, truth in zip(
                (h, y, dh), plain, (exact_h, exact_y, exact_dh), strict=True
            ):
                assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


def test_which_way_a_matrix_lies_and_where():
    x = torch.empty(4, 6)
    assert not cublaslt.transposed(x) and cublaslt.transposed(x.T)
    assert not cublaslt.transposed(x[:, :3]) and cublaslt.transposed(x[:, :3].T)
    with pytest.raises(ValueError, match="copy it"):
        cublaslt.transposed(x[:, ::2])
    flat = torch.empty(512, dtype=torch.uint8)
    flat = flat[-flat.data_ptr() % 256 :]
    assert [cublaslt.alignment(flat[i:]) for i in (0, 2, 16, 64)] == [256, 2, 16, 64]
