"""The teller: plans who asks, gives, keeps and swaps, and puts it into sentences.

A hash sets pairs (adjective, thing) and (first name, second name) aside: no training story holds
one of them, every held-out story does, while each word alone is known from training.
"""

import random
import zlib
from collections.abc import Iterator
from typing import Literal

from msfs_functional.synthetic.stories import lexicon as words
from msfs_functional.synthetic.stories.judging import Book, read, take_in
from msfs_functional.synthetic.stories.sentences import SENTENCES, fill

Split = Literal["train", "valid"]
HELD_OUT = 6  # of 100 pairs


def held_out(*pair: str) -> bool:
    """Whether training never sees the pair."""
    return zlib.crc32("+".join(pair).encode()) % 100 < HELD_OUT


def tell(rng: random.Random) -> tuple[str, bool]:
    """One story, and whether it holds a pair that is set aside."""
    said: list[str] = []
    book = Book()
    people = rng.sample(words.NAMES, 3)
    things = rng.sample(words.THINGS, 2)
    adjectives = {thing: rng.choice(words.ADJECTIVES) for thing in things}

    def say(kind: str, forms: tuple[str, ...] | None = None, **slots: str) -> None:
        sentence = rng.choice(forms or SENTENCES[kind])
        said.append(fill(sentence, slots, adjectives))
        take_in(kind, {**slots, "o_adj": adjectives.get(slots.get("o", ""), "")}, book)

    def chance(share: float) -> bool:
        return rng.random() < share

    a, b, c = people
    place = rng.choice(words.PLACES)
    say("open", a=a, b=b, p=place, d=rng.choice(words.DAYS))
    thing, other = things
    owner = rng.choice((a, b))
    say("own", a=owner, o=thing)
    here = [a, b]
    if both := chance(0.3):
        say("own", a=b if owner == a else a, o=other)
    elif chance(0.4):
        say("join", a=c)
        here.append(c)
    if both and chance(0.5):
        say("swap", a=owner, b=book.holder[other], o=thing, q=other)
    for _ in range(rng.choice((1, 1, 1, 2))):
        has = book.holder[thing]
        wants = rng.choice([name for name in here if name != has])
        if chance(0.4):
            say("wish", a=wants, o=thing)
        if asked := chance(0.7):
            say("ask", a=wants, b=has, o=thing)
        if asked and chance(0.35):
            say("keep", a=has, b=wants, o=thing)
            if chance(0.6):
                say("anger", a=wants, b=has, o=thing)
        else:
            forms = SENTENCES["give"]  # the first one answers a question
            say("give", forms if asked else forms[1:], a=has, b=wants, o=thing)
            if chance(0.7):
                say("thank", a=wants, b=has, o=thing)
                if chance(0.5):
                    say("hold", a=wants, o=thing)
        if chance(0.3):
            has = book.holder[thing]
            say("drop", a=has, b=rng.choice([name for name in here if name != has]), o=thing)
        if chance(0.3):
            say("move", p=rng.choice([p for p in words.PLACES if p != book.place]))
    has, given = book.holder[thing], book.giver.get(thing)
    if both and book.holder[other] != has and chance(0.6):
        say("end_two", a=has, b=book.holder[other], o=thing, q=other)
    elif given and chance(0.4):
        say("end_given", a=has, b=given[0], o=thing)
    else:
        say("end", a=has, o=thing, p=book.place)
    pairs = [(a, b), *((adjectives[thing], thing) for thing in book.holder)]
    return " ".join(said), any(held_out(*pair) for pair in pairs)


def told(seed: int, split: Split) -> Iterator[str]:
    """Distinct stories of a split, without end."""
    rng, seen = random.Random(f"{split} {seed}"), set()
    while True:
        story, aside = tell(rng)
        if aside == (split == "valid") and story not in seen:
            seen.add(story)
            yield story


def stories(seed: int, n: int, *, split: Split = "train") -> list[str]:
    """n distinct stories; the same seed and split give the same ones everywhere.

    Args:
        seed: of the stories. Which pairs are set aside does not depend on it.
        n: how many.
        split: "train", or "valid" for stories that each hold a pair training never sees.

    Raises:
        ValueError: n below 1, an unknown split.
    """
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1 story")
    if split not in ("train", "valid"):
        raise ValueError(f"split ({split!r}) must be 'train' or 'valid'")
    made = told(seed, split)
    return [next(made) for _ in range(n)]


def beginning(story: str, sentences: int = 2) -> str:
    """The first sentences of a story: who is there and who has what, to be gone on with."""
    end = -1
    for _ in range(sentences):
        found = read(story, end + 1)
        if found is None:
            raise ValueError(f"no story of ours: {story[end + 1 :][:60]!r} begins no sentence")
        end = found[1].end()
    return story[:end]
