"""Forward mode beside our own forward and the peer, and the memory of second derivatives."""

import argparse
import functools
from collections.abc import Callable

import torch
from attention_grid import save
from attention_peers import jvp_flash_if_installed, jvp_of, ours
from attention_timing import captured, median_ms, peak_mib
from msfs_kernels import triton_backend, triton_tangent
from msfs_kernels.options import Options
from torch import Tensor


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
