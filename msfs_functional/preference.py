"""Learning from preferences as pure functions of log-probabilities.

    hidden states -> token_logps -> sequence_logps -> dpo, ipo, simpo, orpo, kto, ...
    rewards of a reward model    ->                   bradley_terry, plackett_luce

A policy, a reference and a reward model are params of pure functions; nothing here knows a model.
A reference's log-probabilities are plain tensors: computed once and kept beside the data, or in the
step from a second params pytree. Every loss is one value for each example and carries the implicit
rewards, so that means, weights and metrics are the caller's:

    logps = token_logps(states, output_weight(params), labels)
    sums, lengths = sequence_logps(logps, mask)             # rows: chosen, then rejected
    chosen, rejected = sums.chunk(2)
    out = dpo(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    loss, accuracy = out.losses.mean(), (out.margins > 0).float().mean()

A length-normalised variant is the same function on mean log-probabilities (`sums / lengths`). Under
a prompt mask, supervised fine-tuning is `-(sums.sum() / lengths.sum())`.

Dimension key: B examples (rows), T tokens, D width, V vocabulary, G sequences packed in a row,
K ranked answers to one prompt.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msfs_functional.transforms import remat

CHUNK = {"cpu": 2**21, "cuda": 2**27}  # logits of a chunk


class Preference(NamedTuple):
    """Losses of B pairs and the implicit rewards of their two sides (detached), all (B,)."""

    losses: Float[Tensor, "B"]
    chosen_rewards: Float[Tensor, "B"]
    rejected_rewards: Float[Tensor, "B"]

    @property
    def margins(self) -> Float[Tensor, "B"]:
        """Chosen minus rejected reward: above 0 where the policy agrees with the preference."""
        return self.chosen_rewards - self.rejected_rewards


# -------------------------------------------------------------------------------- log-probabilities


def token_logps(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "..."],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "..."]:
    """log softmax((hidden @ weight.T + bias) / temperature)[label], without all of the logits.

    Exact. Tokens go through in chunks; autograd and torch.compile compute a chunk's logits again in
    the backward pass, so at most one chunk of them exists. The transforms of `torch.func` give the
    same numbers but keep what they differentiate (see `transforms.remat`).

    Args:
        hidden, weight, bias: of one dtype; products are in it, the softmax in float32 (float64 for
            float64).
        labels: in [0, V), at masked positions too: any token will do there.
        temperature: that of the sampling, above 0.

    Returns:
        nats, float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature not above 0.
    """
    return _statistics(_logps, hidden, weight, labels, bias, temperature)[..., 0]


def token_logps_and_entropies(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "..."],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`token_logps`, and the entropy in nats of each token's distribution, from the same logits."""
    both = _statistics(_logps_and_entropies, hidden, weight, labels, bias, temperature)
    return both[..., 0], both[..., 1]


def _logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None]) - logits.logsumexp(-1, keepdim=True)


def _logps_and_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    return torch.cat([logp.gather(-1, labels[:, None]), entropy], -1)


def _statistics(
    of_logits: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
) -> Tensor:
    """of_logits(logits (N, V), labels (N,)) -> (N, number of statistics), chunk by chunk."""
    _positive("temperature", temperature)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of the tokens of hidden, "
            f"{tuple(hidden.shape[:-1])}: shift both by one token, or neither"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, expected integers: one token id an item")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} must be (V, {hidden.shape[-1]}), the width of hidden "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be ({weight.shape[0]},), one per class")
    if {x.dtype for x in (hidden, weight, bias) if x is not None} != {hidden.dtype}:
        raise ValueError(
            f"hidden ({hidden.dtype}), weight ({weight.dtype}) and bias must have one dtype: cast "
            "the parameters"
        )

    @remat
    def chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return of_logits(logits / temperature if temperature != 1 else logits, labels)

    rows = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // weight.shape[0])
    parts = zip(
        hidden.reshape(-1, hidden.shape[-1]).split(rows),
        labels.reshape(-1).long().split(rows),
        strict=True,
    )
    return torch.cat([chunk(h, weight, bias, y) for h, y in parts]).unflatten(0, labels.shape)


def sequence_logps(
    logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    segments: int | None = None,
) -> tuple[Float[Tensor, "B *G"], Float[Tensor, "B *G"]]:
    """Sums of token log-probabilities over completions, and how many tokens each one has.

        logps        a b c d e f
        mask         0 1 1 0 1 0
        segment_ids  0 0 0 1 1 2      ->  with segments = 2:  sums (b + c, e), lengths (2, 1)

    Args:
        logps: nats; what stands at masked positions does not matter, NaN included.
        mask: True where a token belongs to a completion (no prompt, no padding).
        segment_ids: which of the sequences packed in the row a token belongs to, in [0, segments)
            wherever the mask is True.
        segments: G, with segment_ids: the most sequences in a row; slots not used have length 0.

    Returns:
        (sums, lengths) of logps' dtype: (B,) without segment_ids, (B, G) with them. Mean
        log-probabilities are `sums / lengths` (`lengths.clamp(min=1)` where slots may be empty).

    Raises:
        ValueError: shapes that do not fit, a mask that is not boolean, segment_ids without
            segments.
    """
    check_mask(mask, logps, "logps")
    kept = torch.where(mask, logps, 0.0)
    counts = mask.to(logps.dtype)
    if segment_ids is None:
        return kept.sum(-1), counts.sum(-1)
    if segments is None or segments < 1:
        raise ValueError(
            f"segments ({segments}) must be a number above 0 with segment_ids: the most sequences "
            "packed in one row"
        )
    if segment_ids.shape != logps.shape:
        raise ValueError(
            f"segment_ids {tuple(segment_ids.shape)} must have the shape of logps "
            f"{tuple(logps.shape)}"
        )
    member_BGT = segment_ids[:, None] == torch.arange(segments, device=logps.device)[:, None]
    return (kept[:, None] * member_BGT).sum(-1), (counts[:, None] * member_BGT).sum(-1)


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


