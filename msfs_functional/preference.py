"""Learning from preferences as pure functions of log-probabilities.

    hidden states -> logps.token_logps -> logps.sequence_logps -> dpo, ipo, simpo, orpo, kto, ...

A policy and a reference are params of pure functions; nothing here knows a model. A reference's
log-probabilities are plain tensors: computed once and kept beside the data, or in the step from a
second params pytree. Every loss is one value for each example and carries the implicit rewards, so
that means, weights and metrics are the caller's:

    logps = token_logps(states, output_weight(params), labels)
    sums, lengths = sequence_logps(logps, mask)             # rows: chosen, then rejected
    chosen, rejected = sums.chunk(2)
    out = dpo(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    loss, accuracy = out.losses.mean(), (out.margins > 0).float().mean()

A length-normalised variant is the same function on mean log-probabilities (`sums / lengths`).

Dimension key: B examples, T and S tokens.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msfs_functional.checks import check_mask, not_negative, positive, same_shape


class Preference(NamedTuple):
    """Losses of B pairs and the implicit rewards of their two sides (detached), all (B,)."""

    losses: Float[Tensor, "B"]
    chosen_rewards: Float[Tensor, "B"]
    rejected_rewards: Float[Tensor, "B"]

    @property
    def margins(self) -> Float[Tensor, "B"]:
        """Chosen minus rejected reward: above 0 where the policy agrees with the preference."""
        return self.chosen_rewards - self.rejected_rewards


def check_pairs(
    chosen: Int[Tensor, "B T"],
    chosen_mask: Bool[Tensor, "B T"],
    rejected: Int[Tensor, "B S"],
    rejected_mask: Bool[Tensor, "B S"],
) -> None:
    """Raises ValueError for pairs that teach nothing; for batches on the host, before any step.

    Raises:
        ValueError: names the rows with an empty completion, or with two equal sides.
    """
    for name, mask in (("chosen", chosen_mask), ("rejected", rejected_mask)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}_mask is {mask.dtype}, expected bool: True for completions")
        if empty := (~mask.any(-1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"rows {empty} have an empty {name} completion; each needs at least one token: "
                "drop the pairs, or end completions with the end token"
            )
    rows = zip(chosen, chosen_mask, rejected, rejected_mask, strict=True)
    if same := [i for i, (c, m, r, n) in enumerate(rows) if torch.equal(c[m], r[n])]:
        raise ValueError(
            f"rows {same} have equal chosen and rejected completions, and a preference needs two: "
            "drop the pairs"
        )


def check_reference(policy: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless both are parameters of one architecture; names what differs."""
    missing = sorted(policy.keys() ^ reference.keys())
    other = [n for n in policy if n in reference and policy[n].shape != reference[n].shape]
    if missing or other:
        name = (missing or other)[0]
        shapes = [
            str(tuple(side[name].shape)) if name in side else "absent"
            for side in (policy, reference)
        ]
        raise ValueError(
            f"the reference is of another architecture: {name} is {shapes[0]} in the policy, "
            f"{shapes[1]} in the reference ({len(missing) + len(other)} differ): start both from "
            "one model, or score with the reference's own and give its log-probabilities"
        )


# ------------------------------------------------------------------- direct preference optimization


