"""Batches of token pairs: few shapes, little padding, the same again after every restart.

Pairs of like lengths share a bucket. A bucket has one shape, B rows of S source and T target ids,
with B (S + T) at most the token budget, so that a compiled step sees as many shapes as there are
buckets and costs the same on each.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from msfs_functional.tokenizer import PAD

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Ragged:
    """Lists of ids end to end: list i is `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray, width: int) -> np.ndarray:
        """int32 (len(rows) + 1, width), PAD after the end of each list; the last row is all PAD."""
        columns = np.arange(width)
        inside = columns < self.lengths[rows][:, None]
        places = np.where(inside, self.offsets[rows][:, None] + columns, 0)
        out = np.full((len(rows) + 1, width), PAD, np.int32)
        out[:-1] = np.where(inside, self.values[places], PAD)
        return out


def _ceil_to(value, multiple: int):
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class _Plan:
    """How rows become batches: the budget and the rounding, for one rank."""

    tokens: int
    row_multiple: int
    length_multiple: int
    world: int

    def rows_a_batch(self, width):
        """B for a padded S + T of `width`, at least one `row_multiple`."""
        rows = self.tokens // width // self.row_multiple * self.row_multiple
        return np.maximum(rows, self.row_multiple)

    def cost(self, count, source, target):
        """Padded tokens of `count` rows at widths (source, target), last batches filled up."""
        width = _ceil_to(source, self.length_multiple) + _ceil_to(target, self.length_multiple)
        rows = self.rows_a_batch(width) * self.world
        return _ceil_to(count, rows) * width


def _best_cut(rows: np.ndarray, lengths: np.ndarray, plan: _Plan):
    """(tokens saved, two parts) of the best cut of one bucket by source or by target length."""
    source, target = lengths[rows].T
    whole = plan.cost(len(rows), source.max(), target.max())
    best = (0, rows, rows[:0])
    for axis in (0, 1):
        order = np.argsort(lengths[rows, axis], kind="stable")
        sorted_rows = rows[order]
        along, other = lengths[sorted_rows, axis], lengths[sorted_rows, 1 - axis]
        cuts = np.flatnonzero(np.diff(along)) + 1  # a cut at c: rows [:c] and [c:]
        if not len(cuts):
            continue
        low = plan.cost(cuts, along[cuts - 1], np.maximum.accumulate(other)[cuts - 1])
        high_other = np.maximum.accumulate(other[::-1])[::-1][cuts]
        high = plan.cost(len(rows) - cuts, along[-1], high_other)
        saved = whole - low - high
        i = int(saved.argmax())
        if saved[i] > best[0]:
            best = (int(saved[i]), sorted_rows[: cuts[i]], sorted_rows[cuts[i] :])
    return best


def _shape(rows: np.ndarray, lengths: np.ndarray, plan: _Plan) -> tuple[int, int]:
    s, t = (int(_ceil_to(n, plan.length_multiple)) for n in lengths[rows].max(axis=0))
    return s, t


def _buckets(lengths: np.ndarray, most: int, plan: _Plan) -> list[np.ndarray]:
    """Rows of each bucket: cut where it saves most padding, again and again, up to `most`."""
    parts = [np.arange(len(lengths))]
    cuts = [_best_cut(parts[0], lengths, plan)]
    while len(parts) < most:
        i = max(range(len(parts)), key=lambda i: cuts[i][0])
        saved, low, high = cuts[i]
        if saved <= 0:
            break
        parts[i : i + 1] = [low, high]
        cuts[i : i + 1] = [_best_cut(low, lengths, plan), _best_cut(high, lengths, plan)]
    shapes: dict[tuple[int, int], list[np.ndarray]] = {}
    for part in parts:  # rounding can give two parts one shape
        shapes.setdefault(_shape(part, lengths, plan), []).append(part)
    return [np.sort(np.concatenate(shapes[shape])) for shape in sorted(shapes)]


@dataclass(frozen=True)
class _Bucket:
    """Padded ids of its rows, with one row of PAD of length 0 at the end to fill up with."""

    rows: int
    batch_size: int
    arrays: dict[str, np.ndarray]


class TokenBatches:
    """Batches without end over pairs of id lists, one epoch after the other; iterate with `next`.

    A batch is {"source" Int64[B, S], "source_lengths" Int64[B], "target" Int64[B, T + 1],
    "target_lengths" Int64[B]} on the CPU. The decoder reads target[:, :-1] and predicts
    target[:, 1:]; target_lengths counts those T-side positions (ids of the target less one).
    Rows that fill up a bucket's last batch are PAD and have length 0.

    An epoch gives each row once. Its order depends on (seed, epoch) alone, so `state()` is a few
    numbers and `restore` resumes in the middle of an epoch with the very next batch. Over several
    ranks each step takes its rows from one bucket: all ranks have the same shape at every step,
    the same number of steps, and together the rows that one rank with `world` times the rows has.

    Args:
        source, target: id lists; the target's start with BOS and end with EOS.
        tokens: budget of padded tokens, source and target together, of a batch on one rank.
        max_length: most ids on either side, EOS among them, BOS not; longer pairs are dropped and
            counted in `.dropped`. None keeps all.
        buckets: most shapes to have.
        row_multiple: B is a multiple of it (of the gradient accumulation, for example).
        length_multiple: S and T are multiples of it (8 suits GPUs).
        seed: of the order; independent of the model's.
        shuffle: False gives bucket after bucket, rows in their given order.
        epochs: number of epochs after which iteration ends, to start over with the next `for`;
            None never ends.
        rank, world: this process and how many there are.

    Attributes:
        shapes: [(B, S, T)] of the buckets. steps_per_epoch: batches of a rank in an epoch.
        dropped: pairs longer than max_length. padding: share of an epoch's ids that is padding.
        epoch, step: position, steps counted within the epoch.
    """

    def __init__(
        self,
        source: Ragged,
        target: Ragged,
        *,
        tokens: int,
        max_length: int | None = None,
        buckets: int = 8,
        row_multiple: int = 1,
        length_multiple: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        positive = dict(
            tokens=tokens, buckets=buckets, row_multiple=row_multiple,
            length_multiple=length_multiple, world=world, max_length=max_length, epochs=epochs,
        )  # fmt: skip
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if seed < 0:
            raise ValueError(f"seed ({seed}) must be at least 0")
        if not 0 <= rank < world:
            raise ValueError(f"rank ({rank}) must lie in [0, world = {world})")
        if len(source.lengths) != len(target.lengths):
            raise ValueError(
                f"{len(source.lengths)} sources and {len(target.lengths)} targets: pairs need both"
            )
        lengths = np.stack([source.lengths, target.lengths - 1], axis=1)
        keep = np.arange(len(lengths))
        if max_length is not None:
            keep = np.flatnonzero(lengths.max(axis=1, initial=0) <= max_length)
        if not len(keep):
            raise ValueError(
                f"none of {len(lengths)} pairs has at most max_length ({max_length}) ids on both "
                "sides: raise it or bring more data"
            )
        self.dropped = len(lengths) - len(keep)
        plan = _Plan(tokens, row_multiple, length_multiple, world)
        lengths_kept = lengths[keep]
        self._buckets: list[_Bucket] = []
        self.shapes: list[tuple[int, int, int]] = []
        for rows in _buckets(lengths_kept, buckets, plan):
            s, t = _shape(rows, lengths_kept, plan)
            if row_multiple * (s + t) > tokens:
                raise ValueError(
                    f"a batch of {row_multiple} x ({s} + {t}) ids exceeds tokens ({tokens}): raise "
                    "tokens or lower max_length"
                )
            lengths_of = np.append(lengths_kept[rows], [[0, 0]], axis=0)
            size = int(plan.rows_a_batch(s + t))
            self.shapes.append((size, s, t))
            self._buckets.append(
                _Bucket(
                    rows=len(rows),
                    batch_size=size,
                    arrays={
                        "source": source.padded(keep[rows], s),
                        "source_lengths": lengths_of[:, 0],
                        "target": target.padded(keep[rows], t + 1),
                        "target_lengths": lengths_of[:, 1],
                    },
                )
            )
        self._steps = np.concatenate(
            [
                np.full(-(-bucket.rows // (bucket.batch_size * world)), i)
                for i, bucket in enumerate(self._buckets)
            ]
        )
        self.steps_per_epoch = len(self._steps)
        padded = sum(b * (s + t) for b, s, t in (self.shapes[i] for i in self._steps)) * world
        self.padding = 1 - int(lengths_kept.sum()) / padded
        self._seed, self._shuffle, self._epochs = seed, shuffle, epochs
        self._rank, self._world = rank, world
        self.epoch = self.step = 0
        self._open_epoch = -1

    def _order(self, stream: int, count: int) -> np.ndarray:
        """A permutation that (seed, epoch, stream) fix, from raw Philox words."""
        if not self._shuffle:
            return np.arange(count)
        philox = np.random.Philox(key=[self._seed, 0], counter=[0, 0, self.epoch, stream])
        return np.argsort(philox.random_raw(count), kind="stable")

    def _open(self) -> None:
        """Draws the order of rows in each bucket and of the batches of this epoch."""
        self._rows = []
        for i, bucket in enumerate(self._buckets):
            size = bucket.batch_size * self._world
            rows = np.full(-(-bucket.rows // size) * size, bucket.rows)  # the filling row
            rows[: bucket.rows] = self._order(i + 1, bucket.rows)
            # Rank r takes every world-th row: the filling spreads evenly over the ranks.
            self._rows.append(rows[self._rank :: self._world])
        self._sequence = self._steps[self._order(0, self.steps_per_epoch)]
        earlier = np.zeros(len(self._buckets), np.int64)
        self._place = np.empty(self.steps_per_epoch, np.int64)  # which batch of its bucket
        for i, bucket in enumerate(self._sequence):
            self._place[i] = earlier[bucket]
            earlier[bucket] += 1
        self._open_epoch = self.epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._epochs is not None and self._position() >= (self._epochs, 0):
            self.epoch = self.step = 0
        return self

    def _position(self) -> tuple[int, int]:
        if self.step == self.steps_per_epoch:
            return self.epoch + 1, 0
        return self.epoch, self.step

    def __next__(self) -> Batch:
        self.epoch, self.step = self._position()
        if self._epochs is not None and self.epoch >= self._epochs:
            raise StopIteration
        if self._open_epoch != self.epoch:
            self._open()
        i = self._sequence[self.step]
        bucket, start = self._buckets[i], self._place[self.step] * self._buckets[i].batch_size
        rows = self._rows[i][start : start + bucket.batch_size]
        self.step += 1
        # NumPy gathers on this thread alone: it never waits for cores that the step uses.
        return {
            name: torch.from_numpy(array[rows].astype(np.int64))
            for name, array in bucket.arrays.items()
        }

    def state(self) -> dict[str, int]:
        """Position as JSON: what `restore` needs to go on with the next batch."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seed": self._seed,
            "pairs": sum(bucket.rows for bucket in self._buckets),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Goes to a position that `state` gave.

        Raises:
            ValueError: the state comes from other data, another seed, budget or world.
        """
        own = self.state()
        for name in ("seed", "pairs", "steps_per_epoch"):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"the saved position has {name} = {state.get(name)}, here it is {own[name]}: "
                    "resume with the same data, seed, token budget and number of ranks"
                )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])


class Resumable(Protocol):
    """Batches that know where they are: `TokenBatches`, `packing.PackedBatches` and their like."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Prefetch:
    """The same batches, made by a background thread and handed out on `device`.

    On CUDA the thread puts them in pinned memory and the copy does not block the step. `state()`
    is the position after the last batch handed out, whatever the thread has made ahead of it.
    """

    def __init__(self, batches: Resumable, device: torch.device | str, *, depth: int = 4):
        if depth < 1:
            raise ValueError(f"depth ({depth}) must be at least 1 batch")
        self._batches, self._device, self._depth = batches, torch.device(device), depth
        self._thread = None
        self._state = batches.state()

    def _work(self, made: queue.Queue, stop: threading.Event) -> None:
        def put(item) -> bool:
            while not stop.is_set():
                try:
                    made.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    pass
            return False

        try:
            for batch in self._batches:
                if self._device.type == "cuda":
                    batch = {name: value.pin_memory() for name, value in batch.items()}
                if not put((batch, self._batches.state())):
                    return
            put((None, None))
        except Exception as error:
            put((error, None))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._made: queue.Queue = queue.Queue(self._depth)
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._work, args=(self._made, self._stop), daemon=True
            )
            self._thread.start()
        batch, state = self._made.get()
        if isinstance(batch, Exception):
            self.close()
            raise batch
        if batch is None:
            self.close()
            raise StopIteration
        self._state = state
        return {name: value.to(self._device, non_blocking=True) for name, value in batch.items()}

    def state(self) -> dict[str, Any]:
        """Position after the last batch handed out."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` gave; what was made ahead is thrown away."""
        self.close()
        self._batches.restore(state)
        self._state = state

    def close(self) -> None:
        """Stops the thread; the next batch starts it again after the last one handed out."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._batches.restore(self._state)
