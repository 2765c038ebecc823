"""The sentences of the stories: one table that the teller fills in and the judge reads.

Slots of a sentence, which both understand:

    {a} {b} {c}      names                    {a.he} {a.his} {a.him}   a's pronoun ({a.He}: capital)
    {o} {q}          things                   {o.adj} {o.a}            o's adjective, "a" or "an"
    {p} {p.in}       a place, its preposition                {d}       a time of the day

A sentence that has a pronoun of a but not a's name speaks of the last sentence's a.
"""

import functools
import re
from collections.abc import Mapping

from msfs_functional.synthetic.stories import lexicon as words

SENTENCES: dict[str, tuple[str, ...]] = {
    "open": (
        "One {d}, {a} and {b} were {p.in} the {p}.",
        "One {d}, {a} met {b} {p.in} the {p}.",
    ),
    "join": ("{a} was there, too.", "Soon {a} came to play with them."),
    "own": ("{a} had {o.a} {o.adj} {o}.", "{a} was proud of {a.his} {o}, {o.a} {o.adj} one."),
    "wish": (
        "{a} was sad because {a.he} had no {o}.",
        "{a} looked at the {o} and wanted it for {a.his} game.",
    ),
    "ask": (
        '"May I have your {o.adj} {o}, {b}?" asked {a}.',
        '{a} said to {b}, "Please give me your {o.adj} {o}."',
    ),
    "give": (
        '"Yes, {b}, take it," said {a}, and {a.he} gave {b.him} the {o.adj} {o}.',
        '{a} smiled and gave the {o.adj} {o} to {b}. "It is yours now, {b}," {a.he} said.',
    ),
    "keep": (
        '"No, {b}, it is mine," said {a}, and {a.he} kept {a.his} {o}.',
        "But {a} did not want to give {b} the {o}, so {a.he} held it tight.",
    ),
    "swap": ('"Let us swap," said {a}, so {a} got the {q} and {b} got the {o}.',),
    "thank": (
        "{a} was happy and thanked {b} for the {o.adj} {o}.",
        '"Thank you, {b}!" said {a} happily.',
    ),
    "anger": (
        "{a} was angry because {b} had kept {b.his} {o}.",
        '"That is not kind, {b}," said {a} angrily.',
    ),
    "hold": ("{a.He} put the {o} into {a.his} bag.", "{a.He} showed the {o} to everybody."),
    "drop": ("Then {a} dropped the {o.adj} {o}, but {b} found it and brought it back to {a.him}.",),
    "move": ("Then it began to rain, so they all ran to the {p}.", "Later they walked to the {p}."),
    "end": (
        "In the end, {a} took the {o.adj} {o} home from the {p}.",
        "At night, the {o.adj} {o} lay beside {a}'s bed.",
        "So the {o.adj} {o} stayed with {a}, and {a.he} slept well.",
    ),
    "end_given": ("Now {a} had the {o.adj} {o}, because {b} had given it to {a.him}.",),
    "end_two": ("In the end, {a} had the {o.adj} {o} and {b} had the {q.adj} {q}.",),
}

SLOT = re.compile(r"\{(\w)(?:\.(\w+))?\}")
FORMS = {
    "person": words.NAMES,
    "thing": words.THINGS,
    "adj": words.ADJECTIVES,
    "a": ("a", "an"),
    "place": words.PLACES,
    "in": tuple(sorted(set(words.PREPOSITIONS.values()))),
    "day": words.DAYS,
    **words.PRONOUNS,
    "He": ("He", "She"),
}
KINDS = {"a": "person", "b": "person", "c": "person", "o": "thing", "q": "thing"}
KINDS |= {"p": "place", "d": "day"}


def fill(sentence: str, slots: Mapping[str, str], adjectives: Mapping[str, str]) -> str:
    """The sentence in words; `adjectives` are those of the things."""

    def word(match: re.Match[str]) -> str:
        value, form = slots[match[1]], match[2]
        if form is None:
            return value
        if form == "in":
            return words.PREPOSITIONS[value]
        if form in ("adj", "a"):
            adjective = adjectives[value]
            return adjective if form == "adj" else words.article(adjective)
        found = words.pronoun(value, form.lower())
        return found.capitalize() if form[0].isupper() else found

    return SLOT.sub(word, sentence)


def pattern(sentence: str) -> re.Pattern[str]:
    """Matches every filling of the sentence, the wrong ones too; slot x.y is the group x_y."""
    parts, seen, end = [], set(), 0
    for match in SLOT.finditer(sentence):
        parts.append(re.escape(sentence[end : match.start()]))
        end, form = match.end(), match[2] or KINDS[match[1]]
        name = match[1] if match[2] is None else f"{match[1]}_{match[2]}"
        while name in seen:
            name += "_"  # said again: the judge compares
        seen.add(name)
        parts.append(f"(?P<{name}>{'|'.join(map(re.escape, FORMS[form]))})\\b")
    return re.compile("".join(parts) + re.escape(sentence[end:]))


@functools.cache
def patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """(kind, pattern) of every sentence."""
    return tuple((kind, pattern(s)) for kind, several in SENTENCES.items() for s in several)
