"""Clocks of bench_attention: of the device's work, of the host's, and of both in turn."""

import argparse
import random
import time
from collections.abc import Callable

import torch


def median_ms(fn: Callable[[], object], rep_ms: int) -> float:
    from triton.testing import do_bench

    result = do_bench(fn, warmup=max(10, rep_ms // 4), rep=rep_ms, return_mode="median")
    assert isinstance(result, float)
    return result


def captured(fn: Callable[[], object]) -> Callable[[], object]:
    """fn() as one CUDA graph: the device's work without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()  # compiles, and fills what is remembered by shape
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def repeated_ms(fn: Callable[[], object], rep_ms: float) -> float:
    """Mean milliseconds of fn, again and again in one CUDA graph: of kernels of microseconds, too,
    which between a model's other kernels find their inputs in the cache.
    """
    fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    times = max(3, min(50, int(rep_ms / 1e3 / (time.perf_counter() - start))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            fn()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(4):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / times)
    return sorted(taken[1:])[1]


def interleaved_ms(calls: list[Callable[[], object]], rep_ms: int) -> list[float]:
    """Median milliseconds of each call on the CPU, run in turn so that all see the same machine, in
    another order each time: other programs come and go at times of their own.
    """
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while time.perf_counter() - start < len(calls) * rep_ms / 1000 or len(times[0]) < 5:
        for number in random.sample(range(len(calls)), len(calls)):
            call, taken = calls[number], times[number]
            before = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - before))
    return [sorted(taken)[len(taken) // 2] for taken in times]


def milliseconds(calls: list[Callable[[], object]], args: argparse.Namespace) -> list[float]:
    """Median milliseconds of each call on the device at hand."""
    if args.device == "cpu":
        return interleaved_ms(calls, args.rep)
    return [median_ms(call, args.rep) for call in calls]


def host_microseconds(
    calls: list[Callable[[], object]], args: argparse.Namespace
) -> tuple[list[float], float]:
    """Median time of each call, and the median of the first's share of the last's round by round:
    rounds of 20 calls in turn, so that other programs on these cores disturb both alike. The
    device's work is not waited for.
    """
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    rounds: list[list[float]] = []
    for _ in range(102):
        taken = []
        for call in calls:
            wait()
            start = time.perf_counter()
            for _ in range(20):
                call()
            taken.append((time.perf_counter() - start) / 20 * 1e6)
        rounds.append(taken)
    rounds = rounds[2:]
    ratios = sorted(taken[0] / taken[-1] for taken in rounds)
    medians = [sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True)]
    return medians, ratios[len(ratios) // 2]


def peak_mib(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Peak memory above what is held before, and seconds; on the CPU the growth of the process."""
    if device == "cpu":
        import resource

        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        call()
        taken = time.perf_counter() - start
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, taken
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, time.perf_counter() - start
