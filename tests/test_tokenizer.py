"""Tokenizers: exact round trips, determinism, the specials, and errors that help."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfs_functional.tokenizer import (
    BOS,
    EOS,
    PAD,
    SPECIALS,
    UNK,
    Tokenizer,
    train_bpe,
    train_word_level,
)

LINES = [
    "The man doesn't see John's cat.",
    "L'uomo non vede l'amico dell'artista: è qui, c'è già.",
    "Zwei junge weiße Männer sind im Freien.",
    "  two  spaces ",
    "12345 € 👨‍👩‍👧 e\u0301\u0327 日本語",
] * 4


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(LINES, 420)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_word_level(LINES, 100)


any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=60)
tricky = st.sampled_from(
    ["", " ", "  x", "<pad>", " <eos> <unk>", "\t\r\x00", "\u2028a\u0085b", "e\u0301é", "'s", "l'",
     "👩🏽‍🚀🇮🇹", "\ufeffx", "a\u00a0b", "ﷺ", "’t’", "𝔘𝔫𝔦"]
)  # fmt: skip


@settings(max_examples=150)
@given(lines=st.lists(any_text | tricky, max_size=4))
def test_bpe_round_trip_is_exact_for_any_unicode_text(bpe, lines):
    assert bpe.decode(bpe.encode(lines)) == lines
    assert bpe.decode(bpe.encode(lines, bos=True, eos=True)) == lines


@given(lines=st.lists(any_text | tricky, max_size=3))
def test_bpe_ids_lie_in_the_vocabulary_and_are_never_special(bpe, lines):
    for ids in bpe.encode(lines):
        assert all(len(SPECIALS) <= i < bpe.vocab_size for i in ids)


@given(lines=st.lists(any_text | tricky, min_size=1, max_size=3))
def test_each_line_is_encoded_as_if_alone(bpe, lines):
    assert bpe.encode(lines) == [bpe.encode([line])[0] for line in lines]


def test_specials_are_the_first_four_ids(bpe, words):
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    for tokenizer in (bpe, words):
        vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
        assert [vocabulary[token] for token in SPECIALS] == [0, 1, 2, 3]
        assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))


def test_bos_and_eos_frame_the_line_and_vanish_on_decoding(bpe):
    (plain,), (framed,) = bpe.encode(["a cat"]), bpe.encode(["a cat"], bos=True, eos=True)
    assert framed == [BOS, *plain, EOS]
    assert bpe.decode([[BOS, *plain, EOS, PAD, PAD]]) == ["a cat"]


def test_the_text_of_a_special_is_text(bpe, words):
    (ids,) = bpe.encode(["<pad> and <eos>"])
    assert not set(ids) & {PAD, BOS, EOS, UNK}
    assert not set(words.encode(["<pad> <bos> <eos>"])[0]) & {PAD, BOS, EOS}


def test_words_have_the_same_ids_wherever_they_stand(bpe):
    (first,), (later,) = bpe.encode(["uomo"]), bpe.encode(["non uomo"])
    assert later[-len(first) :] == first


def test_pieces_keep_elisions_and_english_endings_whole():
    tokenizer = train_word_level(LINES, 200)
    (ids,) = tokenizer.encode(["L'uomo dell'artista doesn't see John's cat."])
    assert tokenizer.tokens(ids) == (
        ["▁L'", "uomo", "▁dell'", "artista", "▁doesn", "'t", "▁see", "▁John", "'s", "▁cat", "."]
    )


def test_word_level_gives_unknown_words_unk_and_the_rest_exactly(words):
    (ids,) = words.encode(["The zebra doesn't see John's cat."])
    assert ids.count(UNK) == 1
    assert words.decode([ids]) == ["The <unk> doesn't see John's cat."]
    assert words.decode(words.encode(LINES[:3])) == LINES[:3]


def test_word_level_keeps_the_most_frequent_words():
    tokenizer = train_word_level(["a a a b b c"], 6)
    assert tokenizer.vocab_size == 6
    assert [len(set(ids) & {UNK}) for ids in tokenizer.encode(["a", "b", "c"])] == [0, 0, 1]
    assert train_word_level(["a a a b b c"], 99, min_frequency=3).vocab_size == 5


def test_word_level_joins_composed_and_decomposed_letters(words):
    assert words.encode(["è"]) == words.encode(["e\u0300"])


def test_saving_and_loading_changes_nothing(bpe, words, tmp_path):
    for tokenizer in (bpe, words):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = Tokenizer.load(tmp_path / "tokenizer.json")
        assert again.to_json() == tokenizer.to_json()
        assert again.encode([*LINES, "<pad>"]) == tokenizer.encode([*LINES, "<pad>"])


def test_training_is_deterministic_across_processes():
    script = (
        "from msfs_functional.tokenizer import train_bpe, train_word_level\n"
        "from hashlib import sha256\n"
        "lines = [f'la casa {i % 97} dei {i * 7919 % 1013} ragazzi' for i in range(2000)]\n"
        "for train in (train_bpe, train_word_level):\n"
        "    print(sha256(train(lines, 600).to_json().encode()).hexdigest())\n"
    )
    runs = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_vocabulary_has_the_size_asked_for_where_there_is_text_for_it():
    lines = [chr(97 + i % 26) * 2 + chr(97 + i % 17) + chr(97 + i % 23) for i in range(900)]
    assert train_bpe(lines, 500).vocab_size == 500
    assert train_bpe(["ab"], 5000).vocab_size == 260


@pytest.mark.parametrize("size", [-1, 0, 4, 260])
def test_a_bpe_vocabulary_too_small_says_size_rule_and_remedy(size):
    with pytest.raises(ValueError, match=rf"vocab_size \({size}\) must exceed 260.*pass 1000"):
        train_bpe(LINES, size)


def test_other_bad_input_says_what_to_do(tmp_path, bpe):
    with pytest.raises(ValueError, match=r"vocab_size \(4\) must exceed"):
        train_word_level(LINES, 4)
    with pytest.raises(ValueError, match="0 lines without text"):
        train_bpe([], 500)
    with pytest.raises(ValueError, match=r"pass \[line\]"):
        bpe.encode("a cat")
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"bad.json: not a tokenizer"):
        Tokenizer.load(tmp_path / "bad.json")
    foreign = json.loads(bpe.to_json())
    foreign["added_tokens"] = []
    foreign["model"]["vocab"] = {"a": 0, "b": 1, "c": 2, "d": 3}
    foreign["model"]["merges"] = []
    with pytest.raises(ValueError, match="the first ids are"):
        Tokenizer.from_json(json.dumps(foreign))
