"""Drawing noun phrases and places: what is there, whose it is, how many, what it is like."""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from msfs_functional.synthetic.english_italian import italian
from msfs_functional.synthetic.english_italian.lexicon import (
    CITIES,
    NAMES,
    NUMBERS,
    Adjective,
    Noun,
    lexicon,
    nouns_of,
)
from msfs_functional.synthetic.english_italian.nouns import (
    NO_PAIRS,
    POSSESSIVES,
    QUANTIFIERS,
    SUBJECT_PRONOUNS,
    Pairs,
    Phrase,
    both,
    phrase,
)

T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def draw(rng: random.Random, weights: Mapping[T, float]) -> T:
    """One of the keys, as likely as its weight says."""
    rest = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        rest -= weight
        if rest < 0:
            return key
    raise ValueError(f"weights {weights} must be positive")


_DETERMINERS = {
    "the": 42, "a": 18, "possessive": 14, "demonstrative": 10, "number": 7, "quantifier": 5,
    "every": 2, "all the": 2, "other": 2, "owner": 6,
}  # fmt: skip
# Whom and what people call theirs, for the kinds where not everything is.
_OWNED = {
    "P": {"friend", "teacher", "student", "doctor", "nurse", "lawyer", "neighbour", "cook"},
    "A": {"dog", "cat", "horse", "bird", "cow", "duck"},
    "G": {"house", "castle", "school", "shop", "hotel", "restaurant", "university", "church"},
    "L": {"garden", "village", "city", "kitchen", "island"},
    "X": {"street"},
    "U": {"song"},
    "W": set(),
}  # fmt: skip
_POSSESSORS = {"husband": ["my", "your", "her"], "wife": ["my", "your", "his"]}


def _adjectives(rng: random.Random, noun: Noun, rate: float) -> list[Adjective]:
    """None, one, or one that stands before the Italian noun and one behind it."""
    if rng.random() >= rate:
        return []
    fitting = lexicon().adjectives[noun.kind]
    first, second = pick(rng, fitting), pick(rng, fitting)
    two = rng.random() < 0.12 and first.before and not second.before
    return [first, second] if two else [first]


def _suits(noun: Noun, determiner: str) -> bool:
    """Whether a noun takes a kind of determiner: no two breads, no my moon."""
    if noun.kind == "K" and determiner not in ("possessive", "a", "some numbers"):
        return False
    if determiner in ("number", "some numbers", "quantifier", "all the"):
        return noun.plural
    if determiner in ("a", "every", "other"):
        return noun.countable
    if determiner in ("possessive", "owner"):
        return noun.lemma in _OWNED.get(noun.kind, {noun.lemma})
    return True


def noun_phrase(
    rng: random.Random,
    noun: Noun,
    *,
    determiner: str | None = None,
    plural: bool | None = None,
    rate: float = 0.3,
) -> Phrase:
    """A noun with determiner and adjectives.

    Args:
        determiner: the, a, possessive, demonstrative, number ("two" or "the two"), "some numbers"
            ("two"), quantifier, every, all the, other or owner ("the doctor's"); drawn where left
            out; where it does not suit the noun, another one takes its place.
        plural: drawn where left out; nouns without plural stay singular.
        rate: how often it has adjectives.
    """
    kind = determiner or ("possessive" if noun.kind == "K" else draw(rng, _DETERMINERS))
    if not _suits(noun, kind):
        kind = "possessive" if noun.kind == "K" else "the"
    if plural is None:
        plural = rng.random() < 0.35
    plural = plural and noun.plural and kind not in ("a", "every")
    word: str | Phrase = kind
    match kind:
        case "possessive":
            word = pick(rng, _POSSESSORS.get(noun.lemma, list(POSSESSIVES)))
        case "demonstrative":
            word = pick(rng, ("this", "that"))
        case "number" | "some numbers":
            word = pick(rng, list(NUMBERS))
            if kind == "number" and rng.random() < 0.4:
                word = "the " + word
        case "quantifier":
            word = pick(rng, list(QUANTIFIERS))
        case "other":
            word = "the other" if plural or rng.random() < 0.5 else "another"
        case "owner":
            word = owner(rng)
    return phrase(noun, word, plural=plural, adjectives=_adjectives(rng, noun, rate))


def name(rng: random.Random) -> Phrase:
    """A first name."""
    chosen = pick(rng, list(NAMES))
    return Phrase(chosen, chosen, NAMES[chosen])


def owner(rng: random.Random) -> Phrase:
    """Somebody who owns things: a name, my father, the doctor."""
    chance = rng.random()
    if chance < 0.4:
        return name(rng)
    kind, determiner = ("K", "possessive") if chance < 0.6 else ("P", "the")
    return noun_phrase(rng, pick(rng, lexicon().nouns[kind]), determiner=determiner, rate=0)


def short(rng: random.Random) -> Phrase:
    """A person in one or two words: a pronoun, a name, my father, the doctor."""
    return pick(rng, SUBJECT_PRONOUNS) if rng.random() < 0.4 else owner(rng)


def subject(rng: random.Random, kinds: str = "PK", *, pronouns: float = 0.25) -> Phrase:
    """Somebody or something that acts: names and pronouns where persons may."""
    kind = pick(rng, kinds)
    if kind in "PK":
        if rng.random() < pronouns:
            return pick(rng, SUBJECT_PRONOUNS)
        chance = rng.random()
        if chance < 0.25:
            return name(rng)
        if chance < 0.31:
            first, second = name(rng), name(rng)
            if first != second:
                return both(first, second)
    return noun_phrase(rng, pick(rng, lexicon().nouns[kind]), rate=0.2)


def thing(rng: random.Random, kinds: str, **options) -> Phrase:
    """A noun phrase about a noun of one of the kinds, each noun equally likely."""
    return noun_phrase(rng, pick(rng, nouns_of(kinds)), **options)


_ON = {"beach", "island", "bridge", "table", "chair", "bed", "sofa"}
_NEAR = {"river", "sea", "lake", "tree"}
_PREPOSITIONS = {
    "in": ("in", ""), "on": ("su", ""), "near": ("vicino", "a"), "behind": ("dietro", ""),
    "in front of": ("davanti", "a"), "under": ("sotto", ""),
}  # fmt: skip


def place(rng: random.Random, kinds: str = "GGLX") -> tuple[str, str, Pairs]:
    """Where something happens: in the garden, near my house, on that table, in Rome."""
    if "G" in kinds and rng.random() < 0.08:
        city, città = pick(rng, list(CITIES.items()))
        return "in " + city, italian.preposition("a", città, None), NO_PAIRS
    kind = pick(rng, kinds)
    nouns = lexicon().nouns[kind]
    noun = pick(rng, [n for n in nouns if n.lemma in _NEAR] if kind == "W" else nouns)
    choices = ["on" if noun.lemma in _ON else "near" if noun.lemma in _NEAR else "in"] * 5
    if noun.lemma not in _NEAR or noun.lemma == "tree":
        choices += ["near", "behind", "in front of"]
    if noun.kind == "F" or noun.lemma in ("bridge", "tree", "box"):
        choices += ["under", "under"]
    preposition = pick(rng, choices)
    determiner = draw(rng, {"the": 70, "possessive": 12, "demonstrative": 12, "owner": 6})
    landmark = noun_phrase(rng, noun, determiner=determiner, plural=False, rate=0.12)
    first, second = _PREPOSITIONS[preposition]
    dove = f"{first} {landmark.after(second)}" if second else landmark.after(first)
    return f"{preposition} {landmark.english}", dove, landmark.pairs
