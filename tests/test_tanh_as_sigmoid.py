"""GELU's tangent becomes a sigmoid in compiled graphs: as exact as torch's own, on both ways."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.compiling import inductor_options
from msfs_functional.tanh_as_sigmoid import TanhAsSigmoid

aten = torch.ops.aten


def gelu(x):
    return F.gelu(x, approximate="tanh")


def value_and_grad(x):
    x = x.detach().requires_grad_()
    y = gelu(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def count(graph):
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    return calls.count(aten.tanh.default), calls.count(aten.sigmoid.default)


def rewritten(fn, x):
    """fn as Inductor sees it, after the pass."""
    traced = make_fx(fn, select_decomp_table(), tracing_mode="fake")(x)
    TanhAsSigmoid()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_and_its_gradient_are_as_exact_as_torchs(dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4])])
    x = x.to(dtype)
    traced = rewritten(value_and_grad, x)
    assert count(traced.graph) == (0, 2)
    results = traced(x), value_and_grad(x), value_and_grad(x.double())
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.isfinite().all() and ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_a_tangent_that_is_no_gelus_stays():
    x = torch.linspace(-100, 100, 99)

    def cap(x):
        return 30 * torch.tanh(x / 30) + 1

    traced = rewritten(cap, x)
    assert count(traced.graph) == (1, 0)
    torch.testing.assert_close(traced(x), cap(x))


def test_compiled_regions_have_it_in_forward_and_backward():
    seen, ours = [], TanhAsSigmoid.__call__

    class Watched(TanhAsSigmoid):
        def uuid(self):
            return get_hash_for_files((__file__,), str(id(self)))

        def __call__(self, graph):
            ours(self, graph)
            seen.append(count(graph))

    options = inductor_options()
    assert type(options["post_grad_custom_pre_pass"]) is TanhAsSigmoid
    options["post_grad_custom_pre_pass"] = Watched()
    compiled = torch.compile(gelu, options=options)
    x = torch.linspace(-3, 3, 7).requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, value_and_grad(x)[1])
    assert seen == [(0, 1), (0, 1)]
