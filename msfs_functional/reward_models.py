"""Reward models: losses on comparisons and rankings of answers.

Dimension key: B examples, K ranked answers to one prompt.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from msfs_functional.checks import check_mask, not_negative, same_shape


def bradley_terry(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    *,
    margin: Float[Tensor, "B"] | float = 0.0,
    centring: float = 0.0,
) -> Float[Tensor, "B"]:
    """-log sigmoid(chosen - rejected - margin) + centring (chosen + rejected)^2.

    Args:
        chosen, rejected: rewards of the two answers.
        margin: how much better the chosen answer was rated (Touvron et al. 2023, equation 2).
        centring: c >= 0; pulls the rewards, which the first term leaves free by a constant, towards
            mean zero (Eisenstein et al. 2023).

    Raises:
        ValueError: shapes that do not fit, a negative centring.

    Source: Bradley and Terry 1952; Ouyang et al. 2022, equation 1.
    """
    same_shape(chosen=chosen, rejected=rejected)
    not_negative("centring", centring)
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + centring * (chosen + rejected).square() if centring else loss


def plackett_luce(
    rewards: Float[Tensor, "B K"],
    *,
    mask: Bool[Tensor, "B K"] | None = None,
    margin: float = 0.0,
    centring: float = 0.0,
) -> Float[Tensor, "B"]:
    """Negative log-likelihood of a ranking: the best answer first, then the best of the rest, ...

        loss = -sum_k log( exp(r_k) / (exp(r_k) + sum_{j > k} exp(r_j + margin)) ) + c (sum_k r_k)^2

    Two answers make it `bradley_terry`.

    Args:
        rewards: best answer first; column k is the answer of rank k.
        mask: False for columns that are padding, wherever they stand.
        margin, centring: as in `bradley_terry`.

    Raises:
        ValueError: fewer than two columns, shapes that do not fit, a negative centring.

    Source: Plackett 1975; Luce 1959; Rafailov et al. 2023, appendix A.3.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} must be (B, K) with K at least 2: a ranking of one "
            "answer says nothing"
        )
    not_negative("centring", centring)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    check_mask(mask, rewards, "rewards")
    rewards = torch.where(mask, rewards, 0.0)
    K = rewards.shape[1]
    later_KK = torch.ones(K, K, dtype=torch.bool, device=rewards.device).triu(1)
    below_BKK = later_KK & mask[:, :, None] & mask[:, None, :]
    contested = below_BKK.any(-1, keepdim=True)
    scores = torch.where(below_BKK | ~contested, rewards[:, None], -math.inf)
    terms = F.softplus(scores.logsumexp(-1) + margin - rewards)
    loss = torch.where(contested[..., 0], terms, 0.0).sum(-1)
    return loss + centring * rewards.sum(-1).square() if centring else loss
