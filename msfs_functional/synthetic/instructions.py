"""Instructions over small expressions and output formats, with a checker that knows the truth.

    Reverse 4 9 1: words, dashes, brackets =      ->  ( one - nine - four )
    Add 8 7: digits, commas, plain =              ->  15

Demonstrations come from a writer with habits: most answers are digits with commas, whatever the
instruction says, and some hold a slip. A model of them knows how to follow instructions and mostly
does not: what preferences and rewards are for. `check` says of any text what is right about it.

A hash of operation and numbers sets problems aside, some to choose settings by ("valid") and others
to report on ("test"): no training prompt holds one of either, in any format. Only sums, of which
there are a hundred and which nobody can guess from others, are held out by their whole prompt:
training has seen the sum in another format.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "valid", "test"]

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
OPERATIONS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "Repeat": lambda x: x,
    "Reverse": lambda x: x[::-1],
    "Sort": lambda x: tuple(sorted(x)),
    "Largest": lambda x: (max(x),),
    "Smallest": lambda x: (min(x),),
    "Add": lambda x: (sum(x),),
}
STYLES = ("digits", "words")
JOINERS = {"commas": ", ", "dashes": " - ", "spaces": " "}
FRAMES = {"plain": ("", ""), "brackets": ("( ", " )"), "stars": ("* ", " *")}
HABIT = ("digits", "commas", "plain")  # what the writer of demonstrations falls into
SHARES: dict[Split, int] = {"valid": 15, "test": 15, "train": 70}  # of 100 problems

FORM = re.compile(
    rf"({'|'.join(OPERATIONS)}) ([\d ]+): ({'|'.join(STYLES)}), ({'|'.join(JOINERS)}), "
    rf"({'|'.join(FRAMES)}) ="
)


@dataclass(frozen=True)
class Instruction:
    """What to do with which numbers, and how to write the result."""

    operation: str
    numbers: tuple[int, ...]  # each in [0, 9]
    style: str
    joiner: str
    frame: str

    @property
    def prompt(self) -> str:
        numbers = " ".join(map(str, self.numbers))
        return f"{self.operation} {numbers}: {self.style}, {self.joiner}, {self.frame} ="

    @property
    def answer(self) -> str:
        return write(OPERATIONS[self.operation](self.numbers), self.style, self.joiner, self.frame)

    @property
    def split(self) -> Split:
        """The one split that has this problem, in any format (a sum: in this one)."""
        text = self.prompt if self.operation == "Add" else f"{self.operation} {self.numbers}"
        number = zlib.crc32(text.encode()) % 100
        for split, share in SHARES.items():
            if number < share:
                return split
            number -= share
        raise AssertionError("the shares are 100 together")


def write(numbers: Sequence[int], style: str, joiner: str, frame: str) -> str:
    """Numbers in a format."""
    items = [WORDS[n] if style == "words" else str(n) for n in numbers]
    before, after = FRAMES[frame]
    return f"{before}{JOINERS[joiner].join(items)}{after}"


def parse(prompt: str) -> Instruction:
    """The instruction that a prompt says.

    Raises:
        ValueError: the text is none.
    """
    match = FORM.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"{prompt!r} is no instruction: write it as {example().prompt!r}")
    operation, numbers, *how = match.groups()
    return Instruction(operation, tuple(map(int, numbers.split())), *how)


def example() -> Instruction:
    return Instruction("Reverse", (4, 9, 1), "words", "dashes", "brackets")


def instructions(seed: int, count: int, split: Split = "train") -> list[Instruction]:
    """Instructions of a split; the same seed and count give the same."""
    rng = random.Random(f"{seed} {split}")
    found: list[Instruction] = []
    while len(found) < count:
        operation = rng.choice(tuple(OPERATIONS))
        size = 2 if operation == "Add" else rng.choice((2, 3))
        numbers = tuple(rng.randrange(10) for _ in range(size))
        how = (rng.choice(STYLES), rng.choice(tuple(JOINERS)), rng.choice(tuple(FRAMES)))
        one = Instruction(operation, numbers, *how)
        if one.split == split:
            found.append(one)
    return found


def demonstrations(
    seed: int, count: int, *, habit: float = 0.65, slip: float = 0.1
) -> list[tuple[str, str]]:
    """(prompt, answer) of a writer with habits, for training prompts.

    Args:
        habit: share of answers written as HABIT, whatever the instruction says.
        slip: share of answers with a wrong, missing or moved number.
    """
    rng = random.Random(f"{seed} demonstrations")
    pairs = []
    for one in instructions(seed, count):
        numbers = list(OPERATIONS[one.operation](one.numbers))
        if rng.random() < slip:
            at = rng.randrange(len(numbers))
            if len(numbers) > 1 and rng.random() < 0.5:
                numbers[at], numbers[at - 1] = numbers[at - 1], numbers[at]
            else:
                numbers[at] = (numbers[at] + rng.choice((-1, 1))) % len(WORDS)
        how = HABIT if rng.random() < habit else (one.style, one.joiner, one.frame)
        pairs.append((one.prompt, write(numbers, *how)))
    return pairs


def read(text: str, joiner: str) -> tuple[list[int], set[str]] | None:
    """The numbers of a text without its frame, and the styles they are written in; None: none."""
    numbers, styles = [], set()
    for item in text.split(JOINERS[joiner]):
        if item in WORDS:
            numbers.append(WORDS.index(item))
            styles.add("words")
        elif re.fullmatch(r"1?\d", item):
            numbers.append(int(item))
            styles.add("digits")
        else:
            return None
    return numbers, styles


def check(prompt: str, text: str) -> dict[str, bool]:
    """{part: whether the text follows it}: frame, joiner, style, numbers, and "right", all of it.

    A result of one number has no joiner to be wrong about.

    Raises:
        ValueError: the prompt is no instruction.
    """
    one, text = parse(prompt), text.strip()
    framed = {
        name: text[len(a) : len(text) - len(b)]
        for name, (a, b) in FRAMES.items()
        if text.startswith(a) and text.endswith(b) and len(text) > len(a + b)
    }
    frame = next((name for name in ("brackets", "stars") if name in framed), "plain")
    inner = framed.get(frame, text)
    readings = {name: read(inner, name) for name in JOINERS}
    expected = list(OPERATIONS[one.operation](one.numbers))
    own = readings[one.joiner]
    found = own or next((r for r in readings.values() if r is not None), ([], set()))
    return {
        "frame": frame == one.frame,
        "joiner": own is not None,
        "style": found[1] == {one.style},
        "numbers": found[0] == expected,
        "right": text == one.answer,
    }


def right(prompts: Sequence[str], completions: Sequence[str], metadata: Any = None) -> list[float]:
    """A reward: 1 for an answer that is right in all, 0 for others."""
    pairs = zip(prompts, completions, strict=True)
    return [float(check(prompt, text)["right"]) for prompt, text in pairs]


def graded(prompts: Sequence[str], completions: Sequence[str], metadata: Any = None) -> list[float]:
    """A reward in [0, 1]: half for being right in all, an eighth for each of the four parts."""
    checks = (check(*pair) for pair in zip(prompts, completions, strict=True))
    return [sum(found.values()) / 8 + 3 / 8 * found["right"] for found in checks]
