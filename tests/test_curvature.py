"""Solves, influence and trust regions against explicit matrices and trainings to the end."""

import pytest
import torch
import torch.nn.functional as F
from ranks import DEVICE, mesh
from torch.func import grad, hessian

from msfs_functional import random, sharding
from msfs_functional.collectives import psum
from msfs_functional.curvature import influences, solve, trust_region_step
from msfs_functional.gathering import sharded
from msfs_functional.layouts import DECODER
from msfs_functional.models.decoder import decoder, tiny


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_solve_equals_the_matrix_inverse():
    a = draw(5, 5)
    a = a @ a.T
    v = {"x": draw(5, seed=1)}
    found = solve(lambda u: {"x": a @ u["x"]}, v, damping=0.1, steps=20)
    expected = torch.linalg.solve(a + 0.1 * torch.eye(5, dtype=a.dtype), v["x"])
    torch.testing.assert_close(found.x["x"], expected, atol=1e-6, rtol=1e-6)
    assert found.residual < 1e-5 and found.steps <= 7


def test_solve_stops_at_negative_curvature_instead_of_running_away():
    found = solve(lambda u: {"x": -u["x"]}, {"x": torch.ones(3)}, damping=0.0)
    assert found.steps == 1 and not found.x["x"].any()


def preference_loss(params, example):
    """DPO on a linear policy: what chosen and rejected differ in, times the weights."""
    return F.softplus(-(example @ params["w"])) + 0.05 * params["w"].square().sum()


def minimum(weights, examples):
    """The minimum of the weighted loss, by Newton's method."""
    w = torch.zeros(examples.shape[1], dtype=torch.float64)

    def total(w):
        losses = torch.vmap(lambda e: preference_loss({"w": w}, e))(examples)
        return (weights * losses).sum()

    for _ in range(30):
        w = w - torch.linalg.solve(hessian(total)(w), grad(total)(w))
    return w


def test_influence_predicts_what_training_with_one_more_weight_does():
    examples, held_out = draw(12, 3), draw(7, 3, seed=1)
    n = len(examples)
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    params = {"w": minimum(even, examples)}

    def target(w):
        return torch.vmap(lambda e: preference_loss({"w": w}, e))(held_out).mean()

    slope = {"w": grad(target)(params["w"])}
    found, solved = influences(
        preference_loss, params, examples, slope, damping=0.0, steps=10, chunk=5
    )
    assert solved.residual < 1e-6
    eps = 1e-5
    for i in range(n):
        more = even + eps * F.one_hot(torch.tensor(i), n)
        change = (target(minimum(more, examples)) - target(params["w"])) / eps
        torch.testing.assert_close(found[i], change, atol=1e-4, rtol=1e-3)


def policy(seed=0):
    states = draw(20, 4, seed=seed + 2)
    mask = torch.arange(20) < 15
    params = {"w": 0.3 * draw(6, 4, seed=seed)}
    tokens, advantages = torch.arange(20) % 6, draw(20, seed=seed + 1)
    logits_fn = lambda p: states @ p["w"].T  # noqa: E731
    old = logits_fn(params).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def surrogate(p):
        logps = logits_fn(p).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        return (((logps - old).exp() * advantages) * mask).sum() / mask.sum()

    return params, logits_fn, surrogate, mask


def test_trust_region_step_is_the_natural_gradient_of_the_explicit_fisher_matrix():
    params, logits_fn, surrogate, mask = policy()
    radius, damping = 1e-8, 1e-3
    out = trust_region_step(
        surrogate, logits_fn, params, mask, radius=radius, damping=damping, steps=200
    )
    old = logits_fn(params).log_softmax(-1)

    def kl(w):
        new = logits_fn({"w": w.view(6, 4)}).log_softmax(-1)
        return ((old.exp() * (old - new)).sum(-1) * mask).sum() / mask.sum()

    fisher = hessian(kl)(params["w"].flatten()) + damping * torch.eye(24, dtype=torch.float64)
    x = torch.linalg.solve(fisher, grad(surrogate)(params)["w"].flatten())
    step = x * (2 * radius / (x @ fisher @ x)).sqrt()
    moved = (out.params["w"] - params["w"]).flatten() / out.scale
    torch.testing.assert_close(moved, step, atol=1e-8, rtol=1e-3)


def test_trust_region_step_raises_the_surrogate_within_the_exact_kl():
    params, logits_fn, surrogate, mask = policy()
    out = trust_region_step(surrogate, logits_fn, params, mask, radius=0.05)
    assert out.scale > 0 and 0 < out.kl <= 0.05 and out.gain > 0
    again = surrogate(out.params) - surrogate(params)
    torch.testing.assert_close(out.gain, again)
    for radius in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"radius .* above 0"):
            trust_region_step(surrogate, logits_fn, params, mask, radius=radius)


def test_without_a_direction_nothing_moves():
    params, logits_fn, _, mask = policy()
    flat = lambda p: 0 * p["w"].sum()  # noqa: E731
    out = trust_region_step(flat, logits_fn, params, mask, radius=0.05)
    assert out.scale == 0 and out.params is params


def step_of_a_decoder(model, params, rows, total=lambda x: x):
    """A step on this process's rows of eight; what it found."""
    key = random.key(0, device=DEVICE)
    tokens = (random.uniform(key, (8, 7)) * 23).long()[rows]
    mask = torch.ones(8, 6, dtype=torch.bool, device=DEVICE).tril(3)[rows]  # other counts in halves
    advantages = random.normal(random.fold_in(key, 1), (8, 6))[rows].double()

    def logits_fn(params):
        return model.apply(params, tokens[:, :-1], implementation="reference")

    def logps(params):
        return logits_fn(params).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    with torch.no_grad():
        old, count = logps(params), total(mask.sum())

    def surrogate(params):
        return ((logps(params) - old).exp() * advantages * mask).sum() / count

    return trust_region_step(surrogate, logits_fn, params, mask, radius=0.01, steps=5, total=total)


def trust_region_of_shards():
    """Two processes with other rows each take the step of one that has them all."""
    own = decoder(tiny(23, width=12, depth=1, heads=2, kv_heads=1, hidden=10, max_length=8))
    whole = own.init(0, device=DEVICE, dtype=torch.float64)
    want = step_of_a_decoder(own, whole, slice(None))
    assert want.scale > 0
    for given in ({"dp_shard": 2}, {"dp_replicate": 2}):
        (axis,), on = given, mesh(**given)
        group, first = on.get_group(axis).group_name, 4 * on.get_local_rank(axis)
        found = step_of_a_decoder(
            sharded(own, DECODER, on),
            sharding.shard(whole, DECODER.rules, on),
            slice(first, first + 4),
            lambda x: psum(x, group),  # noqa: B023, called at once
        )
        for name, value in sharding.gather(found.params).items():
            torch.testing.assert_close(value, want.params[name], atol=1e-9, rtol=1e-7)
        for a, b in zip(found[1:], want[1:], strict=True):
            torch.testing.assert_close(a, b)


TWO = [trust_region_of_shards]  # for test_ranks
