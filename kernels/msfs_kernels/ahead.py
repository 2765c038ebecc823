"""Attention's kernels are compiled while Inductor still works on the graph that calls them.

A training step's first call otherwise compiles graph and kernels one after another, and the three
large kernels of attention, which Triton compiles where they are first launched, are a third of its
time. What a compiled graph will call is known as soon as it is traced: the fake kernels see shapes,
strides and options, and hand them to the processes that compile Inductor's own kernels. What comes
out lands in Triton's cache on disk, where the launch finds it; a launch that comes too early waits.

Nothing depends on it: where there are no such processes, or they fail, launches compile as ever.
"""

import os
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from msfs_kernels.options import OPTION_TENSORS, Options

TENSOR_OPTIONS = 1 + OPTION_TENSORS  # the bias, too
MOST_LAUNCHES = 4  # of a backward: delta, keys, queries, and one for a bias
PATIENCE = 30.0  # seconds that a launch waits for its kernel
asked: set[Any] = set()
pending: dict[str, list[Future]] = {}  # by op
Meta = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


def meta(x: Tensor | None) -> Meta | None:
    return None if x is None else (tuple(x.shape), tuple(x.stride()), x.dtype)


def expect(name: str, given: dict[str, Any]) -> None:
    """Has the kernels of an op compiled, whose fake kernel was just given these arguments."""
    q = given["q"]
    if not os.environ.get("MSFS_COMPILE_AHEAD"):
        return
    if q.device.type != "cuda" or q.dtype is torch.float64:
        return
    tensors = ["q", "k", "v", "bias", *Options._fields[1:TENSOR_OPTIONS]]
    tensors += ["do", "dlse", "o", "lse"] if name == "attention_backward" else []
    metas = {x: meta(given[x]) for x in tensors}
    sizes = [n for found in metas.values() if found for part in found[:2] for n in part]
    if not all(type(n) is int for n in sizes):
        return  # sizes that are symbols yet
    scalars = tuple(given[x] for x in Options._fields[TENSOR_OPTIONS:])
    job = (name, tuple(metas.items()), scalars, bool(given.get("need_dbias")))
    if job in asked:
        return
    asked.add(job)
    try:
        submit(job, q.device.index or 0)
    except Exception:  # Inductor's own affair changes from version to version
        pending.clear()


def submit(job: tuple, device: int) -> None:
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    if get_compile_threads() <= 1:
        return
    # As Inductor does when it makes its first kernel: all of a process lie in one place.
    folder = os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))
    major, minor = torch.cuda.get_device_capability(device)
    pool = AsyncCompile.process_pool()
    for number in range(MOST_LAUNCHES if job[0] == "attention_backward" else 1):
        future = pool.submit(compile_one, job, number, 10 * major + minor, folder)
        pending.setdefault(job[0], []).append(future)


def wait(name: str) -> None:
    """Until what was asked for an op so far is there."""
    for future in pending.pop(name, []):
        try:
            future.result(PATIENCE)
        except Exception:  # the launch compiles for itself, and tells what is wrong
            return


def compile_one(job: tuple, number: int, capability: int, folder: str) -> None:
    """In a process without CUDA: launch `number` of an op's call, into Triton's cache."""
    os.environ["TRITON_CACHE_DIR"] = folder
    from msfs_kernels import configs, gluon_support, triton_backend
    from msfs_kernels.launching import launches_of
    from msfs_kernels.triton_compile import compile_launch

    name, metas, scalars, need_dbias = job
    configs.chip = lambda: f"sm_{capability}"  # pyright: ignore[reportAttributeAccessIssue]
    gluon_support.here = lambda *args: capability == 90  # pyright: ignore
    x: dict[str, Any] = {
        key: None if found is None else torch.empty_strided(*found[:2], dtype=found[2])
        for key, found in metas
    }
    tensors = (x["bias"], *(x[key] for key in Options._fields[1:TENSOR_OPTIONS]))
    options = Options(*tensors, *scalars)
    q, k, v = x["q"], x["k"], x["v"]
    if name == "attention":
        launches = launches_of(lambda: triton_backend.forward(q, k, v, options))
    else:
        given = (x["do"], x["dlse"], q, k, v, x["o"], x["lse"], options, need_dbias)
        launches = launches_of(lambda: triton_backend.backward(*given))
    if number < len(launches):
        compile_launch(launches[number], capability)
