"""Starting as one process or as one of many that torchrun has started, and starting again.

def main(config):
    with processes(config.timeout, device=config.device) as watchdog:
        train(config, watchdog)
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from msfs_functional import agreement, meshes
from msfs_functional.watchdog import Watchdog


def several() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarts() -> int:
    """How often torchrun has started these processes again; all ranks call it together."""
    return agreement.highest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


@contextlib.contextmanager
def processes(
    timeout: float, *, device: str | None = None, debug: bool = False
) -> Iterator[Watchdog]:
    """Joins the other processes, if there are any, under a watchdog that ends a job that hangs.

    Args:
        timeout: seconds in which something must happen (`Watchdog`); a single process may take
            its time.
        device: the kind of device to join on; None: GPUs where there are some.
        debug: every rank shows its own errors; otherwise rank 0 alone tells what all ranks have.
    """
    alone = not several()
    timeout = math.inf if alone else max(timeout, 1.0)
    with Watchdog(timeout) as watchdog:
        if not alone:
            watchdog.at("joining the other processes")
            kind = torch.device(device).type if device else None
            meshes.join(kind, timeout=60 + 2 * timeout)  # the watchdog, which says more, is first
            watchdog.joined()
        with contextlib.nullcontext() if debug else agreement.said_once():
            yield watchdog
    if not alone:
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str | None = None, *, debug: bool = False) -> Iterator[None]:
    """As `processes`, without a watchdog: for runs of minutes.

    A process group that was there before stays.
    """
    if not several():
        yield
        return
    before = dist.is_initialized()
    meshes.join(torch.device(device).type if device else None)
    with contextlib.nullcontext() if debug else agreement.said_once():
        yield
    if not before:
        dist.destroy_process_group()


def resume_command(script: str, run: Path) -> str:
    """The same launch again, from the checkpoint of a run; every node of several gives it."""
    launch = "python"
    if agreement.world() > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", agreement.world())
        nodes = agreement.world() // int(local)
        launch = f"torchrun --nnodes {nodes} --nproc-per-node {local}"
    return f"{launch} {script} --resume --out {run.parent} --name {run.name}"
