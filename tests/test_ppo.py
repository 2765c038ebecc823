"""Advantages, penalties and losses of PPO and its relatives, against loops and worked numbers."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import grad, vmap

from msfs_functional import masked, ppo
from msfs_functional.advantages import (
    discounted_returns,
    explained_variance,
    gae,
    group_advantages,
    leave_one_out_advantages,
    token_rewards,
)

B, T = 4, 9


def draw(seed=0, *shape, dtype=torch.float64):
    return torch.randn(shape or (B, T), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_mask(seed=1):
    """Gaps, a row without tokens, and one with all."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0], mask[1] = True, False
    return mask


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]]).expand(B, T)


def loop_gae(rewards, values, mask, segments, gamma, lam):
    """Equation 16 of Schulman et al. 2016, token by token from the end."""
    advantages = torch.zeros_like(rewards)
    for b in range(B):
        following: dict[int, tuple] = {}
        for t in reversed(range(T)):
            if mask[b, t]:
                value, advantage = following.get(int(segments[b, t]), (0.0, 0.0))
                delta = rewards[b, t] + gamma * value - values[b, t]
                advantages[b, t] = delta + gamma * lam * advantage
                following[int(segments[b, t])] = values[b, t], advantages[b, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.5, 0.0), (1.0, 1.0)])
def test_gae_equals_the_loop_over_gaps_and_packed_rows(gamma, lam, packed):
    rewards, values, mask = draw(0), draw(1), draw_mask()
    segments = SEGMENTS if packed else torch.zeros(B, T, dtype=torch.long)
    given = {"segment_ids": SEGMENTS} if packed else {}
    found = gae(rewards, values, mask, gamma=gamma, lam=lam, **given)
    expected = loop_gae(rewards, values, mask, segments, gamma, lam)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_returns_are_gae_without_values(packed):
    rewards, mask = draw(0), draw_mask()
    given = {"segment_ids": SEGMENTS} if packed else {}
    zeros = torch.zeros_like(rewards)
    found = discounted_returns(rewards, mask, gamma=0.8, **given)
    expected, _ = gae(rewards, zeros, mask, gamma=0.8, lam=1.0, **given)
    torch.testing.assert_close(found, expected)


