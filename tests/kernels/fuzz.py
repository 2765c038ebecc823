r"""The Triton kernels over the fuzz set: random shapes, strides, dtypes and options, on a GPU.

    python tests/kernels/fuzz.py --workers 15           # all draws against float64
    for i in 0 1 2 3 4 5 6 7; do                        # then, kernels compiled: out of bounds?
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
            python tests/kernels/fuzz.py --launch-only --shard $i 8 &
    done; wait
    TRITON_INTERPRET=1 python tests/kernels/fuzz.py --device cpu --largest 40 --cases 4

A draw is a set of options and shapes (`triton_check.random_case`), run with three sets of lengths
and values that share its kernels. Compiling takes nearly all of the time, so each process takes
whole draws, compiles and runs them; those that compile longest go first.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import time
from typing import NamedTuple

import torch
from msfs_kernels.triton_check import (
    ONE_PASS,
    Case,
    by_kernels,
    directions,
    fuzz_set,
    random_case,
    ratios,
)

SIBLINGS = 3  # cases of a draw
PASSES = {"o": "forward", "lse": "forward", "to": "tangent", "tlse": "tangent"}  # others: backward


class Result(NamedTuple):
    """What came of a case: the worst error over the formula's of each pass, and what is wrong."""

    features: tuple[str, ...]
    worst: dict[str, float]
    complaint: str


def run_case(case: Case, sibling: int, launch_only: bool) -> Result:
    complaint = ""
    try:
        if launch_only:
            by_kernels(case, *directions(case, sibling))
            if case.q.is_cuda:
                torch.cuda.synchronize()
            found = {}
        else:
            found = ratios(case, sibling)
    except Exception as problem:
        complaint = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        found = dict.fromkeys(("o", "dq", "to"), float("inf"))
    worst: dict[str, float] = dict.fromkeys(("forward", "backward", "tangent"), 0.0)
    for name, ratio in found.items():
        which = "tangent" if name.startswith(ONE_PASS) else PASSES.get(name, "backward")
        worst[which] = max(worst[which], ratio)
    wrong = {name: round(ratio, 2) for name, ratio in found.items() if not ratio <= 2}
    if wrong:
        complaint = f"{case.name}\n    {complaint or wrong}"
    return Result(case.features, worst, complaint)


def run_draw(seed: int, device: str, largest: int, launch_only: bool, deadline: float):
    """Results of a draw's cases; nothing after the deadline."""
    torch.set_num_threads(1)
    dtypes = None if device == "cuda" else (torch.float16, torch.float32)
    results = []
    for sibling in range(SIBLINGS):
        if time.monotonic() > deadline:
            break
        case = random_case(seed, device, largest, dtypes, sibling)
        results.append(run_case(case, sibling, launch_only))
    return results


def cost(seed: int, largest: int) -> int:
    """Roughly, how long a draw compiles: full float32 has no matrix unit, products unroll."""
    case = random_case(seed, "meta", largest)
    return case.q.shape[3] * (8 if case.q.dtype is torch.float32 else 1)


def table(results: list[Result]) -> str:
    lines = [f"{'option':16s} cases  forward backward  tangent   (error over the formula's)"]
    for feature in sorted({f for result in results for f in result.features}):
        rows = [result.worst for result in results if feature in result.features]
        worst = [max(row[which] for row in rows) for which in rows[0]]
        verdict = "ok" if max(worst) <= 2 else "WRONG"
        cells = " ".join(f"{x:8.2f}" for x in worst)
        lines.append(f"{feature:16s} {len(rows):5d} {cells}  {verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=48, help="draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=300, help="tokens")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--launch-only", action="store_true", help="for a memory checker")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a context")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this many")
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"),
        help="every Nth draw from the Ith on, so that N processes or machines share them",
    )  # fmt: skip
    args = parser.parse_args()
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--device cpu needs TRITON_INTERPRET=1: the kernels are Triton's")
    start = time.monotonic()
    first, step = args.shard
    order = functools.partial(cost, largest=args.largest)
    seeds = sorted(fuzz_set(args.cases, args.seed, args.largest), key=order, reverse=True)
    seeds = seeds[first::step]
    rest = (args.device, args.largest, args.launch_only, start + args.seconds)
    results, visited = [], 0

    def keep(found: list[Result]) -> None:
        nonlocal visited
        visited += len(found) == SIBLINGS
        results.extend(found)
        for result in found:
            if result.complaint:
                print(result.complaint, flush=True)

    if args.workers == 1:
        for seed in seeds:
            keep(run_draw(seed, *rest))
    else:  # forked before CUDA starts, each with the imports and its own context
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            running = [pool.submit(run_draw, seed, *rest) for seed in seeds]
            for future in concurrent.futures.as_completed(running):
                keep(future.result())
    if results and not args.launch_only:
        print(table(results))
    wrong = sum(bool(result.complaint) for result in results)
    print(
        f"{len(results)} cases in {time.monotonic() - start:.0f} s: {wrong} wrong;"
        f" {visited} of {len(seeds)} draws done"
    )
    if wrong or visited < len(seeds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
