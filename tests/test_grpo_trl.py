"""The GRPO family against TRL's own losses and advantages on the same tensors."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msfs_functional import masked, ppo
from msfs_functional import policy_variants as variants
from msfs_functional.advantages import group_advantages, leave_one_out_advantages

B, P, T = 4, 2, 5
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OVER: dict[str, Any] = {
    "grpo": "sequences",
    "sapo": "sequences",
    "dr_grpo": "constant",
    "luspo": "sums",
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(B, T, generator=generator, dtype=torch.float64)  # noqa: E731
    logps = (-2 + draw()).requires_grad_()
    old = logps.detach() + 0.3 * draw()
    entropies = draw().abs().requires_grad_()
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4])[:, None]
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.0], dtype=torch.float64)
    return logps, old, old + 0.1 + 0.2 * draw(), old + 0.5 * draw(), entropies, mask, advantages


def trl_loss(loss_type, trainer=None, **options):
    """TRL's own `_compute_loss`, on a stand-in for its trainer."""
    trainer = trainer or pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logps, old, sampler, reference, entropies, mask, advantages = tensors()
    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
        "entropy_target": 0.2,
    }
    own: dict[str, Any] = {
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "entropy_coef": 0.0,
    }
    for name, value in options.items():
        (args if name in args else own)[name] = value
    inputs = {
        "prompt_ids": torch.zeros(B, P, dtype=torch.long),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "sampling_per_token_logps": sampler,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": own.pop("importance_sampling_ratio", None),
    }
    accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        gather=lambda x: x,
        pad_across_processes=lambda x, **_: x,
        reduce=lambda x, reduction: x,
    )
    stand_in = SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(**args),
        aux_loss_enabled=False,
        loss_type=loss_type,
        current_gradient_accumulation_steps=1,
        max_completion_length=T,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
        **own,
    )
    for name in ("get_high_entropy_mask",):
        setattr(stand_in, name, getattr(trainer, name).__get__(stand_in))
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(stand_in, name, getattr(trainer, name))
    return trainer._compute_loss(stand_in, None, inputs), logps, entropies


def our_losses(loss_type, logps, old, advantages, mask, weights=None, **options):
    if loss_type == "cispo":
        return variants.cispo(logps, old, advantages, mask, most=0.28, **options).losses
    if loss_type == "sapo":
        return variants.sapo(logps, old, advantages, mask, **options).losses
    if loss_type == "vespo":
        options.pop("level", None)
        return variants.vespo(logps, old, advantages, mask, weights=weights, **options).losses
    return ppo.policy_loss(logps, old, advantages, mask, clip_high=0.28, **options).losses


def same(ours, theirs, logps, *inputs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    pairs = zip(
        torch.autograd.grad(ours, (logps, *inputs), retain_graph=True),
        torch.autograd.grad(theirs, (logps, *inputs)),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def average(loss_type, losses, mask):
    return masked.average(losses, mask, over=OVER.get(loss_type, "tokens"), length=T)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_of_the_family_equals_trl(loss_type, level):
    theirs, logps, _ = trl_loss(loss_type, importance_sampling_level=level)
    _, old, _, _, _, mask, advantages = tensors()
    ours: Any = "mean" if level == "sequence" else "token"
    losses = our_losses(loss_type, logps, old, advantages, mask, level=ours)
    same(average(loss_type, losses, mask), theirs, logps)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "vespo"])
def test_pull_to_the_reference_equals_trl(loss_type, corrected):
    theirs, logps, _ = trl_loss(loss_type, beta=0.3, use_bias_correction_kl=corrected)
    _, old, _, reference, _, mask, advantages = tensors()
    kl = ppo.kl_estimate(logps, reference, "k3")
    if corrected:  # the gradient of KL(policy || reference) without bias
        kl = kl * ppo.log_ratio(logps, old, mask).exp()
    losses = our_losses(loss_type, logps, old, advantages, mask) + 0.3 * kl
    same(average(loss_type, losses, mask), theirs, logps)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_geometric_mean_of_ratios_equals_trl(beta):
    trainer = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    theirs, logps, _ = trl_loss("grpo", trainer, beta=beta, epsilon_low=0.15, epsilon_high=0.25)
    _, old, _, reference, _, mask, advantages = tensors()
    out = variants.gmpo(logps, old, advantages, mask, clip=0.15, clip_high=0.25)
    assert out.clipped.any() and (mask & ~out.clipped).any()
    losses = out.losses + beta * ppo.kl_estimate(logps, reference, "k3")
    same(masked.average(losses, mask, over="sequences"), theirs, logps)


