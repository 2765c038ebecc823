"""Losses of reinforcement learning on completions, as a few functions to be combined.

    PPO          advantages.gae                           -> policy_loss + value_loss
    GRPO         advantages.group_advantages              -> policy_loss, average over="sequences"
    Dr. GRPO     the same, scale="none"                   -> policy_loss, average over="constant"
    RLOO         advantages.leave_one_out_advantages      -> policy_loss, ratio of sequences
    REINFORCE++  advantages.discounted_returns, whitened  -> policy_loss

with `kl_estimate` in the reward (through token_rewards) or added to the losses, and
`importance_weights` on the losses where the sampler's numbers differ from the trainer's.

All is plain tensors, so a rollout is any function and a policy any model. Arrays are (B, T) with a
mask that is True on the tokens the policy chose; what stands elsewhere changes nothing.

Dimension key: B rows, T tokens.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msfs_functional.checks import check_mask, same_shape

Level = Literal["token", "sequence", "mean"]


class PolicyLoss(NamedTuple):
    """Per-token losses, zero where masked; ratio new / old and where the clip bites, detached."""

    losses: Float[Tensor, "B T"]
    ratio: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]


def kl_estimate(
    logps: Float[Tensor, "..."],
    reference_logps: Float[Tensor, "..."],
    estimator: Literal["k1", "k2", "k3"] = "k3",
) -> Float[Tensor, "..."]:
    """KL(policy || reference) of each token from one sample of the policy, in nats.

        s = reference_logps - logps        k1 = -s        k2 = s^2 / 2        k3 = exp(s) - 1 - s

    k1 and k3 are unbiased in value, k2 and k3 never negative. In the reward use k1. As losses on
    samples of the policy their mean gradients are: k1 zero, k2 that of KL(policy || reference), k3
    that of KL(reference || policy).

    Raises:
        ValueError: shapes that do not fit, an unknown estimator.

    Source: Schulman 2020, "Approximating KL divergence"; k3 in the loss: Shao et al. 2024, eq. 4.
    """
    same_shape(logps=logps, reference_logps=reference_logps)
    s = reference_logps - logps
    if estimator == "k1":
        return -s
    if estimator == "k2":
        return s.square() / 2
    if estimator == "k3":
        return s.expm1() - s
    raise ValueError(f'estimator ({estimator!r}) must be "k1", "k2" or "k3"')


def adaptive_kl_coefficient(
    coefficient: Float[Tensor, ""],
    kl: Float[Tensor, ""],
    *,
    target: float,
    horizon: float,
    items: int,
) -> Float[Tensor, ""]:
    """The next KL coefficient: a proportional controller on the log scale.

        next = coefficient (1 + clip(kl / target - 1, -0.2, 0.2) items / horizon)

    Args:
        kl: measured, nats a sequence, as the target.
        items: sequences since the last update; horizon: the sequences over which a full error
            moves the coefficient by 20%.

    Raises:
        ValueError: target or horizon not above 0.

    Source: Ziegler et al. 2019, section 2.2.
    """
    for name, value in (("target", target), ("horizon", horizon)):
        if not value > 0:
            raise ValueError(f"{name} ({value}) must be above 0; for no control keep a constant")
    error = (kl / target - 1).clamp(-0.2, 0.2)
    return coefficient * (1 + error * items / horizon)


def log_ratio(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: Level = "token",
) -> Float[Tensor, "B T"]:
    """log pi / pi_old of each token, or of its whole row, the same at all of the row's tokens.

        token       PPO, GRPO            sequence    the sum over the row: exact, RLOO
        mean        the sum / length (Zheng et al. 2025, GSPO)

    Zeros where masked. Sequence levels take rows of one sequence.
    """
    check_mask(mask, logps, "logps")
    check_mask(mask, old_logps, "old_logps")
    difference = torch.where(mask, logps, 0.0) - torch.where(mask, old_logps, 0.0)
    if level == "token":
        return difference
    if level not in ("sequence", "mean"):
        raise ValueError(f'level ({level!r}) must be "token", "sequence" or "mean"')
    total = difference.sum(-1, keepdim=True)
    if level == "mean":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, total, 0.0)


def policy_loss(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    most: float | None = None,
    level: Level = "token",
) -> PolicyLoss:
    """The clipped surrogate, token by token: -min(ratio A, clip(ratio, 1 - e, 1 + e_high) A).

    Args:
        logps: of the policy; old_logps: of the policy that the completions came from.
        advantages: (B, T), or (B,) for one a sequence; no gradient flows into them.
        clip: e in (0, 1); None for the plain ratio-weighted policy gradient.
        clip_high: e_high where it differs (Yu et al. 2025, clip-higher).
        most: largest ratio of all, above 1 + e_high; bounds the loss of bad answers too, which the
            clip leaves open (two-sided clipping, Prime Intellect 2025, section 3.4).
        level: of the ratio, see `log_ratio`.

    Returns:
        losses to `average`, the ratio, and where its gradient is cut.

    Raises:
        ValueError: shapes that do not fit, options out of range.

    Source: Schulman et al. 2017, equation 7.
    """
    advantages = per_token(advantages, mask).detach()
    ratio = log_ratio(logps, old_logps.detach(), mask, level=level).exp()
    plain = -ratio * advantages
    if clip is None:
        cut = torch.zeros_like(mask)
        return PolicyLoss(torch.where(mask, plain, 0.0), ratio.detach(), cut)
    high = clip if clip_high is None else clip_high
    if not 0 < clip < 1 or not high > 0:
        raise ValueError(
            f"clip ({clip}) must be in (0, 1) and clip_high ({high}) above 0: None for no clipping"
        )
    if most is not None:
        if not most > 1 + high:
            raise ValueError(f"most ({most}) must be above 1 + clip_high ({1 + high}), or None")
        plain = -ratio.clamp(max=most) * advantages
    bounded = -ratio.clamp(1 - clip, 1 + high) * advantages
    losses = torch.where(mask, torch.maximum(plain, bounded), 0.0)
    return PolicyLoss(losses, ratio.detach(), mask & (bounded > plain).detach())


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, "B T"]:
    """Half the squared error of the values, the worse of plain and clipped; zero where masked.

        max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2

    Args:
        clip: e above 0, in units of the rewards; None for the plain squared error.

    Raises:
        ValueError: shapes that do not fit, a clip not above 0.
    """
    for name, x in (("values", values), ("old_values", old_values), ("returns", returns)):
        check_mask(mask, x, name)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip ({clip}) must be above 0: None for no clipping")
    values, old_values, returns = (
        torch.where(mask, x, 0.0) for x in (values, old_values.detach(), returns.detach())
    )
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def importance_weights(
    logps: Float[Tensor, "B T"],
    sampler_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    maximum: float = 2.0,
    minimum: float = 0.0,
    level: Level = "token",
    beyond: Literal["truncate", "drop"] = "truncate",
) -> Float[Tensor, "B T"]:
    """pi / sampler in bounds, to multiply losses of completions that something else sampled.

    The sampler is the same policy in other arithmetic, or an older one; bounds keep the variance
    finite at the price of a bias (Ionides 2008; Yao et al. 2025). No gradient.

    Args:
        maximum, minimum: of the ratio.
        level: of the ratio, see `log_ratio`.
        beyond: a ratio out of bounds becomes the bound, or 0 (its tokens are dropped).

    Raises:
        ValueError: shapes that do not fit, a maximum not above 0 or the minimum.
    """
    if not maximum > 0 or not minimum < maximum:
        raise ValueError(
            f"maximum ({maximum}) must be above 0 and above minimum ({minimum}): inf for no bound"
        )
    ratio = log_ratio(logps, sampler_logps, mask, level=level).exp()
    if beyond == "truncate":
        ratio = ratio.clamp(minimum, maximum)
    else:
        ratio = torch.where((ratio < minimum) | (ratio > maximum), 0.0, ratio)
    return torch.where(mask, ratio, 0.0).detach()


def entropy(logits: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """-sum p log p in nats; `preference.token_logps_and_entropies` needs no logits.

    Logits of -inf, tokens that were ruled out, add nothing.
    """
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logits == -torch.inf, 0.0)).sum(-1)


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages (B,) or (B, T) at every token, zeros where masked."""
    if advantages.shape == mask.shape[:1]:
        advantages = advantages[:, None].expand(mask.shape)
    check_mask(mask, advantages, "advantages")
    return torch.where(mask, advantages, 0.0)
