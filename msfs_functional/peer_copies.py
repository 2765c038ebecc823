"""Gathers and sums by copies between the GPUs of one host, which take no multiprocessor.

NCCL moves data by kernels of its own: matrix products beside them have fewer multiprocessors, and
one that wants all of them takes a second turn for a few tiles. Here ranks see one another's memory
(torch's symmetric memory) and copy out of it and into it, which is work for the GPU's copy engines:

    gather    lay the shards, in the dtype of the products | all have | copy the others' shards
    sum       copy each chunk of the gradient to its rank  | all have | add up what came, in order

What blocks lay in the forward pass stays for the backward. What stands outside of them is gathered
once, first of all, and lies where the last blocks' shards will:

    laid      | block 0 | block 1 | ...   | block 22 | block 23 |
                                               | outside, before |

A gradient travels in the dtype that it has, and is added up in that of the sums. What is received
lies in two places by turns, each as large as a block's sum: who comes to the second sum knows that
all are done with the first, and may send the third where that was. Larger sums come in parts.
"""

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from msfs_functional.collectives import group_rank, group_size
from msfs_functional.transport import Collectives, Term, Whole, by_group, in_chunks, pg, places

GATHERS, SUMS = 0, 1  # channels of barriers: two streams wait apart
LAID, RECEIVED = 0, (1, 2)  # places in memory
SMALL = 2**24  # elements of a whole gradient: up to so many are summed at once
_kept: dict[Any, "Shared"] = {}


class Shared:
    """Memory of a group's ranks in which each sees the others': a place for what is laid and two
    for what is received.

    Args:
        sizes: elements of a rank's shards, and of what it gets in one sum at most.
    """

    def __init__(
        self, group: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int]
    ):
        self.process_group = pg(group)
        timeout = self.process_group._get_backend(device).options._timeout
        self.timeout = math.ceil(timeout.total_seconds() * 1000)  # [ms]
        self.rank, self.size = group_rank(group), group_size(group)
        self.others = [(self.rank + i) % self.size for i in range(1, self.size)]
        # Nothing here is sent to all at once; torch would set up NVLink's multicast all the same.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.places, self.handles = [], []
        try:
            for n in (sizes[0], sizes[1], sizes[1]):
                self.places.append(symmetric.empty(n, dtype=dtype, device=device))
                handle: Any = symmetric.rendezvous(self.places[-1], group)  # pyright: ignore
                self.handles.append(handle)
        except RuntimeError as error:
            raise RuntimeError(
                f"GPUs of this host cannot see one another's memory ({error}): use "
                f'transport="collectives"'
            ) from error

    def barrier(self, channel: int) -> None:
        """All ranks have come here, on the stream of this channel.

        A GPU whose peers do not come in the time of the process group stops with an error, as the
        collectives' waits do.
        """
        self.handles[0].barrier(channel=channel, timeout_ms=self.timeout)

    def of(self, rank: int, place: int) -> Tensor:
        """A rank's memory."""
        x = self.places[place]
        return x if rank == self.rank else self.handles[place].get_buffer(rank, x.shape, x.dtype)


def shared(group: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int]) -> Shared:
    """The memory of a group, of which there is one for models of the same sizes."""
    key = group, dtype, device, sizes
    if key not in _kept or _kept[key].process_group is not pg(group):
        _kept[key] = Shared(group, dtype, device, sizes)
    return _kept[key]


def forget() -> None:
    """Lets go of all this memory."""
    _kept.clear()


def shared_bytes() -> int:
    """What all this memory takes of this rank's GPU: torch.cuda.memory_allocated leaves it out."""
    return sum(x.nbytes for memory in _kept.values() for x in memory.places)


