"""Clauses in both languages at once: verb, tense, polarity, adverb, objects, questions."""

import random
from typing import NamedTuple

from msfs_functional.synthetic.english_italian import english, italian
from msfs_functional.synthetic.english_italian.lexicon import CITIES, TIMES, Verb, lexicon, nouns_of
from msfs_functional.synthetic.english_italian.nouns import (
    NO_PAIRS,
    Pairs,
    Phrase,
    phrase,
)
from msfs_functional.synthetic.english_italian.phrases import (
    draw,
    noun_phrase,
    pick,
    place,
    thing,
)


class Sentence(NamedTuple):
    """One meaning in both languages, and the (adjective, noun) and (verb, object) lemmas in it."""

    english: str
    italian: str
    pairs: Pairs = NO_PAIRS


class Predicate(NamedTuple):
    """A verb with what follows it, ready for any subject; `clitic` stands before the Italian verb.

    `dative` marks a clitic that is the indirect object.
    """

    verb: Verb
    english: str = ""
    italian: str = ""
    clitic: str = ""
    dative: bool = False
    pairs: Pairs = NO_PAIRS


class Mood(NamedTuple):
    """Tense, polarity and adverb of a clause; `time` says whether an adverb of time may join."""

    tense: str
    negative: bool = False
    adverb: str = ""
    time: bool = False


def words(*parts: str) -> str:
    """English words with spaces between them, none for empty parts."""
    return " ".join(part for part in parts if part)


def end(said: str, detto: str, pairs: Pairs, mark: str = ".") -> Sentence:
    """Capital first letters and a full stop, or another mark."""
    return Sentence(said[0].upper() + said[1:] + mark, detto[0].upper() + detto[1:] + mark, pairs)


ADVERBS = {
    "always": "sempre", "often": "spesso", "never": "mai", "already": "già", "just": "appena",
    "yet": "ancora", "": "",
}  # fmt: skip
_TENSES = {
    "present": 28, "past": 28, "future": 16, "progressive": 8, "perfect": 8, "was": 2, "used": 4,
    "can": 3, "must": 3, "want": 3,
}  # fmt: skip


def readable(verb: Verb, tense: str, person: int) -> bool:
    """Whether English tells the tense: "they read" would be present or past."""
    return tense != "present" or verb.english.base != verb.english.past or person == 2


def mood(rng: random.Random, verb: Verb, person: int, *, asked: bool = False) -> Mood:
    """A tense that suits the verb, adverb, negation; `asked` leaves out what is odd to ask."""
    while True:
        tense = draw(rng, _TENSES)
        if verb.state and tense in ("progressive", "was", "must", "can"):
            continue
        if asked and tense in ("used", "perfect"):
            continue
        if readable(verb, tense, person):
            break
    if asked:
        return Mood(tense)
    chance = rng.random()
    if tense == "perfect":
        adverb = draw(rng, {"already": 3, "never": 3, "just": 2, "yet": 3})
        return Mood(tense, adverb == "yet", adverb)
    if tense == "present" and chance < 0.24:
        return Mood(tense, adverb=draw(rng, {"always": 3, "often": 3, "never": 3}))
    negative = chance > 0.85 and tense not in ("used", "was")
    return Mood(tense, negative, time=tense in TIMES)


def groups(what: Predicate, how: Mood, who: Phrase) -> tuple[str, str, str]:
    """(English verb group, what ends the English clause, Italian verb group)."""
    verb = what.verb
    if how.negative:
        auxiliary, main = english.supported(verb.english, how.tense, who.person)
        auxiliary = "cannot" if auxiliary == "can" else auxiliary + " not"
    else:
        auxiliary, main = english.group(verb.english, how.tense, who.person)
    group = italian.group(
        verb.italian,
        how.tense,
        who.person,
        who.form,
        negative=how.negative or how.adverb == "never",
        clitic=what.clitic,
        dative=what.dative,
        adverb=ADVERBS[how.adverb],
    )
    yet = how.adverb == "yet"
    return words(auxiliary, "" if yet else how.adverb, main), "yet" * yet, group


def clause(who: Phrase, what: Predicate, how: Mood) -> tuple[str, str, Pairs]:
    """Subject and predicate as a statement, without capital or full stop."""
    group, tail, gruppo = groups(what, how, who)
    return (
        words(who.english, group, what.english, tail),
        italian.join(who.direct, gruppo, what.italian),
        who.pairs | what.pairs,
    )


def question(
    who: Phrase,
    what: Predicate,
    how: Mood,
    opening: tuple[str, str] = ("", ""),
    *,
    invert: bool = False,
) -> Sentence:
    """A yes/no question, or one behind question words; `invert` puts the Italian subject last."""
    auxiliary, main = english.supported(what.verb.english, how.tense, who.person)
    group = italian.group(
        what.verb.italian, how.tense, who.person, who.form,
        negative=how.negative, clitic=what.clitic, dative=what.dative,
    )  # fmt: skip
    order = (group, what.italian, who.direct) if invert else (who.direct, group, what.italian)
    return end(
        words(opening[0], auxiliary, who.english, "not" * how.negative, main, what.english),
        italian.join(opening[1], *order),
        who.pairs | what.pairs,
        "?",
    )


