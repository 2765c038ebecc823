"""Preference pairs as tensors: (chosen, rejected) answers to one prompt, padded to one width.

    tokens   p p p a a E 0 0        row 0 of a pair: the chosen answer
             p p p b E 0 0 0        row 1: the rejected one
    mask     0 0 0 1 1 1 0 0        True on answers
             0 0 0 1 1 0 0 0

Dimension key: P pairs, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from msfs_functional import random
from msfs_functional.preference_data import reasons
from msfs_functional.tokenizer import PAD

Ids = Sequence[int]


class Pair(NamedTuple):
    """Ids of a prompt (begin token included) and of two answers (end token included)."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


class Encoded(NamedTuple):
    """Pairs as tensors, and why others were left out: {reason: number}."""

    tokens: Int64[Tensor, "P 2 T"]
    mask: Bool[Tensor, "P 2 T"]
    dropped: dict[str, int]


def padded(rows: Sequence[tuple[Ids, Ids]], width: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask) of (prompt, answer) rows."""
    tokens = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        tokens[n, :size] = torch.tensor([*prompt, *answer])
        mask[n, len(prompt) : size] = True
    return tokens, mask


def encode_pairs(pairs: Sequence[Pair], *, longest: int, multiple: int = 8) -> Encoded:
    """Tensors of the pairs that teach something and fit; the others are counted.

    Args:
        longest: tokens of prompt and answer together, the model's context at most.
        multiple: the width is rounded up to it, up to `longest`.

    Raises:
        ValueError: no pair is left; says why each was dropped.
    """
    kept: list[Pair] = []
    dropped = dict.fromkeys(("equal sides", "an empty side", f"beyond {longest} tokens"), 0)
    equal, empty, long = dropped
    for pair in pairs:
        if not pair.chosen or not pair.rejected:
            dropped[empty] += 1
        elif list(pair.chosen) == list(pair.rejected):
            dropped[equal] += 1
        elif len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > longest:
            dropped[long] += 1
        else:
            kept.append(pair)
    if not kept:
        raise ValueError(
            f"of {len(pairs)} pairs none is left ({reasons(dropped)}): give pairs whose answers "
            "differ, are not empty and fit the context"
        )
    width = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in kept)
    width = min(-(-width // multiple) * multiple, longest)
    rows = [(pair.prompt, side) for pair in kept for side in (pair.chosen, pair.rejected)]
    tokens, mask = padded(rows, width)
    return Encoded(tokens.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2)), dropped)


@dataclass
class Shuffled:
    """Batches without end of rows of tensors, in a new order each epoch; batch i is a function of
    the seed and i, so `state` is one number.

    Args:
        data: tensors with their rows in dim 0.
        batch: rows of one batch, over all shares.
        share: (number, count): this process takes rows number, ... of each batch.

    Raises:
        ValueError: fewer rows than a batch, shares that do not divide the batch.
    """

    data: Mapping[str, Tensor]
    batch: int
    seed: int = 0
    share: tuple[int, int] = (0, 1)
    done: int = 0
    _order: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)  # of an epoch

    def __post_init__(self):
        if self.batch % self.share[1]:
            raise ValueError(
                f"{self.share[1]} data ranks must divide the batch ({self.batch} rows): change one"
            )
        if self.rows < self.batch:
            raise ValueError(
                f"{self.rows} rows are fewer than one batch ({self.batch}): give more data, or a "
                "smaller batch"
            )

    @property
    def rows(self) -> int:
        return len(next(iter(self.data.values())))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        each = self.rows // self.batch
        epoch, number = divmod(self.done, each)
        self.done += 1
        if self._order is None or self._order[0] != epoch:
            key = random.fold_in(random.key(self.seed), epoch)
            self._order = epoch, random.permutation(key, self.rows)
        order = self._order[1]
        size = self.batch // self.share[1]
        start = number * self.batch + self.share[0] * size
        chosen = order[start : start + size]
        return {name: x[chosen.to(x.device)] for name, x in self.data.items()}

    def state(self) -> dict[str, int]:
        return {"done": self.done}

    def restore(self, state: Mapping[str, int]) -> None:
        self.done = state["done"]
