"""Noun phrases in both languages at once: determiners, adjectives, owners, pronouns."""

from collections.abc import Sequence
from typing import NamedTuple

from msfs_functional.synthetic.english_italian import english, italian
from msfs_functional.synthetic.english_italian.lexicon import NUMBERS, Adjective, Noun

Pairs = frozenset[tuple[str, str]]
NO_PAIRS: Pairs = frozenset()


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


POSSESSIVES = {
    "my": dict(m="mio", f="mia", mp="miei", fp="mie"),
    "your": dict(m="tuo", f="tua", mp="tuoi", fp="tue"),
    "his": dict(m="suo", f="sua", mp="suoi", fp="sue"),
    "her": dict(m="suo", f="sua", mp="suoi", fp="sue"),
    "our": dict(m="nostro", f="nostra", mp="nostri", fp="nostre"),
    "their": dict(m="loro", f="loro", mp="loro", fp="loro"),
}
QUANTIFIERS = {"many": "molto", "few": "poco", "some": "alcuno"}
_DEMONSTRATIVES = {"this": ("these", "questo"), "that": ("those", "quello")}


def phrase(
    noun: Noun,
    determiner: str | Phrase,
    *,
    plural: bool = False,
    adjectives: Sequence[Adjective] = (),
) -> Phrase:
    """A noun with its determiner and adjectives.

    Args:
        determiner: "the", "a", "my" to "their", "this" or "that" (for the plural too), "two" and
            the other numbers, "the two", "many", "few", "some", "every", "all the", "the other",
            "another", or the phrase of an owner.
        plural: left as it is where the determiner says it: many, two, every, a.
    """
    number = determiner.removeprefix("the ") if isinstance(determiner, str) else ""
    plural |= number in NUMBERS or determiner in ("many", "few", "some", "all the")
    form = italian.agreement(noun.genders[plural], plural)
    words = " ".join([*(entry.english for entry in adjectives), noun.english[plural]])
    parole = noun.italian[plural]
    for entry in adjectives:
        if entry.before:
            parole = italian.shaped(entry.italian["m"], parole, form)
        else:
            parole = f"{parole} {entry.italian[form]}"
    pairs = frozenset((entry.english, noun.lemma) for entry in adjectives)

    article = False
    if isinstance(determiner, Phrase):
        mark = "'" if determiner.english.endswith("s") and determiner.person == 5 else "'s"
        words = f"{determiner.english}{mark} {words}"
        parole = f"{parole} {determiner.after('di')}"
        article, pairs = True, pairs | determiner.pairs
    elif determiner in ("a", "another"):
        if determiner == "another":
            words, parole = "another " + words, f"{italian.adjective('altro')[form]} {parole}"
        else:
            words = english.indefinite(words)
        parole = italian.indefinite(parole, form)
    elif determiner in _DEMONSTRATIVES:
        these, questo = _DEMONSTRATIVES[determiner]
        words = f"{these if plural else determiner} {words}"
        parole = italian.shaped(questo, parole, form)
    else:
        words = f"{determiner} {words}"
        article = determiner.startswith("the ") or determiner == "the" or determiner in POSSESSIVES
        if determiner in POSSESSIVES:
            parole = f"{POSSESSIVES[determiner][form]} {parole}"
            # Next of kin go without article: mia madre, but le mie zie, la loro madre.
            close = noun.kind == "K" and not plural and not adjectives
            article = not close or determiner == "their"
        elif number in NUMBERS:
            parole = f"{NUMBERS[number]} {parole}"
        elif determiner in QUANTIFIERS:
            parole = f"{italian.adjective(QUANTIFIERS[determiner])[form]} {parole}"
        elif determiner == "every":
            parole = "ogni " + parole
        elif determiner == "all the":
            tutti = italian.adjective("tutto")[form]
            parole = f"{tutti} {italian.definite(parole, form)}"
        elif determiner == "the other":
            parole = f"{italian.adjective('altro')[form]} {parole}"
        elif determiner != "the":
            raise ValueError(
                f"no determiner {determiner!r}: see the docstring for the ones there are"
            )
    return Phrase(words, parole, form, article, 5 if plural else 2, pairs, noun)


HE, SHE, WHO = Phrase("he", "", "m"), Phrase("she", "", "f"), Phrase("who", "chi", "m")
# Italian leaves subject pronouns out. "you" is one person; speakers and "they" are masculine.
SUBJECT_PRONOUNS = (
    Phrase("I", "", "m", person=0),
    Phrase("you", "", "m", person=1),
    HE,
    SHE,
    Phrase("we", "", "mp", person=3),
    Phrase("they", "", "mp", person=5),
)
# In the same order: person, English, Italian clitic of the direct and of the indirect object.
OBJECT_PRONOUNS = (
    (0, "me", "mi", "mi"),
    (1, "you", "ti", "ti"),
    (2, "him", "lo", "gli"),
    (2, "her", "la", "le"),
    (3, "us", "ci", "ci"),
    (5, "them", "li", ""),
)


def both(first: Phrase, second: Phrase) -> Phrase:
    """Two phrases as one subject: Anna and the boy; feminine if both are."""
    form = "fp" if first.form[0] == second.form[0] == "f" else "mp"
    e = italian.conjunction("e", second.direct)
    return Phrase(
        f"{first.english} and {second.english}",
        f"{first.direct} {e} {second.direct}",
        form,
        person=5,
        pairs=first.pairs | second.pairs,
    )
