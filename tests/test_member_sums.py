"""The graph pass that sums gradients of an ensemble's biases and norms over rows by a kernel."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.member_sums import MemberSums

aten = torch.ops.aten
DECOMPOSED = [aten.native_layer_norm, aten.native_layer_norm_backward]


def layer(x: Tensor, w: Tensor, b: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return x + F.layer_norm(F.linear(x, w, b), (8,), gain, shift)


def without_shift(x: Tensor, w: Tensor, b: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(F.linear(x, w), (8,), gain)


@pytest.mark.parametrize(
    "fn, ops, dtype",
    [
        (layer, ["members_norm_sums", "members_sums"], torch.float32),
        (layer, ["members_norm_sums", "members_sums"], torch.bfloat16),
        (without_shift, ["members_norm_sums"], torch.float32),
    ],
)
def test_gradients_of_bias_and_norm_are_sums_by_the_kernel(fn, ops, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 2, 70, 8), (3, 8, 8), (3, 8), (3, 8), (3, 8)]
    args = [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    def run(*args: Tensor) -> tuple[Tensor | None, ...]:
        args = tuple(x.detach().requires_grad_() for x in args)
        out = torch.func.vmap(fn)(*args)
        seed = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        return torch.autograd.grad(out, args, seed, allow_unused=True)

    table: Any = get_decompositions(DECOMPOSED)
    module = make_fx(run, decomposition_table=table, tracing_mode="fake")(*args)
    MemberSums(everywhere=True)(module.graph)
    module.graph.lint()
    module.recompile()
    found = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert sorted(str(t).split(".")[1] for t in found if "members" in str(t)) == sorted(ops)
    bound = {"rtol": 3e-2, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(module(*args), run(*args), **bound)


def test_other_sums_stay_as_they_are():
    def run(x: Tensor) -> tuple[Tensor, ...]:
        return x.sum(0), x.sum(-1), x.sum((0, 1)), x[:1].sum(1), x.sum(1, dtype=torch.float64)

    module = make_fx(run, tracing_mode="fake")(torch.ones(3, 700, 8))
    MemberSums(everywhere=True)(module.graph)
    assert not [n for n in module.graph.nodes if "members" in str(n.target)]
