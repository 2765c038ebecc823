"""Attention measured: our kernels and every peer that is installed, in one run on one GPU.

    python recipes/bench_attention.py               # the grid, forward and backward
    python recipes/bench_attention.py --device cpu --lengths 128 1024     # beside torch on the CPU
    python recipes/bench_attention.py --tangent     # torch.func.jvp beside jvp_flash_attention
    python recipes/bench_attention.py --overhead    # the host's time a call, beside torch's
    python recipes/bench_attention.py --decode      # few queries against a long cache, beside torch
    python recipes/bench_attention.py --masks       # windows, lengths, grouped heads: work left
    python recipes/bench_attention.py --second-order      # peak memory of second derivatives
    python recipes/bench_attention.py --tune        # measures tile sizes, rewrites configs.json
    python recipes/bench_attention.py --head-dims 128 --lengths 4096 --peers ours cudnn   # a part

Work: bf16, 16,384 tokens of width 2048, so heads = 2048 / head dim and batch = 16,384 / length. A
forward counts 4 B H T^2 K floating-point operations, a backward 10 B H T^2 K, half of either under
a causal mask. Times are medians over CUDA events; errors are the largest difference from the
formula in float64 on one head; memory is the peak of one forward and backward above the inputs, in
MiB. A table goes to the terminal and, with a plot, to --out.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from msfs_kernels import (
    configs,
    triton_backend,
    triton_backward,
    triton_dual,
    triton_forward,
    triton_tangent,
)
from msfs_kernels.configs import Config
from msfs_kernels.launching import Launch
from msfs_kernels.options import Options

WIDTH, TOKENS = 2048, 16_384
LENGTHS = {"tiny": 48, "short": 1024, "long": 8192}  # what --tune measures for a size class
Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from msfs_kernels import flash_attention

    out = flash_attention(q, k, v, is_causal=causal)
    assert isinstance(out, Tensor)
    return out


def sdpa(backend: str) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attention


def flex() -> Attention:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # the backward is timed by running it repeatedly
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if not causal:
            return compiled(q, k, v)
        length = q.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return compiled(q, k, v, block_mask=masks[length])

    return attention


def flash_attention_4() -> Attention:
    from flash_attn.cute import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = flash_attn_func(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal
        )
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention


def jvp_flash() -> Attention:
    from jvp_flash_attention.jvp_attention import JVPAttn

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return JVPAttn.fwd_dual(q, k, v, causal=causal)

    return attention


def cuda_cpp() -> Attention:
    """Our forward in CUDA C++, the one to read."""
    from msfs_kernels import cuda_forward

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        options = Options(causal=causal, scale=q.shape[-1] ** -0.5)
        return cuda_forward.forward(q.detach(), k.detach(), v.detach(), options)[0]

    return attention


PEERS: dict[str, Callable[[], Attention]] = {
    "ours": lambda: ours,
    "cuda": cuda_cpp,
    "flash2": lambda: sdpa("FLASH_ATTENTION"),
    "flex": flex,
    "cudnn": lambda: sdpa("CUDNN_ATTENTION"),
    "flash4": flash_attention_4,
    "math": lambda: sdpa("MATH"),
}


def available(names: list[str]) -> dict[str, Attention]:
    """The peers that import; the others are named once."""
    peers = {}
    for name in names:
        try:
            peers[name] = PEERS[name]()
        except ImportError as error:
            print(f"{name}: not installed ({error})")
    return peers


def median_ms(fn: Callable[[], object], rep_ms: int) -> float:
    from triton.testing import do_bench

    result = do_bench(fn, warmup=max(10, rep_ms // 4), rep=rep_ms, return_mode="median")
    assert isinstance(result, float)
    return result


def captured(fn: Callable[[], object]) -> Callable[[], object]:
    """fn() as one CUDA graph: the device's work without the host's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()  # compiles, and fills what is remembered by shape
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def inputs(head_dim: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do as (B, H, T, K)."""
    shape = (TOKENS // length, WIDTH // head_dim, length, head_dim)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return q, k, v, do


def exact_head(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """o, dq, dk, dv of the first head in float64."""
    leaves = [x[:1, :1].double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    o = scores.softmax(-1) @ leaves[2]
    return o.detach(), *torch.autograd.grad(o, leaves, do[:1, :1].double())


def measure(
    attention: Attention,
    tensors: tuple[Tensor, ...],
    causal: bool,
    exact: tuple[Tensor, ...],
    rep_ms: int,
):
    """Forward and backward ms, largest errors of o and of the gradients, peak MiB above inputs;
    NaN for the backward of a forward kernel.
    """
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    do = tensors[3]

    def both() -> tuple[Tensor, ...]:
        o = attention(q, k, v, causal)
        return o, *(torch.autograd.grad(o, (q, k, v), do) if o.requires_grad else ())

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    errors = [
        float((x[:1, :1].detach().double() - y).abs().max())
        for x, y in zip(results, exact, strict=False)
    ]
    del results
    with torch.no_grad():
        forward_ms = median_ms(lambda: attention(q, k, v, causal), rep_ms)
    o = attention(q, k, v, causal)
    if not o.requires_grad:
        return forward_ms, float("nan"), errors[0], float("nan"), peak
    backward_ms = median_ms(
        lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), rep_ms
    )
    return forward_ms, backward_ms, errors[0], max(errors[1:], default=0.0), peak


def bench(args: argparse.Namespace) -> None:
    peers = available(args.peers)
    rows = []
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; "
        "forward / backward TFLOP/s (error o / grads, peak MiB)"
    )
    for head_dim in args.head_dims:
        for causal in args.causal:
            for length in args.lengths or (1024, 4096, 16_384):
                tensors = inputs(head_dim, length)
                exact = exact_head(*tensors, causal)
                flops = 4 * TOKENS * length * WIDTH / (2 if causal else 1)
                cells = []
                for name, attention in peers.items():
                    if name == "math" and length > 4096:
                        continue
                    try:
                        fwd, bwd, error, grad_error, peak = measure(
                            attention, tensors, causal, exact, args.rep
                        )
                    except Exception as problem:
                        cells.append(f"{name} failed: {str(problem).splitlines()[0][:60]}")
                        continue
                    row = dict(
                        head_dim=head_dim,
                        causal=causal,
                        length=length,
                        peer=name,
                        forward_ms=fwd,
                        backward_ms=bwd,
                        forward=flops / fwd / 1e9,
                        backward=2.5 * flops / bwd / 1e9,
                        error=error,
                        grad_error=grad_error,
                        peak_mib=peak,
                    )
                    rows.append(row)
                    cells.append(
                        f"{name} {row['forward']:.0f}/{row['backward']:.0f} "
                        f"({error:.1g}/{grad_error:.1g} {peak:.0f})"
                    )
                print(
                    f"{head_dim:4d} {'causal' if causal else 'full  '} {length:6d}  "
                    + "  ".join(cells),
                    flush=True,
                )
    save(args.out, "attention", rows)
    plot(args.out, rows)


def save(out: Path, name: str, rows: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1))


def plot(out: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = sorted({(row["head_dim"], row["causal"]) for row in rows})
    if not groups:
        return
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4 * len(groups), 6), squeeze=False, sharey="row"
    )
    for column, (head_dim, causal) in enumerate(groups):
        mine = [row for row in rows if (row["head_dim"], row["causal"]) == (head_dim, causal)]
        for axis, field in zip(axes[:, column], ("forward", "backward"), strict=True):
            for peer in dict.fromkeys(row["peer"] for row in mine):
                points = [(row["length"], row[field]) for row in mine if row["peer"] == peer]
                axis.plot(*zip(*points, strict=True), marker="o", label=peer)
            axis.set_xscale("log", base=2)
            axis.set_title(
                f"{field}, head dim {head_dim}{', causal' if causal else ''}", fontsize=9
            )
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    figure.tight_layout()
    figure.savefig(out / "attention.png", dpi=130)


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


def bench_cpu(args: argparse.Namespace) -> None:
    """Forward and backward in float32 on the CPU beside torch's own attention there."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; B 2, H 8, K 64, float32")
    for length in args.lengths or (128, 1024):
        for causal in args.causal:
            q, k, v = (torch.randn(2, 8, length, 64, requires_grad=True) for _ in range(3))
            do = torch.randn(2, 8, length, 64)

            def torchs(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            calls: list[Callable[[], object]] = []
            for attention in (ours, torchs):
                o = attention(q, k, v, causal)
                calls.append(torch.no_grad()(functools.partial(attention, q, k, v, causal)))
                calls.append(
                    functools.partial(torch.autograd.grad, o, (q, k, v), do, retain_graph=True)
                )
            fwd, bwd, peer_fwd, peer_bwd = interleaved_ms(calls, args.rep)
            print(
                f"{length:6d} {'causal' if causal else 'full  '}"
                f"  forward {fwd:7.3f} ms, torch {peer_fwd:7.3f}, {fwd / peer_fwd:4.2f} times"
                f"  backward {bwd:7.3f} ms, torch {peer_bwd:7.3f}, {bwd / peer_bwd:4.2f} times",
                flush=True,
            )


def milliseconds(calls: list[Callable[[], object]], args: argparse.Namespace) -> list[float]:
    """Median milliseconds of each call on the device at hand."""
    if args.device == "cpu":
        return interleaved_ms(calls, args.rep)
    return [median_ms(call, args.rep) for call in calls]


def bench_decode(args: argparse.Namespace) -> None:
    """A few new tokens of some rows, 32 heads over 8 kv heads of 128, against a cache of keys:
    ours beside what torch picks by itself and its FlashAttention-2.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    for batch in (1, 8):
        for length in args.lengths or (8192, 32_768, 65_536):
            k, v = (
                torch.randn(batch, 8, length, 128, device=args.device, dtype=torch.bfloat16)
                for _ in range(2)
            )
            gigabytes = 2 * k.numel() * k.element_size() / 1e9
            for T in (1, 4, 16):
                q = torch.randn(batch, 32, T, 128, device=args.device, dtype=torch.bfloat16)
                peer = functools.partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
                calls: list[Callable[[], object]] = [
                    functools.partial(ours, q, k, v, False),
                    peer,
                ]
                with torch.no_grad():
                    error = (ours(q, k, v, False) - peer()).abs().max()
                    ms, peer_ms = milliseconds(calls, args)
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        (flash_ms,) = milliseconds([peer], args)
                rows.append(
                    f"{batch:4d} {T:4d} {length:7d} {ms:9.3f} {gigabytes / ms * 1e3:7.0f}"
                    f" {peer_ms:9.3f} {flash_ms:9.3f} {peer_ms / ms:8.2f} {flash_ms / ms:8.2f}"
                    f" {float(error):10.2g}"
                )
    print("rows    T    keys   ours ms    GB/s   sdpa ms  flash ms  faster than either  difference")
    print("\n".join(rows))


def mask_rows(length: int, device: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name: (kv heads of 16, options), each leaving a part of the work of the first."""
    half = torch.full((1,), length // 2, device=device)
    ids = torch.arange(length, device=device) // (length // 8)
    return {
        "full": (16, {}),
        "causal": (16, {"is_causal": True}),
        "causal, window of 1k": (16, {"is_causal": True, "window": 1024}),
        "window of 1k, both sides": (16, {"window": 1024}),
        "keys half as long": (16, {"key_lengths": half}),
        "causal, 8 packed segments": (16, {"is_causal": True, "segment_ids": ids}),
        "causal, prefix of half": (16, {"is_causal": True, "prefix_lengths": half}),
        "4 kv heads": (4, {}),
        "1 kv head": (1, {}),
        "softcap": (16, {"softcap": 50.0}),
        "ALiBi": (16, {"is_causal": True, "alibi_slopes": torch.rand(16, device=device)}),
        "dropout 0.1": (
            16,
            {"dropout": 0.1, "dropout_key": torch.tensor([1, 2], device=device)},
        ),
    }


def bench_masks(args: argparse.Namespace) -> None:
    """What each option costs at 16k tokens, 16 heads of 128: time falls with the work left."""
    from msfs_kernels import flash_attention

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    for length in args.lengths or (16_384,):
        first: list[float] = []
        print(f"{length} tokens{'':14s} forward ms  of full  backward ms  of full")
        for name, (kv_heads, options) in mask_rows(length, args.device).items():
            q, k, v = (
                torch.randn(1, heads, length, 128, device=args.device, dtype=dtype).requires_grad_()
                for heads in (16, kv_heads, kv_heads)
            )
            o = flash_attention(q, k, v, **options)
            calls: list[Callable[[], object]] = [
                torch.no_grad()(functools.partial(flash_attention, q, k, v, **options)),
                functools.partial(torch.autograd.grad, o, (q, k, v), o, retain_graph=True),
            ]
            times = milliseconds(calls, args)
            first = first or times
            cells = (f"{ms:9.3f} {ms / full:7.1%}" for ms, full in zip(times, first, strict=True))
            print(f"{name:26s} " + "   ".join(cells), flush=True)


def bench_overhead(args: argparse.Namespace) -> None:
    """Time that the host takes to start a tiny attention, in microseconds a call."""
    q, k, v = (
        torch.randn(1, 2, 16, 64, device=args.device, dtype=torch.bfloat16) for _ in range(3)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    moves = tuple(torch.randn_like(x) for x in (q, k, v))

    def torchs(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    do = torch.randn_like(q)

    def with_backward(attention: Attention) -> object:
        return torch.autograd.grad(attention(leaves[0], leaves[1], leaves[2], False), leaves, do)

    calls: dict[str, list[Callable[[], object]]] = {
        "forward": [lambda: ours(q, k, v, False), lambda: torchs(q, k, v, False)],
        "forward that records": [
            lambda: ours(leaves[0], leaves[1], leaves[2], False),
            lambda: torchs(leaves[0], leaves[1], leaves[2], False),
        ],
        "forward and backward": [lambda: with_backward(ours), lambda: with_backward(torchs)],
        "jvp": [lambda: torch.func.jvp(lambda x, y, z: ours(x, y, z, False), (q, k, v), moves)],
    }
    if args.device == "cuda":
        lse, options = q.new_empty((1, 2, 16), dtype=torch.float32), Options(scale=0.125)
        point = (q, k, v, q, lse, options)
        calls["forward, kernel alone"] = [lambda: triton_forward.forward(q, k, v, options)]
        calls["backward, kernel alone"] = [lambda: triton_backward.backward(q, None, *point, False)]
        calls["tangent, kernel alone"] = [lambda: triton_tangent.tangent(q, k, v, None, *point)]
    peer = jvp_flash_if_installed()
    if args.device == "cuda" and peer is not None:
        x, t = (torch.randn(3, 1, 2, 128, 64, device="cuda", dtype=q.dtype) for _ in range(2))
        calls["jvp, jvp_flash_attention"] = [
            functools.partial(jvp_of, attention, tuple(x), tuple(t)) for attention in (ours, peer)
        ]
    print("microseconds a call          ours   peer  ratio (medians of rounds in turn)")
    for name, both in calls.items():
        times, ratio = host_microseconds(both, args)
        peer_and_ratio = f" {times[1]:6.1f} {ratio:6.2f}" if len(both) > 1 else ""
        print(f"{name:26s} {times[0]:6.1f}{peer_and_ratio}", flush=True)


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


def bench_second_order(args: argparse.Namespace) -> None:
    """Peak memory of second derivatives above the inputs, causal, 8 heads of 64: linear in T."""

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours(q, k, v, True).float().sin().sum()

    gradient = torch.func.grad(loss, (0, 1, 2))

    def size_of_gradient(*x: Tensor) -> Tensor:
        return torch.stack([g.float().square().sum() for g in gradient(*x)]).sum()

    gradient_of_gradient = torch.func.grad(size_of_gradient, (0, 1, 2))

    def tangent_of_gradient(*x: Tensor) -> object:
        return torch.func.jvp(gradient, x, x)

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = []
    for length in args.lengths or (4096, 8192, 16_384):
        x = tuple(torch.randn(1, 8, length, 64, device=args.device, dtype=dtype) for _ in range(3))
        cells = []
        for fn in (gradient_of_gradient, tangent_of_gradient):
            peak, seconds = peak_mib(functools.partial(fn, *x), args.device)
            cells.append(f"{peak:9.0f} {1e3 * seconds:9.1f}")
        matrix = 8 * length * length * 4 / 2**20
        rows.append(f"{length:7d}   {cells[0]}      {cells[1]}    {matrix:12.0f}")
    print(" tokens  grad(grad) MiB     ms  jvp(grad) MiB     ms  one T x T float32 MiB")
    print("\n".join(rows))


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


def jvp_of(attention: Attention, primals: tuple, tangents: tuple, causal: bool = False):
    """(o, its tangent), by torch.func.jvp over q, k and v."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal)

    return torch.func.jvp(fn, primals, tangents)


def jvp_flash_if_installed() -> Attention | None:
    try:
        return jvp_flash()
    except ImportError as problem:
        print(f"jvp_flash_attention is not installed ({problem})")
        return None


def bench_tangent(args: argparse.Namespace) -> None:
    """torch.func.jvp at 8,192 tokens of width 1024, beside our own forward and the peer: as called,
    where the host may be the limit, and as CUDA graphs, where only the device's work is left.
    """
    peer = jvp_flash_if_installed()
    rows = []
    print("ms, as called and in CUDA graphs; * times our own forward, x faster than the peer")
    print("head dim, mask, T: forward; jvp; peer | forward; jvp; peer | forward, tangent kernels")
    for head_dim in args.head_dims:
        for causal in args.causal:
            for length in args.lengths or (1024, 4096, 8192):
                shape = (8192 // length, 1024 // head_dim, length, head_dim)
                # Six tensors: torch copies tangents of views into storage as large as the views'.
                x = tuple(torch.randn(shape, device="cuda").bfloat16() for _ in range(6))
                primals, tangents = x[:3], x[3:]
                options = Options(causal=causal, scale=head_dim**-0.5)
                o, lse = triton_backend.forward(x[0], x[1], x[2], options)
                calls: dict[str, Callable[[], object]] = {
                    "forward": functools.partial(ours, x[0], x[1], x[2], causal),
                    "jvp": functools.partial(jvp_of, ours, primals, tangents, causal),
                }
                if peer is not None:
                    calls["peer"] = functools.partial(jvp_of, peer, primals, tangents, causal)
                calls |= {f"{name}, graph": captured(fn) for name, fn in calls.items()}
                calls["forward kernel"] = functools.partial(
                    triton_backend.forward, x[0], x[1], x[2], options
                )
                calls["tangent kernel"] = functools.partial(
                    triton_tangent.tangent, *tangents, None, *primals, o, lse, options
                )
                # In turn, three times, so that other programs on the host disturb all alike.
                rounds = [[median_ms(call, args.rep) for call in calls.values()] for _ in range(3)]
                medians = [sorted(times)[1] for times in zip(*rounds, strict=True)]
                ms = dict(zip(calls, medians, strict=True))
                rows.append(dict(head_dim=head_dim, causal=causal, length=length, **ms))
                cells = []
                for kind in ("", ", graph"):
                    forward, jvp = ms[f"forward{kind}"], ms[f"jvp{kind}"]
                    theirs = ms.get(f"peer{kind}", float("nan"))
                    cells.append(
                        f"{forward:6.3f} {jvp:6.3f} {jvp / forward:5.2f}*"
                        f" {theirs:6.3f} {theirs / jvp:5.2f}x"
                    )
                mask = "causal" if causal else "full  "
                print(
                    f"{head_dim:4d} {mask} {length:6d}  {'  |  '.join(cells)}"
                    f"  |  {ms['forward kernel']:6.3f} {ms['tangent kernel']:6.3f}",
                    flush=True,
                )
    save(args.out, "tangent", rows)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tangent", action="store_true", help="measure torch.func.jvp")
    parser.add_argument("--overhead", action="store_true", help="measure the host's time a call")
    parser.add_argument("--decode", action="store_true", help="measure few tokens against a cache")
    parser.add_argument("--masks", action="store_true", help="measure what each option costs")
    parser.add_argument(
        "--second-order", action="store_true", help="peak memory of second derivatives"
    )
    parser.add_argument("--tune", action="store_true", help="measure tile sizes, rewrite the table")
    parser.add_argument(
        "--bench",
        action="store_true",
        help="measure the grid (the default without any of these)",
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens; the default is each measurement's own"
    )
    parser.add_argument("--causal", type=int, nargs="+", choices=[0, 1], default=[0, 1])
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=["ours", "cuda", "flash2", "flex", "cudnn", "flash4"],
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["forward", "fused", "own", "keys", "queries", "tangent", "dual"],
    )
    parser.add_argument("--sizes", nargs="+", choices=list(LENGTHS), default=["short", "long"])
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of measurement a cell")
    parser.add_argument("--seconds", type=float, default=60.0, help="of compiling in --tune")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--show", type=int, default=4, help="lines a ranking in --tune")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_attention"))
    args = parser.parse_args()
    args.causal = [bool(x) for x in args.causal]
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looks, and does not start CUDA
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_attention measures a GPU: torch.cuda.is_available() is False here")
    if args.tune:
        tune(args)
    modes = {
        "overhead": bench_overhead,
        "decode": bench_decode,
        "masks": bench_masks,
        "second_order": bench_second_order,
        "tangent": bench_tangent,
    }
    chosen = [run for name, run in modes.items() if getattr(args, name)]
    for run in chosen:
        run(args)
    if args.bench or not (chosen or args.tune):
        bench_cpu(args) if args.device == "cpu" else bench(args)


if __name__ == "__main__":
    main()
