"""Runs claims on several ranks of this machine, many in one start of processes."""

import functools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from msfs_functional import meshes

DEVICE = os.environ.get("RANKS_DEVICE", "cpu")  # "cuda": a GPU for each rank, NCCL between them


@functools.cache
def mesh(**degrees: int) -> DeviceMesh:
    """The mesh of these degrees over the ranks of this stage."""
    return meshes.mesh(**degrees, device=DEVICE)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check_claims(*stages: tuple[list[Callable[[], None]], int]) -> None:
    """Every claim of a stage (claims, ranks), one after another, stage after stage; fails with the
    names of those that do not hold.

    Processes are forked from one that has imported everything, and later stages run on some of
    those of the largest one.
    """
    start_server(*{claim.__module__ for claims, _ in stages for claim in claims})
    context = mp.get_context("forkserver")
    results = context.SimpleQueue()
    ports = context.Array("i", len(stages))
    world = max(ranks for _, ranks in stages)
    args = (stages, ports, dict(os.environ), results)
    processes = mp.start_processes(_rank, args, world, join=False, start_method="forkserver")
    assert processes is not None
    failed = ""
    while not processes.join():
        pass
    while not results.empty():
        failed += results.get()
    assert not failed, failed


def start_server(*modules: str) -> None:
    """The process to fork from, if there is none yet; it finds modules where this one does."""
    mp.get_context("forkserver").set_forkserver_preload([__name__, *sorted(modules)])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


def _rank(rank: int, stages: tuple, ports, environment: dict[str, str], results) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for i, (claims, world) in enumerate(stages):
        if rank < world:
            port = port_of(ports, i, rank)
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in given.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            _stage(rank, world, claims, results)


def port_of(ports, stage: int, rank: int) -> int:
    """Rank 0 chooses it when the stage begins: one chosen minutes before may be in use by then."""
    if rank == 0:
        ports[stage] = free_port()
    while not ports[stage]:
        time.sleep(0.01)
    return ports[stage]


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
        if dist.is_initialized():  # what a rank leaves for the next claim is there
            dist.barrier()
        if rank == 0:
            seconds = time.perf_counter() - start
            print(f"{claim.__name__}: {seconds:.1f} s", file=sys.stderr, flush=True)
    mesh.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
