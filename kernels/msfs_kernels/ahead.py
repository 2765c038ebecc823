"""Kernels that a graph will launch are compiled in threads while the graph is still being compiled.

A training step's first call otherwise compiles one after another: Python traces a block and writes
its kernels, then Triton compiles attention's three large ones where they are first launched, a
third of the first step's time. What a graph will launch is known as soon as it is traced, when the
fake kernels see shapes, strides and options. Most of Triton's work is LLVM's and ptxas', which let
Python go on. (Inductor's own processes are no help: each imports this package first, for longer
than a kernel takes.)

Nothing depends on it: a launch waits for what was asked for its kernel, and compiles for itself
what was not, or failed.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

POOL = ThreadPoolExecutor(4, thread_name_prefix="kernels")
LOCKS: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)  # by kernel
pending: dict[int, list[Future]] = {}  # by kernel
seen: set[Any] = set()


def expect(op: Callable[..., Any], args: tuple) -> None:
    """Has the kernels compiled that op(*args) will launch; args as a fake kernel gets them."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    sizes = [n for x in tensors for n in (*x.shape, *x.stride())]
    device = tensors[0].device
    known = all(type(n) is int for n in sizes)  # no symbols
    if device.type != "cuda" or not known or not torch.cuda.is_available():
        return
    key = (op, *(signature(x) if isinstance(x, Tensor) else x for x in args))
    if key in seen or tensors[0].dtype is torch.float64:
        return
    seen.add(key)
    from msfs_kernels.launching import launches_of

    try:
        with _disable_current_modes(), torch.no_grad():
            real = [real_one(x) if isinstance(x, Tensor) else x for x in args]
            launches = launches_of(lambda: op(*real))
    except (RuntimeError, ValueError):  # no memory to spare; what else is wrong the launch will say
        return
    start(launches, device)


def signature(x: Tensor) -> tuple:
    return tuple(x.shape), x.stride(), x.dtype, x.device


def real_one(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def start(launches: Iterable[Any], device: torch.device) -> None:
    """Begins to compile the launches' kernels for a device."""

    def compile(launch: Any) -> None:
        where = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with LOCKS[id(launch.kernel)], where:  # one after another: the second may be the first
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)

    for launch in launches:
        pending.setdefault(id(launch.kernel), []).append(POOL.submit(compile, launch))


def wait(kernel: Any) -> None:
    """Until what was asked for a kernel so far is there."""
    for future in pending.pop(id(kernel), []):
        future.exception()
