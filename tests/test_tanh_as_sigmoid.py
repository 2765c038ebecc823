"""GELU's tangent becomes a sigmoid in compiled graphs: equal values, nothing more is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from msfs_functional.tanh_as_sigmoid import TanhAsSigmoid

aten = torch.ops.aten


class Watched(CustomGraphPass):
    """The pass, and how many of two operations it leaves in each graph."""

    def __init__(self):
        self.seen = []

    def uuid(self):
        return get_hash_for_files((__file__,), str(id(self)))

    def __call__(self, graph):
        TanhAsSigmoid()(graph)
        graph.lint()
        calls = [node.target for node in graph.nodes if node.op == "call_function"]
        targets = aten.tanh.default, aten.sigmoid.default
        self.seen.append(tuple(calls.count(target) for target in targets))


def compiled(fn):
    watched = Watched()
    options = {"post_grad_custom_pre_pass": watched}
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, options=options), watched.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_and_its_gradient_are_as_exact_as_torchs(dtype):
    def value_and_grad(fn, x):
        x = x.detach().requires_grad_()
        y = fn(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    fn, seen = compiled(gelu)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4])])
    x = x.to(dtype)
    for ours, theirs, exact in zip(
        value_and_grad(fn, x),
        value_and_grad(gelu, x),
        value_and_grad(gelu, x.double()),
        strict=True,
    ):
        error = (theirs - exact).abs().max()
        assert (ours - exact).abs().max() <= 2 * error
        assert ours.isfinite().all()
    assert seen == [(0, 1), (0, 1)]


def test_a_tangent_that_is_no_gelus_stays():
    def cap(x):
        return 30 * torch.tanh(x / 30) + x

    fn, seen = compiled(cap)
    x = torch.linspace(-100, 100, 99)
    torch.testing.assert_close(fn(x), cap(x))
    assert seen == [(1, 0)]
