"""Byte-pair merges: the example of the docstring, brute force, and the published oracle."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from msfs_functional.byte_pairs import joined, learn_merges, letters, pairs
from msfs_functional.tokenizer import train_bpe

ORACLE = "tokenizers/bpe_oracle"


def test_the_example_of_the_docstring():
    counts = Counter(b"low low low lower newer newer".split())
    assert learn_merges(counts, 3) == [(b"o", b"w"), (b"l", b"ow"), (b"e", b"r")]


def test_overlapping_pairs_are_joined_from_the_left():
    assert joined([b"a", b"a", b"a"], (b"a", b"a")) == [b"aa", b"a"]
    assert learn_merges({b"aaa": 2, b"aa": 1}, 5) == [(b"a", b"a"), (b"aa", b"a")]


@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=8).map(str.encode), st.integers(1, 3)),
    st.integers(0, 8),
)
def test_merges_are_those_of_counting_everything_anew_each_time(pieces, most):
    words = {piece: [bytes([byte]) for byte in piece] for piece in pieces}
    expected = []
    while len(expected) < most:
        total = Counter()
        for piece, word in words.items():
            total.update({pair: times * pieces[piece] for pair, times in pairs(word).items()})
        if not total:
            break
        expected.append(max(total, key=lambda pair: (total[pair], pair)))
        words = {piece: joined(word, expected[-1]) for piece, word in words.items()}
    assert learn_merges(pieces, most) == expected


def test_merges_of_the_oracle():
    """243 merges that the published reference learned from its corpus with GPT-2's pieces."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data")) / ORACLE
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: MSFS_DATA names the one with tokenizers")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_of = {letter: byte for byte, letter in enumerate(letters())}
    decoded = lambda text: bytes(byte_of[letter] for letter in text)  # noqa: E731
    text = (folder / "corpus.en").read_bytes().decode()
    pieces = Counter(decoded(piece) for piece, _ in bytewise.pre_tokenize_str(text))
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    expected = [tuple(decoded(part) for part in line.split(" ")) for line in lines]
    found = learn_merges(pieces, len(expected))
    assert found == expected
    vocabulary = json.loads((folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8"))
    learned = {a + b for a, b in found} | {bytes([byte]) for byte in range(256)}
    assert {decoded(text) for text in vocabulary if text != "<|endoftext|>"} == learned


def test_a_tokenizer_of_these_merges_spells_and_splits_like_them():
    lines = ["low low low lower newer newer", "new, newest: newer"]
    tokenizer = train_bpe(lines, 4 + 256 + 7, ties="greater")
    assert tokenizer.vocab_size == 267 and tokenizer.decode(tokenizer.encode(lines)) == lines
    pieces = Counter(b" low low low lower newer newer new newest newer".split(b" ")[1:])
    spaced = Counter({b" " + piece: count for piece, count in pieces.items()})
    spaced.update([b",", b":"])
    merges = learn_merges(spaced, 7)
    tokens = [tokenizer.tokens([id_])[0] for id_ in range(260, 267)]
    assert tokens == [(a + b).decode().replace(" ", "▁") for a, b in merges]


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match=r"most \(-1\)"):
        learn_merges({b"a": 1}, -1)
    with pytest.raises(ValueError, match=r"b'a' has count 0"):
        learn_merges({b"a": 0}, 1)
