"""The graph pass that has gradients of q, k and v written side by side: same numbers, no copy."""

import dataclasses

import pytest
import torch
from msfs_kernels import flash_attention
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.compiling import compile_per_shape
from msfs_functional.joined_gradients import GradientsSideBySide
from msfs_functional.models.decoder import decoder, fuse, gpt2
from msfs_functional.transforms import value_and_grad

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


def rewritten(fn, args: list[Tensor]) -> tuple[torch.fx.GraphModule, bool]:
    """The graph after the pass, and whether gradients are joined in it, and nothing copied."""
    module = make_fx(fn, tracing_mode="fake")(*args)
    GradientsSideBySide(everywhere=True)(module.graph)
    module.graph.lint()
    module.recompile()
    names = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    joined = any("attention_backward_joined" in name for name in names)
    assert any("aten.cat" in name for name in names) != joined
    return module, joined


@pytest.mark.parametrize(
    "options, joined",
    [({}, True), ({"kv_heads": 1}, True), ({"turn": True}, False)],
    ids=["heads", "grouped heads", "something in between"],
)
def test_gradients_are_joined_where_one_product_made_the_heads(options, joined):
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(size, generator=generator) for size in SIZES]
    run = lambda *args: gradients(*args, **options)  # noqa: E731
    module, found = rewritten(run, args)
    assert found == joined
    torch.testing.assert_close(module(*args), run(*args))


def test_gradients_of_the_members_of_an_ensemble_are_joined_too():
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn((3, *size), generator=generator) for size in SIZES]

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(x.detach().requires_grad_() for x in args)
        out = torch.func.vmap(attend)(*args)
        return out, *torch.autograd.grad(out, args, torch.ones_like(out).cumsum(-1))

    module, found = rewritten(run, args)
    assert found
    torch.testing.assert_close(module(*args), run(*args))


@pytest.mark.gpu
def test_a_compiled_fused_block_is_as_exact_as_an_eager_plain_one():
    """On a GPU, where the pass is at work, with gains moved into matrices, in bfloat16."""
    shape = gpt2(300, width=128, depth=1, heads=2, hidden=256, max_length=256, fused=True)
    params = {name: 3 * x for name, x in decoder(shape).init(0, device="cuda").items()}
    tokens = torch.randint(300, (4, 256), device="cuda")
    some = torch.randn(4, 256, 128, device="cuda")

    def gradient(dtype, shape, implementation, compiled):
        model = decoder(shape)
        own = {name: x.to(dtype) for name, x in params.items()}
        if not shape.fused:
            own = {name: x.to(dtype) for name, x in unfused.items()}
        options = {"method": "hidden", "implementation": implementation}
        loss = lambda p, x: (model.apply(p, x, **options) * some).sum()  # noqa: E731
        fn = compile_per_shape(loss, False) if compiled else loss
        grads = value_and_grad(fn)(own, tokens)[1]
        return grads if shape.fused else fuse(grads)

    sizes = [128 * i for i in range(4)]
    unfused = dict(params)
    for last in ("weight", "bias"):
        joined = unfused.pop(f"blocks.0.attention.qkv.{last}")
        for part, start in zip("qkv", sizes, strict=False):
            unfused[f"blocks.0.attention.{part}.{last}"] = joined[start : start + 128]
    plain = dataclasses.replace(shape, fused=False)
    exact = gradient(torch.float64, plain, "reference", False)
    eager = gradient(torch.bfloat16, plain, "reference", False)
    found = gradient(torch.bfloat16, shape, "flash", True)
    for name, want in exact.items():
        error, usual = ((x[name].double() - want).norm() / want.norm() for x in (found, eager))
        assert error <= 2 * usual + 1e-3, (name, float(error), float(usual))