def why_not(groups: Iterable[str], device: str) -> str | None:
    """Why ranks of these groups cannot see one another's memory; None if they can."""
    if device != "cuda":
        return f"copies are for GPUs, the mesh is of {device}"
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return "LOCAL_WORLD_SIZE, which torchrun sets, does not say how many ranks are on a host"
    on_host = int(os.environ["LOCAL_WORLD_SIZE"])
    for group in groups:
        ranks = dist.get_process_group_ranks(pg(group))
        if hosts := len({rank // on_host for rank in ranks}) - 1:
            return (
                f"ranks that share parameters are on {hosts + 1} hosts: let dp_replicate span "
                f"them, and dp_shard the GPUs of one"
            )
        gpus = [rank % on_host for rank in ranks]
        apart = [(a, b) for a in gpus for b in gpus if a != b and not sees(a, b)]
        if apart:
            return f"GPU {apart[0][0]} cannot reach the memory of GPU {apart[0][1]}"
    return None


def sees(a: int, b: int) -> bool:
    return torch.cuda.can_device_access_peer(a, b)


class Sent(NamedTuple):
    """What a rank's part of a sum comes from."""

    out: Tensor
    chunks: Sequence[Tensor]  # of this rank's gradient, for each rank one as large as `out`


class PeerCopies(Collectives):
    """The transport of one step.

    Args:
        wholes: one for each parameter of the model; of `out` only shape and dtype are looked at.
        device: where the memory is to be.
        outside: sets of names, those outside of blocks whose gradients are summed together.
        blocks: the same of blocks, in the order in which they are gathered.
    """

    def __init__(
        self,
        wholes: Sequence[Whole],
        device: torch.device,
        outside: Sequence[Collection[str]],
        blocks: Sequence[Collection[str]],
    ):
        self.memory: dict[str, Shared] = {}
        self.starts: dict[str, int] = {}  # where a parameter's chunk is laid
        self.here: dict[str, set[str]] = {}  # by group: parameters that all ranks have laid
        self.rivals: dict[str, tuple[set[str], set[str]]] = {}  # the ones lie where the others do
        self.summed: Counter[str] = Counter()  # by group: sums so far
        for group, some in by_group(wholes).items():
            of = {x.name: x.chunk(0).numel() for x in some}
            size, row = group_size(group), max(x.chunk(0)[0].numel() for x in some)
            small = places([max(row, SMALL // size)])[1]
            sums, larger = (
                max((places([of[n] for n in names if n in of])[1] for names in sets), default=0)
                for sets in (blocks, outside)
            )
            received = max(sums, min(larger, small))
            dtype = functools.reduce(torch.promote_types, (x.out.dtype for x in some))
            laid = self._place(group, of, outside, blocks)
            self.memory[group] = shared(group, dtype, device, (laid, received * size))
            self.here[group] = set()

    def _place(
        self,
        group: str,
        sizes: Mapping[str, int],
        outside: Sequence[Collection[str]],
        blocks: Sequence[Collection[str]],
    ) -> int:
        """Says where chunks of these sizes are laid, and how much memory they take."""
        first, then = (
            [name for names in sets for name in names if name in sizes]
            for sets in (outside, blocks)
        )
        starts, total = places([sizes[name] for name in then])
        before, more = places([sizes[name] for name in first])
        begin = max(total - more, 0)
        self.starts |= dict(zip(then, starts, strict=True))
        self.starts |= {name: begin + start for name, start in zip(first, before, strict=True)}
        last = {name for name in then if self.starts[name] + sizes[name] > begin}
        self.rivals[group] = set(first), last
        return max(total, more)

    def gather(self, wholes: Sequence[Whole]) -> None:
        if rest := [x for x in wholes if x.way.group is None]:
            torch._foreach_copy_([x.out for x in rest], [x.shard for x in rest])
        for group, some in by_group(wholes).items():
            memory, here = self.memory[group], self.here[group]
            mine = self._laid(memory.of(memory.rank, LAID), some)
            new = [i for i, x in enumerate(some) if x.name not in here]
            if self._make_room(group, {some[i].name for i in new}):
                memory.barrier(GATHERS)  # all have read what lay there
            if new:
                shards = [some[i].shard for i in new]
                into = [mine[i][: len(x)] for i, x in zip(new, shards, strict=True)]
                torch._foreach_copy_(into, shards)
                memory.barrier(GATHERS)
                here.update(some[i].name for i in new)
            torch._foreach_copy_([x.chunk(memory.rank) for x in some], mine)
            for rank in memory.others:
                theirs = self._laid(memory.of(rank, LAID), some)
                for x, chunk in zip(some, theirs, strict=True):
                    x.chunk(rank).copy_(chunk)

    def _make_room(self, group: str, names: set[str]) -> bool:
        """Forgets what lies where these are to be laid; whether something may have lain there."""
        here = self.here[group]
        before = bool(names) and not here  # in the step before
        for some, others in itertools.permutations(self.rivals[group]):
            if names & some and here & others:
                here -= others
                before = True
        return before

    def _laid(self, laid: Tensor, wholes: Sequence[Whole]) -> list[Tensor]:
        """A rank's chunks of these parameters, in the memory where it lays them."""
        shapes = [x.chunk(0).shape for x in wholes]
        starts = [self.starts[x.name] for x in wholes]
        pairs = zip(starts, shapes, strict=True)
        return [laid[start : start + shape.numel()].view(shape) for start, shape in pairs]

    def scatter(self, group: str, terms: Sequence[Term]) -> None:
        memory = self.memory[group]
        grads = in_chunks(terms, [memory.places[RECEIVED[0]].dtype] * len(terms))
        sent = [
            Sent(term.out, g.split(term.way.each)) for term, g in zip(terms, grads, strict=True)
        ]
        room = memory.places[RECEIVED[0]].numel() // memory.size
        for some in in_parts(sent, room):
            place = RECEIVED[self.summed[group] % 2]
            self.summed[group] += 1
            self._exchange(memory, place, some)

    def _exchange(self, memory: Shared, place: int, sent: Sequence[Sent]) -> None:
        """Chunks to their ranks, and what came added up; `out` lie side by side."""
        starts, total = places([x.out.numel() for x in sent])

        def copies(rank: int) -> tuple[list[Tensor], list[Tensor]]:
            """(where, what) of the chunks that this rank sends to that one."""
            row = memory.of(rank, place)[memory.rank * total : (memory.rank + 1) * total]
            chunks = [x.chunks[rank] for x in sent]
            pairs = zip(starts, chunks, strict=True)
            return [row[start : start + x.numel()].view(x.shape) for start, x in pairs], chunks

        for rank in memory.others:
            for there, chunk in zip(*copies(rank), strict=True):
                there.copy_(chunk)
        torch._foreach_copy_(*copies(memory.rank))
        memory.barrier(SUMS)
        rows = memory.places[place][: memory.size * total].view(memory.size, total)
        used = starts[-1] + sent[-1].out.numel()  # beyond it the next part may begin
        added = sent[0].out.as_strided((used,), (1,))  # all of them, side by side
        torch.sum(rows[:, :used], 0, dtype=added.dtype, out=added)


def in_parts(sent: Sequence[Sent], room: int) -> Iterator[list[Sent]]:
    """The same in order, in lists that take no more than so many elements of each rank.

    What alone takes more is cut by rows, of which each fits.
    """
    part: list[Sent] = []
    for x in sent:
        if part and places([y.out.numel() for y in [*part, x]])[1] > room:
            yield part
            part = []
        if x.out.numel() <= room:
            part.append(x)
            continue
        most = room // x.out[0].numel()
        rows = math.ceil(len(x.out) / math.ceil(len(x.out) / most))
        cut = [x.out.split(rows), *(chunk.split(rows) for chunk in x.chunks)]
        yield from ([Sent(out, chunks)] for out, *chunks in zip(*cut, strict=True))
    if part:
        yield part
