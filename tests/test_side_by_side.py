"""Tensors side by side: where they lie changes no number and saves copies."""

from typing import Any

import optree
import pytest
import torch

from msfs_functional import checkpoint, optim, params, random
from msfs_functional.side_by_side import address, joined, lay, memory_order, parts
from msfs_functional.train import init_state, make_step

SHAPES = {"matrix": (4, 8), "odd": (7,), "scalar": (), "bias": (16,)}


def tensors(lead=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(lead + s, generator=generator).to(dtype) for s in SHAPES.values()]


@pytest.mark.parametrize("lead", [0, 1])
def test_what_is_laid_can_be_joined_without_a_copy(lead):
    apart = tensors((3,) * lead)
    beside = lay(apart, lead)
    whole = joined(beside, lead)
    assert whole is not None and address(whole) == address(beside[2])
    assert whole.shape == (3,) * lead + (32 + 7 + 1 + 16,)
    torch.testing.assert_close(parts(whole, apart, lead), apart, rtol=0, atol=0)
    assert memory_order(beside[::-1], lead) == [3, 2, 1, 0]
    assert joined(beside[::-1], lead) is None and joined(apart, lead) is None
    assert joined(beside[:1] + beside[2:], lead) is None, "a gap"


def loss_fn(trained, batch, key):
    low = params.cast(trained, torch.bfloat16)
    terms = [(x.float() * batch).sin().sum() for x in low.values()]
    return torch.stack(terms).sum() + random.normal(key, ()), {}


def ensemble(apart: bool) -> tuple[Any, Any]:
    """State and metrics of three steps; `apart` begins with copies that do not lie side by side."""
    optimizer = optim.adamw(0.1, weight_decay=0.1, decay=[("matrix", True), ("", False)])
    start = dict(zip(SHAPES, tensors((3,)), strict=True))
    state: Any = init_state(start, optimizer, random.split(random.key(0), 3), ema_decay=0.5)
    if apart:
        state = optree.tree_map(torch.clone, state, namespace="msfs_functional")
    step = make_step(loss_fn, optimizer, members=3, clip_norm=0.5, ema_decay=0.5, compile=False)
    metrics: Any = None
    for i in range(3):
        state, metrics = step(state, torch.tensor(1.0 + i))
    return state, metrics


def test_an_ensemble_computes_the_same_bits_side_by_side_and_apart():
    beside: Any = ensemble(False)
    apart: Any = ensemble(True)
    order = memory_order(list(beside[0].params.values()), 1)
    assert order and not memory_order(list(apart[0].params.values()), 1)
    same = optree.tree_map(torch.equal, beside, apart, namespace="msfs_functional")
    assert optree.tree_all(same, namespace="msfs_functional")


def test_gradients_of_a_cast_lie_as_its_arguments():
    laid = [x.requires_grad_() for x in lay(tensors((3,)), 1)]

    def loss(*xs):
        low = params.cast(dict(zip(SHAPES, xs, strict=True)), torch.bfloat16)
        return torch.stack([x.square().sum().float() for x in low.values()]).sum()

    grads = torch.autograd.grad(torch.func.vmap(loss)(*laid).sum(), laid)
    assert joined(grads, 1) is not None and grads[0].dtype == torch.float32
    torch.testing.assert_close(grads, [2 * x.bfloat16().float() for x in laid], rtol=0.01, atol=0)


def test_a_restored_ensemble_lies_side_by_side_again(tmp_path):
    state, _ = ensemble(False)
    checkpoint.save(tmp_path, 3, state)
    restored = checkpoint.load(tmp_path, state).state
    for tree in ("params", "ema"):
        where = [list(getattr(s, tree).values()) for s in (state, restored)]
        assert memory_order(where[0], 1) == memory_order(where[1], 1) is not None
        torch.testing.assert_close(*where, rtol=0, atol=0)
