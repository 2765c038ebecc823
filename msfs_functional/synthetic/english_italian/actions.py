"""Sentences about what somebody does."""

import random

from msfs_functional.synthetic.english_italian import english, italian
from msfs_functional.synthetic.english_italian.clauses import (
    Mood,
    Predicate,
    Sentence,
    activity,
    clause,
    end,
    groups,
    intransitive,
    mood,
    motion,
    readable,
    timed,
    verb,
    with_object,
    words,
)
from msfs_functional.synthetic.english_italian.lexicon import lexicon, transitive_verb
from msfs_functional.synthetic.english_italian.nouns import (
    OBJECT_PRONOUNS,
    SUBJECT_PRONOUNS,
    Phrase,
)
from msfs_functional.synthetic.english_italian.phrases import (
    draw,
    name,
    pick,
    subject,
    thing,
)


def simple(rng: random.Random, who: Phrase, what: Predicate) -> Sentence:
    """One statement, often with an adverb of time."""
    how = mood(rng, what.verb, who.person)
    return timed(rng, how, clause(who, what, how), 0.3)


def transitive(rng: random.Random) -> Sentence:
    """The boy has already eaten the red apple."""
    return simple(rng, subject(rng), with_object(rng)[0])


def acting(rng: random.Random) -> Sentence:
    """The cat sleeps under the table. The girls got up."""
    kind = "P" if rng.random() < 0.7 else "A"
    return simple(rng, subject(rng, kind), intransitive(rng, kind))


def moving(rng: random.Random) -> Sentence:
    """Anna went to the station yesterday."""
    return simple(rng, subject(rng), motion(rng))


def _other_pronoun(rng: random.Random, who: Phrase, count: int) -> tuple[str, str, str]:
    """One of the first `count` object pronouns that cannot mean the subject itself: I ... me."""
    us = (0, 3)
    allowed = [
        pronoun
        for person, *pronoun in OBJECT_PRONOUNS[:count]
        if not (person == who.person != 2 or (person in us and who.person in us))
    ]
    english_pronoun, direct, indirect = pick(rng, allowed)
    return english_pronoun, direct, indirect


def giving(rng: random.Random) -> Sentence:
    """The teacher gives the book to the student. She gave a flower to me: Mi ha dato un fiore."""
    verb = pick(rng, lexicon().ditransitive)
    what, _ = with_object(rng, verb, rate=0.2)
    who = subject(rng)
    if rng.random() < 0.35:
        him, _, gli = _other_pronoun(rng, who, 5)
        what = what._replace(english=f"{what.english} to {him}", clitic=gli, dative=True)
    else:
        receiver = name(rng) if rng.random() < 0.4 else thing(rng, "PK", rate=0.1)
        while receiver.english == who.english:
            receiver = name(rng)
        what = what._replace(
            english=f"{what.english} to {receiver.english}",
            italian=italian.join(what.italian, receiver.after("a")),
            pairs=what.pairs | receiver.pairs,
        )
    return end(*clause(who, what, mood(rng, verb, who.person)))


_WITH_PERSONS = ("see", "look at", "look for", "wait for", "listen to", "love", "call", "help",
                 "invite", "meet", "forget")  # fmt: skip


def clitic(rng: random.Random) -> Sentence:
    """The woman saw them. We have never met her."""
    who = subject(rng)
    him, lo, _ = _other_pronoun(rng, who, 6)
    return simple(rng, who, Predicate(transitive_verb(pick(rng, _WITH_PERSONS)), him, clitic=lo))


_FIRST = ("buy", "find", "take", "choose", "write", "wash")
_SECOND = ("eat", "drink", "read", "wear", "sell", "break", "hide", "forget", "repair", "clean",
           "play", "drive", "correct", "close")  # fmt: skip
_CLITICS = {"m": "lo", "f": "la", "mp": "li", "fp": "le"}


