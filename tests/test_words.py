"""Words of captions: what is known, what is cut and told."""

import pytest

from msfs_functional.synthetic import shapes
from msfs_functional.words import NOTHING, UNKNOWN, Words


def test_captions_are_words_that_the_vocabulary_holds():
    texts = [shapes.caption(scene) for scene in shapes.scenes(0, 300)]
    words = Words.of(texts, length=12)
    given = words.encode([*texts, "", "A small PINK circle"])
    assert (given["ids"][:-1] != UNKNOWN).all() and int(given["ids"].max()) < words.vocab
    assert given["ids"].shape == (302, 10)  # as many as the longest caption has
    assert given["lengths"][-2:].tolist() == [1, 4]
    assert given["ids"][-2, 0] == NOTHING
    assert (given["ids"][-1] == UNKNOWN).sum() == 1


def test_words_are_kept_by_how_common_they_are_and_marks_count():
    words = Words.of(["A dog, a cat.", "a dog"], most=3, length=4)
    assert words.words == ("a", "dog", ",")
    assert words.encode(["a dog, no"])["ids"].tolist() == [[3, 4, 5, UNKNOWN]]
    assert words.strange(["a dog, no", ""]) == ["no"]


def test_a_caption_beyond_the_context_is_cut_and_told(capsys):
    words = Words.of(["one two three"], length=2)
    given = words.encode(["three two one", "two"])
    assert given["lengths"].tolist() == [2, 1] and given["ids"].shape == (2, 2)
    assert "1 of 2 captions are longer than 2 words" in capsys.readouterr().err


def test_captions_without_words_are_refused():
    with pytest.raises(ValueError, match="all captions are empty"):
        Words.of(["", " "])
    with pytest.raises(ValueError, match=r"length \(0\)"):
        Words.of(["a"], length=0)
