"""Gathers and sums by copies between the GPUs of one host, which take no multiprocessor.

NCCL moves data by kernels of its own: matrix products beside them have fewer multiprocessors, and
one that wants all of them takes a second turn for a few tiles. Here every rank lays its shards, in
the dtype of the products, into memory that the others see (torch's symmetric memory), where they
stay for the step; others copy from there, which is work for the GPU's copy engines.

    rank 0 | lays a0, all are here | copies a1 from rank 1 |   backward: | copies a1 once more |
    rank 1 | lays a1, all are here | copies a0 from rank 0 |             | copies a0 once more |

Of a gradient each rank copies every other's chunk into that one's memory, in the dtype that it has;
each then adds up what it got, in the dtype of the sum, in the order of ranks. What is received lies
in two places by turns: who comes to the second sum knows that all are done with the first.
"""

import functools
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from msfs_functional.collectives import group_rank, group_size
from msfs_functional.transport import Collectives, Term, Whole, by_group, in_chunks, pg, places

GATHERS, SUMS = 0, 1  # channels of barriers: two streams wait apart
_kept: dict[Any, "Shared"] = {}


class Shared:
    """Memory of a group of ranks in which each sees the others' parts.

    Args:
        laid: elements of a rank's shards.
        received: elements of what a rank gets in one sum at most.
    """

    def __init__(
        self, group: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int]
    ):
        self.group, self.process_group = group, pg(group)
        self.rank, self.size = group_rank(group), group_size(group)
        # Nothing here is sent to all at once; torch would set up NVLink's multicast all the same.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.others = [(self.rank + i) % self.size for i in range(1, self.size)]
        self.laid, *self.received = (
            symmetric.empty(n, dtype=dtype, device=device) for n in (sizes[0], sizes[1], sizes[1])
        )
        self.handles: list[Any] = [
            symmetric.rendezvous(x, group)  # pyright: ignore[reportArgumentType]
            for x in (self.laid, *self.received)
        ]

    def barrier(self, channel: int) -> None:
        self.handles[0].barrier(channel=channel)

    def of(self, rank: int, number: int) -> Tensor:
        """A rank's `laid` (0) or `received` (1 and 2)."""
        x = (self.laid, *self.received)[number]
        if rank == self.rank:
            return x
        return self.handles[number].get_buffer(rank, x.shape, x.dtype)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.laid, *self.received))


def shared(group: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int]) -> Shared:
    """The memory of a group, of which there is one for models of the same sizes."""
    key = group, dtype, device, sizes
    if key not in _kept or _kept[key].process_group is not pg(group):
        _kept[key] = Shared(group, dtype, device, sizes)
    return _kept[key]


def why_not(groups: Iterable[dist.ProcessGroup], device: str) -> str | None:
    """Why the ranks of these groups cannot see one another's memory; None if they can."""
    if device != "cuda":
        return f"it is for GPUs, the mesh is of {device}"
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    for group in groups:
        hosts = {rank // on_host for rank in dist.get_process_group_ranks(group)}
        if len(hosts) > 1:
            return (
                f"ranks that share parameters are on {len(hosts)} hosts: let dp_replicate span "
                f"them, and dp_shard the GPUs of one"
            )
    return None


def forget() -> None:
    """Lets go of all this memory."""
    _kept.clear()


def shared_bytes() -> int:
    """What all this memory takes of this rank's GPU: torch.cuda.memory_allocated leaves it out."""
    return sum(memory.bytes for memory in _kept.values())


class PeerCopies(Collectives):
    """The transport of one step.

    Args:
        wholes: one for each parameter of the model; of `out` only shape and dtype are looked at.
        device: where the memory is to be.
        together: names of the parameters whose gradients are summed together, set by set.
    """

    def __init__(
        self,
        wholes: Sequence[Whole],
        device: torch.device,
        together: Sequence[Collection[str]],
    ):
        self.memory: dict[str, Shared] = {}
        self.starts: dict[str, int] = {}  # where in `laid` a parameter's chunk begins
        self.here: set[str] = set()  # parameters that all ranks have laid in this step
        self.turn = 0
        for group, some in by_group(wholes).items():
            of = {x.name: x.chunk(0).numel() for x in some}
            starts, total = places(list(of.values()))
            self.starts |= dict(zip(of, starts, strict=True))
            sets = [[of[name] for name in names if name in of] for names in together]
            received = max(places(sizes)[1] for sizes in sets) * group_size(group)
            dtype = functools.reduce(torch.promote_types, (x.out.dtype for x in some))
            self.memory[group] = shared(group, dtype, device, (total, received))

    def gather(self, wholes: Sequence[Whole]) -> None:
        for group, some in by_group(wholes).items():
            memory = self.memory[group]
            if new := [x for x in some if x.name not in self.here]:
                if not self.here:  # all are done with what they got in the step before
                    memory.barrier(GATHERS)
                laid = [self._laid(memory.laid, x)[: len(x.shard)] for x in new]
                torch._foreach_copy_(laid, [x.shard for x in new])
                memory.barrier(GATHERS)
                self.here.update(x.name for x in new)
            own = [self._laid(memory.laid, x) for x in some]
            torch._foreach_copy_([x.chunk(memory.rank) for x in some], own)
            for rank in memory.others:
                theirs = memory.of(rank, 0)
                for x in some:
                    x.chunk(rank).copy_(self._laid(theirs, x))
        if rest := [x for x in wholes if x.way.group is None]:
            torch._foreach_copy_([x.out for x in rest], [x.shard for x in rest])

    def _laid(self, laid: Tensor, x: Whole) -> Tensor:
        shape, start = x.chunk(0).shape, self.starts[x.name]
        return laid[start : start + shape.numel()].view(shape)

    def scatter(self, group: str, terms: Sequence[Term]) -> None:
        memory = self.memory[group]
        into = in_chunks(terms, [memory.laid.dtype] * len(terms))
        starts, total = places([x.out.numel() for x in terms])
        number = 1 + self.turn % 2
        self.turn += 1
        for rank in (*memory.others, memory.rank):
            row = memory.of(rank, number)[memory.rank * total :]
            for term, x, start in zip(terms, into, starts, strict=True):
                chunk = x.narrow(0, rank * term.way.each, term.way.each)
                row[start : start + chunk.numel()].view(chunk.shape).copy_(chunk)
        memory.barrier(SUMS)
        rows = memory.received[number - 1][: memory.size * total].view(memory.size, total)
        added = terms[0].out.as_strided((total,), (1,))  # all of them, side by side
        torch.sum(rows, 0, dtype=added.dtype, out=added)