def test_gae_of_a_hand_worked_row_with_a_gap():
    mask = torch.tensor([[True, False, True, True]])
    rewards, values = torch.tensor([[1.0, 9.0, 1.0, 1.0]]), torch.tensor([[0.0, 9.0, 2.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert advantages.tolist() == [[1.75, 0.0, -0.5, 1.0]]
    assert returns.tolist() == [[1.75, 0.0, 1.5, 1.0]]


def test_what_stands_at_masked_tokens_changes_nothing_nan_included():
    mask = draw_mask()
    spoiled = [torch.where(mask, draw(i), torch.nan) for i in range(4)]
    clean = [torch.where(mask, draw(i), 7.0) for i in range(4)]

    def everything(logps, old, rewards, values):
        yield from gae(rewards, values, mask)
        yield discounted_returns(rewards, mask)
        yield masked.whiten(rewards, mask)
        yield masked.average(rewards, mask, over="sequences")
        yield ppo.policy_loss(logps, old, rewards, mask, level="mean").losses
        yield ppo.value_loss(values, old, rewards, mask)
        yield ppo.importance_weights(logps, old, mask)
        yield explained_variance(values, rewards, mask)
        kl = ppo.kl_estimate(logps, old)
        yield token_rewards(torch.ones(B).double(), mask, kl=kl, kl_coefficient=0.1)

    for a, b in zip(everything(*spoiled), everything(*clean), strict=True):
        assert torch.equal(a, b)


def test_averages_of_hand_worked_losses():
    losses = torch.tensor([[1.0, 3.0, 9.0], [8.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked.average(losses, mask) == 4.0
    assert masked.average(losses, mask, over="sequences") == 5.0
    assert masked.average(losses, mask, over="constant", length=4) == 1.0
    assert masked.masked_mean(losses, torch.zeros_like(mask)) == 0.0


def test_whitened_numbers_have_mean_zero_and_variance_one_or_keep_their_mean():
    x, mask = 3 * draw() + 5, draw_mask()
    white = masked.whiten(x, mask)
    torch.testing.assert_close(white[mask].mean(), torch.zeros(()).double())
    torch.testing.assert_close(white[mask].var(), torch.ones(()).double())
    assert not white[~mask].any()
    kept = masked.whiten(x, mask, centre=False)
    torch.testing.assert_close(kept[mask].mean(), x[mask].mean())


def test_estimators_average_to_the_divergence_and_their_gradients_are_as_stated():
    """All tokens of a small vocabulary, weighted by the policy, in place of samples."""
    logits, reference = draw(0, 5), draw(1, 5).log_softmax(-1)

    def expectation(logits, estimator):
        logps = logits.log_softmax(-1)
        return (logps.detach().exp() * ppo.kl_estimate(logps, reference, estimator)).sum()

    def divergence(p, q):
        return (p.exp() * (p - q)).sum()

    logps = logits.log_softmax(-1)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(expectation(logits, estimator), divergence(logps, reference))
    assert (ppo.kl_estimate(logps, reference, "k2") >= 0).all()
    assert (ppo.kl_estimate(logps, reference, "k3") >= 0).all()
    forward = grad(lambda x: divergence(x.log_softmax(-1), reference))(logits)
    backward = grad(lambda x: divergence(reference, x.log_softmax(-1)))(logits)
    for estimator, expected in {"k1": 0 * logits, "k2": forward, "k3": backward}.items():
        torch.testing.assert_close(grad(expectation)(logits, estimator), expected)


def test_coefficient_rises_above_the_target_and_falls_below_it():
    next_of = lambda kl: ppo.adaptive_kl_coefficient(  # noqa: E731
        torch.tensor(0.2), torch.tensor(kl), target=6.0, horizon=100.0, items=10
    )
    torch.testing.assert_close(next_of(6.6), torch.tensor(0.2 * (1 + 0.1 * 0.1)))
    torch.testing.assert_close(next_of(60.0), torch.tensor(0.2 * 1.02))
    torch.testing.assert_close(next_of(0.0), torch.tensor(0.2 * 0.98))
    torch.testing.assert_close(next_of(6.0), torch.tensor(0.2))


def test_score_stands_at_the_last_token_of_each_sequence():
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    found = token_rewards(torch.tensor([5.0, 7.0]), mask, kl=kl, kl_coefficient=0.5)
    assert found.tolist() == [[0.0, -0.5, 4.0, 0.0], [-0.5, -0.5, -0.5, 6.5]]
    segments = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    scores = torch.tensor([[5.0, 0.0], [1.0, 2.0]])
    found = token_rewards(scores, mask, segment_ids=segments)
    assert found.tolist() == [[0.0, 0.0, 5.0, 0.0], [0.0, 1.0, 0.0, 2.0]]


def test_group_advantages_of_hand_worked_scores():
    scores = torch.tensor([1.0, 3.0, 0.0, 0.0])
    root = 1 / (math.sqrt(2) + 1e-4)
    expected = torch.tensor([-root, root, 0.0, 0.0])
    torch.testing.assert_close(group_advantages(scores, 2), expected)
    assert group_advantages(scores, 2, scale="none").tolist() == [-1, 1, 0, 0]
    assert leave_one_out_advantages(scores, 2).tolist() == [-2, 2, 0, 0]
    assert leave_one_out_advantages(torch.tensor([3.0, 0.0, 0.0]), 3).tolist() == [
        3,
        -1.5,
        -1.5,
    ]


def test_advantages_of_a_constant_reward_are_zero():
    assert not group_advantages(torch.full((4,), 0.5), 2).any()
    assert not leave_one_out_advantages(torch.full((4,), 0.5), 2).any()


@pytest.mark.parametrize("ratio, advantage, loss, cut", [
    (1.5, 2.0, -2.4, True), (1.1, 2.0, -2.2, False), (0.5, 2.0, -1.0, False),
    (0.5, -2.0, 1.6, True), (1.5, -2.0, 3.0, False),
])  # fmt: skip
def test_the_clip_cuts_the_gradient_only_where_it_bites(ratio, advantage, loss, cut):
    logps = torch.tensor([[ratio]]).log().requires_grad_()
    out = ppo.policy_loss(
        logps, torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([[True]])
    )
    torch.testing.assert_close(out.losses, torch.tensor([[loss]]))
    slope = torch.autograd.grad(out.losses.sum(), logps)[0]
    torch.testing.assert_close(slope, torch.tensor([[0.0 if cut else loss]]))
    assert out.clipped.item() is cut
    torch.testing.assert_close(out.ratio, torch.tensor([[ratio]]))


def test_clip_higher_and_no_clip():
    mask, advantages = torch.tensor([[True]]), torch.tensor([1.0])
    logps, old = torch.tensor([[1.5]]).log(), torch.zeros(1, 1)
    for options, loss in (({"clip_high": 0.4}, -1.4), ({"clip": None}, -1.5)):
        out = ppo.policy_loss(logps, old, advantages, mask, **options)
        torch.testing.assert_close(out.losses, torch.tensor([[loss]]))


def test_without_a_change_of_policy_the_gradient_is_that_of_reinforce():
    logps, advantages, mask = draw(0).requires_grad_(), draw(1), draw_mask()
    out = ppo.policy_loss(logps, logps.detach(), advantages, mask)
    slope = torch.autograd.grad(out.losses.sum(), logps)[0]
    torch.testing.assert_close(slope, torch.where(mask, -advantages, 0.0))


def test_ratios_of_sequences_and_their_means_are_those_of_the_rows():
    logps, old, mask = draw(0), draw(1), draw_mask()
    whole = ppo.log_ratio(logps, old, mask, level="sequence")
    mean = ppo.log_ratio(logps, old, mask, level="mean")
    for b in range(B):
        difference = (logps - old)[b][mask[b]]
        torch.testing.assert_close(whole[b][mask[b]], difference.sum().expand(len(difference)))
        torch.testing.assert_close(mean[b][mask[b]], difference.mean().expand(len(difference)))


@pytest.mark.parametrize("level", ["token", "sequence", "mean"])
def test_gradients_of_policy_and_value_losses_by_finite_differences(level):
    mask = draw_mask()
    logps, old, advantages = 0.1 * draw(0), 0.1 * draw(1), draw(2)
    loss = lambda x: ppo.policy_loss(x, old, advantages, mask, level=level).losses  # noqa: E731
    assert gradcheck(loss, logps.requires_grad_())
    loss = lambda x: ppo.value_loss(x, old, advantages, mask)  # noqa: E731
    assert gradcheck(loss, draw(3).requires_grad_())


def test_value_loss_is_the_worse_of_plain_and_clipped():
    values, old = torch.tensor([[2.0, 0.1, 2.0]]), torch.zeros(1, 3)
    returns, mask = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[True, True, True]])
    found = ppo.value_loss(values, old, returns, mask, clip=0.5)
    torch.testing.assert_close(found, torch.tensor([[1.125, 0.405, 4.5]]))
    found = ppo.value_loss(values, old, returns, mask, clip=None)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.405, 4.5]]))


