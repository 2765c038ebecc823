"""Claims of msfs_functional.metrics: sacreBLEU's own figures, and units that are what they say."""

import math

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st

from msfs_functional import metrics

HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
OTHERS = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    bleu = metrics.bleu(HYPOTHESES, REFERENCES)
    assert bleu.value == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert bleu.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    chrf = metrics.chrf(HYPOTHESES, REFERENCES)
    assert chrf.value == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert chrf.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_bleu_of_the_documented_example() -> None:
    """The example of sacreBLEU's README, two references a sentence: 48.53."""
    both = list(zip(REFERENCES, OTHERS, strict=True))
    assert round(metrics.bleu(HYPOTHESES, both).value, 2) == 48.53
    assert "nrefs:2" in metrics.bleu(HYPOTHESES, both).signature


def test_bleu_by_hand() -> None:
    """Precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty: their geometric mean."""
    score = metrics.bleu(["a b c d x"], ["a b c d e"])
    assert score.value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_scores_are_cased_and_perfect_ones_are_100() -> None:
    assert metrics.bleu(REFERENCES, REFERENCES).value == pytest.approx(100)
    assert metrics.chrf(REFERENCES, REFERENCES).value == pytest.approx(100)
    assert metrics.bleu([h.upper() for h in REFERENCES], REFERENCES).value < 10


def test_sentences_may_have_different_numbers_of_references() -> None:
    score = metrics.bleu(HYPOTHESES, [[REFERENCES[0], OTHERS[0]], *REFERENCES[1:]])
    assert "nrefs:var" in score.signature
    assert score.value >= metrics.bleu(HYPOTHESES, REFERENCES).value


def test_score_prints_with_its_signature() -> None:
    assert str(metrics.Score(41.237, "nrefs:1")) == "41.24 (nrefs:1)"


@pytest.mark.parametrize("score", [metrics.bleu, metrics.chrf])
@pytest.mark.parametrize(
    ("hypotheses", "references", "words"),
    [
        ([], [], "at least one"),
        (["a"], ["a", "b"], r"hypotheses \(1\) and references \(2\)"),
        (["a"], [[]], "at least one reference"),
        ("a", ["a"], "not one string"),
    ],
)
def test_bad_lists_raise(score, hypotheses, references, words) -> None:
    with pytest.raises(ValueError, match=words):
        score(hypotheses, references)


@given(probability=st.floats(1e-6, 1.0), tokens=st.integers(1, 10**6))
def test_perplexity_of_uniform_guesses_is_their_number(probability: float, tokens: int) -> None:
    result = metrics.perplexity(-math.log(probability) * tokens, tokens)
    assert result.value == pytest.approx(1 / probability)
    assert result.nats_per_token == pytest.approx(-math.log(probability))
    assert result.bits_per_token == pytest.approx(-math.log2(probability))


def test_perplexity_takes_tensors_and_means_and_never_overflows() -> None:
    assert metrics.perplexity(torch.tensor(4.0), torch.tensor(2)).value == math.exp(2)
    assert metrics.perplexity(2.0) == metrics.perplexity(20.0, 10)
    assert metrics.perplexity(1e6).value == math.inf
    with pytest.raises(ValueError, match=r"tokens \(0\) must be > 0"):
        metrics.perplexity(1.0, 0)


def test_accuracy_counts_what_is_not_ignored() -> None:
    predictions, labels = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 9, 3], [5, 0, 0]])
    assert metrics.accuracy(predictions, labels) == (4 / 6, 4, 6)
    assert metrics.accuracy(predictions, labels, ignore_index=0) == (0.5, 2, 4)
    with pytest.raises(ValueError, match="no label counts"):
        metrics.accuracy(labels * 0, labels * 0, ignore_index=0)
    with pytest.raises(ValueError, match=r"\(2, 3, 7\) and labels \(2, 3\) .* argmax"):
        metrics.accuracy(torch.zeros(2, 3, 7, dtype=torch.int64), labels)
