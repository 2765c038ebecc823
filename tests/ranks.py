"""Runs claims on several gloo ranks of this machine, many in one start of processes."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check_claims(claims: list[Callable[[], None]], world: int) -> None:
    """Every claim on `world` ranks, one after another; fails with the names of those that do not
    hold."""
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(_rank, (world, free_port(), claims, results), world, join=False)
    failed = ""
    while not processes.join():
        pass
    while not results.empty():
        failed += results.get()
    assert not failed, failed


def _rank(rank: int, world: int, port: int, claims: list, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for claim in claims:
        start = time.perf_counter()
        torch._dynamo.reset()
        try:
            claim()
        except Exception:
            where = f"rank {rank} of {world}, {claim.__name__}:\n"
            results.put(where + "".join(traceback.format_exc()[-3000:]) + "\n")
        if rank == 0:
            print(f"{claim.__name__}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
