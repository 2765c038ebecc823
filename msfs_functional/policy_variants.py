"""Policy losses that replace PPO's hard clip, and masks that say which tokens may speak.

    cispo       clips the ratio as a weight, so that every token keeps its gradient
    sapo        a smooth gate in place of the clip
    vespo       a smooth weight of whole answers
    gmpo        the geometric mean of an answer's clipped ratios
    a2po        squared distance of the policy's own reward to the optimal advantage, without a clip

Each is one number a token, to be `masked.average`d like `ppo.policy_loss`'s; a2po's is one an
answer.

Dimension key: B rows, T tokens.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msfs_functional.checks import check_mask, positive, same_shape
from msfs_functional.masked import masked_mean
from msfs_functional.ppo import Level, PolicyLoss, log_ratio, per_token


def cispo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    mask: Bool[Tensor, "B T"],
    *,
    most: float = 5.0,
    level: Level = "token",
) -> PolicyLoss:
    """-min(ratio, most) A log pi, the weight without gradient.

    Args:
        most: largest ratio that a token may weigh, above 0.
        others: as in `ppo.policy_loss`.

    Raises:
        ValueError: shapes that do not fit, `most` not above 0.

    Source: MiniMax 2025 (M1), equation 4; Khatri et al. 2025 (ScaleRL).
    """
    positive("most", most)
    advantages = per_token(advantages, mask).detach()
    ratio = log_ratio(logps, old_logps.detach(), mask, level=level).exp().detach()
    losses = -ratio.clamp(max=most) * advantages * torch.where(mask, logps, 0.0)
    return PolicyLoss(losses, ratio, mask & (ratio > most) & (advantages > 0))


def sapo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B *T"],
    mask: Bool[Tensor, "B T"],
    *,
    positive_temperature: float = 1.0,
    negative_temperature: float = 1.05,
    level: Level = "token",
) -> PolicyLoss:
    """-(4 / t) sigmoid(t (ratio - 1)) A: slope 1 on policy, fading on both sides.

    Args:
        positive_temperature, negative_temperature: t where A is above 0, and elsewhere; above 0.
        others: as in `ppo.policy_loss`. `clipped` is nowhere.

    Raises:
        ValueError: shapes that do not fit, temperatures not above 0.

    Source: Gao et al. 2025, "Soft adaptive policy optimization".
    """
    positive("positive_temperature", positive_temperature)
    positive("negative_temperature", negative_temperature)
    advantages = per_token(advantages, mask).detach()
    ratio = log_ratio(logps, old_logps.detach(), mask, level=level).exp()
    t = torch.where(advantages > 0, positive_temperature, negative_temperature).to(ratio.dtype)
    losses = -4 / t * torch.sigmoid(t * (ratio - 1)) * advantages
    return PolicyLoss(torch.where(mask, losses, 0.0), ratio.detach(), torch.zeros_like(mask))


class Gamma(NamedTuple):
    """phi(w) = exp(l) w^k exp(-l w), 1 at w = 1: the weight of an answer of ratio w."""

    k: float
    lam: float


ABOVE, BELOW = Gamma(2.0, 3.0), Gamma(3.0, 2.0)


def vespo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    *,
    above: Gamma = ABOVE,
    below: Gamma = BELOW,
    weights: Float[Tensor, "B T"] | None = None,
) -> PolicyLoss:
    """-phi(w) A log pi, with w the ratio of the whole answer; no gradient flows into phi.

    Args:
        above, below: phi where A is at least 0, and where it is below.
        weights: old / sampler of each token (`ppo.importance_weights`), which become part of w.
        others: as in `ppo.policy_loss`.

    Returns:
        losses, w at each token, nowhere clipped.

    Raises:
        ValueError: shapes that do not fit.

    Source: Shen et al. 2026 (VESPO).
    """
    with torch.no_grad():
        floor = math.log(1e-8)
        total = log_ratio(logps, old_logps, mask).clamp(-20, 20).sum(-1, keepdim=True)
        if weights is not None:
            check_mask(mask, weights, "weights")
            own = torch.where(mask, weights, 1.0).log().clamp(floor, 20)
            total = total + own.sum(-1, keepdim=True)
        log_w = total.clamp(floor, 20)
        sides = per_token(advantages, mask)
        row = advantages[:, None] >= 0
        k = torch.where(row, above.k, below.k).to(log_w.dtype)
        lam = torch.where(row, above.lam, below.lam).to(log_w.dtype)
        phi = (lam + k * log_w - lam * log_w.exp()).exp()
        ratio = torch.where(mask, log_w.exp(), 1.0)
    losses = -phi * sides * torch.where(mask, logps, 0.0)
    return PolicyLoss(losses, ratio, torch.zeros_like(mask))


def gmpo(
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float = 0.4,
    clip_high: float | None = None,
) -> PolicyLoss:
    """-exp(mean clipped log ratio) A, the same at all tokens of an answer.

    Clipped from above at clip_high where A > 0, from below at -clip elsewhere. Average it
    over="sequences".

    Args:
        advantages: of whole answers.
        clip, clip_high: bounds of the *log* ratio, above 0; clip_high None: as clip.
        others: as in `ppo.policy_loss`.

    Raises:
        ValueError: shapes that do not fit, bounds not above 0.

    Source: Zhao et al. 2025, "Geometric-mean policy optimization", equation 4.
    """
    high = clip if clip_high is None else clip_high
    positive("clip", clip)
    positive("clip_high", high)
    sides = per_token(advantages, mask).detach()
    s = log_ratio(logps, old_logps.detach(), mask)
    cut = mask & torch.where(sides > 0, s > high, s < -clip)
    kept = torch.where(sides > 0, s.clamp(max=high), s.clamp(min=-clip))
    mean = torch.where(mask, kept, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(1)
    return PolicyLoss(-mean.exp() * sides, s.exp().detach(), cut)


def a2po(
    logps: Float[Tensor, "B"],
    reference_logps: Float[Tensor, "B"],
    rewards: Float[Tensor, "B"],
    values: Float[Tensor, "B"],
    *,
    beta: float = 1e-3,
) -> Float[Tensor, "B"]:
    """(beta (logp - reference logp) - (reward - value))^2: the optimal policy's own reward is its
    advantage, so the policy regresses on it. One sample a prompt will do.

    Args:
        logps, reference_logps: of whole answers, nats.
        values: `optimal_values` of the prompts.
        beta: above 0, strength of the pull to the reference.

    Raises:
        ValueError: shapes that do not fit, beta not above 0.

    Source: Brantley et al. 2025 (A*-PO), equation 3.
    """
    positive("beta", beta)
    same_shape(logps=logps, reference_logps=reference_logps, rewards=rewards, values=values)
    return (beta * (logps - reference_logps) - (rewards - values).detach()).square()


def optimal_values(rewards: Float[Tensor, "B N"], *, beta: float = 0.5) -> Float[Tensor, "B"]:
    """beta log mean exp(reward / beta) of N answers of the reference to each prompt.

    The value of the best policy with a KL pull of strength beta, which is above 0: the mean reward
    where beta is large, the best one where it is small. Source: as `a2po`, equation 2.
    """
    positive("beta", beta)
    return beta * ((rewards / beta).logsumexp(-1) - math.log(rewards.shape[-1]))


# ------------------------------------------------------------------------------------------- masks


def near_policy(
    logps: Float[Tensor, "B T"],
    sampler_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    *,
    threshold: float,
) -> Bool[Tensor, "B T"]:
    """Off-policy sequence masking: bad answers that the policy has left behind say nothing more.

    Kept are rows with A >= 0, and rows whose mean of log sampler - log pi is at most the threshold
    [nats a token].

    Source: DeepSeek-AI 2025 (V3.2), equation 9.
    """
    positive("threshold", threshold)
    gap = -log_ratio(logps.detach(), sampler_logps, mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return mask & ((advantages >= 0) | (gap <= threshold))[:, None]


def most_uncertain(
    entropies: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, share: float
) -> Bool[Tensor, "B T"]:
    """The tokens of the batch with the highest entropies, this share of them.

    Args:
        share: in [0, 1]; 0 leaves the highest one, 1 all.

    Source: Wang et al. 2025, "Beyond the 80/20 rule".
    """
    check_mask(mask, entropies, "entropies")
    if not 0 <= share <= 1:
        raise ValueError(f"share ({share}) must be in [0, 1]")
    if share == 1 or not mask.any():
        return mask
    threshold = torch.quantile(entropies[mask].float(), 1 - share)
    return mask & (entropies >= threshold)


def adaptive_entropy_coefficient(
    coefficient: float,
    entropy: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    target: float,
    step: float = 0.005,
    least: float = 0.0,
    most: float = 1.0,
) -> tuple[float, float]:
    """(next coefficient, the one to apply next): up a step at or below the target, else down.

    While the entropy is above the target none is applied.

    Args:
        entropy: of each token, nats; target in the same unit.

    Source: He et al. 2025 (Skywork-OR1), section 4.
    """
    low = bool(masked_mean(entropy, mask) <= target)
    after = min(coefficient + step, most) if low else max(coefficient - step, least)
    return after, after if low else 0.0
