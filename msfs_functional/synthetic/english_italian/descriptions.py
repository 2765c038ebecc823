"""Sentences about how and where things are."""

import random

from msfs_functional.synthetic.english_italian import english, italian
from msfs_functional.synthetic.english_italian.clauses import (
    ADVERBS,
    Sentence,
    end,
    words,
)
from msfs_functional.synthetic.english_italian.lexicon import (
    NUMBERS,
    SENSATIONS,
    Adjective,
    lexicon,
)
from msfs_functional.synthetic.english_italian.nouns import (
    HE,
    NO_PAIRS,
    SHE,
    Pairs,
    Phrase,
)
from msfs_functional.synthetic.english_italian.phrases import (
    draw,
    name,
    noun_phrase,
    owner,
    pick,
    place,
    short,
    subject,
    thing,
)

# By tense: English "be" before and after an inverted subject, Italian essere and avere.
_ESSERE, _AVERE = italian.verb("essere"), italian.verb("avere")
_BE = {
    "present": (english.BE, "", _ESSERE.present, _AVERE.present),
    "was": (english.WAS, "", _ESSERE.imperfect, _AVERE.imperfect),
    "future": (("will",) * 6, "be", _ESSERE.future, _AVERE.future),
}
# Nothing is two things of a group at once.
_EXCLUSIVE = (
    {"small", "big"}, {"old", "new", "young"}, {"happy", "sad"}, {"rich", "poor"},
    {"clean", "dirty"}, {"red", "green", "yellow", "black", "white", "blue"},
)  # fmt: skip
_DEGREES = {"": "", "very": "molto", "too": "troppo"}


def being(rng: random.Random, person: int, tense: str = "") -> tuple[str, str, str, str]:
    """(is, "" or be, è, ha) in a tense, drawn where it is left out: will ... be, sarà, avrà."""
    tense = tense or draw(rng, {"present": 6, "was": 3, "future": 1})
    be, base, essere, avere = _BE[tense]
    return be[person], base, essere[person], avere[person]


# States of persons that come and go.
_PASSING = {"tired", "happy", "sad", "nervous", "poor", "rich"}


def _quality(
    rng: random.Random, who: Phrase, allowed: set[str] | None = None
) -> tuple[Adjective, Pairs]:
    """An adjective that suits a phrase, and the combination they make."""
    fitting = lexicon().adjectives[who.noun.kind if who.noun else "P"]
    entry = pick(rng, [a for a in fitting if a.english in allowed] if allowed else fitting)
    return entry, frozenset({(entry.english, who.noun.lemma)}) if who.noun else NO_PAIRS


def state(rng: random.Random, who: Phrase, tense: str = "") -> tuple[str, str, Pairs]:
    """A short clause: somebody is tired or hungry."""
    be, base, essere, avere = being(rng, who.person, tense)
    if rng.random() < 0.35:
        feeling, sensazione = pick(rng, list(SENSATIONS.items()))
        said = words(who.english, be, base, feeling)
        return said, italian.join(who.direct, avere, sensazione), who.pairs
    entry, pairs = _quality(rng, who, _PASSING)
    said = words(who.english, be, base, entry.english)
    detto = italian.join(who.direct, essere, entry.italian[who.form])
    return said, detto, who.pairs | pairs


def copula(rng: random.Random) -> Sentence:
    """The houses are not very old. Is she tired?"""
    kinds = pick(rng, ("P", "P", "A", "RDTCMVENOFIUHGLX"))
    who = subject(rng, kinds) if kinds == "P" else thing(rng, kinds, rate=0.1)
    entry, pairs = _quality(rng, who)
    pairs |= who.pairs
    be, base, essere, _ = being(rng, who.person)
    degree = draw(rng, {"": 6, "very": 3, "too": 1})
    quality = words(degree, entry.english)
    qualità = italian.join(_DEGREES[degree], entry.italian[who.form])
    chance = rng.random()
    if chance < 0.15:
        said = words(be, who.english, base, quality)
        return end(said, italian.join(who.direct, essere, qualità), pairs, "?")
    if chance < 0.3:
        said = words(who.english, be, "not", base, quality)
        return end(said, italian.join(who.direct, "non", essere, qualità), pairs)
    if chance < 0.4 and not base:
        adverb = draw(rng, {"always": 2, "often": 1, "never": 2})
        no = "non" * (adverb == "never")
        said = words(who.english, be, adverb, quality)
        return end(said, italian.join(who.direct, no, essere, ADVERBS[adverb], qualità), pairs)
    if chance < 0.55:
        second, more = _quality(rng, who)
        two = {entry.english, second.english}
        if second != entry and not any(two <= group for group in _EXCLUSIVE):
            conjunction, congiunzione = pick(rng, (("and", "e"), ("but", "ma")))
            altra = second.italian[who.form]
            quality = words(entry.english, conjunction, second.english)
            congiunzione = italian.conjunction(congiunzione, altra)
            qualità = italian.join(entry.italian[who.form], congiunzione, altra)
            pairs |= more
    said = words(who.english, be, base, quality)
    return end(said, italian.join(who.direct, essere, qualità), pairs)