def timed(rng: random.Random, how: Mood, said: tuple[str, str, Pairs], rate: float) -> Sentence:
    """Ends a clause, with an adverb of time before or behind it where its tense has some."""
    if how.time and rng.random() < rate:
        when, quando = pick(rng, list(TIMES[how.tense].items()))
        if rng.random() < 0.3:
            return end(f"{when} {said[0]}", f"{quando} {said[1]}", said[2])
        return end(f"{said[0]} {when}", f"{said[1]} {quando}", said[2])
    return end(*said)


def verb(english_verb: english.Verb, infinitive: str, *, state: bool = False, **options) -> Verb:
    """A verb that is in none of the lexicon's tables."""
    return Verb(english_verb, italian.verb(infinitive, **options), "", state)


def with_object(
    rng: random.Random, verb: Verb | None = None, **options
) -> tuple[Predicate, Phrase]:
    """A transitive verb with an object it can have, and the object."""
    verb = verb or pick(rng, lexicon().transitive)
    what = thing(rng, verb.kinds, **options)
    assert what.noun is not None
    pairs = what.pairs | {(verb.lemma, what.noun.lemma)}
    return Predicate(verb, what.english, what.direct, pairs=pairs), what


_WATERS = [noun for noun in nouns_of("WX") if noun.lemma in ("sea", "lake", "river")]
PLACED = {"sleep", "work", "dance", "have lunch", "have dinner", "stay", "run",
           "wake up", "fall asleep", "swim"}  # fmt: skip


def intransitive(rng: random.Random, kind: str = "P", *, placed: float = 0.6) -> Predicate:
    """A verb without object that a person or an animal can do, often with a place."""
    verb = pick(rng, [verb for verb in lexicon().intransitive if kind in verb.kinds])
    if rng.random() < placed:
        if verb.lemma == "swim":
            water = phrase(pick(rng, _WATERS), "the")
            return Predicate(verb, "in " + water.english, water.after("in"))
        if verb.lemma in PLACED:
            where, dove, pairs = place(rng)
            return Predicate(verb, where, dove, pairs=pairs)
    return Predicate(verb)


_GO = verb(english.verb("go", "went", "gone"), "andare", essere=True)
_COME = verb(english.verb("come", "came", "come"), "venire", essere=True)
_RETURN = verb(english.verb("return"), "tornare", essere=True)
_ENTER = verb(english.verb("enter"), "entrare", essere=True)
_WAYS = ((_GO, "to", "a"), (_GO, "to", "a"), (_RETURN, "to", "a"), (_COME, "to", "a"),
         (_COME, "from", "da"), (_ENTER, "", "in"))  # fmt: skip
_GOALS = {"museum", "theatre", "hotel", "hospital", "library", "restaurant", "castle", "church",
          "school", "station", "shop", "airport", "university", "park", "market", "beach",
          "village", "zoo", "river", "bridge", "square"}  # fmt: skip


def motion(rng: random.Random) -> Predicate:
    """Going somewhere, with the contraction that the place wants."""
    verb, preposition, preposizione = pick(rng, _WAYS)
    if preposition and rng.random() < 0.25:
        city, città = pick(rng, list(CITIES.items()))
        return Predicate(
            verb, f"{preposition} {city}", italian.preposition(preposizione, città, None)
        )
    kinds = "GLX" if preposition else "G"
    goals = [noun for noun in nouns_of(kinds) if noun.lemma in _GOALS]
    goal = noun_phrase(
        rng,
        pick(rng, goals),
        determiner=draw(rng, {"the": 8, "demonstrative": 1, "possessive": 1}),
        plural=False,
        rate=0.12,
    )
    return Predicate(
        verb, words(preposition, goal.english), goal.after(preposizione), pairs=goal.pairs
    )


def predicate(rng: random.Random) -> Predicate:
    """Anything that a person can do."""
    chance = rng.random()
    if chance < 0.6:
        return with_object(rng)[0]
    return intransitive(rng) if chance < 0.8 else motion(rng)


def activity(rng: random.Random) -> tuple[str, str, Pairs]:
    """Something to do, as infinitives without "to": eat the cake, mangiare la torta."""
    while True:
        what = predicate(rng)
        if not what.verb.state and not what.verb.italian.reflexive:
            break
    base = what.verb.english.base + what.verb.english.tail
    return (
        words(base, what.english),
        italian.join(what.verb.italian.infinitive, what.italian),
        what.pairs,
    )