def test_importance_weights_are_truncated_and_carry_no_gradient():
    logps = torch.tensor([[4.0, 1.5, 0.5, 1.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    weights = ppo.importance_weights(logps, torch.zeros(1, 4), mask)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.5, 0.5, 0.0]]))
    assert not weights.requires_grad


def test_entropy_of_equal_tokens_and_of_ruled_out_ones():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -torch.inf, -torch.inf]])
    expected = torch.tensor([math.log(4), math.log(2)])
    torch.testing.assert_close(ppo.entropy(logits), expected)
    assert grad(lambda x: ppo.entropy(x).sum())(logits).isfinite().all()


def test_explained_variance_of_a_perfect_and_of_a_constant_critic():
    returns, mask = draw(), draw_mask()
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(explained_variance(returns, returns, mask), one)
    constant = torch.full_like(returns, 3.0)
    torch.testing.assert_close(explained_variance(constant, returns, mask), 0 * one)


def test_a_sweep_over_clips_of_values_is_one_vmapped_call():
    logps, old, advantages, mask = draw(0), draw(1), draw(2), draw_mask()
    scaled = vmap(lambda s: ppo.policy_loss(logps, old, s * advantages, mask).losses)
    found = scaled(torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(found[1], 2 * found[0])


@pytest.mark.parametrize("call, said", [
    (lambda: group_advantages(torch.zeros(4), 1), r"size \(1\) must be at least 2"),
    (lambda: group_advantages(torch.zeros(5), 2), "whole groups"),
    (lambda: ppo.kl_estimate(torch.zeros(2), torch.zeros(3)), "must have the shape"),
    (lambda: ppo.kl_estimate(torch.zeros(2), torch.zeros(2), "k4"), "k4"),
    (lambda: gae(draw(), draw(), draw_mask(), gamma=1.5), r"gamma \(1.5\)"),
    (lambda: gae(draw(), draw(), draw_mask(), lam=-1.0), r"lam \(-1.0\)"),
    (lambda: gae(draw(), draw(0, 2, 2), draw_mask()), "values"),
    (lambda: masked.average(draw(), draw_mask(), over="rows"), "rows"),
    (lambda: masked.average(draw(), draw_mask(), over="constant"), "length"),
    (lambda: ppo.policy_loss(draw(), draw(), draw(), draw_mask(), clip=0.0), r"clip \(0.0\)"),
    (lambda: ppo.policy_loss(draw(), draw(), draw(0, 3), draw_mask()), "advantages"),
    (lambda: ppo.value_loss(draw(), draw(), draw(), draw_mask(), clip=-1.0), r"clip \(-1.0\)"),
    (lambda: ppo.importance_weights(draw(), draw(), draw_mask(), maximum=0.0), "maximum"),
    (lambda: token_rewards(torch.zeros(3), draw_mask()), "one a completion"),
    (lambda: ppo.log_ratio(draw(), draw(), draw_mask(), level="row"), "row"),
    (lambda: ppo.adaptive_kl_coefficient(
        torch.ones(()), torch.ones(()), target=0.0, horizon=1.0, items=1), r"target \(0.0\)"),
])  # fmt: skip
def test_bad_input_is_refused_with_value_and_remedy(call, said):
    with pytest.raises(ValueError, match=said):
        call()
