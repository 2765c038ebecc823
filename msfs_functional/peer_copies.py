"""Gathers and sums by copies between the GPUs of one host, which take no multiprocessor.

NCCL moves data by kernels of its own: matrix products beside them have fewer multiprocessors, and
one that wants all of them takes a second turn for a few tiles. Here ranks see one another's memory
(torch's symmetric memory) and copy out of it and into it, which is work for the GPU's copy engines:

    gather    lay the shards, in the dtype of the products | all have | copy the others' shards
    sum       copy each chunk of the gradient to its rank  | all have | add up what came, in order

What is laid in the forward pass stays for the backward. A gradient travels in the dtype that it
has, and is added up in that of the sums. What is received lies in two places by turns: who comes to
the second sum knows that all are done with the first, and may send the third where that was.
"""

import functools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from msfs_functional.collectives import group_rank, group_size
from msfs_functional.transport import Collectives, Term, Whole, by_group, in_chunks, pg, places

GATHERS, SUMS = 0, 1  # channels of barriers: two streams wait apart
LAID, RECEIVED = 0, (1, 2)  # places in memory
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
        """All ranks have come here, on the stream of this channel."""
        self.handles[0].barrier(channel=channel)

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


class PeerCopies(Collectives):
    """The transport of one step.

    Args:
        wholes: one for each parameter of the model; of `out` only shape and dtype are looked at.
        device: where the memory is to be.
        sums: names of the parameters whose gradients are summed together, set by set.
    """

    def __init__(
        self, wholes: Sequence[Whole], device: torch.device, sums: Sequence[Collection[str]]
    ):
        self.memory: dict[str, Shared] = {}
        self.starts: dict[str, int] = {}  # where a parameter's chunk is laid
        self.here: dict[str, set[str]] = {}  # by group: parameters that all ranks have laid
        self.summed: Counter[str] = Counter()  # by group: sums so far
        for group, some in by_group(wholes).items():
            of = {x.name: x.chunk(0).numel() for x in some}
            starts, laid = places(list(of.values()))
            self.starts |= dict(zip(of, starts, strict=True))
            received = max(places([of[name] for name in names if name in of])[1] for names in sums)
            dtype = functools.reduce(torch.promote_types, (x.out.dtype for x in some))
            sizes = laid, received * group_size(group)
            self.memory[group], self.here[group] = shared(group, dtype, device, sizes), set()

    def gather(self, wholes: Sequence[Whole]) -> None:
        if rest := [x for x in wholes if x.way.group is None]:
            torch._foreach_copy_([x.out for x in rest], [x.shard for x in rest])
        for group, some in by_group(wholes).items():
            memory, here = self.memory[group], self.here[group]
            mine = self._laid(memory.of(memory.rank, LAID), some)
            if not here:  # all are done with the step before
                memory.barrier(GATHERS)
            if new := [i for i, x in enumerate(some) if x.name not in here]:
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

    def _laid(self, laid: Tensor, wholes: Sequence[Whole]) -> list[Tensor]:
        """A rank's chunks of these parameters, in the memory where it lays them."""
        shapes = [x.chunk(0).shape for x in wholes]
        starts = [self.starts[x.name] for x in wholes]
        pairs = zip(starts, shapes, strict=True)
        return [laid[start : start + shape.numel()].view(shape) for start, shape in pairs]

    def scatter(self, group: str, terms: Sequence[Term]) -> None:
        memory, place = self.memory[group], RECEIVED[self.summed[group] % 2]
        self.summed[group] += 1
        starts, total = places([x.out.numel() for x in terms])
        grads = in_chunks(terms, [memory.places[place].dtype] * len(terms))

        def copies(rank: int) -> tuple[list[Tensor], list[Tensor]]:
            """(where, what) of the chunks that this rank sends to that one."""
            row = memory.of(rank, place)[memory.rank * total : (memory.rank + 1) * total]
            chunks = [
                g.narrow(0, rank * term.way.each, term.way.each)
                for term, g in zip(terms, grads, strict=True)
            ]
            pairs = zip(starts, chunks, strict=True)
            return [row[start : start + x.numel()].view(x.shape) for start, x in pairs], chunks

        for rank in memory.others:
            for there, chunk in zip(*copies(rank), strict=True):
                there.copy_(chunk)
        torch._foreach_copy_(*copies(memory.rank))
        memory.barrier(SUMS)
        rows = memory.places[place][: memory.size * total].view(memory.size, total)
        added = terms[0].out.as_strided((total,), (1,))  # all of them, side by side
        torch.sum(rows, 0, dtype=added.dtype, out=added)
