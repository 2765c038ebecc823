"""From rewards of completions to advantages of tokens.

    PPO          token_rewards -> gae -> masked.whiten
    GRPO         group_advantages
    Dr. GRPO     group_advantages(scale="none")
    RLOO         leave_one_out_advantages
    REINFORCE++  token_rewards -> discounted_returns -> masked.whiten

With segment_ids a row holds several packed sequences, whose tokens are then each in one stretch.

Dimension key: B rows, T tokens.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msfs_functional.checks import check_mask
from msfs_functional.masked import masked_mean


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
    scores: Float[Tensor, "B"],
    size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Float[Tensor, "B"]:
    """GRPO: (score - mean) / (std + eps), the mean of each group of `size` answers to one prompt.

        group    std of the group's scores (Shao et al. 2024)
        batch    std of all scores, which a group of equal ones does not blow up (Liu et al. 2025,
                 "Part I: tricks or traps")
        none     no division, which favours prompts that are too easy or too hard (Liu et al. 2025,
                 Dr. GRPO)

    std is the unbiased one.

    Args:
        scores: groups one after the other: prompt 0's completions, prompt 1's, ...

    Raises:
        ValueError: a size below 2, one that does not divide the scores, an unknown scale.

    Source: Shao et al. 2024, section 4.1.
    """
    groups = _groups(scores, size)
    centred = groups - groups.mean(-1, keepdim=True)
    if scale == "group":
        std = (centred.square().sum(-1, keepdim=True) / (size - 1)).sqrt()
        centred = centred / (std + eps)
    elif scale == "batch":
        centred = centred / (scores.std() + eps)
    elif scale != "none":
        raise ValueError(f'scale ({scale!r}) must be "group", "batch" or "none"')
    return centred.reshape(-1)


def several_advantages(
    scores: Float[Tensor, "B R"], weights: Float[Tensor, "R"], size: int, *, eps: float = 1e-4
) -> Float[Tensor, "B"]:
    """Advantages of several rewards, each scaled within its groups, then summed and scaled again.

    No reward drowns in the spread of another one.

    Args:
        scores: R rewards of each completion, groups of `size` one after the other.

    Source: Liu et al. 2026 (GDPO).
    """
    each = [group_advantages(one, size, eps=eps) for one in scores.unbind(1)]
    total = torch.stack(each, 1) @ weights.to(scores.dtype)
    return (total - total.mean()) / (total.std() + eps)


def leave_one_out_advantages(scores: Float[Tensor, "B"], size: int) -> Float[Tensor, "B"]:
    """RLOO: score - mean of the group's other scores = size / (size - 1) (score - mean).

    Arguments and errors as in `group_advantages`.

    Source: Kool et al. 2019; Ahmadian et al. 2024, equation 8.
    """
    groups = _groups(scores, size)
    return (size / (size - 1) * (groups - groups.mean(-1, keepdim=True))).reshape(-1)


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


def _discount(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} ({value}) must be in [0, 1]")
