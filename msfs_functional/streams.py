"""Batches of packed rows from documents that stream: each process reads its own, and can go on.

    stream     d0 d1 d2 d3 d4 d5 ...
    lane 0     d0    d2    d4    ...   one of two lanes; where the files of a dataset are a multiple
    lane 1        d1    d3    d5 ...   of the lanes, each lane reads files of its own instead
    batch      rows of lane 0, rows of lane 1

A process takes the lanes of its share. The batches depend on the number of lanes, not on that of
processes: one that divides the lanes goes on exactly where another number stopped.

A lane reads a chunk of documents, tokenises and packs it (`packing.pack`), and hands its rows out
in an order drawn by the seed. Its place is where the chunk begins in the stream (the state that
`datasets` gives) and how many rows of it are out: a few numbers, after which a restored lane reads
the chunk again and goes on.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msfs_functional.documents import stream_errors
from msfs_functional.packing import FIELDS, Packed, pack

if TYPE_CHECKING:
    from datasets import IterableDataset

EncodeFn = Callable[[list[str]], Sequence[Sequence[int]]]  # documents -> ids with BOS and EOS
CHUNK = 256  # documents
ROWS = 8  # that the documents of a chunk fill at least, so that the last one wastes little


class Lane:
    """Rows of one lane, without end: the stream begins anew when it is through.

    Args: as `StreamedBatches`, and which of how many lanes it is.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        stream: "IterableDataset",
        encode_fn: EncodeFn,
        length: int,
        seed: int,
        chunk: int,
        field: str,
        skip_fn: Callable[[str], bool],
    ):
        from datasets.distributed import split_dataset_by_node  # takes seconds to import

        self.number, self.lanes, self.encode_fn, self.length = number, lanes, encode_fn, length
        self.seed, self.chunk, self.field, self.skip_fn = seed, chunk, field, skip_fn
        self.stream = split_dataset_by_node(stream, number, lanes)
        self.start = copy.deepcopy(self.stream.state_dict())
        self.restore(self._beginning(0))

    def _beginning(self, epoch: int) -> dict[str, Any]:
        """The place before the first document; `seen` are the epoch's tokens before the chunk."""
        return {"epoch": epoch, "chunk": 0, "taken": 0, "seen": 0, "source": self.start}

    def restore(self, place: dict[str, Any]) -> None:
        """Goes to where the lane's `place` was."""
        self.place: dict[str, Any] = copy.deepcopy(place)
        self.stream.load_state_dict(copy.deepcopy(place["source"]))
        self.documents: Iterator[Any] | None = None
        self.rows: Packed | None = None
        self.tokens, self.following, self.last = 0, None, False  # of the chunk

    def take(self, number: int) -> list[Packed]:
        """The next `number` rows, in parts."""
        parts: list[Packed] = []
        while number:
            rows = self.read()
            start = self.place["taken"]
            part = Packed(*(values[start : start + number] for values in rows))
            size = len(part.tokens)
            parts += [part] * bool(size)
            number -= size
            self.place["taken"] += size
            if self.place["taken"] == len(rows.tokens):
                self._go_on()
        return parts

    def read(self) -> Packed:
        """Rows of the chunk at the lane's place."""
        if self.rows is not None:
            return self.rows
        if self.documents is None:
            self.documents = iter(self.stream)
        ids: list[Sequence[int]] = []
        self.tokens, self.last = 0, False
        while not self.last and (self.tokens < ROWS * self.length or len(ids) < self.chunk):
            with stream_errors("the stream"):
                records = list(itertools.islice(self.documents, self.chunk))
            self.last = len(records) < self.chunk
            texts = [record[self.field] for record in records]
            if wrong := next((text for text in texts if not isinstance(text, str)), None):
                raise ValueError(f"column {self.field!r} holds {wrong!r}, not text: name another")
            new = self.encode_fn(
                [text for text in texts if text.strip() and not self.skip_fn(text)]
            )
            self.tokens += sum(len(document) - 1 for document in new)
            ids += new
        self.following, seen = self.stream.state_dict(), self.place["seen"] + self.tokens
        if self.last and seen < self.length:
            raise ValueError(
                f"lane {self.number} of {self.lanes} holds {seen} tokens, fewer than one sequence "
                f"of {self.length}: give more text, fewer lanes or a smaller length"
            )
        rows = pack(ids, self.length)
        key = (self.seed, self.number, self.place["epoch"], self.place["chunk"])
        order = np.random.default_rng(key).permutation(len(rows.tokens))
        self.rows = Packed(*(values[order] for values in rows))
        return self.rows

    def _go_on(self) -> None:
        """To the chunk that follows."""
        self.rows, seen = None, self.place["seen"] + self.tokens
        if not self.last:
            chunk = self.place["chunk"] + 1
            self.place |= {"chunk": chunk, "taken": 0, "seen": seen, "source": self.following}
            return
        self.restore(self._beginning(self.place["epoch"] + 1))


class StreamedBatches:
    """Batches like those of `packing.PackedBatches`, from a stream; see the top of this module.

    Args:
        stream: what `documents.open_stream` gives.
        encode_fn: documents -> ids with BOS and EOS.
        length: T, tokens of a row.
        batch: rows of one batch, over all shares.
        share: (number, count): this process makes the rows of its part of the lanes.
        lanes: a multiple of the shares and a divisor of the batch; None: one a share.
        chunk: documents that a lane packs together, more where these fill few rows.
        field: the column of texts.
        skip_fn: documents to leave out (those of validation).

    Raises:
        ValueError: lanes that the shares do not divide, or that do not divide the batch; while
            reading, a lane with less text than one row.
    """

    def __init__(
        self,
        stream: "IterableDataset",
        encode_fn: EncodeFn,
        length: int,
        batch: int,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        *,
        lanes: int | None = None,
        chunk: int = CHUNK,
        field: str = "text",
        skip_fn: Callable[[str], bool] = lambda text: False,
    ):
        lanes = share[1] if lanes is None else lanes
        if lanes < 1 or lanes % share[1] or batch % lanes:
            raise ValueError(
                f"lanes ({lanes}) must be a multiple of the data ranks ({share[1]}) and divide the "
                f"batch ({batch} rows): change one"
            )
        own = lanes // share[1]
        self.rows, self.count = batch // lanes, lanes
        self.lanes = [
            Lane(number, lanes, stream, encode_fn, length, seed, chunk, field, skip_fn)
            for number in range(share[0] * own, (share[0] + 1) * own)
        ]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """{"tokens", "labels", "segments", "positions"}: int64 (B / shares, T)."""
        parts = [part for lane in self.lanes for part in lane.take(self.rows)]
        whole = (np.concatenate(values).astype(np.int64) for values in zip(*parts, strict=True))
        return {name: torch.from_numpy(x) for name, x in zip(FIELDS, whole, strict=True)}

    def check(self) -> None:
        """Reads what the next rows come from: what is wrong with it is raised here already."""
        for lane in self.lanes:
            lane.read()

    def state(self) -> dict[str, Any]:
        """Where this process's lanes are; those of all processes, merged, are the whole place."""
        places = {f"lane {lane.number}": copy.deepcopy(lane.place) for lane in self.lanes}
        return {"lanes": self.count, **places}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place: what `state` gave on each process, merged.

        Raises:
            ValueError: it has another number of lanes.
        """
        if state["lanes"] != self.count:
            raise ValueError(
                f"the place is one of {state['lanes']} lanes, not of {self.count}: go on with "
                f"--data.lanes {state['lanes']}"
            )
        for lane in self.lanes:
            lane.restore(state[f"lane {lane.number}"])
