"""The judge: reads a story sentence by sentence, keeps book, and says what does not hold.

It knows the forms of the sentences (a sample that says something else is not confirmed), who is
there, who has what, who gave it, where everybody is and who was refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msfs_functional.synthetic.stories import lexicon as words
from msfs_functional.synthetic.stories.sentences import patterns

RULES = ("told", "grammar", "names", "holders", "causes", "places")
ENDS = ("end", "end_given", "end_two")


@dataclass
class Book:
    """What is true so far in a story."""

    present: list[str] = field(default_factory=list)
    holder: dict[str, str] = field(default_factory=dict)  # thing -> person
    adjective: dict[str, str] = field(default_factory=dict)  # thing -> adjective
    place: str = ""
    asked: tuple[str, str, str] | None = None  # (who, whom, thing), not answered yet
    giver: dict[str, tuple[str, str]] = field(default_factory=dict)  # thing -> (from, to), last
    last: tuple[str, str, str, str] | None = None  # (kind, a, b, thing) of the last deed
    subject: str = ""  # the last sentence's a


def broken(kind: str, said: Mapping[str, str], book: Book) -> set[str]:
    """The rules that the sentence breaks, given what is true before it."""
    a, b, o, q = (said.get(slot, "") for slot in "aboq")
    people = [said[slot] for slot in "abc" if slot in said]
    found = set()
    if len(set(people)) < len(people):
        found.add("names")
    if kind == "open":
        return found | ({"told"} if book.present else set())
    fresh = kind == "join"
    if any((name in book.present) == fresh for name in people):
        found.add("names")
    things = [thing for thing in (o, q) if thing]
    if kind == "own":
        return found | ({"holders"} if o in book.holder else set())
    owners = [book.holder.get(thing) for thing in things]
    if None in owners or any(
        said[f"{slot}_adj"] != book.adjective.get(said[slot])
        for slot in "oq"
        if f"{slot}_adj" in said
    ):
        found.add("holders")
    has = {  # who must have o (and q) before the sentence
        "give": [a], "keep": [a], "swap": [a, b], "hold": [a], "drop": [a], "ask": [b],
        "end": [a], "end_given": [a], "end_two": [a, b],
    }.get(kind)  # fmt: skip
    if has is not None and owners != has:
        found.add("holders")
    if kind == "wish" and owners == [a]:
        found.add("holders")
    answer = kind in ("give", "keep")
    if book.asked is not None and (not answer or book.asked != (b, a, o)):
        found.add("causes")
    if kind == "keep" and book.asked is None:
        found.add("causes")
    if kind in ("thank", "anger"):
        deed = "give" if kind == "thank" else "keep"
        about = o or (book.last[3] if book.last else "")
        if book.last != (deed, b, a, about):
            found.add("causes")
    if kind == "end_given" and book.giver.get(o) != (b, a):
        found.add("causes")
    if kind == "move" and said["p"] == book.place:
        found.add("places")
    if kind == "end" and said.get("p", book.place) != book.place:
        found.add("places")
    return found


def take_in(kind: str, said: Mapping[str, str], book: Book) -> None:
    """Makes true in the book what the sentence says."""
    a, b, o, q = (said.get(slot, "") for slot in "aboq")
    if kind == "open":
        book.present = [a, b]
    elif kind == "join":
        book.present.append(a)
    elif kind == "own":
        book.holder[o], book.adjective[o] = a, said["o_adj"]
    elif kind == "ask":
        book.asked = (a, b, o)
    elif kind in ("give", "keep"):
        book.asked, book.last = None, (kind, a, b, o)
        if kind == "give":
            book.holder[o], book.giver[o] = b, (a, b)
    elif kind == "swap":
        book.holder |= {o: b, q: a}
        book.giver |= {o: (a, b), q: (b, a)}
    book.place = said.get("p", book.place)
    book.subject = a or book.subject


def agrees(said: Mapping[str, str]) -> bool:
    """Pronouns with their names, articles with adjectives, prepositions with places."""
    for slot, word in said.items():
        who, _, form = slot.rstrip("_").partition("_")
        value = said.get(who, "")
        if not form:
            right = value
        elif form == "adj":
            continue
        elif form == "a":
            right = words.article(said[f"{who}_adj"])
        elif form == "in":
            right = words.PREPOSITIONS[value]
        else:
            right = words.pronoun(value, form.lower())
        if word.lower() != right.lower():
            return False
    return True


def read(story: str, at: int) -> tuple[str, re.Match[str]] | None:
    """The sentence that begins at a character: its kind and what fills its slots."""
    for kind, form in patterns():
        if match := form.match(story, at):
            return kind, match
    return None


def judge(story: str) -> dict[str, bool]:
    """{rule: whether the story keeps it}, and "consistent", whether it keeps all.

    told      known sentences from an opening to an ending
    grammar   pronouns agree with names, "an" with vowels, "in" or "at" with the place
    names     who acts has been introduced, once
    holders   who gives, keeps or ends with a thing has it; it stays the "red ball" it was
    causes    questions are answered by whom they asked; thanks go to who gave, anger to who
              kept; what is said to have been given by somebody was
    places    they are where they went last
    """
    book, at, kind, wrong = Book(), 0, "", set()
    story = story.strip()
    while at < len(story):
        found = read(story, at)
        opens = found is not None and (found[0] == "open") == (at == 0)
        if found is None or not opens or kind in ENDS:
            wrong.add("told")
            break
        kind, match = found
        said = dict(match.groupdict())
        if "a" not in said and "a_He" in said:
            said["a"] = book.subject
        wrong |= broken(kind, said, book)
        if not agrees(said):
            wrong.add("grammar")
        take_in(kind, said, book)
        at = match.end()
        if at < len(story) and story[at] != " ":
            wrong.add("told")
        at += 1
    if kind not in ENDS:
        wrong.add("told")
    return {rule: rule not in wrong for rule in RULES} | {"consistent": not wrong}


def shares(stories: Sequence[str]) -> dict[str, float]:
    """Shares in [0, 1]: of all stories those "told" to the end and "consistent"; of the told ones
    those that keep each other rule (the judge has not read the others whole)."""
    verdicts = [judge(story) for story in stories]
    told = [verdict for verdict in verdicts if verdict["told"]]
    found = {rule: sum(v[rule] for v in told) / max(1, len(told)) for rule in RULES}
    of_all = ("told", "consistent")
    return found | {rule: sum(v[rule] for v in verdicts) / len(verdicts) for rule in of_all}
