"""Documents in rows of one length, several in a row, each with a segment id of its own.

    documents   [B a b E]  [B c E]  [B d e f E]            B, E: BOS, EOS; a, b, ...: tokens
    tokens       B a b   B c   .                            row of 6, a dot is PAD
    labels       a b E   c E   .                            no label crosses a document
    segments     1 1 1   2 2   0
    positions    0 1 2   0 1   0

Attention that keeps to segments sees what it would see of each document alone.

Dimension key: N rows, B rows of a batch, T tokens of a row.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from msfs_functional import random
from msfs_functional.params import Params
from msfs_functional.tokenizer import PAD

AHEAD = 64  # documents that wait for a row they fit into
FIELDS = ("tokens", "labels", "segments", "positions")


class Packed(NamedTuple):
    """Rows; see the picture above."""

    tokens: Int[np.ndarray, "N T"]
    labels: Int[np.ndarray, "N T"]
    segments: Int[np.ndarray, "N T"]
    positions: Int[np.ndarray, "N T"]


def rows_of(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which documents share a row: the longest that fits of the next ones, until none does."""
    rows, waiting = [], []
    coming = iter(range(len(lengths)))
    waiting = list(itertools.islice(coming, AHEAD))
    while waiting:
        row, left = [], room
        while fitting := [i for i in waiting if lengths[i] <= left]:
            best = max(fitting, key=lambda i: lengths[i]) if row else waiting[0]
            waiting.remove(best)
            row.append(best)
            left -= lengths[best]
            waiting.extend(itertools.islice(coming, 1))
        rows.append(row)
    return rows


def pack(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows of `length` tokens; a longer document goes into several, as documents of their own.

    Args:
        documents: ids with BOS and EOS, each of at least two.

    Raises:
        ValueError: length below 1.
    """
    if length < 1:
        raise ValueError(f"length ({length}) must be at least 1 token")
    pieces = [
        document[start : start + length + 1]
        for document in documents
        for start in range(0, len(document) - 1, length)
    ]
    rows = rows_of([len(piece) - 1 for piece in pieces], length)
    tokens, labels, segments, positions = (
        np.full((len(rows), length), PAD, dtype=np.int32) for _ in FIELDS
    )
    for n, row in enumerate(rows):
        at = 0
        for segment, i in enumerate(row, start=1):
            size = len(pieces[i]) - 1
            here = slice(at, at + size)
            tokens[n, here], labels[n, here] = pieces[i][:-1], pieces[i][1:]
            segments[n, here], positions[n, here] = segment, np.arange(size)
            at += size
    return Packed(tokens, labels, segments, positions)


@dataclass
class PackedBatches:
    """Batches of packed rows without end, shuffled and packed anew each epoch.

    Args:
        documents: ids with BOS and EOS.
        length: T, tokens of a row.
        batch: rows of one batch, over all shares.
        seed: of the order.
        share: (number, count): this process takes rows number, ... of each batch; the batches do
            not depend on how many share them.

    Raises:
        ValueError: shares that do not divide the batch, documents that fill no batch.
    """

    documents: Sequence[Sequence[int]]
    length: int
    batch: int
    seed: int = 0
    share: tuple[int, int] = (0, 1)
    epoch: int = 0
    done: int = 0  # batches of the epoch
    _packed: tuple[int, Packed] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.batch % self.share[1]:
            raise ValueError(
                f"{self.share[1]} data ranks must divide the batch ({self.batch} rows): change one"
            )
        tokens = sum(len(document) - 1 for document in self.documents)
        if tokens < self.length * self.batch:
            raise ValueError(
                f"the corpus holds {tokens} tokens, fewer than one batch of {self.batch} x "
                f"{self.length}: give more text, or a smaller batch or length"
            )

    def rows(self) -> Packed:
        """All rows of this epoch."""
        if self._packed is None or self._packed[0] != self.epoch:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.documents))
            packed = pack([self.documents[i] for i in order], self.length)
            self._packed = self.epoch, packed
        return self._packed[1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """{"tokens", "labels", "segments", "positions"}: int64 (B / shares, T)."""
        rows = self.rows()
        if (self.done + 1) * self.batch > len(rows.tokens):
            self.epoch, self.done = self.epoch + 1, 0
            rows = self.rows()
        batch = batch_of(rows, self.done, self.batch, self.share)
        self.done += 1
        return batch

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to a position that `state` gave."""
        self.epoch, self.done = state["epoch"], state["done"]


def batch_of(
    rows: Packed, number: int, batch: int, share: tuple[int, int] = (0, 1)
) -> dict[str, Tensor]:
    """Batch `number` of these rows as tensors; rows that lack at the end are padding."""
    size = batch // share[1]
    start = number * batch + share[0] * size
    part = {}
    for name, values in zip(FIELDS, rows, strict=True):
        some = values[start : start + size].astype(np.int64)
        part[name] = torch.from_numpy(np.pad(some, ((0, size - len(some)), (0, 0))))
    return part


def in_batches(
    rows: Packed, batch: int, share: tuple[int, int] = (0, 1), device: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """All rows once, in batches on a device; `share` as in `PackedBatches`."""
    for number in range(math.ceil(len(rows.tokens) / batch)):
        part = batch_of(rows, number, batch, share)
        yield {name: value.to(device) for name, value in part.items()}


def total_loss(loss_fn: Any, params: Params, batches: Iterable[Any]) -> tuple[float, float]:
    """(sum of the loss, sum of the weight) over batches, without a gradient.

    Args:
        loss_fn: (params, batch, key) -> (mean loss, {"weight": what it is the mean over}).
    """
    total, weight, key = 0.0, 0.0, random.key(0, device=next(iter(params.values())).device)
    with torch.no_grad():
        for batch in batches:
            loss, found = loss_fn(params, batch, key)
            total, weight = total + float(loss * found["weight"]), weight + float(found["weight"])
    return total, weight
