"""Reinforcement learning from rewards on completions, as a few functions to be combined.

    PPO          token_rewards -> gae -> whiten -> policy_loss + value_loss
    GRPO         group_advantages                         -> policy_loss, average over="sequences"
    Dr. GRPO     group_advantages(scale=False)            -> policy_loss, average over="constant"
    RLOO         leave_one_out_advantages                 -> policy_loss, ratio of sequences
    REINFORCE++  token_rewards -> discounted_returns -> whiten -> policy_loss

with `kl_estimate` in the reward (through token_rewards) or added to the losses, and
`importance_weights` on the losses where the sampler's numbers differ from the trainer's.

All is plain tensors, so a rollout is any function and a policy any model. Arrays are (B, T) with a
mask that is True on the tokens the policy chose; what stands elsewhere changes nothing, wherever it
stands: prompts, padding, answers of tools. With segment_ids a row holds several packed sequences,
whose tokens are then each in one stretch.

Dimension key: B rows, T tokens.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msfs_functional.preference import check_mask

Level = Literal["token", "sequence", "mean"]


class PolicyLoss(NamedTuple):
    """Per-token losses, zero where masked; ratio new / old and where the clip bites, detached."""

    losses: Float[Tensor, "B T"]
    ratio: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]


# -------------------------------------------------------------------------------------------- means


def masked_mean(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """The mean of x where mask is True; 0 where nothing is."""
    check_mask(mask, x, "x")
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def average(
    losses: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    over: Literal["tokens", "sequences", "constant"] = "tokens",
    length: int | None = None,
) -> Float[Tensor, ""]:
    """One number from per-token losses: the choice that decides what a long answer weighs.

        tokens      sum / number of tokens: each token weighs the same (Yu et al. 2025, DAPO)
        sequences   mean over rows of the row's mean: each answer weighs the same (GRPO)
        constant    sum / (B length): no length in the denominator, hence no bias towards long wrong
                    answers (Liu et al. 2025, Dr. GRPO)

    Rows without a token do not count, except in "constant". For packed rows use tokens or constant.

    Args:
        length: with "constant" the most tokens a completion may have.

    Raises:
        ValueError: shapes that do not fit, an unknown `over`, "constant" without a length.
    """
    check_mask(mask, losses, "losses")
    total = torch.where(mask, losses, 0.0)
    if over == "tokens":
        return total.sum() / mask.sum().clamp(min=1)
    if over == "sequences":
        lengths = mask.sum(-1)
        return (total.sum(-1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum().clamp(min=1)
    if over != "constant":
        raise ValueError(f'over ({over!r}) must be "tokens", "sequences" or "constant"')
    if length is None or length < 1:
        raise ValueError(
            f'length ({length}) must be above 0 with over="constant": the most tokens a completion '
            "may have"
        )
    return total.sum() / (losses.shape[0] * length)


def whiten(
    x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], *, centre: bool = True, eps: float = 1e-8
) -> Float[Tensor, "..."]:
    """(x - mean) / sqrt(variance + eps) over where mask is True; zeros elsewhere.

    The variance is the unbiased one; centre=False puts the mean back.
    """
    check_mask(mask, x, "x")
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    whitened = centred * (variance + eps).rsqrt()
    return whitened if centre else torch.where(mask, whitened + mean, 0.0)


# --------------------------------------------------------------------------------------- KL penalty


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
    _same_shape(logps=logps, reference_logps=reference_logps)
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


def token_rewards(
    scores: Float[Tensor, "B *G"],
    mask: Bool[Tensor, "B T"],
    *,
    kl: Float[Tensor, "B T"] | None = None,
    kl_coefficient: float | Float[Tensor, ""] = 0.0,
    segment_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """-kl_coefficient kl at every token, plus the score at the last one of its sequence.

    Args:
        scores: a reward for each completion, which is lost where there are no tokens: (B,), or
            (B, G) with segment_ids in [0, G).
        kl: from `kl_estimate`, nats a token, no gradient wanted.

    Raises:
        ValueError: shapes that do not fit.

    Source: Ouyang et al. 2022, equation 2.
    """
    packed = segment_ids is not None
    if mask.ndim != 2 or scores.shape[:1] != mask.shape[:1] or scores.ndim != 1 + packed:
        raise ValueError(
            f"scores {tuple(scores.shape)} must be {'(B, G)' if packed else '(B,)'} for a mask "
            f"(B, T) of {tuple(mask.shape)}: one a completion"
        )
    check_mask(mask, mask if kl is None else kl, "kl")
    here = scores[:, None] if segment_ids is None else scores.gather(-1, segment_ids.long())
    counts = mask.to(scores.dtype)
    left = _reverse_scan(counts, _within(torch.ones_like(counts), segment_ids))
    rewards = torch.where(mask & (left == 1), here, 0.0)
    if kl is None:
        return rewards
    return rewards - kl_coefficient * torch.where(mask, kl, 0.0)


# --------------------------------------------------------------------------------------- advantages


def discounted_returns(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    segment_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """R_t = r_t + gamma R_{t+1}, over the tokens where mask is True.

    Raises:
        ValueError: shapes that do not fit, gamma outside [0, 1].
    """
    check_mask(mask, rewards, "rewards")
    _discount("gamma", gamma)
    decay = _within(torch.where(mask, gamma, 1.0).to(rewards.dtype), segment_ids)
    return torch.where(mask, _reverse_scan(torch.where(mask, rewards, 0.0), decay), 0.0)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    segment_ids: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalized advantage estimates and the returns that values should learn.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}
        returns = A + V

    t runs over the tokens where mask is True; after a sequence's last one V and A are 0. A sequence
    cut off by its length may be bootstrapped: add gamma V(next) to its last reward.

    Args:
        values: predicted before token t was chosen, without gradient.
        gamma, lam: in [0, 1].

    Returns:
        (advantages, returns), zeros where masked, in O(log T) parallel steps.

    Raises:
        ValueError: shapes that do not fit, gamma or lam outside [0, 1].

    Source: Schulman et al. 2016, equation 16.
    """
    check_mask(mask, rewards, "rewards")
    check_mask(mask, values, "values")
    _discount("gamma", gamma)
    _discount("lam", lam)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    # The value at the next kept token is itself a scan: masked tokens hand on what follows them.
    following = _reverse_scan(values, _within((~mask).to(values.dtype), segment_ids))
    following = _within(torch.ones_like(values), segment_ids) * _shift(following, 1)
    delta = torch.where(mask, rewards + gamma * following - values, 0.0)
    decay = _within(torch.where(mask, gamma * lam, 1.0).to(values.dtype), segment_ids)
    advantages = torch.where(mask, _reverse_scan(delta, decay), 0.0)
    return advantages, advantages + values


