"""Claims of msfs_functional.leafwise, through the training step that runs it."""

import optree
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from msfs_functional import leafwise, optim, params, random, schedules
from msfs_functional.train import init_state, make_step

SHAPES = {"weight": (8, 10), "bias": (8,), "wide": (4, 32), "odd": (3, 5), "scalar": ()}
EVERY = {
    "adamw": lambda: optim.adamw(schedules.cosine(1e-2, 50), decay=[("bias", False), ("", True)]),
    "nesterov": lambda: optim.sgd(1e-2, 0.9, nesterov=True, weight_decay=0.1),
    "lion": lambda: optim.lion(1e-3),
    "muon": lambda: optim.muon(1e-2, dtype=torch.float32),
    "adafactor": lambda: optim.adafactor(schedules.constant(1e-2), weight_decay=0.1),
    "groups": lambda: optim.by_group([("bias", optim.adamw(0.1)), ("", optim.lion(1e-3))]),
}


@pytest.fixture
def counter(monkeypatch, compile_with):
    monkeypatch.setattr(random, "fold_in", lambda key, data: key + data)
    return compile_with(CompileCounterWithBackend("eager"))


def draw(layers=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        f"{i}.{name}": torch.randn(shape, generator=g).to(dtype)
        for i in range(layers)
        for name, shape in SHAPES.items()
    }


def loss_fn(params, batch, key):
    terms = [(p.float() * batch).sin().sum() for p in params.values()]
    return torch.stack(terms).sum(), {"weight": batch}


def run(optimizer, compile, steps=3, members=None, dtype=torch.float32, **options):
    start, key = draw(dtype=dtype), random.key(0)
    if members is not None:
        start, key = params.stack([draw()] * members), torch.stack([key] * members)
        start = {
            name: p + torch.arange(members).reshape(-1, *[1] * (p.ndim - 1))
            for name, p in start.items()
        }
    state = init_state(start, optimizer, key, ema_decay=0.9)
    options |= {"ema_decay": 0.9, "members": members, "compile": compile}
    step = make_step(loss_fn, optimizer, **options)
    for i in range(steps):
        state, metrics = step(state, torch.tensor([1.0 + i, 2.0 + i, torch.nan][i]))
    return state, metrics


def assert_same(one, other):
    pairs = zip(
        *(optree.tree_leaves(x, namespace="msfs_functional") for x in (one, other)), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name, donate", [*((name, True) for name in EVERY), ("groups", False)])
def test_update_by_leaf_equals_update_of_the_tree(counter, name, donate):
    """Clipped, averaged, guarded; a step that is not finite leaves every count where it was."""
    options = {"clip_norm": 0.5, "donate": donate}
    assert_same(run(EVERY[name](), True, **options), run(EVERY[name](), False, **options))


def test_update_by_leaf_of_an_ensemble_equals_that_of_the_tree(counter):
    options = {"clip_norm": 0.5, "members": 3}
    assert_same(run(optim.lion(1e-3), True, **options), run(optim.lion(1e-3), False, **options))


def test_narrow_parameters_keep_wide_moments(counter):
    state, _ = run(EVERY["adamw"](), True, dtype=torch.bfloat16)
    assert_same(state, run(EVERY["adamw"](), False, dtype=torch.bfloat16)[0])


def test_number_of_graphs_does_not_grow_with_the_number_of_parameters(counter):
    graphs = []
    for layers in (1, 6):
        counter.frame_count = 0
        state = init_state(draw(layers), optim.adamw(schedules.constant(1e-3)), random.key(0))
        step = make_step(loss_fn, optim.adamw(schedules.constant(1e-3)), clip_norm=1.0)
        for _ in range(3):
            state, _ = step(state, torch.tensor(1.0))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


def test_regions_start_without_graphs_for_little_parameters_and_what_all_share(
    counter, monkeypatch
):
    """With the same numbers; weights, which decay, are one kind and biases the other."""
    monkeypatch.setattr(leafwise, "FEW", 0.1)
    state, graphs = {}, {}
    for compile in (True, "regions", False):
        counter.frame_count = 0
        state[compile] = run(EVERY["adamw"](), compile, clip_norm=0.5)
        graphs[compile] = counter.frame_count
    assert_same(state["regions"], state[False])
    loss, shared, biases = 1, 1, 1  # a loss of no regions is no graph either
    assert graphs["regions"] == graphs[True] - loss - shared - biases


def test_clipping_in_the_step_equals_clipping_in_the_optimizer():
    chained = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2))
    one = run(chained, False, clip_norm=None)
    assert_same(one, run(optim.adamw(1e-2), False, clip_norm=0.5))
    with pytest.raises(ValueError, match=r"clip_norm \(0.0\) must be positive"):
        make_step(loss_fn, optim.adamw(1e-2), clip_norm=0.0)


def test_a_rule_that_matches_no_parameter_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="'typo' matches none"):
        optim.adamw(1e-2, decay=[("typo", False), ("", True)]).init(draw())
