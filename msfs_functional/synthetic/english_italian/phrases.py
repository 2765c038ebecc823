"""Noun phrases in both languages at once: determiners, adjectives, owners, pronouns, places."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from msfs_functional.synthetic.english_italian import english, italian
from msfs_functional.synthetic.english_italian.lexicon import (
    CITIES,
    NAMES,
    NUMBERS,
    Adjective,
    Noun,
    lexicon,
)

Pairs = frozenset[tuple[str, str]]
NO_PAIRS: Pairs = frozenset()
T = TypeVar("T")


class Phrase(NamedTuple):
    """A noun phrase.

    Attributes:
        english: all of it. italian: without the definite article, which `article` asks for, so
            that a preposition can melt with it.
        form: agreement, "m", "f", "mp" or "fp". person: 0 to 5.
        pairs: (adjective, noun) lemmas in it.
        noun: what it is about; None for names and pronouns.
    """

    english: str
    italian: str
    form: str
    article: bool = False
    person: int = 2
    pairs: Pairs = NO_PAIRS
    noun: Noun | None = None

    @property
    def direct(self) -> str:
        """The Italian phrase as subject or object."""
        return italian.definite(self.italian, self.form) if self.article else self.italian

    def after(self, preposition: str) -> str:
        """The Italian phrase behind a preposition."""
        return italian.preposition(preposition, self.italian, self.form if self.article else None)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def draw(rng: random.Random, weights: Mapping[T, float]) -> T:
    """One of the keys, as likely as its weight says."""
    return rng.choices(list(weights), list(weights.values()))[0]


_POSSESSIVES = {
    "my": ("mio", "mia", "miei", "mie"), "your": ("tuo", "tua", "tuoi", "tue"),
    "his": ("suo", "sua", "suoi", "sue"), "her": ("suo", "sua", "suoi", "sue"),
    "our": ("nostro", "nostra", "nostri", "nostre"), "their": ("loro",) * 4,
}  # fmt: skip
_POSSESSORS = {"husband": ["my", "your", "her"], "wife": ["my", "your", "his"]}
_FORMS = ("m", "f", "mp", "fp")
_QUANTIFIERS = {"many": "molto", "few": "poco", "some": "alcuno"}
_DETERMINERS = {
    "the": 42, "a": 18, "possessive": 14, "demonstrative": 10, "number": 7, "quantifier": 5,
    "every": 2, "all": 2, "other": 2, "owner": 6,
}  # fmt: skip
_DEMONSTRATIVES = (("that", "those"), ("this", "these"))  # by near, then by plural
_FORMS_OF = {
    kind: italian.adjective(kind) for kind in ("altro", "tutto", "molto", "poco", "alcuno")
}


# Whom and what people call theirs, for the kinds where not everything is.
_OWNED = {
    "P": {"friend", "teacher", "student", "doctor", "nurse", "lawyer", "neighbour", "guest",
          "cook"},
    "A": {"dog", "cat", "horse", "bird", "cow", "duck", "hen", "monkey", "snake"},
    "G": {"house", "castle", "school", "shop", "hotel", "restaurant", "university", "church"},
    "L": {"garden", "village", "city", "kitchen", "office", "island"},
    "X": {"street", "field", "square"},
    "U": {"song", "radio"},
    "W": set(),
}  # fmt: skip


def _adjectives(
    rng: random.Random, noun: Noun, rate: float
) -> tuple[list[Adjective], list[Adjective]]:
    """At most one adjective to stand before the Italian noun and one after it."""
    if rng.random() >= rate:
        return [], []
    fitting = lexicon().adjectives[noun.kind]
    first = pick(rng, fitting)
    if rng.random() < 0.12:
        second = pick(rng, fitting)
        if first.before and not second.before:
            return [first], [second]
    return ([first], []) if first.before else ([], [first])


def _modified(
    rng: random.Random, noun: Noun, plural: bool, rate: float
) -> tuple[str, str, str, Pairs]:
    """(English words, Italian words, form, pairs) of a noun with its adjectives, no determiner."""
    before, after = _adjectives(rng, noun, rate)
    form = italian.agreement(noun.genders[plural], plural)
    words = " ".join([*(a.english for a in before + after), noun.english[plural]])
    parole = noun.italian[plural]
    for entry in after:
        parole += " " + entry.italian[form]
    for entry in before:
        parole = italian.shaped(entry.italian["m"], parole, form)
    return words, parole, form, frozenset((a.english, noun.lemma) for a in before + after)


def name(rng: random.Random) -> Phrase:
    """A first name."""
    chosen = pick(rng, list(NAMES))
    return Phrase(chosen, chosen, NAMES[chosen])


def owner(rng: random.Random) -> Phrase:
    """Somebody who owns things: a name, my father, the doctor."""
    kind = rng.random()
    if kind < 0.4:
        return name(rng)
    if kind < 0.6:
        return noun_phrase(rng, pick(rng, lexicon().nouns["K"]), determiner="possessive", rate=0)
    return noun_phrase(rng, pick(rng, lexicon().nouns["P"]), determiner="the", rate=0)


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
            ("two"), quantifier, every, all, other or owner ("the doctor's"); drawn where left out.
        plural: drawn where left out; nouns without plural stay singular.
        rate: how often it has adjectives.
    """
    if determiner is None:
        determiner = "possessive" if noun.kind == "K" else draw(rng, _DETERMINERS)
    if noun.kind == "K" and determiner not in ("a", "some numbers"):
        determiner = "possessive"
    if determiner in ("number", "some numbers", "quantifier", "all") and not noun.plural:
        determiner = "the"
    if determiner in ("a", "every", "other") and not noun.countable:
        determiner = "the"
    if determiner in ("possessive", "owner") and noun.lemma not in _OWNED.get(
        noun.kind, {noun.lemma}
    ):
        determiner = "the"
    if plural is None:
        plural = rng.random() < 0.35
    plural = plural and noun.plural and determiner not in ("a", "every")
    plural = plural or determiner in ("number", "some numbers", "quantifier", "all")
    words, parole, form, pairs = _modified(rng, noun, plural, rate)
    index = _FORMS.index(form)

    article = True
    match determiner:
        case "the":
            words = "the " + words
        case "a":
            words, parole, article = (
                english.indefinite(words),
                italian.indefinite(parole, form),
                False,
            )
        case "possessive":
            possessor = pick(rng, _POSSESSORS.get(noun.lemma, list(_POSSESSIVES)))
            words = f"{possessor} {words}"
            article = noun.kind != "K" or plural or bool(pairs) or possessor == "their"
            parole = f"{_POSSESSIVES[possessor][index]} {parole}"
        case "demonstrative":
            near = rng.random() < 0.5
            words = f"{_DEMONSTRATIVES[near][plural]} {words}"
            parole = italian.shaped("questo" if near else "quello", parole, form)
            article = False
        case "number" | "some numbers":
            number, numero = pick(rng, list(NUMBERS.items()))
            article = determiner == "number" and rng.random() < 0.4
            words = f"the {number} {words}" if article else f"{number} {words}"
            parole = f"{numero} {parole}"
        case "quantifier":
            quantifier = pick(rng, list(_QUANTIFIERS))
            words = f"{quantifier} {words}"
            parole = f"{_FORMS_OF[_QUANTIFIERS[quantifier]][form]} {parole}"
            article = False
        case "every":
            words, parole, article = "every " + words, "ogni " + parole, False
        case "all":
            words = "all the " + words
            parole = italian.join(_FORMS_OF["tutto"][form], italian.definite(parole, form))
            article = False
        case "other":
            parole = f"{_FORMS_OF['altro'][form]} {parole}"
            if plural or rng.random() < 0.5:
                words = "the other " + words
            else:
                words, parole, article = "another " + words, italian.indefinite(parole, form), False
        case "owner":
            possessor = owner(rng)
            mark = "'" if possessor.english.endswith("s") else "'s"
            words = f"{possessor.english}{mark} {words}"
            parole = f"{parole} {possessor.after('di')}"
            pairs |= possessor.pairs
    return Phrase(words, parole, form, article, 5 if plural else 2, pairs, noun)