def group_advantages(
    scores: Float[Tensor, "B"], size: int, *, scale: bool = True, eps: float = 1e-4
) -> Float[Tensor, "B"]:
    """GRPO: (score - mean) / (std + eps) within each group of `size` completions of one prompt.

    scale=False leaves out the division, which favours prompts that are too easy or too hard
    (Liu et al. 2025, Dr. GRPO). std is the unbiased one.

    Args:
        scores: groups one after the other: prompt 0's completions, prompt 1's, ...

    Raises:
        ValueError: a size below 2, or one that does not divide the scores.

    Source: Shao et al. 2024, section 4.1.
    """
    groups = _groups(scores, size)
    centred = groups - groups.mean(-1, keepdim=True)
    if scale:
        std = (centred.square().sum(-1, keepdim=True) / (size - 1)).sqrt()
        centred = centred / (std + eps)
    return centred.reshape(-1)


def leave_one_out_advantages(scores: Float[Tensor, "B"], size: int) -> Float[Tensor, "B"]:
    """RLOO: score - mean of the group's other scores = size / (size - 1) (score - mean).

    Arguments and errors as in `group_advantages`.

    Source: Kool et al. 2019; Ahmadian et al. 2024, equation 8.
    """
    groups = _groups(scores, size)
    return (size / (size - 1) * (groups - groups.mean(-1, keepdim=True))).reshape(-1)