# ------------------------------------------------------------------------------------ reward models


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
    _same_shape(chosen=chosen, rejected=rejected)
    _not_negative("centring", centring)
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
    _not_negative("centring", centring)
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


# ------------------------------------------------------------------- direct preference optimization


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
    c, r = _implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
    return _pair(_smoothed(c - r, label_smoothing), c, r)


def robust_dpo(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    reference_chosen: Float[Tensor, "B"],
    reference_rejected: Float[Tensor, "B"],
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.1,
) -> Preference:
    """DPO's loss made unbiased under a known share e of flipped preferences.

        loss = (-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2 e)       d as in `dpo`

    Its mean over the flips is the loss of the clean labels. Arguments as in `dpo`.

    Source: Chowdhury, Kini and Natarajan 2024 (rDPO).
    """
    c, r = _implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
    _flip_rate(label_smoothing)
    d, e = c - r, label_smoothing
    return _pair(((1 - e) * F.softplus(-d) - e * F.softplus(d)) / (1 - 2 * e), c, r)


def dpo_hinge(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    reference_chosen: Float[Tensor, "B"],
    reference_rejected: Float[Tensor, "B"],
    *,
    beta: float | Tensor = 0.1,
) -> Preference:
    """max(0, 1 - d), d as in `dpo`: pairs with a margin of 1 are done with.

    Source: Zhao et al. 2023 (SLiC), equation 1; Liu et al. 2024 (RSO).
    """
    c, r = _implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
    return _pair(F.relu(1 - (c - r)), c, r)


def ipo(
    chosen: Float[Tensor, "B"],
    rejected: Float[Tensor, "B"],
    reference_chosen: Float[Tensor, "B"],
    reference_rejected: Float[Tensor, "B"],
    *,
    beta: float | Tensor = 0.1,
) -> Preference:
    """(h - 1 / (2 beta))^2: regresses the log-ratio margin h = d / beta instead of saturating it.

    Takes sums as in the paper, or mean log-probabilities, which keep the target independent of the
    lengths.

    Source: Azar et al. 2023, equation 17 (beta is its tau).
    """
    c, r = _implicit_rewards(chosen, rejected, reference_chosen, reference_rejected, beta)
    return _pair(((c - r) / beta - 1 / (2 * beta)).square(), c, r)


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
    _same_shape(chosen=chosen, rejected=rejected)
    _positive("beta", beta)
    _not_negative("margin", margin)
    c, r = beta * chosen, beta * rejected
    return _pair(_smoothed(c - r - margin, label_smoothing), c, r)


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
    _same_shape(chosen=chosen, rejected=rejected)
    _positive("beta", beta)
    d = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return _pair(-chosen - beta * F.logsigmoid(d), beta * chosen, beta * rejected)


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
    _same_shape(logps=logps, reference_logps=reference_logps)
    check_mask(desirable, logps, "logps")
    _positive("beta", beta)
    _not_negative("desirable_weight", desirable_weight)
    _not_negative("undesirable_weight", undesirable_weight)
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
    _same_shape(logps=logps, reference_logps=reference_logps)
    return (logps - reference_logps).mean().clamp(min=0).detach()


# ------------------------------------------------------------------------------------------- pieces


def check_mask(mask: Tensor, like: Tensor, name: str) -> None:
    """Raises ValueError unless mask is boolean and of the shape of `like`, called `name`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}, expected bool: True for what counts")
    if mask.shape != like.shape:
        raise ValueError(
            f"the mask {tuple(mask.shape)} must have the shape of {name}, {tuple(like.shape)}"
        )


def _implicit_rewards(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float | Tensor,
) -> tuple[Tensor, Tensor]:
    _positive("beta", beta)
    _same_shape(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    return beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)


def _pair(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Preference:
    return Preference(losses, chosen_rewards.detach(), rejected_rewards.detach())


def _smoothed(d: Tensor, label_smoothing: float) -> Tensor:
    _flip_rate(label_smoothing)
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


def _same_shape(**tensors: Tensor) -> None:
    (first, like), *others = tensors.items()
    for name, x in others:
        if x.shape != like.shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} must have the shape of {first} {tuple(like.shape)}: one "
                "value an example"
            )


def _positive(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} ({value}) must be above 0")


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} ({value}) must not be negative")


def _flip_rate(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing ({label_smoothing}) must be in [0, 0.5): from a half on, swap chosen "
            "and rejected"
        )
