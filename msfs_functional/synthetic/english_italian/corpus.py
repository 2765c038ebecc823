"""The corpus: sentences drawn from the patterns, and splits that test composition.

Some 310 lemmas and 22 sentence patterns (`actions.py`, `descriptions.py`, `linked.py`) over
clauses, noun phrases, word forms and a lexicon. Translating it takes what real Italian takes:
gender and number that agree across the sentence, articles by sound, contractions, adjectives
behind the noun, auxiliaries and participles, clitics, subjects left unsaid.

English decides the Italian, so that one reference is enough: "you" is one person, persons whose
gender English hides are masculine, the simple past is the passato prossimo, "used to" the
imperfect, "be ...ing" stare with the gerund.

A hash sets some (adjective, noun) and (verb, object) pairs aside for the test, others for
validation: no training sentence holds one of them, every test sentence does, while each of its
words is known from training.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msfs_functional.synthetic.english_italian.actions import (
    acting,
    clitic,
    consecutive,
    controlling,
    giving,
    liking,
    moving,
    ordering,
    transitive,
)
from msfs_functional.synthetic.english_italian.clauses import Sentence
from msfs_functional.synthetic.english_italian.descriptions import (
    comparison,
    copula,
    existence,
    having,
    profession,
    superlative,
    where_is,
)
from msfs_functional.synthetic.english_italian.linked import (
    asking,
    joined,
    relative_object,
    relative_subject,
    reporting,
    yes_no,
)
from msfs_functional.synthetic.english_italian.phrases import draw

Pair = tuple[str, str]
PATTERNS: dict[Callable[[random.Random], Sentence], float] = {
    transitive: 20, acting: 9, moving: 7, copula: 9, comparison: 4, superlative: 2, existence: 5,
    giving: 6, clitic: 5, consecutive: 4, liking: 5, relative_subject: 4, relative_object: 5,
    yes_no: 5, asking: 7, where_is: 3, having: 4, controlling: 3, ordering: 3, joined: 4,
    reporting: 3, profession: 2,
}  # fmt: skip
MOST_WORDS = 12
# Share of the combinations that training never sees, out of 100.
VALID_SHARE, TEST_SHARE = 4, 8


class Corpus(NamedTuple):
    """Lists of (English, Italian)."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def held_out(pair: tuple[str, str]) -> str:
    """The split that a combination of lemmas belongs to: "train", "valid" or "test"."""
    bucket = zlib.crc32("+".join(pair).encode()) % 100
    return (
        "test" if bucket < TEST_SHARE else "valid" if bucket < TEST_SHARE + VALID_SHARE else "train"
    )


def sentences(seed: int = 0) -> Iterator[Sentence]:
    """Distinct sentences without end."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        sentence = draw(rng, PATTERNS)(rng)
        if sentence.english not in seen and sentence.english.count(" ") < MOST_WORDS:
            seen.add(sentence.english)
            yield sentence


def _words(sentence: Sentence) -> list[str]:
    return sentence.english.split() + sentence.italian.split()


def english_italian(
    seed: int = 0, *, train: int = 30_000, valid: int = 500, test: int = 1000
) -> Corpus:
    """Makes the corpus; the same seed and sizes give the same sentences everywhere.

    Args:
        seed: of the sentences. Which combinations are set aside does not depend on it.
        train, valid, test: number of sentence pairs.

    Raises:
        ValueError: a size below 1, or too little training text to know the words of the others.
    """
    sizes = {"train": train, "valid": valid, "test": test}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1 sentence")
    parts: dict[str, list[Sentence]] = {name: [] for name in sizes}
    known: set[str] = set()
    for drawn, sentence in enumerate(sentences(seed)):
        splits = {held_out(pair) for pair in sentence.pairs} - {"train"}
        if len(splits) < 2:
            name = splits.pop() if splits else "train"
            if len(parts["train"]) < train:
                parts[name].append(sentence)
            elif name != "train" and known.issuperset(_words(sentence)):
                parts[name].append(sentence)
        if len(parts["train"]) < train:
            continue
        if not known:
            known.update(word for sentence in parts["train"] for word in _words(sentence))
            for name in ("valid", "test"):
                parts[name] = [s for s in parts[name] if known.issuperset(_words(s))]
        if all(len(parts[name]) >= size for name, size in sizes.items()):
            return Corpus(*([(s.english, s.italian) for s in parts[n][: sizes[n]]] for n in sizes))
        if drawn > 10 * (train + valid + test) + 20_000:
            break
    raise ValueError(
        f"{train} training sentences know the words of too few others for {valid} and {test} held "
        "out: make train larger (30000) or the others smaller"
    )
