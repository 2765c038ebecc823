"""What the benchmarks share: the first step, the others timed together, peak memory, kernels."""

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

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


def measure(step: Callable[[], object], warmup: int, steps: int) -> Figures:
    """Runs `step` warmup + steps times; the steps are timed together, without a wait in between."""
    begin = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - begin
    for _ in range(warmup - 1):
        step()
    synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    seconds = (time.perf_counter() - begin) / steps
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
