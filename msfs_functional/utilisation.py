"""How much of a machine a training run uses: model FLOPs utilisation, and traces to look into.

    MFU = tokens/s * (6 N + 6 depth heads head_dim length) / peak FLOP/s of all processes

with N parameters in matrices (an embedding that only looks up is none), two operations each in the
forward and four in the backward pass, and scores and values of attention, causal: half of a row.
What is recomputed does not count (Chowdhery et al. 2022, appendix B). The peak is that of the data
sheet for known GPUs, else of a matrix product measured here.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from msfs_functional.params import Functional

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 [FLOP/s]


def flops_per_token(model: Functional, length: int) -> float:
    """Of forward and backward of a decoder on rows of `length` tokens; the formula stands above."""
    config: Any = model.skeleton.config
    lookups = ("positions.weight",) if config.tied else ("positions.weight", "embedding.weight")
    matrices = sum(
        math.prod(shape)
        for name, shape in model.shapes.items()
        if len(shape) == 2 and name not in lookups
    )
    return 6 * matrices + 6 * config.depth * config.heads * config.size_of_head * length


def peak_flops(device: str) -> float:
    """FLOP/s of one process at most: the data sheet's for a known GPU, else what some matrix
    products reach."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        known = [peak for part, peak in PEAKS.items() if part in name]
        if known:
            return known[0]
    x, best = torch.ones(768, 768, device=device), math.inf
    for _ in range(8):
        begin = time.perf_counter()
        (x @ x).sum().item()
        best = min(best, time.perf_counter() - begin)
    return 2 * len(x) ** 3 / best


@contextlib.contextmanager
def profiled(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """What to call after each step, so that so many of them, after three others, are traced.

    Args:
        path: the trace, .json.gz: for chrome://tracing or perfetto.dev.
        steps: 0 traces nothing.
    """
    if not steps:
        yield lambda: None
        return
    plan = torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=plan, on_trace_ready=lambda profile: profile.export_chrome_trace(str(path))
    ) as profile:
        yield profile.step


class Meter:
    """Speed between two looks, beside a run's loop:

        with meter.waiting(): batch = next(batches)
        with meter.working(): ...; meter.tokens.append(number)
        meter.read()        # waits for the device if the numbers are there; begins anew

    Args:
        share: of one process's peak that one token a second is: FLOP a token / peak FLOP/s.
        world: processes.
    """

    def __init__(self, share: float, world: int):
        self.share, self.world = share, world
        self.tokens: list[Any] = []  # of each step, over all processes
        self.waited = self.worked = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.worked += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """{"tokens/s/rank": of one process, "mfu": in [0, 1], "data_wait": share of the time}"""
        seconds = self.waited + self.worked
        rate = sum(map(int, self.tokens)) / seconds / self.world
        found = {
            "tokens/s/rank": rate,
            "mfu": rate * self.share,
            "data_wait": self.waited / seconds,
        }
        self.tokens, self.waited, self.worked = [], 0.0, 0.0
        return found
