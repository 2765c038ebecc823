"""Questions, and sentences of two clauses."""

import random

from msfs_functional.synthetic.english_italian import english, italian
from msfs_functional.synthetic.english_italian.clauses import (
    PLACED,
    Mood,
    Predicate,
    Sentence,
    clause,
    end,
    groups,
    intransitive,
    mood,
    motion,
    predicate,
    question,
    readable,
    verb,
    with_object,
    words,
)
from msfs_functional.synthetic.english_italian.descriptions import being
from msfs_functional.synthetic.english_italian.descriptions import state as state_of
from msfs_functional.synthetic.english_italian.lexicon import Verb, lexicon
from msfs_functional.synthetic.english_italian.nouns import (
    HE,
    SHE,
    WHO,
    Phrase,
)
from msfs_functional.synthetic.english_italian.phrases import (
    draw,
    pick,
    short,
    subject,
    thing,
)


def yes_no(rng: random.Random) -> Sentence:
    """Did the children eat the cake?"""
    who, what = subject(rng), predicate(rng)
    return question(who, what, mood(rng, what.verb, who.person, asked=True))


_OBJECTS = "RDBTCMVENOFIUHGL"


def asking(rng: random.Random) -> Sentence:
    """What does the boy read? Where did they sleep? How many letters did you write?"""
    kind = draw(
        rng, {"what": 4, "who": 3, "where": 3, "when": 3, "why": 3, "how many": 3, "which": 3}
    )
    if kind == "who":
        what = predicate(rng)
        said, detto, pairs = clause(WHO, what, mood(rng, what.verb, 2, asked=True))
        return end(said, detto, pairs, "?")
    who = subject(rng, pronouns=0.35)
    if kind == "why":
        what = predicate(rng)
        how = mood(rng, what.verb, who.person, asked=True)
        if how.tense in ("present", "past") and rng.random() < 0.25:
            how = how._replace(negative=True)
        return question(who, what, how, ("why", "perché"))
    if kind in ("where", "when"):
        what = motion(rng) if kind == "when" and rng.random() < 0.3 else intransitive(rng, placed=0)
        if kind == "where" and what.verb.lemma not in PLACED:
            return asking(rng)
        opening = (kind, "dove" if kind == "where" else "quando")
    else:
        verbs = [v for v in lexicon().transitive if set(v.kinds) & set(_OBJECTS)]
        verb = pick(rng, verbs)
        what, opening = Predicate(verb), ("what", "che cosa")
        if kind != "what":
            nouns = [n for k in verb.kinds if k in _OBJECTS for n in lexicon().nouns[k] if n.plural]
            if not nouns:
                return asking(rng)
            noun = pick(rng, nouns)
            plural = kind == "how many" or rng.random() < 0.4
            form = italian.agreement(noun.genders[plural], plural)
            which = "quale" if kind == "which" else "quanto"
            opening = (
                f"{kind} {noun.english[plural]}",
                f"{italian.adjective(which)[form]} {noun.italian[plural]}",
            )
            what = what._replace(pairs=frozenset({(verb.lemma, noun.lemma)}))
    how = mood(rng, what.verb, who.person, asked=True)
    return question(who, what, how, opening, invert=True)


def _about(rng: random.Random, head: Phrase) -> Sentence:
    """A short predicate about a long subject."""
    assert head.noun is not None
    if head.noun.kind == "P" and rng.random() < 0.5:
        how = Mood(draw(rng, {"past": 3, "progressive": 3, "future": 3}))
        return end(*clause(head, intransitive(rng, placed=0), how))
    entry = pick(rng, lexicon().adjectives[head.noun.kind])
    be, base, essere, _ = being(rng, head.person)
    return end(
        words(head.english, be, base, entry.english),
        italian.join(head.direct, essere, entry.italian[head.form]),
        head.pairs | {(entry.english, head.noun.lemma)},
    )


