"""Gathers by copies between the GPUs of one host, which take no multiprocessor from products.

NCCL moves data by kernels of its own: products beside them have fewer multiprocessors, and one that
wants all of them takes a second turn for a few tiles. Here every rank lays its part into memory
that the others see (torch's symmetric memory) and copies theirs out of it; copies are work for the
GPU's copy engines.

    rank 0 | lays a0 |  all are here  | copies a1 from rank 1 |
    rank 1 | lays a1 |  all are here  | copies a0 from rank 0 |
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from msfs_functional.collectives import group_rank, group_size


class PeerCopies:
    """Gathers over one group of ranks of one host.

    Parts lie in two buffers by turns: who is done with a gather may lay the next part while others
    still copy the last one, and comes to the part after that when they have reached the next.

    Args:
        elements: that a rank lays for one gather at most.
    """

    def __init__(self, group: str, dtype: torch.dtype, device: torch.device, elements: int):
        self.rank, self.size, self.turn = group_rank(group), group_size(group), 0
        self.buffers: list[tuple[Tensor, Any]] = []
        for _ in range(2):
            buffer = symmetric.empty(elements, dtype=dtype, device=device)
            handle: Any = symmetric.rendezvous(buffer, group)  # pyright: ignore[reportArgumentType]
            self.buffers.append((buffer, handle))

    def begin(self) -> None:
        """A step begins: all are done with the last one's gathers. (A step that is replayed as a
        CUDA graph has the turns of its recording.)"""
        self.turn = 0
        self.buffers[0][1].barrier()

    def gather(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Fills each whole tensor, whose own part is there already.

        Args:
            pairs: (whole, own part of it), parts of one size along dim 0.
        """
        buffer, handle = self.buffers[self.turn % 2]
        self.turn += 1
        places = list(itertools.accumulate((own.numel() for _, own in pairs), initial=0))
        laid = [
            buffer[at : at + own.numel()].view(own.shape)
            for at, (_, own) in zip(places, pairs, strict=False)
        ]
        torch._foreach_copy_(laid, [own for _, own in pairs])
        handle.barrier()
        for at, (whole, own) in zip(places, pairs, strict=False):
            for rank in range(self.size):
                if rank != self.rank:
                    part = whole.narrow(0, rank * len(own), len(own))
                    part.copy_(handle.get_buffer(rank, own.shape, buffer.dtype, at))


@functools.cache
def kept(group: str, dtype: torch.dtype, device: torch.device, elements: int) -> PeerCopies:
    return PeerCopies(group, dtype, device, elements)


def begun(group: str, dtype: torch.dtype, device: torch.device, elements: int) -> PeerCopies:
    """The copies of a group, of which there is one, at the beginning of a step."""
    copies = kept(group, dtype, device, elements)
    copies.begin()
    return copies
