"""Tile sizes measured: compiles candidates on all cores, ranks those that fit, rewrites
kernels/msfs_kernels/configs.json.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import time

import torch
from attention_grid import TOKENS, WIDTH
from attention_timing import repeated_ms
from msfs_kernels import (
    configs,
    triton_backward,
    triton_dual,
    triton_forward,
    triton_tangent,
)
from msfs_kernels.configs import Config
from msfs_kernels.launching import Launch
from msfs_kernels.options import Options

LENGTHS = {"tiny": 48, "short": 1024, "long": 8192}  # what stands for a size class


def candidates(kernel: str, size: str = "long") -> list[Config]:
    if size == "tiny":
        return [
            Config(m, n, warps, stages, tma)
            for m in ((16, 32, 64) if kernel == "own" else (32, 64))
            for n in ((64,) if kernel == "own" else (16, 32, 64))
            for warps in (1, 2, 4, 8)
            for stages in (1, 2)
            for tma in (True, False)
            if 256 <= m * n // warps <= 2048
        ]
    tiles = {
        "forward": [(128, 128), (128, 64), (64, 128), (64, 64), (256, 64)],
        "keys": [(64, 128), (64, 64), (128, 128), (32, 128), (128, 64)],
        "fused": [(64, 128), (64, 64), (128, 128), (32, 128), (128, 64), (64, 256)],
        "own": [(64, 128), (32, 128), (128, 128), (16, 128)],
        "queries": [(128, 128), (128, 64), (64, 128), (64, 64)],
        "tangent": [(128, 64), (128, 128), (64, 64), (64, 128), (128, 32)],
        "dual": [(128, 64), (64, 64), (64, 32), (128, 32)],
    }[kernel]
    return [
        Config(m, n, warps, stages, tma)
        for m, n in tiles
        for warps in ((m // 16,) if kernel == "dual" else (4, 8))
        for stages in {"own": (1, 2, 3), "dual": (2, 3)}.get(kernel, (2, 3, 4))
        for tma in ((True, False) if stages <= 2 and kernel != "dual" else (True,))
    ]


def tuned_launch(
    kernel: str, head_dim: int, causal: bool, length: int, config: Config, device: str
) -> Launch:
    """The launch that a configuration means for a shape; on the CPU only good for compiling."""
    shape = (TOKENS // length, length, WIDTH // head_dim, head_dim)
    if length == LENGTHS["tiny"]:  # eight tiny models of recipes/translate.py in one step
        shape = (632, length, 4, head_dim)
    make = torch.randn if device == "cuda" else torch.empty
    q, k, v, do = (
        make(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    lse = make(q.shape[:3], device=device)
    options = Options(causal=causal, scale=head_dim**-0.5)
    if length == LENGTHS["tiny"] and not causal:  # sentences are padded
        lengths = torch.randint(length // 2, length + 1, shape[:1], dtype=torch.int32)
        options = options._replace(key_lengths=lengths.to(device))
    if kernel == "forward":
        return triton_forward.plan_forward(q, k, v, do, lse, options, config)
    if kernel == "dual":
        return triton_dual.plan_dual(q, k, v, q, k, v, do, lse, do, lse, options, config)
    if kernel == "tangent":
        return triton_tangent.plan_tangent(
            q, k, v, None, q, k, v, do, lse, do, lse, options, config
        )
    if kernel == "queries":
        rest = (do, None, lse, lse, None, q)
        return triton_backward.plan_queries(q, k, v, do, *rest, options, config)
    sums = torch.zeros(q.shape, device=device) if kernel == "fused" else None
    sums = torch.empty_like(q) if kernel == "own" else sums
    rest = (None, None, lse, lse, None, k, v, sums)
    if kernel == "own":
        rest = (do, None, lse, None, None, k, v, sums)
    return triton_backward.plan_keys(q, k, v, do, *rest, options, config)


def length_of(kernel: str, size: str) -> int:
    """Tokens that stand for a size class."""
    return 128 if kernel == "own" and size == "short" else LENGTHS[size]


def compile_one(job: tuple[str, int, bool, str, Config, int]) -> str:
    """In a worker process without CUDA: compiles into Triton's cache, says what it takes."""
    from msfs_kernels.triton_compile import compile_launch, resources

    torch.set_num_threads(1)
    kernel, head_dim, causal, size, config, capability = job
    length = length_of(kernel, size)
    try:
        launch = tuned_launch(kernel, head_dim, causal, length, config, "cpu")
        took = resources(compile_launch(launch, capability), capability)
        return (
            "too much shared memory"
            if took.shared > 227 * 1024
            else f"{took.registers} reg, {took.spills} spill"
        )
    except Exception as problem:
        return f"failed: {type(problem).__name__}"


def tune(args: argparse.Namespace) -> None:
    """Compiles candidates on all cores, measures those that fit, ranks them, rewrites the table."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = driver.active.get_current_target()
    assert isinstance(target, GPUTarget)
    cells = [  # (kernel, head dim, causal, size); one tile of "own" holds all keys
        (kernel, head_dim, causal, size)
        for size in args.sizes
        for kernel in args.kernels
        for head_dim in args.head_dims
        for causal in args.causal
        if not (kernel == "own" and size == "long")
    ]
    jobs = {  # short and long sequences run the same machine code
        (*cell[:3], cell[3] == "tiny", config): (*cell, config, int(target.arch))
        for cell in cells
        for config in candidates(cell[0], cell[3])
    }
    start = time.time()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        futures = {name: pool.submit(compile_one, job) for name, job in jobs.items()}
        concurrent.futures.wait(futures.values(), timeout=args.seconds)
        for future in futures.values():
            future.cancel()
    notes = {
        name: future.result()
        for name, future in futures.items()
        if future.done() and not future.cancelled()
    }
    print(f"compiled {len(notes)} of {len(jobs)} in {time.time() - start:.0f} s")
    table = json.loads(configs.TABLE.read_text()) if configs.TABLE.exists() else {}
    for cell in cells:
        kernel, head_dim, causal, size = cell
        length = length_of(kernel, size)
        ranking = []
        for config in candidates(kernel, size):
            note = notes.get((*cell[:3], size == "tiny", config), "not compiled in time")
            if "reg" not in note:
                continue
            try:
                launch = tuned_launch(kernel, head_dim, causal, length, config, "cuda")
                launch.run()
                torch.cuda.synchronize()
                ranking.append((repeated_ms(launch.run, args.rep / 4), config, note))
            except Exception as problem:
                print(f"  {config}: {type(problem).__name__}")
        ranking.sort()
        products = dict(forward=2, keys=4, fused=5, own=5, queries=3, tangent=5, dual=6)
        work = (632 * length, 4 * head_dim) if size == "tiny" else (TOKENS, WIDTH)
        flops = products[kernel] * 2 * work[0] * length * work[1] / (2 if causal else 1)
        name = configs.key(kernel, configs.chip(), torch.bfloat16, head_dim, causal, length)
        print(name)
        for ms, config, note in ranking[: args.show]:
            print(
                f"  {flops / ms / 1e9:5.0f} TFLOP/s {ms:7.3f} ms  {tuple(config)}  {note}",
                flush=True,
            )
        if ranking:
            table[name] = list(ranking[0][1])
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(table.items())
    )
    text = "{\n" + lines + "\n}\n"
    configs.TABLE.write_text(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "configs.json").write_text(text)
