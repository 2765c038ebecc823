"""Peak memory of one GPU of several, measured where there is one: `bench_mesh` without its peers.

    python recipes/bench_mesh_memory.py --ranks 4 --steps 2                     # 1.3B, 2 x 4096
    python recipes/bench_mesh_memory.py --preset tiny --length 64 --steps 1 --no-compile    # a CPU

This process is rank 0 of so many that are not there: collectives are torch's fake ones, and copies
between GPUs find what this one has laid in the place of every peer. It holds what rank 0 would
hold, so the GiB are real (by torch's allocator, what copies share included); times and losses are
not. The libraries' own buffers (NCCL's) are in no rank's figure, here or in `bench_mesh`.
"""

import functools
from dataclasses import dataclass
from unittest import mock

import bench_mesh
import torch
import torch.distributed as dist
import tyro
from torch.testing._internal.distributed.fake_pg import FakeStore

from msfs_functional import errors, peer_copies
from msfs_functional.collectives import group_rank, group_size
from msfs_functional.transport import pg


@dataclass(frozen=True)
class Config(bench_mesh.Config):
    ranks: int = 4
    paths: tuple[bench_mesh.Path, ...] = ("functional", "collectives", "fsdp2", "torch")


class Alone(peer_copies.Shared):
    """What ranks share, where there is only one."""

    def __init__(
        self, group: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int]
    ):
        self.process_group = pg(group)
        self.rank, self.size = group_rank(group), group_size(group)
        self.others = [(self.rank + i) % self.size for i in range(1, self.size)]
        laid, received = sizes
        options = {"dtype": dtype, "device": device}
        self.places = [torch.zeros(n, **options) for n in (laid, received, received)]

    def barrier(self, channel: int) -> None:
        pass

    def of(self, rank: int, place: int) -> torch.Tensor:
        return self.places[place]


def main(config: Config) -> None:
    dist.init_process_group("fake", rank=0, world_size=config.ranks, store=FakeStore())
    alone = {"Shared": Alone, "why_not": lambda *_: None}
    with mock.patch.multiple(peer_copies, shared_bytes=lambda: 0, **alone):  # the allocator knows
        bench_mesh.main(config)


if __name__ == "__main__":
    errors.run(main, functools.partial(tyro.cli, Config, description=__doc__))