_SUBJECT_PRONOUNS = (("I", 0, "m"), ("you", 1, "m"), ("he", 2, "m"), ("she", 2, "f"),
                     ("we", 3, "mp"), ("they", 5, "mp"))  # fmt: skip
HE, SHE, WHO = Phrase("he", "", "m"), Phrase("she", "", "f"), Phrase("who", "chi", "m")
# Person, English, Italian clitic of the direct and of the indirect object.
OBJECT_PRONOUNS = (
    (0, "me", "mi", "mi"),
    (1, "you", "ti", "ti"),
    (2, "him", "lo", "gli"),
    (2, "her", "la", "le"),
    (3, "us", "ci", "ci"),
    (5, "them", "li", ""),
)


def pronoun(rng: random.Random) -> Phrase:
    """A subject pronoun; Italian leaves it out. "you" is one person, "they" are masculine."""
    english_pronoun, person, form = pick(rng, _SUBJECT_PRONOUNS)
    return Phrase(english_pronoun, "", form, person=person)


def both(first: Phrase, second: Phrase) -> Phrase:
    """Two phrases as one subject: Anna and the boy; feminine if both are."""
    form = "fp" if first.form[0] == second.form[0] == "f" else "mp"
    conjunction = italian.conjunction("e", second.direct)
    return Phrase(
        f"{first.english} and {second.english}",
        f"{first.direct} {conjunction} {second.direct}",
        form,
        person=5,
        pairs=first.pairs | second.pairs,
    )


