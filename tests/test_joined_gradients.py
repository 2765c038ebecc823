"""The graph pass that has gradients of q, k and v written side by side: same numbers, no copy."""

import pytest
import torch
from msfs_kernels import flash_attention
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.joined_gradients import GradientsSideBySide

SIZES = [(2, 5, 8), (24, 8)]  # x; a matrix for 2 heads of 4 and as many keys, or 4 and 1 of each


def attend(x: Tensor, w: Tensor, kv_heads: int = 2, turn: bool = False) -> Tensor:
    heads = [6 - 2 * kv_heads, kv_heads, kv_heads]
    parts = (x @ w.T).split([4 * n for n in heads], -1)
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in parts)
    if turn:
        k = k.flip(-1)
    return flash_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def gradients(*args: Tensor, **options) -> tuple[Tensor, ...]:
    args = tuple(x.detach().requires_grad_() for x in args)
    out = attend(*args, **options)
    return out, *torch.autograd.grad(out, args, torch.ones_like(out).cumsum(-1))


@pytest.mark.parametrize(
    "options, joined",
    [({}, True), ({"kv_heads": 1}, True), ({"turn": True}, False)],
    ids=["heads", "grouped heads", "something in between"],
)
def test_gradients_are_joined_where_one_product_made_the_heads(options, joined):
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(size, generator=generator) for size in SIZES]
    run = lambda *args: gradients(*args, **options)  # noqa: E731
    module = make_fx(run, tracing_mode="fake")(*args)
    GradientsSideBySide(everywhere=True)(module.graph)
    module.graph.lint()
    module.recompile()
    names = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    assert any("attention_backward_joined" in name for name in names) == joined
    assert any("aten.cat" in name for name in names) != joined
    torch.testing.assert_close(module(*args), run(*args))
