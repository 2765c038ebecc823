"""A block's gains in its matrices by one kernel each way: the rewritten graph is the formula."""

import pytest
import torch
import torch.nn.functional as F
from graph_passes import Watched

from msfs_functional.compiling import inductor_options
from msfs_functional.gains_at_once import GainsAtOnce
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.models.decoder_block import gains_in_matrices

OPS = torch.ops.msfs_kernels
CONFIG = DecoderConfig(vocab=8, width=16, heads=2, hidden=32, depth=1, fused=True)


def layers(params, x):
    moved = gains_in_matrices(params, CONFIG)
    y = F.linear(x, moved["attention.qkv.weight"]).tanh()
    return F.linear(y[..., :16], moved["feed_forward.gate_up.weight"])


def gradients(fn, params, x):
    params = {name: value.detach().requires_grad_() for name, value in params.items()}
    y = fn(params, x)
    grads = torch.autograd.grad(y.float().square().sum(), list(params.values()))
    return [y.detach(), *grads]


@pytest.mark.parametrize("offset", [False, True])
def test_the_rewritten_graph_is_the_formula(offset):
    """With an offset (Gemma 2's) the gain is no input of the graph, which then stays."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "attention_norm.weight": (16,),
        "feed_forward_norm.weight": (16,),
        "attention.qkv.weight": (48, 16),
        "feed_forward.gate_up.weight": (64, 16),
    }
    params = {name: torch.randn(size, generator=generator) / 4 for name, size in shapes.items()}
    exact = gradients(layers, params, x := torch.randn(2, 8, 16, generator=generator))
    params = {name: value.bfloat16() for name, value in params.items()}

    def given(params, x):
        if offset:
            params = {n: v + 0.5 if n.endswith("norm.weight") else v for n, v in params.items()}
        return layers(params, x)

    watched = Watched(GainsAtOnce(everywhere=True))
    options = inductor_options() | {"joint_custom_pre_pass": watched}
    ours = gradients(torch.compile(given, options=options, fullgraph=True), params, x.bfloat16())
    assert watched.calls.count(OPS.scaled_columns.default) == (not offset)
    assert watched.calls.count(OPS.scaled_columns_gradient.default) == (not offset)
    plain = gradients(given, params, x.bfloat16())
    if offset:
        exact = gradients(given, {n: v.float() for n, v in params.items()}, x)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()
