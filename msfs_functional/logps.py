"""Log-probabilities of tokens and of sequences, without the logits of all tokens.

    hidden states -> token_logps -> sequence_logps

    logps = token_logps(states, output_weight(params), labels)      # nats
    sums, lengths = sequence_logps(logps, mask)

Losses on preferences (`preference`) and on rewards (`ppo`) begin here. Supervised fine-tuning under
a prompt mask is `-(sums.sum() / lengths.sum())`.

Dimension key: B rows, T tokens, D width, V vocabulary, G sequences packed in a row, K tokens that
count.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msfs_functional.checks import check_mask, positive
from msfs_functional.collectives import psum, pvary
from msfs_functional.losses import check_projection
from msfs_functional.regions import bound, region
from msfs_functional.transforms import remat
from msfs_functional.vocabulary_parallel import Cut, check_rows, label_logits, log_sum_exp

CHUNK = {"cpu": 2**21, "cuda": 2**27}  # logits of a chunk


def token_logps(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "..."],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    cut: Cut | None = None,
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
        cut: over whose ranks the vocabulary is cut (tensor parallel): weight and bias are this
            rank's rows of it then, hidden and the result the same on all of them, and a label that
            is no token has NaN. None: it is not.

    Returns:
        nats, float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature not above 0.
    """
    return _statistics(_logps, hidden, weight, labels, bias, temperature, cut)[..., 0]


def token_logps_and_entropies(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "..."],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    cut: Cut | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`token_logps`, and the entropy in nats of each token's distribution, from the same logits."""
    both = _statistics(_logps_and_entropies, hidden, weight, labels, bias, temperature, cut)
    return both[..., 0], both[..., 1]


OfLogits = Callable[[Tensor, Tensor, Cut | None], Tensor]


def _logps(logits: Tensor, labels: Tensor, cut: Cut | None) -> Tensor:
    if cut is not None:
        return (label_logits(logits, labels, cut) - log_sum_exp(logits, cut))[:, None]
    return logits.gather(-1, labels[:, None]) - logits.logsumexp(-1, keepdim=True)


def _logps_and_entropies(logits: Tensor, labels: Tensor, cut: Cut | None) -> Tensor:
    if cut is not None:
        lse = log_sum_exp(logits, cut)
        surprise = pvary(lse, cut.group)[:, None] - logits  # of this rank's part of the vocabulary
        entropy = psum(((-surprise).exp() * surprise).sum(-1), cut.group)
        return torch.stack([label_logits(logits, labels, cut) - lse, entropy], -1)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    return torch.cat([logp.gather(-1, labels[:, None]), entropy], -1)


def _statistics(
    of_logits: OfLogits,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    cut: Cut | None,
) -> Tensor:
    """of_logits(logits (N, V), labels (N,)) -> (N, number of statistics), chunk by chunk."""
    positive("temperature", temperature)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of the tokens of hidden, "
            f"{tuple(hidden.shape[:-1])}: shift both by one token, or neither"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, expected integers: one token id an item")
    check_projection(hidden, weight, bias)
    if cut is not None:
        check_rows(hidden, weight, labels, cut)
        hidden = pvary(hidden, cut.group)

    hidden, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    rows_held = weight.shape[0] if cut is None else cut.rows
    most = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // rows_held)
    parts = 1
    while -(-len(hidden) // parts) > most:  # a power of two: mostly chunks of one shape
        parts *= 2
    rows = max(1, -(-len(hidden) // parts))
    chunk = remat(bound(_of_chunk))
    done = [
        chunk(of_logits, h, weight, bias, y, float(temperature), cut)
        for h, y in zip(hidden.split(rows), labels_N.split(rows), strict=True)
    ]
    return torch.cat(done).unflatten(0, labels.shape)


@region
def _of_chunk(
    of_logits: OfLogits,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    cut: Cut | None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return of_logits(logits / temperature if temperature != 1 else logits, labels, cut)


def completion_logps(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    most: int,
    **options: Any,
) -> Float[Tensor, "B T"]:
    """`token_logps` where the mask is True, zeros elsewhere, in the time of `most` tokens.

    Prompts and padding have no part in a loss on completions, and here none in its cost either.

    Args:
        most: K, at least the mask's number of True; a batch's own, rounded up, so that few shapes
            occur. Tokens beyond it would be lost: `count_for` finds it on the host.
        options: of `token_logps`.
    """
    return _of_completions(_logps, hidden, weight, labels, mask, most, **options)[0]


def completion_logps_and_entropies(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    most: int,
    **options: Any,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """`token_logps_and_entropies` where the mask is True, as `completion_logps`."""
    logps, entropies = _of_completions(
        _logps_and_entropies, hidden, weight, labels, mask, most, **options
    )
    return logps, entropies


def _of_completions(
    of_logits: OfLogits,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    most: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    cut: Cut | None = None,
) -> tuple[Tensor, ...]:
    """Each statistic of `of_logits` at the first `most` tokens where the mask is True."""
    check_mask(mask, labels, "labels")
    first = mask.reshape(-1).argsort(descending=True, stable=True)[:most]
    kept = mask.reshape(-1)[first]
    h, y = hidden.reshape(-1, hidden.shape[-1])[first], labels.reshape(-1)[first]
    found = _statistics(of_logits, h, weight, y, bias, temperature, cut)
    found = torch.where(kept[:, None], found, 0.0)
    return tuple(
        x.new_zeros(mask.numel()).index_copy(0, first, x).reshape(mask.shape)
        for x in found.unbind(-1)
    )


def count_for(mask: Bool[Tensor, "B T"], multiple: int = 256) -> int:
    """The number of True rounded up: `most` of `completion_logps`; waits for a device."""
    return (
        max(1, -(-int(mask.sum()) // multiple)) * multiple
        if mask.numel() > multiple
        else (mask.numel())
    )


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