_COMPARATIVES = {
    "big": "bigger", "small": "smaller", "old": "older", "young": "younger", "tall": "taller",
    "strong": "stronger", "rich": "richer", "happy": "happier", "heavy": "heavier",
    "long": "longer", "fast": "faster", "clean": "cleaner", "dirty": "dirtier", "new": "newer",
    "sweet": "sweeter", "sad": "sadder", "poor": "poorer", "quiet": "quieter", "hot": "hotter",
    "strange": "stranger",
}  # fmt: skip
_ABSOLUTE = {"good", "broken", "red", "green", "yellow", "black", "white", "blue"}
_THAN = (Phrase("me", "me", "m", person=0), Phrase("you", "te", "m", person=1),
         Phrase("him", "lui", "m"), Phrase("her", "lei", "f"),
         Phrase("us", "noi", "mp", person=3), Phrase("them", "loro", "mp", person=5))  # fmt: skip


def comparison(rng: random.Random) -> Sentence:
    """My house is bigger than the hotel. Anna is as tall as me."""
    kinds = pick(rng, ("P", "P", "A", "G", "MV", "C", "T", "OF"))
    who = subject(rng, kinds) if kinds == "P" else thing(rng, kinds, rate=0.1)
    entry, pairs = _quality(rng, who)
    while entry.english in _ABSOLUTE:
        entry, pairs = _quality(rng, who)
    chance = rng.random()
    if kinds == "P" and chance < 0.6:
        other = pick(rng, _THAN) if chance < 0.3 else name(rng)
    else:
        determiner = draw(rng, {"the": 5, "possessive": 2, "demonstrative": 2})
        kind = who.noun.kind if who.noun else "P"
        other = thing(rng, kind, rate=0, determiner=determiner)
    if other.english == who.english or other.person == who.person in (0, 1, 3):
        return comparison(rng)
    quality = entry.italian[who.form]
    match draw(rng, {"more": 6, "less": 2, "as": 2}):
        case "more":
            words_of = _COMPARATIVES.get(entry.english, "more " + entry.english) + " than"
            parole = f"più {quality} {other.after('di')}"
        case "less":
            words_of = f"less {entry.english} than"
            parole = f"meno {quality} {other.after('di')}"
        case _:
            words_of = f"as {entry.english} as"
            parole = f"{quality} come {other.direct}"
    be, base, essere, _ = being(rng, who.person)
    return end(
        words(who.english, be, base, words_of, other.english),
        italian.join(who.direct, essere, parole),
        who.pairs | pairs | other.pairs,
    )


def superlative(rng: random.Random) -> Sentence:
    """This is the oldest church in the city. Anna is the youngest student."""
    noun = pick(rng, lexicon().nouns[pick(rng, "PAGTVM")])
    form = noun.genders[0]
    entry = pick(rng, [a for a in lexicon().adjectives[noun.kind] if a.english not in _ABSOLUTE])
    comparative = _COMPARATIVES.get(entry.english)
    most = comparative.removesuffix("r") + "st" if comparative else "most " + entry.english
    if noun.kind == "P":
        who = name(rng)
        if who.form != form:
            who = SHE if form == "f" else HE
        this, questo = who.english, who.direct
    else:
        this, questo = pick(rng, (("this", "questo"), ("that", "quello")))
        questo = italian.adjective(questo)[form]
    said = f"{this} is the {most} {noun.lemma}"
    parole = italian.definite(f"{noun.italian[0]} più {entry.italian[form]}", form)
    detto = italian.join(questo, "è", parole)
    if rng.random() < 0.6:
        city = pick(rng, [n for n in lexicon().nouns["L"] if n.lemma in ("city", "village")])
        determiner = draw(rng, {"the": 5, "possessive": 3, "demonstrative": 2})
        where = noun_phrase(rng, city, determiner=determiner, plural=False, rate=0)
        said, detto = f"{said} in {where.english}", f"{detto} {where.after('di')}"
    return end(said, detto, frozenset({(entry.english, noun.lemma)}))


