"""Tasks of the alignment recipes: the embedded one, people's preferences, problems with answers.

built_in        instructions of this project, imperfect demonstrations, a checker
from_pairs      preferences in files: answers of people, no checker
from_problems   questions with worked answers in files, checked by their last number
"""

import gzip
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from msfs_functional.pairs import Ids, Pair
from msfs_functional.preference_data import (
    read_lines,
    read_pairs,
    read_problems,
    reasons,
    solved,
    solved_or_close,
    split_by,
)
from msfs_functional.rewards import RewardFn
from msfs_functional.synthetic import instructions as synthetic
from msfs_functional.tokenizer import train_bpe, train_word_level


class Words(Protocol):
    """A tokenizer whose ids 0 and 2 are padding and the end: ours, or a borrowed one."""

    @property
    def vocab_size(self) -> int: ...

    def encode(
        self, lines: Sequence[str], *, bos: bool = False, eos: bool = False
    ) -> list[list[int]]: ...

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]: ...


@dataclass(frozen=True)
class Data:
    """The embedded task, or files."""

    # JSON lines, also .gz: prompt, chosen and rejected, or two transcripts (align_people); question
    # and answer (align_ppo); none: the embedded task
    files: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()  # .txt or .jsonl with "text", to pretrain on beside the files
    share: float = 0.1  # of the files' prompts, held out
    vocabulary: int = 4000  # ids of the byte-level BPE that is learned from the files
    demonstrations: int = 30_000  # of the embedded task, to imitate
    prompts: int = 3000  # of the embedded task, to answer while learning
    held_out: int = 400  # prompts that nothing is trained on, at most
    # of the embedded task, which of the two sets of them: one to choose settings by, one to report
    figures_on: Literal["valid", "test"] = "test"
    new: int = 12  # longest answer [tokens]


class Prompt(NamedTuple):
    """One prompt as text and as ids, with what the data knows of it."""

    text: str
    ids: Ids  # begin token included
    metadata: Any = None


@dataclass(frozen=True)
class Task:
    """What is to be learned, and how answers are judged."""

    tokenizer: Words
    prompts: list[Prompt]  # to train on
    held_out: list[Prompt]
    demonstrations: Sequence[tuple[Ids, Ids]]  # (prompt, answer) to imitate
    new: int  # longest answer [tokens]
    right: RewardFn | None = None  # 1 for a right answer, 0 for others; on texts
    graded: RewardFn | None = None  # the same with shades
    texts: Sequence[Ids] = field(default_factory=list)  # documents to read before anything else
    pairs: list[Pair] = field(default_factory=list)  # preferences of people, to train on
    held_out_pairs: list[Pair] = field(default_factory=list)
    notes: tuple[str, ...] = ()  # what the user should know of the data


# (what is configured, seed, tokens of a row, tokenizer; None: one learned from the texts) -> Task
TaskFn = Callable[[Data, int, int, Words | None], Task]


