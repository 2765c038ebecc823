"""Batches of images and texts: the same however many share them, questions by weight, moves."""

import re

import numpy as np
import pytest
import torch

from msfs_functional.image_batches import DESCRIBE, Pairs, Questions, grey_of, texts_of
from msfs_functional.image_corpora import Pictured, shapes_world
from msfs_functional.models.vlm import tiny
from msfs_functional.tokenizer import Tokenizer, train_bpe

DATA = shapes_world(0, 24)[0]
TOKENIZER = train_bpe(texts_of(DATA), 400)


def questions(data: Pictured = DATA, tokenizer: Tokenizer = TOKENIZER, **options) -> Questions:
    model = tiny(tokenizer.vocab_size, tokenizer.vocab_size)
    return Questions(data, tokenizer, model, 8, **{"length": 192, **options})


def test_shares_of_a_batch_are_the_batch_of_one_process():
    whole, parts = questions().batch(7), [questions(share=(i, 2)).batch(7) for i in (0, 1)]
    pictures = torch.cat([part["pictures"] for part in parts])
    assert torch.equal(whole["pictures"], pictures)
    learned = [part["labels"][part["labels"] >= 0].sort().values for part in (whole, *parts)]
    assert torch.equal(learned[0], torch.cat(learned[1:]).sort().values)
    assert not torch.equal(whole["pictures"], questions().batch(8)["pictures"])
    ids = torch.arange(sum(map(len, DATA.captions)))[:, None]
    pairs, halves = Pairs(DATA, ids, 6), [Pairs(DATA, ids, 6, share=(i, 2)) for i in (0, 1)]
    for name, value in pairs.batch(5).items():
        assert torch.equal(value, torch.cat([half.batch(5)[name] for half in halves]))


def test_an_epoch_has_every_image_once_and_its_own_text():
    owner = torch.tensor([i for i, texts in enumerate(DATA.captions) for _ in texts])[:, None]
    pairs = Pairs(DATA, owner, 6, seed=3)
    epoch = [next(pairs) for _ in range(4)]
    seen = torch.cat([batch["ids"][:, 0] for batch in epoch])
    assert sorted(seen.tolist()) == list(range(len(DATA)))
    assert torch.equal(torch.cat([batch["images"] for batch in epoch]), DATA.images[seen])
    assert not torch.equal(next(pairs)["ids"], epoch[0]["ids"])


def test_questions_are_drawn_by_the_weight_of_the_first_regex_that_fits():
    mix = [(r"^how many", 0.0), (r"^what", 4.0), (DESCRIBE, 0.5), (r"^how", 9.0)]
    asked = questions(questions=4, mix=mix).asked
    draws = np.random.default_rng(0).random((600, 64))
    drawn = [text for i in range(600) for text, _ in asked(i % 24, draws[i])]
    share = lambda start: np.mean([text.startswith(start) for text in drawn])  # noqa: E731
    assert share("how many") == 0 and share("what") > 0.55
    assert share("describe") == pytest.approx(0.5 / 4, abs=0.03)
    without = questions(mix=[("", 0.0), (DESCRIBE, 1.0)]).asked
    assert without(0, draws[0]) == []


def test_rows_are_as_long_as_the_longest_sample_may_be():
    options = {"questions": 3, "turns": 3, "grey": 0.5, "coloured": "red|blue"}
    batches = questions(length=None, **options)
    for _ in range(20):
        next(batches)  # every sample fits
    few = Pictured(DATA.images, [[] for _ in DATA.captions], [some[:1] for some in DATA.questions])
    alone = questions(few, length=None, **options)  # the same of every image, asked three times
    sizes = [sum(len(alone.ids[text]) for text in pair) for (pair,) in few.questions]
    assert alone.length == alone.model.tokens_per_image + 3 * (max(sizes) + 2)
    next(alone)
    with pytest.raises(ValueError, match="the decoder takes"):
        questions(length=None, questions=90, turns=90)


def test_pictures_are_turned_and_shifted_inside_their_frame():
    moved = questions(flips=True, shift=2).moved
    picture = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6)
    draws = np.random.default_rng(0).random((200, 4))
    found = {tuple(moved(picture, row).flatten().tolist()) for row in draws}
    assert len(found) > 60  # of 8 turns and 25 shifts
    values = set(picture.flatten().tolist())
    assert all(set(one) <= values and len(one) == 36 for one in found)


def test_tints_scale_each_colour_of_a_picture_alike():
    plain, tinted = (questions(tint=t).batch(1)["pictures"].float() for t in (0.0, 0.2))
    ratios = (tinted + 0.5) / (plain + 0.5)
    dark = ratios[:, :, 0, 0]  # of the background, whose values are small
    assert 0.75 < dark.min() < 0.95 and 1.05 < dark.max() < 1.25
    assert len({tuple(ratio.tolist()) for ratio in dark}) == len(dark)
    bright = (plain > 50) & (tinted < 255)
    assert 0.79 < ratios[bright].min() and ratios[bright].max() < 1.21


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"a batch \(30\) must be at most the images .* \(24\)"):
        Pairs(DATA, torch.zeros(99, 1, dtype=torch.int64), 30)
    with pytest.raises(ValueError, match="multiple of the 3 data ranks"):
        questions(share=(0, 3))


COLOURS = r"\b(colour|red|green|blue|yellow|purple|white)\b"


def test_grey_pictures_are_asked_nothing_of_colours():
    one = questions(grey=1.0, coloured=COLOURS)
    asked = [
        pair for i in range(24) for pair in one.asked(i, np.random.default_rng(i).random(64), True)
    ]
    texts = " ".join(text for pair in asked for text in pair)
    assert asked and not re.search(COLOURS + "|describe", texts)
    pictures = one.batch(1)["pictures"]
    assert torch.equal(pictures[:, 0], pictures[:, 1]) and torch.equal(
        pictures[:, 0], pictures[:, 2]
    )
    some = questions(grey=0.5, coloured=COLOURS).batch(1)["pictures"]
    flat = (some[:, 0] == some[:, 1]).flatten(1).all(1)
    assert flat.any() and not flat.all()


def test_grey_pictures_are_paired_with_texts_without_colours():
    texts = torch.arange(sum(map(len, DATA.captions)))[:, None]
    plain = Pairs(DATA, texts, 8).batch(1)
    mixed = Pairs(DATA, texts, 8, grey=0.5, colourless=-1 - texts).batch(1)
    grey = mixed["ids"][:, 0] < 0
    assert grey.any() and not grey.all()
    assert torch.equal(torch.where(grey[:, None], -1 - mixed["ids"], mixed["ids"]), plain["ids"])
    assert torch.equal(mixed["images"][~grey], plain["images"][~grey])
    assert torch.equal(mixed["images"][grey], grey_of(plain["images"][grey]))