def existence(rng: random.Random) -> Sentence:
    """There are three cats under the tree. Is there a key in the box?"""
    small = rng.random() < 0.5
    where, dove, pairs = place(rng, pick(rng, "FN") if small else pick(rng, "GLXW"))
    what = thing(
        rng,
        "ORTC" if small else "PAO",
        determiner=draw(rng, {"a": 6, "some numbers": 3, "quantifier": 3}),
    )
    be, base, essere, _ = being(rng, what.person)
    ci = "c'" if essere[0] in "eè" else "ci"
    asked = rng.random() < 0.15
    there = words(be, "there", base) if asked else words("there", be, base)
    return end(
        words(there, what.english, where),
        italian.join(ci, essere, what.direct, dove),
        what.pairs | pairs,
        "?" if asked else ".",
    )


def where_is(rng: random.Random) -> Sentence:
    """Where are my shoes? What colour is the door? How old is your sister?"""
    kind = draw(rng, {"where": 4, "colour": 3, "age": 2})
    if kind == "age":
        who = subject(rng)
        be, _, _, ha = being(rng, who.person, "present")
        detto = italian.join("quanti anni", ha, who.direct)
        return end(words("how old", be, who.english), detto, who.pairs, "?")
    determiner = draw(rng, {"the": 4, "possessive": 5, "demonstrative": 2})
    kinds = "TCMVENOFPKA" if kind == "where" else "TCMVENOF"
    what = thing(rng, kinds, rate=0.15, determiner=determiner)
    be, _, essere, _ = being(rng, what.person, "was" if rng.random() < 0.25 else "present")
    if kind == "where":
        opening, apertura = "where", "dov'" if essere[0] in "eè" else "dove"
    else:
        opening, apertura = "what colour", "di che colore"
    detto = italian.join(apertura, essere, what.direct)
    return end(words(opening, be, what.english), detto, what.pairs, "?")


_HAVE = english.verb("have", "had")


def having(rng: random.Random) -> Sentence:
    """My sister is twelve years old. We are hungry. He does not have a car."""
    who = subject(rng)
    tense = draw(rng, {"present": 6, "was": 3, "future": 1})
    be, base, _, ha = being(rng, who.person, tense)
    kind = draw(rng, {"age": 3, "feeling": 3, "thing": 5})
    if kind == "age":
        number, numero = pick(rng, list(NUMBERS.items()))
        said = words(who.english, be, base, number, "years old")
        return end(said, italian.join(who.direct, ha, numero, "anni"), who.pairs)
    negative = rng.random() < 0.25
    no, non = "not" * negative, "non" * negative
    if kind == "feeling":
        feeling, sensazione = pick(rng, list(SENSATIONS.items()))
        said = words(who.english, be, no, base, feeling)
        return end(said, italian.join(who.direct, non, ha, sensazione), who.pairs)
    what = thing(rng, "TCMVNOIAK", determiner=draw(rng, {"a": 6, "some numbers": 2}))
    assert what.noun is not None
    form = english.supported if negative else english.group
    auxiliary, main = form(_HAVE, "past" if tense == "was" else tense, who.person)
    return end(
        words(who.english, auxiliary, no, main, what.english),
        italian.join(who.direct, non, ha, what.direct),
        who.pairs | what.pairs | {("have", what.noun.lemma)},
    )


def profession(rng: random.Random) -> Sentence:
    """My sister is a nurse: Mia sorella è un'infermiera."""
    who = pick(rng, (owner(rng), short(rng)))
    if who.person != 2:
        who = name(rng)
    fitting = [noun for noun in lexicon().nouns["P"] if noun.genders[0] == who.form]
    what = noun_phrase(rng, pick(rng, fitting), determiner="a", rate=0.4)
    be, base, essere, _ = being(rng, 2)
    return end(
        words(who.english, be, base, what.english),
        italian.join(who.direct, essere, what.direct),
        who.pairs | what.pairs,
    )