def test_the_distance_to_the_optimal_advantage_equals_trl():
    trainer = pytest.importorskip("trl.experimental.a2po.a2po_trainer").A2POTrainer
    logps, old, *_ = tensors()
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    values = variants.optimal_values(rewards, beta=0.5)
    by_hand = 0.5 * math.log((math.exp(2) + 1 + math.exp(1)) / 3)
    torch.testing.assert_close(values, torch.tensor([by_hand, 0.0], dtype=torch.float64))
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(beta2=0.2),
        _metrics={"eval": defaultdict(list)},
        _get_sequence_logps=lambda *_: logps.sum(-1)[:2],
    )
    inputs = dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep"))
    given = {"ref_logps": old.sum(-1)[:2], "rewards": rewards[:, 0], "v_star": values}
    theirs = trainer.compute_loss(stand_in, None, {**inputs, **given})
    ours = variants.a2po(logps.sum(-1)[:2], old.sum(-1)[:2], rewards[:, 0], values, beta=0.2)
    same(ours.mean(), theirs, logps)


def test_two_sided_clip_equals_trl():
    theirs, logps, _ = trl_loss("grpo", delta=1.3, epsilon_high=0.28)
    _, old, _, _, _, mask, advantages = tensors()
    losses = our_losses("grpo", logps, old, advantages, mask, most=1.3)
    same(average("grpo", losses, mask), theirs, logps)


def test_masks_of_stale_answers_and_of_uncertain_tokens_equal_trl():
    _, old, sampler, _, _, mask, advantages = tensors()
    theirs, logps, _ = trl_loss("bnpo", off_policy_mask_threshold=0.05)
    kept = variants.near_policy(logps, sampler, advantages, mask, threshold=0.05)
    assert kept.any() and (kept != mask).any()
    losses = our_losses("bnpo", logps, old, advantages, mask) * kept
    same(average("bnpo", losses, mask), theirs, logps)
    theirs, logps, entropies = trl_loss("bnpo", top_entropy_quantile=0.4)
    kept = variants.most_uncertain(entropies, mask, share=0.4)
    assert kept.any() and (kept != mask).any()
    losses = our_losses("bnpo", logps, old, advantages, mask) * kept
    same(average("bnpo", losses, mask), theirs, logps)


def test_entropy_bonus_equals_trl():
    theirs, logps, entropies = trl_loss("dapo", _entropy_bonus_enabled=True, entropy_coef=0.05)
    _, old, _, _, _, mask, advantages = tensors()
    ours = average("dapo", our_losses("dapo", logps, old, advantages, mask), mask)
    same(ours - 0.05 * masked.masked_mean(entropies, mask), theirs, logps, entropies)


def test_adaptive_entropy_goes_up_when_entropy_is_low_and_rests_when_it_is_high():
    entropies, mask = torch.full((2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool)
    adapt = variants.adaptive_entropy_coefficient
    assert adapt(0.1, entropies, mask, target=0.6) == pytest.approx((0.105, 0.105))
    assert adapt(0.1, entropies, mask, target=0.4) == pytest.approx((0.095, 0.0))
    assert adapt(1.0, entropies, mask, target=0.6, most=1.0)[0] == 1.0


@pytest.mark.parametrize("beyond", ["truncate", "drop"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_of_another_sampler_equal_trl(level, beyond):
    """The rule of TRL's rollout step, written out; then its loss with those weights."""
    _, old, sampler, _, _, mask, advantages = tensors()
    difference = (old - sampler) * mask
    ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
    if beyond == "truncate":
        ratio = ratio.clamp(0.8, 1.2)
    else:
        ratio = ratio.masked_fill((ratio < 0.8) | (ratio > 1.2), 0.0)
    options: Any = {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "importance_sampling_ratio": ratio,
    }
    weights = ppo.importance_weights(
        old, sampler, mask, minimum=0.8, maximum=1.2, level=level, beyond=beyond
    )
    theirs, logps, _ = trl_loss("dapo", **options)
    losses = our_losses("dapo", logps, old, advantages, mask) * weights
    same(average("dapo", losses, mask), theirs, logps)
    if level == "token":
        theirs, logps, _ = trl_loss("vespo", **options)
        losses = our_losses("vespo", logps, old, advantages, mask, weights=weights)
        same(average("vespo", losses, mask), theirs, logps)


def test_rloo_equals_trl():
    trainer = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    logps, old, _, _, entropies, mask, advantages = tensors()
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
    )
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :P],
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_logps": torch.where(mask, old, 0.0).sum(-1),
    }
    theirs = trainer._compute_loss(stand_in, None, inputs)
    out = ppo.policy_loss(logps, old, advantages, mask, clip=0.2, level="sequence")
    same(masked.average(out.losses, mask, over="sequences"), theirs, logps)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_rule_of_trl(scale):
    scores = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    groups = scores.view(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)).flatten()
    if scale != "none":
        std = scores.std() if scale == "batch" else groups.std(1).repeat_interleave(4)
        expected = expected / (std + 1e-4)
    torch.testing.assert_close(group_advantages(scores, 4, scale=scale), expected)
    left = (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(leave_one_out_advantages(scores, 4), (groups - left).flatten())


def test_masked_tokens_change_nothing_in_any_variant():
    logps, old, _, _, _, mask, advantages = tensors()
    for loss_type in LOSSES:
        plain = average(loss_type, our_losses(loss_type, logps, old, advantages, mask), mask)
        other = torch.where(mask, logps, math.nan)
        again = average(loss_type, our_losses(loss_type, other, old, advantages, mask), mask)
        torch.testing.assert_close(again, plain)