def relative_subject(rng: random.Random) -> Sentence:
    """The boy who reads the book is tired."""
    who = thing(rng, "P", determiner=draw(rng, {"the": 8, "demonstrative": 2}), rate=0.1)
    what = with_object(rng, rate=0.1)[0] if rng.random() < 0.6 else intransitive(rng)
    how = Mood(draw(rng, {"present": 4, "past": 4, "progressive": 3}))
    if not readable(what.verb, how.tense, who.person):
        how = Mood("past")
    if what.verb.state and how.tense == "progressive":
        how = Mood("present")
    group, _, gruppo = groups(what, how, who)
    head = who._replace(
        english=words(who.english, "who", group, what.english),
        italian=italian.join(who.italian, "che", gruppo, what.italian),
        pairs=who.pairs | what.pairs,
    )
    return _about(rng, head)


def relative_object(rng: random.Random) -> Sentence:
    """The apples that the girl bought are red. I lost the key that you gave to me."""
    verb = pick(rng, [v for v in lexicon().transitive if v.kinds != "PK"])
    kinds = verb.kinds.replace("K", "")
    item = thing(rng, kinds, determiner=draw(rng, {"the": 8, "demonstrative": 2}), rate=0.1)
    assert item.noun is not None
    who = subject(rng)
    how = Mood(draw(rng, {"present": 2, "past": 6}))
    if not readable(verb, how.tense, who.person):
        how = Mood("past")
    group, _, gruppo = groups(Predicate(verb), how, who)
    head = item._replace(
        english=words(item.english, "that", who.english, group),
        italian=italian.join(item.italian, "che", who.direct, gruppo),
        pairs=item.pairs | who.pairs | {(verb.lemma, item.noun.lemma)},
    )
    others = [v for v in lexicon().transitive if item.noun.kind in v.kinds and v != verb]
    if rng.random() < 0.6 or not others:
        return _about(rng, head)
    outer = pick(rng, others)
    pairs = head.pairs | {(outer.lemma, item.noun.lemma)}
    what = Predicate(outer, head.english, head.direct, pairs=pairs)
    return end(*clause(subject(rng, pronouns=0.6), what, Mood(pick(rng, ("past", "future")))))


def _deed(rng: random.Random) -> Predicate:
    """Something short that somebody does."""
    return intransitive(rng) if rng.random() < 0.5 else with_object(rng, rate=0)[0]


_CONJUNCTIONS = {
    "because": ("perché", ("past", "present", "progressive")),
    "but": ("ma", ("past", "present", "future")),
    "when": ("quando", ("past", "present")),
    "if": ("se", ("present",)),
}


def joined(rng: random.Random) -> Sentence:
    """Marco is sleeping because he is tired. If you finish the book, we will be happy."""
    conjunction = pick(rng, list(_CONJUNCTIONS))
    congiunzione, tenses = _CONJUNCTIONS[conjunction]
    who, what, tense = short(rng), _deed(rng), pick(rng, tenses)
    if (what.verb.state and tense == "progressive") or not readable(what.verb, tense, who.person):
        what = intransitive(rng)
    first = clause(who, what, Mood(tense))
    again = short(rng)
    if who.person == 2 and (again == who or rng.random() < 0.6):
        again = SHE if who.form == "f" else HE
    now = {"past": "was", "future": "future"}.get(tense, "present")
    second = state_of(rng, again, "future" if conjunction == "if" else now)
    pairs = first[2] | second[2]
    if conjunction in ("when", "if"):
        if tense == "past":
            first, second = second, first
        said, detto = f"{first[0]}, {second[0]}", f"{first[1]}, {second[1]}"
        return end(f"{conjunction} {said}", f"{congiunzione} {detto}", pairs)
    comma = "," if conjunction == "but" else ""
    return end(
        f"{first[0]}{comma} {conjunction} {second[0]}",
        f"{first[1]}{comma} {congiunzione} {second[1]}",
        pairs,
    )


_SAY: tuple[Verb, ...] = (
    verb(english.verb("say", "said"), "dire"),
    verb(english.verb("know", "knew", "known"), "sapere"),
)


def reporting(rng: random.Random) -> Sentence:
    """The doctor says that my father is tired: never denied, that would take the subjunctive."""
    who, inner = short(rng), short(rng)
    if rng.random() < 0.5:
        said, detto, pairs = state_of(rng, inner)
    else:
        said, detto, pairs = clause(inner, _deed(rng), Mood(pick(rng, ("past", "future"))))
    what = Predicate(pick(rng, _SAY), "that " + said, "che " + detto, pairs=pairs)
    return end(*clause(who, what, Mood("present")))