def subject(rng: random.Random, kinds: str = "PK", *, pronouns: float = 0.25) -> Phrase:
    """Somebody or something that acts: names and pronouns where persons may."""
    kind = pick(rng, kinds)
    if kind in "PK":
        chance = rng.random()
        if chance < pronouns:
            return pronoun(rng)
        chance = rng.random()
        if chance < 0.25:
            return name(rng)
        if chance < 0.31:
            first, second = name(rng), name(rng)
            if first != second:
                return both(first, second)
    return noun_phrase(rng, pick(rng, lexicon().nouns[kind]), rate=0.2)


def short(rng: random.Random) -> Phrase:
    """A person in one or two words: a pronoun, a name, my father, the doctor."""
    return pronoun(rng) if rng.random() < 0.4 else owner(rng)


def thing(rng: random.Random, kinds: str, **options) -> Phrase:
    """A noun phrase about a noun of one of the kinds, each noun equally likely."""
    nouns = [noun for kind in kinds for noun in lexicon().nouns[kind]]
    return noun_phrase(rng, pick(rng, nouns), **options)


_ON = {"beach", "island", "mountain", "bridge", "table", "chair", "bed", "sofa", "shelf"}
_NEAR_ONLY = {"river", "sea", "lake", "tree", "gate"}
_PREPOSITIONS = {
    "in": ("in", ""), "on": ("su", ""), "near": ("vicino", "a"), "behind": ("dietro", ""),
    "in front of": ("davanti", "a"), "under": ("sotto", ""),
}  # fmt: skip


def place(rng: random.Random, kinds: str = "GGLX") -> tuple[str, str]:
    """Where something happens: in the garden, near my house, on that table, in Rome."""
    if "G" in kinds and rng.random() < 0.08:
        city = pick(rng, list(CITIES))
        return "in " + city, italian.preposition("a", CITIES[city], None)
    kind = pick(rng, kinds)
    nouns = lexicon().nouns[kind]
    noun = pick(rng, [n for n in nouns if n.lemma in _NEAR_ONLY] if kind == "W" else nouns)
    choices = ["on" if noun.lemma in _ON else "in"] * 5
    if noun.lemma in _NEAR_ONLY:
        choices = ["near"]
    choices += ["near", "behind", "in front of"]
    if noun.kind == "F" or noun.lemma in ("bridge", "tree", "box"):
        choices += ["under"] * 2
    preposition = pick(rng, choices)
    landmark = noun_phrase(
        rng,
        noun,
        determiner=draw(rng, {"the": 70, "possessive": 12, "demonstrative": 12, "owner": 6}),
        plural=False,
        rate=0.12,
    )
    first, second = _PREPOSITIONS[preposition]
    if second:
        return f"{preposition} {landmark.english}", f"{first} {landmark.after(second)}"
    return f"{preposition} {landmark.english}", landmark.after(first)
