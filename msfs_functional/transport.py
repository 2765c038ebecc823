"""How parts travel between ranks in an overlapped step: shards out, gradients back.

`overlap` says when a unit's parameters are made whole and its gradients are summed; a transport
says by what. `Collectives` are those of the process groups (NCCL, gloo); `peer_copies` has copies
between the GPUs of one host.

    gather    shard (fp32) -> cast (bf16) -> every rank's parts side by side: the whole parameter
    sum       gradient of the whole (bf16) -> cast (fp32) -> summed over ranks, each keeps its part
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from msfs_functional.collectives import group_rank, group_size

ALIGN = 128  # elements: parts begin where vectorised memory access wants them to
Steps = tuple[tuple[str, int, int, str], ...]  # collectives as (kind, dim, size, group), in order


class Way(NamedTuple):
    """How one parameter becomes whole and how its gradient comes back.

    A shard is a chunk, along `dim`, of what the group's ranks hold together; None: it is whole.
    """

    group: str | None
    dim: int
    size: int  # of the whole along dim
    parts: int
    rank: int
    sums: tuple[str, ...]  # groups over which gradients of shards are added up

    @property
    def each(self) -> int:
        """Elements along dim of every chunk but the last ones."""
        return -(-self.size // self.parts)

    def padded(self, local: Tensor) -> tuple[int, ...]:
        """The shape, `dim` first, of the whole with all chunks of one size."""
        rest = list(local.shape)
        first = rest.pop(self.dim) if rest else 1
        return (self.each * self.parts if self.group else first, *rest)

    def part(self, local: Tensor) -> tuple[int, ...]:
        """The shape, `dim` first, of a chunk."""
        return (self.each, *self.padded(local)[1:]) if self.group else tuple(local.shape)


def way(steps: Steps) -> Way | None:
    """The way that these steps are; None where more than one axis cuts the parameter."""
    gathers = [step for step in steps if step[0] == "all_gather"]
    sums = tuple(group for kind, _, _, group in steps if kind == "pvary")
    if len(gathers) > 1:
        return None
    if not gathers:
        return Way(None, 0, 0, 1, 0, sums)
    [(_, dim, size, group)] = gathers
    return Way(group, dim, size, group_size(group), group_rank(group), sums)


class Whole(NamedTuple):
    """A parameter that is to be gathered."""

    name: str
    out: Tensor  # what it becomes, `dim` first, chunks of one size
    shard: Tensor  # `dim` first
    way: Way

    def chunk(self, rank: int) -> Tensor:
        return self.out.narrow(0, rank * self.way.each, self.way.each)

    @property
    def own(self) -> Tensor:
        """Where the shard goes."""
        here = self.chunk(self.way.rank) if self.way.group else self.out
        return here.narrow(0, 0, len(self.shard)) if self.way.group else here


class Term(NamedTuple):
    """A gradient that is to be summed."""

    out: Tensor  # what becomes of it on this rank, `way.part`; those of a group lie `side_by_side`
    grad: Tensor | None  # of the whole parameter, `dim` first; None: zero
    shape: tuple[int, ...]  # of the whole, chunks of one size
    way: Way


class Collectives:
    """By the collectives of the process groups."""

    def gather(self, wholes: Sequence[Whole]) -> None:
        torch._foreach_copy_([x.own for x in wholes], [x.shard for x in wholes])
        for group, some in by_group(wholes).items():
            outs, ins = [x.out for x in some], [x.chunk(x.way.rank) for x in some]
            pg(group).allgather_into_tensor_coalesced(outs, ins).wait()

    def sum(self, terms: Sequence[Term]) -> None:
        whole = [x for x in terms if x.way.group is None]
        if whole:
            grads = [torch.zeros_like(x.out) if x.grad is None else x.grad for x in whole]
            torch._foreach_copy_([x.out for x in whole], grads)
        for group, some in by_group(terms).items():
            self.scatter(group, some)
        sums: dict[str, list[Tensor]] = {}
        for term in terms:
            for group in term.way.sums:
                sums.setdefault(group, []).append(term.out)
        for group, tensors in sums.items():
            options = dist.AllreduceCoalescedOptions()
            pg(group).allreduce_coalesced(tensors, options).wait()

    def scatter(self, group: str, terms: Sequence[Term]) -> None:
        into = in_chunks(terms, [x.out.dtype for x in terms])
        pg(group).reduce_scatter_tensor_coalesced([x.out for x in terms], into).wait()


def side_by_side(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Empty tensors one after another in one piece of memory, as `places` says."""
    starts, total = places([math.prod(shape) for shape in shapes])
    piece = torch.empty(total, dtype=dtype, device=device)
    return [
        piece[start : start + math.prod(shape)].view(shape)
        for start, shape in zip(starts, shapes, strict=True)
    ]


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of so many elements begins in one piece of memory, and the size of that."""
    *starts, total = itertools.accumulate((math.ceil(n / ALIGN) * ALIGN for n in sizes), initial=0)
    return starts, total


def in_chunks(terms: Sequence[Term], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Gradients as contiguous tensors of equal chunks; those that are so already, as they are."""
    found, copies = [], []
    for (out, grad, shape, way), dtype in zip(terms, dtypes, strict=True):
        x = grad
        if x is None:
            x = torch.zeros(shape, dtype=dtype, device=out.device)
        elif x.dtype != dtype or x.shape != shape or not x.is_contiguous():
            make = torch.empty if shape[0] == way.size else torch.zeros
            x = make(shape, dtype=dtype, device=out.device)
            own = x.narrow(0, 0, way.size)
            assert grad is not None
            copies.append((own, grad.expand(own.shape)))
        found.append(x)
    if copies:
        torch._foreach_copy_([x for x, _ in copies], [grad for _, grad in copies])
    return found


def by_group(items: Sequence[Any]) -> dict[str, list[Any]]:
    """Those that are cut, by the group that holds them together."""
    found: dict[str, list[Any]] = {}
    for item in items:
        if item.way.group is not None:
            found.setdefault(item.way.group, []).append(item)
    return found


def pg(group: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group)  # pyright: ignore