def implicit_rewards(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """beta (logp - reference logp) of both sides."""
    positive("beta", beta)
    same_shape(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    return beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)


def of_log_probabilities(loss: Callable[..., Tensor]) -> Callable[..., Preference]:
    """A loss of implicit rewards, loss(c, r, beta, **options), with the arguments of `dpo`.

    The decorated function is called as dpo is:

        fn(chosen, rejected, reference_chosen, reference_rejected, *, beta=0.1, **options)
    """

    @functools.wraps(loss)
    def run(
        chosen: Tensor,
        rejected: Tensor,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        *,
        beta: float | Tensor = 0.1,
        **options: Any,
    ) -> Preference:
        c, r = implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
        return as_pair(loss(c, r, beta, **options), c, r)

    del run.__wrapped__  # help() shall show how it is called
    return run


def dpo(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    reference_chosen: Float[Tensor, "B"],
    reference_rejected: Float[Tensor, "B"],
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
) -> Preference:
    """DPO: a Bradley-Terry loss on the rewards that the policy itself implies.

        r = beta (logp - reference logp)          d = r_chosen - r_rejected
        loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d)

    Mean log-probabilities instead of sums give the length-normalised form.

    Args:
        chosen, rejected: the policy's sequence log-probabilities, nats.
        reference_chosen, reference_rejected: those of the reference.
        beta: above 0, strength of the pull to the reference; a 0-d tensor for sweeps under vmap.
        label_smoothing: e in [0, 0.5), the share of preferences believed to be flipped; above 0 it
            is cDPO (Mitchell 2023).

    Raises:
        ValueError: shapes that do not fit, options out of range.

    Source: Rafailov et al. 2023, equation 7.
    """
    c, r = implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
    return as_pair(smoothed(c - r, label_smoothing), c, r)


@of_log_probabilities
def robust_dpo(
    c: Float[Tensor, "B"],
    r: Float[Tensor, "B"],
    beta: float | Tensor,
    *,
    label_smoothing: float = 0.1,
) -> Float[Tensor, "B"]:
    """DPO's loss made unbiased under a known share e of flipped preferences.

        loss = (-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2 e)       d as in `dpo`

    Its mean over the flips is the loss of the clean labels. Arguments as in `dpo`.

    Source: Chowdhury, Kini and Natarajan 2024 (rDPO).
    """
    check_flip_rate(label_smoothing)
    d, e = c - r, label_smoothing
    return ((1 - e) * F.softplus(-d) - e * F.softplus(d)) / (1 - 2 * e)


@of_log_probabilities
def dpo_hinge(
    c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor
) -> Float[Tensor, "B"]:
    """max(0, 1 - d), d as in `dpo`: pairs with a margin of 1 are done with.

    Source: Zhao et al. 2023 (SLiC), equation 1; Liu et al. 2024 (RSO).
    """
    return F.relu(1 - (c - r))


@of_log_probabilities
def ipo(c: Float[Tensor, "B"], r: Float[Tensor, "B"], beta: float | Tensor) -> Float[Tensor, "B"]:
    """(h - 1 / (2 beta))^2: regresses the log-ratio margin h = d / beta instead of saturating it.

    Takes sums as in the paper, or mean log-probabilities, which keep the target independent of the
    lengths.

    Source: Azar et al. 2023, equation 17 (beta is its tau).
    """
    return ((c - r) / beta - 1 / (2 * beta)).square()


def simpo(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    *,
    beta: float | Tensor = 2.0,
    margin: float = 1.0,
    label_smoothing: float = 0.0,
) -> Preference:
    """SimPO: mean log-probabilities as rewards, a target margin, no reference.

        loss = -log sigmoid(beta chosen - beta rejected - margin)

    Args:
        chosen, rejected: *mean* log-probabilities of the tokens, nats a token.
        beta: above 0.
        margin: gamma, at least 0.
        label_smoothing: as in `dpo`.

    Raises:
        ValueError: shapes that do not fit, options out of range.

    Source: Meng et al. 2024, equation 6.
    """
    same_shape(chosen=chosen, rejected=rejected)
    positive("beta", beta)
    not_negative("margin", margin)
    c, r = beta * chosen, beta * rejected
    return as_pair(smoothed(c - r - margin, label_smoothing), c, r)


def orpo(
    chosen: Float[Tensor, "B"], rejected: Float[Tensor, "B"], *, beta: float | Tensor = 0.1
) -> Preference:
    """ORPO: fine-tuning on the chosen answer plus a log odds ratio, no reference.

        loss = -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected))
        odds = p / (1 - p),  p = exp(mean log-probability)

    Args:
        chosen, rejected: *mean* log-probabilities of the tokens, nats a token, below 0.
        beta: above 0, the paper's lambda.

    Raises:
        ValueError: shapes that do not fit, beta not above 0.

    Source: Hong et al. 2024, equations 4 to 7.
    """
    same_shape(chosen=chosen, rejected=rejected)
    positive("beta", beta)
    d = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return as_pair(-chosen - beta * F.logsigmoid(d), beta * chosen, beta * rejected)


def kto(
    logps: Float[Tensor, "B"],
    reference_logps: Float[Tensor, "B"],
    desirable: Bool[Tensor, "B"],
    kl: Float[Tensor, ""],
    *,
    beta: float | Tensor = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """KTO: single answers called good or bad, judged against the policy's own drift.

        r = beta (logp - reference logp)
        loss = w_d (1 - sigmoid(r - beta kl))  where desirable,  w_u (1 - sigmoid(beta kl - r)) else

    Args:
        logps, reference_logps: sequence log-probabilities, nats.
        desirable: True for a good answer. Choose weights so that w_d #desirable is between 1 and
            4/3 of w_u #undesirable (section 4 of the paper).
        kl: reference point z_0 in nats, from `kto_kl`; no gradient flows into it.
        beta: above 0.

    Returns:
        losses and implicit rewards (detached), both (B,).

    Raises:
        ValueError: shapes that do not fit, options out of range.

    Source: Ethayarajh et al. 2024.
    """
    same_shape(logps=logps, reference_logps=reference_logps)
    check_mask(desirable, logps, "logps")
    positive("beta", beta)
    not_negative("desirable_weight", desirable_weight)
    not_negative("undesirable_weight", undesirable_weight)
    rewards = beta * (logps - reference_logps)
    gain = rewards - beta * kl.detach()
    good = desirable_weight * torch.sigmoid(-gain)
    bad = undesirable_weight * torch.sigmoid(gain)
    return torch.where(desirable, good, bad), rewards.detach()


def kto_kl(logps: Float[Tensor, "B"], reference_logps: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """KTO's reference point: max(0, mean log-ratio) over answers paired with the wrong prompts.

    Args:
        logps, reference_logps: of each prompt of the batch with another prompt's answer.

    Source: Ethayarajh et al. 2024, section 4.1.
    """
    same_shape(logps=logps, reference_logps=reference_logps)
    return (logps - reference_logps).mean().clamp(min=0).detach()


# ------------------------------------------------------------------------------------------- pieces


def as_pair(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Preference:
    """Losses with detached rewards."""
    return Preference(losses, chosen_rewards.detach(), rejected_rewards.detach())


def smoothed(d: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d)."""
    check_flip_rate(label_smoothing)
    clean = -F.logsigmoid(d)
    if not label_smoothing:
        return clean
    return (1 - label_smoothing) * clean - label_smoothing * F.logsigmoid(-d)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side (Maechler 2012)."""
    near = x > -math.log(2)
    close = torch.where(near, x, -1.0).expm1().neg().log()
    far = torch.where(near, -1.0, x).exp().neg().log1p()
    return torch.where(near, close, far)


def check_flip_rate(label_smoothing: float) -> None:
    """Raises ValueError unless it is in [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing ({label_smoothing}) must be in [0, 0.5): from a half on, swap chosen "
            "and rejected"
        )
