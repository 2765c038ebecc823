"""The graph pass that takes bias and ReLU of an ensemble's layers into their products."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from graph_passes import Watched
from msfs_kernels import flash_attention
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.epilogues import ReluInProducts
from msfs_functional.joined_gradients import GradientsSideBySide
from msfs_functional.member_layers import MemberLayers
from msfs_functional.member_sums import MemberSums
from msfs_functional.transposed_products import TransposedProducts

SIZES = [(3, 2, 5, 8), (3, 24, 8), (3, 24)]  # x, W, b of three members


def attend(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in F.linear(x, w, b).chunk(3, -1))
    return cast(Tensor, flash_attention(q, k, v))


def activate(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.linear(x, w, b))


def feed_forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(activate(x, w, b), w.T, b[:8])


def add_elsewhere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).sin()


def rewritten(fn, args: list[Tensor]):
    """fn of members with its gradients, the graph after the pass, and how often it rewrote."""

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(x.detach().requires_grad_() for x in args)
        out = torch.func.vmap(fn)(*args)
        return out, *torch.autograd.grad(out, args, torch.ones_like(out).cumsum(-1))

    table: Any = get_decompositions([torch.ops.aten.threshold_backward])
    module = make_fx(run, decomposition_table=table, tracing_mode="fake")(*args)
    MemberLayers(everywhere=True)(module.graph)
    module.graph.lint()
    module.recompile()
    ops = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    return run, module, sum("members_linear" in op for op in ops), ops


@pytest.mark.parametrize("fn, times", [(attend, 1), (activate, 1), (add_elsewhere, 0)])
def test_layers_before_attention_and_relu_are_one_product(fn, times):
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(size, generator=generator) for size in SIZES]
    run, module, found, ops = rewritten(fn, args)
    assert found == times
    assert fn is not activate or "aten.relu.default" not in ops
    torch.testing.assert_close(module(*args), run(*args))


def test_mask_and_bias_gradient_of_a_relu_join_the_product_behind_it():
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(size, generator=generator) for size in SIZES]
    run, module, _, ops = rewritten(feed_forward, args)
    assert any("members_masked_product" in op for op in ops)
    assert not {"aten.relu.default", "aten.where.self", "aten.le.Scalar"} & set(ops)
    assert ops.count("aten.sum.dim_IntList") == 1  # of the second layer's bias
    torch.testing.assert_close(module(*args), run(*args))


def test_inductor_takes_what_all_passes_make_of_an_ensemble():
    def members(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            y = attend(x, w, b).transpose(1, 2).flatten(-2)
            return feed_forward(F.layer_norm(y, (8,), b[:8], b[8:16]), w, b)

        return torch.func.vmap(one)(x, w, b) + feed_forward(x[0], w[0], b[0])

    def with_gradients(fn) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        args = [torch.randn(size, generator=generator).double() for size in SIZES]
        args = [x.requires_grad_() for x in args]
        out = fn(*args)
        return out, *torch.autograd.grad(out.square().sum(), args)

    passes = Watched(
        ReluInProducts(True), MemberLayers(True), GradientsSideBySide(True), TransposedProducts(),
        MemberSums(True),
    )  # fmt: skip
    options: Any = {"joint_custom_pre_pass": passes}
    compiled = torch.compile(members, fullgraph=True, dynamic=False, options=options)
    # Sums over rows of the products with a mask are in float32.
    torch.testing.assert_close(
        with_gradients(compiled), with_gradients(members), rtol=1e-5, atol=1e-5
    )
    ops = {str(call).split(".")[1] for call in passes.calls if "msfs" in str(call)}
    assert ops >= {
        "masked_product",
        "members_linear", "members_masked_product", "attention", "attention_backward_joined",
        "members_sums", "members_norm_sums",
    }  # fmt: skip
