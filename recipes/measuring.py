"""What the benchmarks share: the first step, the others timed together, peak memory, kernels."""

import fcntl
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Figures(NamedTuple):
    """What one side of a comparison took."""

    first: float  # seconds until the first step or call was done, compilation included
    seconds: float  # of one after the warm-up
    memory: float  # GiB at the peak


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh() -> None:
    """Nothing of the side before stays in memory, nor in the count of its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def taking_turns(
    folder: Path, name: str, names: Sequence[str], patience: float = 600.0
) -> Iterator[None]:
    """One process of those that share this folder is inside, and none before all are here.

    Compiled beside one another, processes would otherwise be timed while others still compile and
    search on the same device.

    Args:
        name: this process's; `here` may say it for one that will not come.
        names: of all processes.
        patience: seconds to wait for the others, then it begins without them.
    """
    here(folder, name)
    begin = time.monotonic()
    while time.monotonic() - begin < patience:
        if all((folder / f"{other}.here").exists() for other in names):
            break
        time.sleep(0.1)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def here(folder: Path, name: str) -> None:
    """Says that nobody has to wait for this process any longer."""
    (folder / f"{name}.here").touch()


def measure(
    step: Callable[[], object],
    warmup: int,
    steps: int,
    *,
    blocks: int = 1,
    turn: AbstractContextManager[Any] | None = None,
) -> Figures:
    """Runs `step` warmup + blocks * steps times; the steps of a block are timed together, without a
    wait in between, and the median block counts.

    Args:
        turn: entered after the first step, so that processes that share a device are not timed at
            the same time (`taking_turns`).
    """
    begin = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - begin
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of what compiling tried out, for others on this device
    with turn or nullcontext():
        for _ in range(warmup - 1):
            step()
        synchronize()
        took = []
        for _ in range(blocks):
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize()
            took.append((time.perf_counter() - begin) / steps)
    seconds = statistics.median(took)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return Figures(first, seconds, memory)


def kernels(step: Callable[[], object], steps: int = 5, rows: int = 50) -> str:
    """A table of the kernels (on a CPU the operations) of a step by their time."""
    with torch.profiler.profile() as profile:
        for _ in range(steps):
            step()
        synchronize()
    events = profile.key_averages()
    device = [e for e in events if e.self_device_time_total and not e.self_cpu_time_total]
    times = {
        e.key: (e.self_device_time_total or e.self_cpu_time_total, e.count)
        for e in device or events
    }
    total, launches = (sum(column) / steps for column in zip(*times.values(), strict=True))
    lines = [f"{total:.0f} us in {launches:.0f} kernels a step, of which"]
    for name, (took, count) in sorted(times.items(), key=lambda one: -one[1][0])[:rows]:
        lines.append(f"{took / steps:9.1f} us {count / steps:7.1f} x  {name[:110]}")
    return "\n".join(lines)