def built_in(data: Data, seed: int, length: int = 64, tokenizer: Words | None = None) -> Task:
    """The task of `synthetic.instructions`.

    Raises:
        ValueError: a tokenizer that needs more tokens for a prompt and an answer than `length`.
    """
    shown = synthetic.demonstrations(seed, data.demonstrations)
    tokenizer = tokenizer or train_word_level([text for pair in shown for text in pair], 1000)

    def encoded(split: synthetic.Split, count: int) -> list[Prompt]:
        texts = [one.prompt for one in synthetic.instructions(seed + 1, count, split)]
        ids = tokenizer.encode(texts, bos=True)
        return [Prompt(*both) for both in zip(texts, ids, strict=True)]

    asked, given = zip(*shown, strict=True)
    pairs = zip(tokenizer.encode(asked, bos=True), tokenizer.encode(given, eos=True), strict=True)
    prompts, held_out = encoded("train", data.prompts), encoded(data.figures_on, data.held_out)
    if (most := max(len(p.ids) for p in [*prompts, *held_out]) + data.new) > length:
        raise ValueError(
            f"a prompt and its answer take up to {most} tokens, beyond --model.length ({length}): "
            "raise it"
        )
    return Task(
        tokenizer,
        prompts,
        held_out,
        list(pairs),
        data.new,
        synthetic.right,
        synthetic.graded,
    )


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Documents of files: .jsonl with "text", else the paragraphs of a text; also .gz."""
    documents = []
    for path in paths:
        if ".jsonl" in path.name:
            documents += [row["text"] for row in read_lines(path, (("text",),))]
            continue
        if not path.is_file():
            raise ValueError(f"{path} does not exist: check the path")
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        documents += ["\n".join(part.split("\n")) for part in text.split("\n\n")]
    return [text for document in documents if (text := document.strip())]


def from_pairs(data: Data, seed: int, length: int, tokenizer: Words | None = None) -> Task:
    """Preferences of people, split by prompt; the chosen answers are the demonstrations.

    Prompts that leave no room for an answer, pairs beyond the context, with two equal sides or an
    empty one are left out and counted.
    """
    pairs, left_out = read_pairs(data.files)
    train, held_out = split_by(pairs, lambda pair: pair.prompt, data.share)
    seen = [text for pair in train for text in (pair.prompt + pair.chosen, pair.rejected)]
    more = read_texts(data.texts)
    tokenizer = tokenizer or train_bpe([*seen, *more], data.vocabulary)

    def encoded(some: Sequence[Any]) -> list[Pair]:
        prompts = tokenizer.encode([pair.prompt for pair in some], bos=True)
        sides = [
            tokenizer.encode([getattr(pair, side) for pair in some], eos=True)
            for side in ("chosen", "rejected")
        ]
        every = [Pair(*three) for three in zip(prompts, *sides, strict=True)]
        return [p for p in every if len(p.prompt) + max(map(len, p[1:])) <= length]

    own, other = encoded(train), encoded(held_out)
    room = length - data.new
    asked = [
        Prompt(pair.prompt, ids)
        for pair, ids in zip(
            held_out, tokenizer.encode([p.prompt for p in held_out], bos=True), strict=True
        )
        if len(ids) <= room
    ]
    asked = list({prompt.text: prompt for prompt in asked}.values())[: data.held_out]
    note = (
        f"{len(train)} pairs to train and {len(held_out)} held out by prompt; "
        f"{len(train) - len(own)} and {len(held_out) - len(other)} are beyond {length} tokens and "
        f"left out, as are pairs without a preference: {reasons(left_out)}; {len(asked)} held-out "
        "prompts to answer"
    )
    documents = [text for pair in train for text in (pair.prompt + pair.chosen,)]
    return Task(
        tokenizer,
        [],
        asked,
        [(pair.prompt, pair.chosen) for pair in own],
        data.new,
        texts=tokenizer.encode([*documents, *more], bos=True, eos=True),
        pairs=own,
        held_out_pairs=other,
        notes=(note,),
    )


def from_problems(data: Data, seed: int, length: int, tokenizer: Words | None = None) -> Task:
    """Questions whose worked answers end in "#### number", split by question."""
    problems = read_problems(data.files)
    train, held_out = split_by(problems, lambda problem: problem.question, data.share)
    more = read_texts(data.texts)
    frame = "Question: {}\nAnswer:"
    seen = [f"{frame.format(p.question)} {p.answer}" for p in train]
    tokenizer = tokenizer or train_bpe([*seen, *more], data.vocabulary)
    room, dropped = length - data.new, 0

    def encoded(some: Sequence[Any]) -> list[Prompt]:
        nonlocal dropped
        texts = [frame.format(problem.question) for problem in some]
        rows = zip(texts, tokenizer.encode(texts, bos=True), some, strict=True)
        kept = [Prompt(text, ids, one.answer) for text, ids, one in rows if len(ids) <= room]
        dropped += len(some) - len(kept)
        return kept

    prompts, asked = encoded(train), encoded(held_out)[: data.held_out]
    answers = tokenizer.encode([prompt.metadata for prompt in prompts], eos=True)
    shown = [
        (prompt.ids, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(prompt.ids) + len(answer) <= length
    ]
    note = (
        f"{len(train)} problems to train and {len(held_out)} held out, {len(asked)} of them to "
        f"answer; {dropped} questions leave no room for {data.new} tokens in {length} and are left "
        f"out, {len(prompts) - len(shown)} worked answers are too long to imitate"
    )
    return Task(
        tokenizer,
        prompts,
        asked,
        shown,
        data.new,
        solved,
        solved_or_close,
        texts=tokenizer.encode([*seen, *more], bos=True, eos=True),
        notes=(note,),
    )


def checked_task(data: Data, seed: int, length: int = 64, tokenizer: Words | None = None) -> Task:
    """A task whose answers can be checked: the problems of files, else the embedded one."""
    return (from_problems if data.files else built_in)(data, seed, length, tokenizer)
