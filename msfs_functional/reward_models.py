"""Reward models: losses on comparisons and rankings of answers, the model, ensembles of it.

    params = with_head(model.init(seed), width, seed)          # a decoder's and one vector
    rewards = last_rewards(model, params, tokens, lengths)
    loss = bradley_terry(*rewards.chunk(2), centring=0.01).mean()

An ensemble is stacked params (`train.make_step(members=...)`), its rewards (E, B) become one by
`aggregate`.

Dimension key: B examples, T tokens, K ranked answers to one prompt, E members of an ensemble.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msfs_functional import random
from msfs_functional.checks import check_mask, not_negative, same_shape
from msfs_functional.params import Functional, Params
from msfs_functional.scoring import is_cut, states_of, whole_rows


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


# --------------------------------------------------------------------------------------- the model

HEAD = "reward.weight"


def with_head(params: Params, width: int, seed: int) -> Params:
    """The parameters of a decoder and of a reward head, which starts as N(0, 1 / (width + 1))."""
    key = random.key(seed, device=next(iter(params.values())).device)
    return {**params, HEAD: random.normal(key, (width,)) / math.sqrt(width + 1)}


def last_rewards(
    model: Functional,
    params: Params,
    tokens: Int[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    **options: Any,
) -> Float[Tensor, "B"]:
    """The reward of each row, read off the state of its last token; float32.

    Args:
        model: a decoder, plain or on a mesh (see `scoring`); params: `with_head`'s, the head whole.
        tokens: prompt and answer, padded on the right.
        lengths: tokens of each row, at least 1.
        options: of the decoder's `hidden`.

    Source: Stiennon et al. 2020; Ouyang et al. 2022, section 3.5.
    """
    body = {name: value for name, value in params.items() if name != HEAD}
    states = states_of(model, body, tokens, **options)
    if is_cut(model, "cp"):  # which rank has the last token differs from row to row
        scores = (states.float() * params[HEAD].float()).sum(-1)
        rows = whole_rows(model, scores, tokens.shape[1])
        return rows.take_along_dim(lengths[:, None] - 1, 1)[:, 0]
    last = states.take_along_dim(lengths[:, None, None] - 1, 1)[:, 0]
    return (last.float() * params[HEAD].float()).sum(-1)


def aggregate(
    rewards: Float[Tensor, "E B"],
    how: Literal["mean", "min", "uncertainty"] = "mean",
    *,
    penalty: float = 1.0,
) -> Float[Tensor, "B"]:
    """One reward from those of E members: their mean, their least, or mean - penalty variance.

    Raises:
        ValueError: an unknown way, a negative penalty.

    Source: Coste et al. 2024, "Reward model ensembles help mitigate overoptimization", section 3.
    """
    not_negative("penalty", penalty)
    if how == "mean":
        return rewards.mean(0)
    if how == "min":
        return rewards.amin(0)
    if how == "uncertainty":
        return rewards.mean(0) - penalty * rewards.var(0, correction=0)
    raise ValueError(f'how ({how!r}) must be "mean", "min" or "uncertainty"')
