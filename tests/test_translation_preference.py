"""Preference tuning of the encoder-decoder: sums are its own, and DPO moves them apart."""

import pytest
import torch

from msfs_functional import random
from msfs_functional.models.transformer import tiny, transformer
from msfs_functional.preference import dpo
from msfs_functional.tokenizer import BOS, EOS, PAD
from msfs_functional.transforms import value_and_grad
from msfs_functional.translation_preference import (
    TranslationPair,
    judged_pairs,
    pair_data,
    pair_sums,
    sample_translations,
)

SOURCES = [[5, 6, 7], [8, 9], [5, 5, 5, 5]]
PAIRS = [
    TranslationPair([5, 6, 7], [6, 7, EOS], [7, EOS]),
    TranslationPair([8, 9], [9, EOS], [8, 8, 8, EOS]),
]


@pytest.fixture(scope="module")
def model():
    size = {"width": 16, "depth": 1, "heads": 2, "hidden": 16, "dropout": 0.0, "max_length": 16}
    return transformer(tiny(12, **size))


@pytest.fixture(scope="module")
def params(model):
    return model.init(0)


def test_samples_end_or_reach_the_limit_and_depend_on_the_key_alone(model, params):
    options = {"samples": 3, "extra": 4, "batch": 2}
    found = sample_translations(model, params, SOURCES, random.key(0), **options)
    assert [len(each) for each in found] == [3, 3, 3]
    for source, rows in zip(SOURCES, found, strict=True):
        for row in rows:
            assert EOS not in row[:-1]
            assert row[-1] == EOS or len(row) >= len(source) + 4
    assert found == sample_translations(model, params, SOURCES, random.key(0), **options)
    assert found != sample_translations(model, params, SOURCES, random.key(1), **options)


def test_sums_of_a_pair_are_those_of_each_translation_alone(model, params):
    data = pair_data(model, params, PAIRS)
    sums, lengths = pair_sums(model, params, data)
    torch.testing.assert_close(data["reference"], sums)
    assert lengths.tolist() == [[3, 2], [2, 4]]
    for n, pair in enumerate(PAIRS):
        for side, ids in enumerate((pair.chosen, pair.rejected)):
            target = torch.tensor([[BOS, *ids]])
            logits = model.apply(params, torch.tensor([pair.source]), target[:, :-1])
            logps = logits.log_softmax(-1).gather(-1, target[:, 1:, None])
            torch.testing.assert_close(sums[n, side], logps.sum(), atol=1e-4, rtol=1e-4)


def test_dpo_on_an_encoder_decoder_raises_the_margins(model, params):
    data = pair_data(model, params, PAIRS)

    def loss_fn(params):
        sums, _ = pair_sums(model, params, data)
        out = dpo(*sums.unbind(1), *data["reference"].unbind(1), beta=0.5)
        return out.losses.mean(), out.margins

    first = None
    for _ in range(8):
        (loss, margins), grads = value_and_grad(loss_fn, has_aux=True)(params)
        first = loss if first is None else first
        params = {name: value - 0.1 * grads[name] for name, value in params.items()}
    assert first is not None and loss < first and (margins > 0).all()


def test_the_best_and_the_worst_translation_make_a_pair_where_they_differ():
    made = [[[4, EOS], [5, EOS], [6, EOS]], [[4, EOS], [4, EOS], [4, EOS]]]
    texts = [["il gatto", "il gatto nero", "zzz"], ["uno", "uno", "uno"]]
    pairs = judged_pairs(SOURCES[:2], made, texts, ["il gatto nero", "uno"])
    assert pairs == [TranslationPair([5, 6, 7], [5, EOS], [6, EOS])]
    with pytest.raises(ValueError, match="0 pairs: no two translations"):
        pair_data(None, {"x": torch.zeros(1)}, [])  # pyright: ignore[reportArgumentType]


def test_padding_of_other_pairs_changes_nothing(model, params):
    both, one = pair_data(model, params, PAIRS), pair_data(model, params, PAIRS[1:])
    assert both["target"].shape[-1] == 5 and (both["target"] == PAD).any()
    torch.testing.assert_close(both["reference"][1:], one["reference"], atol=1e-5, rtol=1e-5)
