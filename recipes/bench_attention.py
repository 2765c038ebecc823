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
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from attention_costs import bench_decode, bench_masks, bench_overhead
from attention_derivatives import bench_second_order, bench_tangent
from attention_grid import bench, bench_cpu
from attention_peers import PEERS
from attention_tuning import LENGTHS, tune


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
