"""Preferences and problems in files: JSON lines, also as .gz.

pairs      {"prompt": ..., "chosen": ..., "rejected": ...}, or two transcripts without a prompt
           that end in different answers:  "\\n\\nHuman: ...\\n\\nAssistant: ..."
problems   {"question": ..., "answer": ...}, the answer ending in "#### number"
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
TURN = "\n\nAssistant:"
NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


class TextPair(NamedTuple):
    """A prompt and two answers to it."""

    prompt: str
    chosen: str
    rejected: str


class Problem(NamedTuple):
    """A question and its worked answer."""

    question: str
    answer: str


def read_lines(path: Path, columns: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The objects of a JSON lines file, which have one of these sets of columns, as texts.

    Raises:
        ValueError: no such file; a line that is no object; columns that are missing (says which
            were found).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): give UTF-8 JSON lines") from None
    rows = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error})") from None
        found = sorted(row) if isinstance(row, dict) else [type(row).__name__]
        if not isinstance(row, dict) or not any(set(each) <= row.keys() for each in columns):
            wanted = " or ".join(str(list(each)) for each in columns)
            raise ValueError(f"{path}, line {number} holds {found}, expected {wanted}: rename them")
        for name in {n for each in columns for n in each} & row.keys():
            if not isinstance(row[name], str):
                raise ValueError(
                    f"{path}, line {number}: {name!r} is a {type(row[name]).__name__}, expected "
                    "text: one string a column"
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no line: give data")
    return rows


class Pairs(NamedTuple):
    """Pairs to learn from, and why others were left out: {reason: number}."""

    kept: list[TextPair]
    left_out: dict[str, int]


def read_pairs(paths: Sequence[Path]) -> Pairs:
    """The preference pairs of files; errors as `read_lines`.

    Of two transcripts the prompt is all up to the last turn that both share.

    Raises:
        ValueError: no pair is left; says why each was left out.
    """
    kept: list[TextPair] = []
    empty, equal, two = why = ("an empty side", "equal sides", "two prompts")
    left_out: dict[str, int] = dict.fromkeys(why, 0)
    for path in paths:
        columns = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
        for row in read_lines(path, columns):
            chosen, rejected = row["chosen"], row["rejected"]
            cut = 0
            if "prompt" not in row:
                cut = min(chosen.rfind(TURN), rejected.rfind(TURN))
                cut = 0 if cut < 0 else cut + len(TURN)
            pair = TextPair(row.get("prompt", chosen[:cut]), chosen[cut:], rejected[cut:])
            if chosen[:cut] != rejected[:cut]:
                left_out[two] += 1
            elif not pair.chosen.strip() or not pair.rejected.strip():
                left_out[empty] += 1
            elif pair.chosen.strip() == pair.rejected.strip():
                left_out[equal] += 1
            else:
                kept.append(pair)
    if not kept:
        raise ValueError(
            f"of {sum(left_out.values())} pairs none is left ({reasons(left_out)}): give answers "
            "to one prompt that differ and are not empty"
        )
    return Pairs(kept, left_out)


def reasons(left_out: Mapping[str, int]) -> str:
    """ "3 with equal sides, 1 with two prompts", or "none"."""
    return ", ".join(f"{n} with {why}" for why, n in left_out.items() if n) or "none"


def read_problems(paths: Sequence[Path]) -> list[Problem]:
    """The problems of files; errors as `read_lines`."""
    columns = (("question", "answer"),)
    return [
        Problem(r["question"], r["answer"]) for path in paths for r in read_lines(path, columns)
    ]


def split_by(
    items: Sequence[T], text_of: Callable[[T], str], share: float
) -> tuple[list[T], list[T]]:
    """(training items, held-out items): items of one text are on one side, whatever the order.

    Args:
        share: of texts to hold out, in (0, 1).

    Raises:
        ValueError: a share out of range, a side without items.
    """
    if not 0 < share < 1:
        raise ValueError(f"share ({share}) must be in (0, 1)")
    train: list[T] = []
    held_out: list[T] = []
    for item in items:
        out = zlib.crc32(text_of(item).encode()) % 10_000 < 10_000 * share
        (held_out if out else train).append(item)
    if not train or not held_out:
        raise ValueError(
            f"{len(items)} items leave {len(train)} to train and {len(held_out)} to hold out: give "
            "more data, or another share"
        )
    return train, held_out


def number_of(text: str) -> float | None:
    """The number after the last "####"; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def solved(prompts: Sequence[str], completions: Sequence[str], metadata: Any) -> list[float]:
    """A reward: 1 where the final number is that of the worked answer in metadata."""
    truths = [number_of(answer) for answer in metadata]
    return [
        float(truth is not None and number_of(text) == truth)
        for text, truth in zip(completions, truths, strict=True)
    ]


def solved_or_close(
    prompts: Sequence[str], completions: Sequence[str], metadata: Any
) -> list[float]:
    """`solved`, and a tenth for an answer that ends in some number as it should."""
    whole = solved(prompts, completions, metadata)
    pairs = zip(whole, completions, strict=True)
    return [max(right, 0.1 * (number_of(text) is not None)) for right, text in pairs]