def consecutive(rng: random.Random) -> Sentence:
    """Anna buys three apples and eats them: Anna compra tre mele e le mangia."""
    first = transitive_verb(pick(rng, _FIRST))
    what, item = with_object(
        rng, first, determiner=draw(rng, {"the": 3, "a": 3, "number": 1, "possessive": 1})
    )
    assert item.noun is not None
    verbs = [transitive_verb(lemma) for lemma in _SECOND]
    second = pick(rng, [verb for verb in verbs if item.noun.kind in verb.kinds] or [first])
    if second == first:
        return consecutive(rng)
    who = subject(rng)
    how = Mood(draw(rng, {"present": 3, "past": 4, "future": 2}))
    if not readable(second, how.tense, who.person):
        how = Mood("past")
    said, detto, pairs = clause(who, what, how)
    it = Predicate(second, "them" if item.person == 5 else "it", clitic=_CLITICS[item.form])
    group, _, gruppo = groups(it, how, who)
    return end(
        words(said, "and", group.removeprefix("will "), it.english),
        italian.join(detto, italian.conjunction("e", gruppo), gruppo),
        pairs | {(second.lemma, item.noun.lemma)},
    )


_LIKE = english.verb("like")
_PIACERE = italian.verb("piacere", essere=True)


def liking(rng: random.Random) -> Sentence:
    """The girl likes these apples: Alla ragazza piacciono queste mele."""
    if rng.random() < 0.35:
        i = int(rng.random() * 5)
        who, mi = SUBJECT_PRONOUNS[i], OBJECT_PRONOUNS[i][3]
    else:
        who, mi = subject(rng, pronouns=0), ""
    tense = "past" if rng.random() < 0.25 else "present"
    negative = rng.random() < 0.25
    if negative:
        auxiliary, main = english.supported(_LIKE, tense, who.person)
        like = f"{auxiliary} not {main}"
    else:
        like = english.group(_LIKE, tense, who.person)[1]
    if tense == "present" and rng.random() < 0.3:
        said, detto, pairs = activity(rng)
        said, detto = "to " + said, "piace " + detto
    else:
        item = thing(
            rng,
            "DTHUGLC" if tense == "past" else "RDTHUGLCMO",
            determiner=draw(rng, {"the": 4, "possessive": 2, "demonstrative": 4}),
            rate=0.25,
        )
        assert item.noun is not None
        group = italian.group(_PIACERE, tense, item.person, item.form)
        said, detto = item.english, italian.join(group, item.direct)
        pairs = item.pairs | {("like", item.noun.lemma)}
    no = "non" * negative
    opening = italian.join(no, mi) if mi else italian.join(who.after("a"), no)
    return end(words(who.english, like, said), italian.join(opening, detto), who.pairs | pairs)


_CONTROL = (
    (verb(english.verb("begin", "began", "begun"), "cominciare"), "a"),
    (verb(english.verb("try"), "cercare"), "di"),
    (verb(english.verb("decide"), "decidere", participle="deciso"), "di"),
    (verb(english.verb("learn"), "imparare"), "a"),
    (transitive_verb("forget"), "di"),
)


def controlling(rng: random.Random) -> Sentence:
    """She has decided to sell the house: Ha deciso di vendere la casa."""
    verb, preposition = pick(rng, _CONTROL)
    who = subject(rng)
    said, detto, pairs = activity(rng)
    detto = italian.preposition(preposition, detto, None)
    what = Predicate(verb, "to " + said, detto, pairs=pairs)
    return end(*clause(who, what, mood(rng, verb, who.person)))


_ORDERED = ("open", "close", "eat", "drink", "read", "write", "buy", "sell", "look at", "look for",
            "wait for", "listen to", "clean", "wash", "choose", "finish", "repair", "call", "help",
            "invite", "visit", "cross", "play", "take", "correct", "watch")  # fmt: skip


def ordering(rng: random.Random) -> Sentence:
    """Open the door! Do not eat this apple! Let us visit the museum!"""
    what, _ = with_object(rng, transitive_verb(pick(rng, _ORDERED)))
    base, verbo = what.verb.english.base + what.verb.english.tail, what.verb.italian
    chance = rng.random()
    if chance < 0.25:
        order, ordine = "let us " + base, verbo.present[3]
    elif chance < 0.5:
        order, ordine = "do not " + base, italian.imperative(verbo, negative=True)
    else:
        order, ordine = base, italian.imperative(verbo)
    said, detto = words(order, what.english), italian.join(ordine, what.italian)
    return end(said, detto, what.pairs, "!")