# ------------------------------------------------------------------------------------------- losses


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
    level: Level = "token",
) -> PolicyLoss:
    """The clipped surrogate, token by token: -min(ratio A, clip(ratio, 1 - e, 1 + e_high) A).

    Args:
        logps: of the policy; old_logps: of the policy that the completions came from.
        advantages: (B, T), or (B,) for one a sequence; no gradient flows into them.
        clip: e in (0, 1); None for the plain ratio-weighted policy gradient.
        clip_high: e_high where it differs (Yu et al. 2025, clip-higher).
        level: of the ratio, see `log_ratio`.

    Returns:
        losses to `average`, the ratio, and where its gradient is cut.

    Raises:
        ValueError: shapes that do not fit, options out of range.

    Source: Schulman et al. 2017, equation 7.
    """
    advantages = _per_token(advantages, mask).detach()
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
    level: Level = "token",
) -> Float[Tensor, "B T"]:
    """min(pi / sampler, maximum), to multiply losses of completions that something else sampled.

    The sampler is the same policy in other arithmetic, or an older one; truncation bounds the
    variance at the price of a bias (Ionides 2008; Yao et al. 2025). No gradient.

    Raises:
        ValueError: shapes that do not fit, a maximum not above 0.
    """
    if not maximum > 0:
        raise ValueError(f"maximum ({maximum}) must be above 0: inf for no truncation")
    ratio = log_ratio(logps, sampler_logps, mask, level=level).exp().clamp(max=maximum)
    return torch.where(mask, ratio, 0.0).detach()


def entropy(logits: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """-sum p log p in nats; `preference.token_logps_and_entropies` needs no logits.

    Logits of -inf, tokens that were ruled out, add nothing.
    """
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logits == -torch.inf, 0.0)).sum(-1)


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for a constant one."""

    check_mask(mask, values, "values")

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    tiny = torch.finfo(returns.dtype).tiny
    return 1 - variance(returns - values) / variance(returns).clamp(min=tiny)


# ------------------------------------------------------------------------------------------- pieces


def _reverse_scan(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1} by recursive doubling: log2 T steps, differentiable."""
    step, T = 1, x.shape[-1]
    while step < T:
        x, decay = x + decay * _shift(x, step), decay * _shift(decay, step)
        step *= 2
    return x


def _shift(x: Tensor, by: int) -> Tensor:
    """x_{t + by}, zeros past the end."""
    return torch.cat([x[..., by:], torch.zeros_like(x[..., :by])], -1)


def _within(decay: Tensor, segment_ids: Tensor | None) -> Tensor:
    """decay, but 0 from the last token of a segment to the next segment."""
    if segment_ids is None:
        return decay
    if segment_ids.shape != decay.shape:
        raise ValueError(
            f"segment_ids {tuple(segment_ids.shape)} must have the shape of the tokens, "
            f"{tuple(decay.shape)}"
        )
    same = torch.ones_like(segment_ids, dtype=torch.bool)
    same = torch.cat([segment_ids[..., 1:] == segment_ids[..., :-1], same[..., :1]], -1)
    return torch.where(same, decay, 0.0)


def _groups(scores: Tensor, size: int) -> Tensor:
    if size < 2:
        raise ValueError(
            f"size ({size}) must be at least 2: a completion is judged against others of its prompt"
        )
    if scores.ndim != 1 or scores.shape[0] % size:
        raise ValueError(
            f"scores {tuple(scores.shape)} must be (B,) with B a multiple of size ({size}): whole "
            "groups, one after the other"
        )
    return scores.unflatten(0, (-1, size))


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    if advantages.shape == mask.shape[:1]:
        advantages = advantages[:, None].expand(mask.shape)
    check_mask(mask, advantages, "advantages")
    return torch.where(mask, advantages, 0.0)


def _same_shape(**tensors: Tensor) -> None:
    (first, like), *others = tensors.items()
    for name, x in others:
        if x.shape != like.shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} must have the shape of {first} {tuple(like.shape)}"
            )


def _discount(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} ({value}) must be in [0, 1]")
