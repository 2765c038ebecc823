"""What a compiled dropout costs: ours, by a key, against F.dropout, eager and compiled.

    python recipes/bench_dropout.py                 # on a GPU: 256 MiB, and (256, 128, 512), bf16
    python recipes/bench_dropout.py --device cpu    # a smoke test of the script

Each row is forward and backward of x -> dropout(x), and of the residual form x, y -> x + dropout(y)
that a Transformer has. "kept" is what lives between forward and backward beside inputs and output.
The last column is the time over that of the compiled F.dropout, which is to be at most 1.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from msfs_functional import random


@dataclass(frozen=True)
class Config:
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    rate: float = 0.1  # share of elements dropped
    repeats: int = 20  # timed groups of calls; the median counts
    calls: int = 20  # calls in a group, queued without waiting


def seconds(call: Callable[[], object], config: Config) -> float:
    """Median time of one call, in seconds."""
    for _ in range(3):
        call()
    groups = []
    for _ in range(config.repeats):
        synchronize(config)
        start = time.perf_counter()
        for _ in range(config.calls):
            call()
        synchronize(config)
        groups.append((time.perf_counter() - start) / config.calls)
    return statistics.median(groups)


def synchronize(config: Config) -> None:
    if config.device == "cuda":
        torch.cuda.synchronize()


def kept_bytes(forward: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Bytes that a call allocates and leaves behind, its output aside."""
    before = torch.cuda.memory_allocated()
    output = forward(*inputs)
    return torch.cuda.memory_allocated() - before - output.nbytes


def main(config: Config) -> None:
    shapes = [(2**27,), (256, 128, 512)] if config.device == "cuda" else [(2**16,), (8, 16, 32)]
    key = random.key(0, device=config.device)

    def ours(x: Tensor) -> Tensor:
        return random.dropout(key, x, config.rate)

    def peer(x: Tensor) -> Tensor:
        return F.dropout(x, config.rate)

    sides = {
        "F.dropout eager": (peer, False),
        "F.dropout compiled": (peer, True),
        "ours compiled": (ours, True),
    }
    table = Table(
        "work", "side", "forward ms", "both ms", "kept MiB", "ratio", title="dropout, bf16"
    )
    for shape in shapes:
        x, y, g = (torch.randn(shape, device=config.device, dtype=torch.bfloat16) for _ in range(3))
        x.requires_grad_()
        y.requires_grad_()
        for work, inputs in ((f"{shape}", [x]), (f"residual {shape}", [x, y])):
            results = {}
            for side, (dropout, compiled) in sides.items():
                torch.compiler.reset()

                def forward(
                    *inputs: Tensor, dropout: Callable[[Tensor], Tensor] = dropout
                ) -> Tensor:
                    return sum(inputs[:-1], dropout(inputs[-1]))

                if compiled:
                    forward = torch.compile(forward, fullgraph=True)

                def both(forward: Callable[..., Tensor] = forward, inputs=inputs, g=g) -> object:
                    return torch.autograd.grad(forward(*inputs), inputs, g)

                results[side] = (
                    seconds(lambda forward=forward, inputs=inputs: forward(*inputs), config),
                    seconds(both, config),
                    kept_bytes(forward, inputs) / 2**20 if config.device == "cuda" else 0.0,
                )
            for side, (one, two, kept) in results.items():
                ratio = two / results["F.dropout compiled"][1]
                table.add_row(
                    work,
                    side,
                    f"{one * 1e3:.3f}",
                    f"{two * 1e3:.3f}",
                    f"{kept:.1f}",
                    f"{ratio:.2f}",
                )
    Console(width=100).print(table)
    if config.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, rate {config.rate}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
