"""The graph pass that takes ReLU into the products beside it: same numbers, fewer kernels.

That Inductor takes the result is shown in test_member_layers, for all passes in one compilation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.epilogues import ReluInProducts

aten = torch.ops.aten
SIZES = [(4, 6, 16), (32, 16), (32,), (16, 32), (16,)]  # x, W, b, V, c


def feed_forward(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w, b)), v, c)


def with_gradients(fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(x.detach().requires_grad_() for x in args)
        out = fn(*args)
        return out, *torch.autograd.grad(out, args, torch.ones_like(out).cumsum(-1))

    return run


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def rewritten(fn: Callable[..., Tensor], args: list[Tensor]) -> tuple[GraphModule, list[str]]:
    """The joint graph of fn and its gradients after the pass, and its operations."""
    table = get_decompositions([aten.threshold_backward])
    module = make_fx(with_gradients(fn), decomposition_table=table, tracing_mode="fake")(*args)
    ReluInProducts(everywhere=True)(module.graph)
    module.graph.lint()
    module.recompile()
    return module, [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def worst(found: tuple[Tensor, ...], args: list[Tensor]) -> float:
    """Largest error of value and gradients over that of the plain formula in the same dtype."""
    exact = with_gradients(feed_forward)(*(x.double() for x in args))
    plain = with_gradients(feed_forward)(*args)
    eps = torch.finfo(args[0].dtype).eps
    return max(
        float(((f - e).abs().max() / ((p - e).abs().max() + eps * e.abs().max())).detach())
        for f, p, e in zip(found, plain, exact, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_mask_and_bias_gradient_join_two_products(dtype):
    args = inputs(dtype)
    module, ops = rewritten(feed_forward, args)
    assert "aten._addmm_activation.default" in ops and "msfs_kernels.masked_product.default" in ops
    assert not {"aten.relu.default", "aten.where.self", "aten.le.Scalar"} & set(ops)
    assert ops.count("aten.sum.dim_IntList") == 1  # of the second layer's bias
    assert worst(module(*args), args) <= 2


def test_what_is_not_the_pattern_stays():
    def seen(x, w, b, v, c):  # someone else reads what the ReLU erases
        y = F.linear(x, w, b)
        return F.linear(F.relu(y), v, c) + y.sum()

    def leaky(x, w, b, v, c):
        y = F.linear(x, w, b)
        return F.linear(torch.where(y <= 0, 0.1, y), v, c)

    args = inputs(torch.float32)
    for fn in (seen, leaky):
        module, ops = rewritten(fn, args)
        assert "aten._addmm_activation.default" not in ops
        expected = with_gradients(fn)(*args)
        for ours, theirs in zip(module(*args), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16_a_training_step_takes_the_products():
    found = []

    class Seen(ReluInProducts):
        def __call__(self, graph):
            super().__call__(graph)
            found.extend(str(n.target) for n in graph.nodes)

    args = [x.cuda() for x in inputs(torch.bfloat16)]
    options = {"joint_custom_pre_pass": Seen()}
    compiled = torch.compile(feed_forward, fullgraph=True, dynamic=False, options=options)
    with torch._inductor.config.patch(force_disable_caches=True):  # what is kept calls no pass
        assert worst(with_gradients(compiled)(*args), args) <= 2
    if torch.cuda.get_device_capability()[0] == 9:
        assert "msfs_kernels.masked_product.default" in found
