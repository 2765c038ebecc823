"""Advantages and policy losses equal hand-worked numbers."""

import pytest
import torch

from msfs_functional.ppo import gae, group_advantages, leave_one_out_advantages, policy_loss


def test_gae_of_a_hand_worked_row_with_a_gap():
    mask = torch.tensor([[True, False, True, True]])
    rewards, values = torch.tensor([[1.0, 9.0, 1.0, 1.0]]), torch.tensor([[0.0, 9.0, 2.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert advantages.tolist() == [[1.75, 0.0, -0.5, 1.0]]
    assert returns.tolist() == [[1.75, 0.0, 1.5, 1.0]]


def test_advantages_of_a_constant_reward_are_zero():
    assert not group_advantages(torch.full((4,), 0.5), 2).any()
    assert not leave_one_out_advantages(torch.full((4,), 0.5), 2).any()


def test_the_clip_cuts_the_gradient_of_a_hand_worked_token():
    logps = torch.tensor([[1.5]]).log().requires_grad_()
    out = policy_loss(logps, torch.zeros(1, 1), torch.tensor([2.0]), torch.tensor([[True]]))
    torch.testing.assert_close(out.losses, torch.tensor([[-2.4]]))
    assert out.clipped.all() and not torch.autograd.grad(out.losses.sum(), logps)[0].any()


def test_groups_of_one_are_refused():
    with pytest.raises(ValueError, match=r"size \(1\) must be at least 2"):
        group_advantages(torch.zeros(4), 1)
