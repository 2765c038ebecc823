"""Figures that people compare, each with what is needed to compare it.

BLEU and chrF are sacreBLEU's (Post 2018, https://aclanthology.org/W18-6319): on whole, detokenised
sentences, with the signature that says how they were computed. Perplexity says its unit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

from jaxtyping import Bool, Int
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor


class Score(NamedTuple):
    """A corpus score in [0, 100] and the sacreBLEU signature to quote with it."""

    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.signature})"


class Perplexity(NamedTuple):
    """Mean negative log likelihood of a token, in nats and in bits, and its exponential."""

    value: float
    nats_per_token: float
    bits_per_token: float


class Accuracy(NamedTuple):
    """The share of right predictions, in [0, 1], and what it was counted over."""

    value: float
    correct: int
    total: int


References = Sequence[str] | Sequence[Sequence[str]]


def _streams(hypotheses: Sequence[str], references: References) -> list[list[str]]:
    """sacreBLEU's order: all first references, all second ones, ...; None where one lacks."""
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("hypotheses and references must be lists of sentences, not one string")
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses ({len(hypotheses)}) and references ({len(references)}) must be as many, "
            "and at least one: give the references in the order of the hypotheses"
        )
    several = [[entry] if isinstance(entry, str) else list(entry) for entry in references]
    if not all(several):
        raise ValueError("every hypothesis needs at least one reference")
    most = max(map(len, several))
    ranks = [[row[i] if i < len(row) else None for row in several] for i in range(most)]
    return cast(list[list[str]], ranks)  # sacreBLEU takes None, its annotation does not


def bleu(hypotheses: Sequence[str], references: References) -> Score:
    """Corpus BLEU as sacreBLEU computes it: cased, tokenizer 13a, exponential smoothing.

    Args:
        hypotheses: detokenised translations.
        references: one sentence for each hypothesis, or a list of several.

    Raises:
        ValueError: empty lists or lists of different lengths.
    """
    metric = BLEU(tokenize="13a", lowercase=False)
    score = metric.corpus_score(hypotheses, _streams(hypotheses, references))
    return Score(score.score, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: References) -> Score:
    """Corpus chrF2 (Popovic 2015) as sacreBLEU computes it: character 1 to 6-grams, beta 2.

    Arguments and errors are those of `bleu`.
    """
    metric = CHRF()
    score = metric.corpus_score(hypotheses, _streams(hypotheses, references))
    return Score(score.score, str(metric.get_signature()))


def perplexity(nats: float | Tensor, tokens: int | Tensor = 1) -> Perplexity:
    """exp(nats / tokens).

    Args:
        nats: summed negative log likelihood, natural logarithm (or its mean, with tokens = 1).
        tokens: the number of tokens that the sum is over, > 0; padding does not count.
    """
    total, count = float(nats), float(tokens)
    if count <= 0:
        raise ValueError(f"tokens ({count:g}) must be > 0: nothing was counted")
    mean = total / count
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return Perplexity(value, mean, mean / math.log(2))


def accuracy(
    predictions: Int[Tensor, "..."],
    labels: Int[Tensor, "..."],
    *,
    ignore_index: int | None = None,
) -> Accuracy:
    """The share of positions where prediction and label agree.

    Args:
        predictions: class or token numbers, e.g. `logits.argmax(-1)`.
        labels: as many, same shape.
        ignore_index: positions with this label do not count (PAD).
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} must have "
            "the same shape: take the argmax over the classes first"
        )
    right: Bool[Tensor, ...] = predictions == labels
    counts = labels != ignore_index if ignore_index is not None else labels == labels
    correct, total = int((right & counts).sum()), int(counts.sum())
    if total == 0:
        raise ValueError(f"no label counts (all are ignore_index = {ignore_index}, or none given)")
    return Accuracy(correct / total, correct, total)
