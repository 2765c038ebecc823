"""Further losses on preference pairs in the form of `preference.dpo`, and changes of their inputs.

    exo nca bco sppo apo_zero apo_down discopop aot      losses, called as `preference.dpo` is
    divergence_score          another divergence than the reverse KL, for any of the losses
    desensitised_logps        the tail of the longer answer counts less
    confidence_weights        pairs that the policy would say itself count more

With c and r the implicit rewards beta (logp - reference logp) of both sides and d = c - r.

Dimension key: B pairs, T tokens.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from msfs_functional.checks import check_mask, positive
from msfs_functional.logps import sequence_logps
from msfs_functional.preference import (
    Preference,
    as_pair,
    implicit_rewards,
    of_log_probabilities,
    smoothed,
)


@of_log_probabilities
def exo(
    c: Float[Tensor, "B"],
    r: Float[Tensor, "B"],
    beta: float | Tensor,
    *,
    label_smoothing: float = 1e-3,
) -> Float[Tensor, "B"]:
    """KL(softmax(c, r) || (1 - e, e)): the exact reverse KL of the pair (Ji et al. 2024, eq. 16).

    Args:
        label_smoothing: e in (0, 0.5).
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"label_smoothing ({label_smoothing}) must be in (0, 0.5): 0 is infinite")
    d, e = c - r, label_smoothing
    better = torch.sigmoid(d) * (F.logsigmoid(d) - math.log1p(-e))
    return better + torch.sigmoid(-d) * (F.logsigmoid(-d) - math.log(e))


@of_log_probabilities
def nca(c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor) -> Float[Tensor, "B"]:
    """-log s(c) - log s(-c) / 2 - log s(-r) / 2, s the sigmoid: holds the chosen answer's
    probability up (Chen et al. 2024, noise contrastive alignment)."""
    return -F.logsigmoid(c) - F.logsigmoid(-c) / 2 - F.logsigmoid(-r) / 2


@of_log_probabilities
def bco(c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor) -> Float[Tensor, "B"]:
    """-log s(c) - log s(-r): a classifier of good and bad answers (Jung et al. 2024, no shift)."""
    return -F.logsigmoid(c) - F.logsigmoid(-r)


@of_log_probabilities
def sppo(c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor) -> Float[Tensor, "B"]:
    """(c / beta - 1 / (2 beta))^2 + (r / beta + 1 / (2 beta))^2 (Wu et al. 2024, hard labels)."""
    return ((c - 0.5) / beta).square() + ((r + 0.5) / beta).square()


@of_log_probabilities
def apo_zero(
    c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor
) -> Float[Tensor, "B"]:
    """s(-c) + s(r): chosen up, rejected down, for answers better than the policy's own
    (D'Oosterlinck et al. 2024, equation 7). Single answers: `preference.kto` with a kl of zero."""
    return torch.sigmoid(-c) + torch.sigmoid(r)


@of_log_probabilities
def apo_down(
    c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor
) -> Float[Tensor, "B"]:
    """s(c) + s(-d): both down, rejected more, for answers worse than the policy's (equation 8)."""
    return torch.sigmoid(c) + torch.sigmoid(r - c)


@of_log_probabilities
def discopop(
    c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor, *, tau: float = 0.05
) -> Float[Tensor, "B"]:
    """-(1 - m) log s(d) + m exp(-d), m = s(d / tau): found by search (Lu et al. 2024, eq. 5).

    With a tau up to 0.1 its slope at d = 0, where training begins, prefers the rejected answer.

    Args:
        tau: temperature of the mixing, above 0.
    """
    positive("tau", tau)
    d = c - r
    mixing = torch.sigmoid(d / tau)
    return -F.logsigmoid(d) * (1 - mixing) + (-d).exp() * mixing


def aot(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
    paired: bool = True,
) -> Preference:
    """DPO on sorted margins: the distribution of the policy's margins is to dominate (Melnyk et al.
    2024). Losses are in the order of the sorting, not of the pairs.

    Args:
        paired: sort the margins of policy and reference; else the rewards of both sides.
    """
    c, r = implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
    if paired:
        policy, reference = chosen - rejected, reference_chosen - reference_rejected
        d = beta * (policy.sort().values - reference.sort().values)
    else:
        d = c.sort().values - r.sort().values
    return as_pair(smoothed(d, label_smoothing), c, r)


# ------------------------------------------------------------------------------------------- inputs


def divergence_score(
    logratio: Float[Tensor, "..."],
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"],
    *,
    alpha: float = 0.5,
) -> Float[Tensor, "..."]:
    """f'(pi / reference) up to a constant: what takes the log-ratio's place under an f-divergence.

        reverse_kl  log t      forward_kl  1 - 1 / t      js  log(2 t / (1 + t))
        alpha       (t^(a - 1) - 1) / (a - 1)

    Give it to any loss as the log-probability, with references of zero.

    Args:
        logratio: log t = policy - reference, nats.

    Raises:
        ValueError: an unknown divergence.

    Source: Wang et al. 2024, "Beyond reverse KL", table 1.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return logratio
    if divergence == "forward_kl":
        return -(-logratio).expm1()
    if divergence == "js":
        return math.log(2) + F.logsigmoid(logratio)
    if divergence == "alpha":
        return ((alpha - 1) * logratio).clamp(max=80.0).expm1() / (alpha - 1)
    raise ValueError(
        f'divergence ({divergence!r}) must be "reverse_kl", "forward_kl", "js" or "alpha"'
    )


def desensitised_logps(
    logps: Float[Tensor, "B 2 T"], mask: Bool[Tensor, "B 2 T"], *, alpha: float
) -> Float[Tensor, "B 2"]:
    """Sums in which tokens beyond the shorter answer's length count alpha (Liu et al. 2024).

    Args:
        alpha: in [0, 1].

    Raises:
        ValueError: shapes that do not fit, alpha out of range.
    """
    check_mask(mask, logps, "logps")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha ({alpha}) must be in [0, 1]")
    number = mask.cumsum(-1)
    shared = mask & (number <= mask.sum(-1).amin(-1)[:, None, None])
    kept = torch.where(mask, logps, 0.0)
    return torch.where(shared, kept, alpha * kept).sum(-1)


def confidence_weights(
    logps: Float[Tensor, "B 2 T"],
    log_sum_squares: Float[Tensor, "B 2 T"],
    mask: Bool[Tensor, "B 2 T"],
) -> Float[Tensor, "B"]:
    """exp(mean(log p - log sum p^2)) of both sides, multiplied; no gradient (Zhou et al. 2024).

    Args:
        log_sum_squares: log sum over the vocabulary of p^2 at each token.
    """
    aligned = (logps - log_sum_squares).detach()
    sums, lengths = sequence_logps(aligned.flatten(0, 1), mask.flatten(0, 1))
    return (sums / lengths.clamp(min=1)).exp().unflatten(0, (-1, 2)).prod(1)
