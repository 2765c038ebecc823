"""What the benchmarks of training share: the first step, the others timed together, peak memory."""

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
