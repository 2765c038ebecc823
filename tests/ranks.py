"""Runs claims on several ranks of this machine, many in one start of processes."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from msfs_functional import meshes

DEVICE = os.environ.get("RANKS_DEVICE", "cpu")  # "cuda": a GPU for each rank, NCCL between them


def mesh(**degrees: int) -> DeviceMesh:
    """A mesh of the ranks of this stage."""
    return meshes.mesh(**degrees, device=DEVICE)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check_claims(*stages: tuple[list[Callable[[], None]], int]) -> None:
    """Every claim of a stage (claims, ranks), one after another, stage after stage; fails with the
    names of those that do not hold.

    Processes take most of the time to start: later stages run on some of those of the largest one.
    """
    results = mp.get_context("spawn").SimpleQueue()
    world = max(ranks for _, ranks in stages)
    planned = [(claims, ranks, free_port()) for claims, ranks in stages]
    processes = mp.spawn(_rank, (planned, results), world, join=False)
    failed = ""
    while not processes.join():
        pass
    while not results.empty():
        failed += results.get()
    assert not failed, failed


def _rank(rank: int, stages: list, results) -> None:
    torch.set_num_threads(1)
    for claims, world, port in stages:
        if rank < world:
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in given.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            _stage(rank, world, claims, results)


def _stage(rank: int, world: int, claims: list, results) -> None:
    for claim in claims:
        start = time.perf_counter()
        torch._dynamo.reset()
        try:
            claim()
        except Exception:
            where = f"rank {rank} of {world}, {claim.__name__}:\n"
            told = where + traceback.format_exc()[-3000:] + "\n"
            print(told, file=sys.stderr, flush=True)
            results.put(told)
        if rank == 0:
            print(
                f"{claim.__name__}: {time.perf_counter() - start:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    if dist.is_initialized():
        dist.destroy_process_group()
