"""What an optimizer step costs: ours compiled in place against torch.optim.AdamW.

    python recipes/bench_optim.py                 # on a GPU: GPT-2 124M and Transformer base shapes
    python recipes/bench_optim.py --device cpu    # a smoke test of the script

AdamW with clipping by global norm, float32. GiB/s counts what must be moved: parameter, gradient
and two moments read, all but the gradient written, the gradient read once more for the norm.
"combo" is Inductor's combo_kernels, which updates many parameters in one kernel.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from msfs_functional import optim, random


@dataclass(frozen=True)
class Config:
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 10  # timed groups of steps; the median counts
    steps: int = 10  # steps in a group, queued without waiting


def gpt2() -> dict[str, tuple[int, ...]]:
    """GPT-2 124M: 148 tensors, most of the numbers in few of them."""
    shapes: dict[str, tuple[int, ...]] = {"wte": (50304, 768), "wpe": (1024, 768)}
    for i in range(12):
        for name, shape in (("qkv", (2304, 768)), ("out", (768, 768)), ("up", (3072, 768))):
            shapes |= {f"{i}.{name}.weight": shape, f"{i}.{name}.bias": shape[:1]}
        shapes |= {f"{i}.down.weight": (768, 3072), f"{i}.down.bias": (768,)}
        shapes |= {f"{i}.norm{j}.{name}": (768,) for j in (1, 2) for name in ("weight", "bias")}
    return shapes | {"norm.weight": (768,), "norm.bias": (768,)}


def base() -> dict[str, tuple[int, ...]]:
    """Transformer base, 6 + 6 layers of width 512: 253 tensors, many of them small."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (32000, 512)}
    for i in range(18):  # an encoder layer has one attention, a decoder layer two
        for name in "qkvo":
            shapes |= {f"{i}.{name}.weight": (512, 512), f"{i}.{name}.bias": (512,)}
        shapes |= {f"{i}.norm.weight": (512,), f"{i}.norm.bias": (512,)}
    for i in range(12):
        shapes |= {f"{i}.up.weight": (2048, 512), f"{i}.up.bias": (2048,)}
        shapes |= {f"{i}.down.weight": (512, 2048), f"{i}.down.bias": (512,)}
        shapes |= {f"{i}.last.weight": (512,), f"{i}.last.bias": (512,)}
    return shapes


def seconds(step: Callable[[], object], config: Config) -> float:
    """Median time of one step, in seconds."""
    for _ in range(3):
        step()
    groups = []
    for _ in range(config.repeats):
        synchronize(config)
        start = time.perf_counter()
        for _ in range(config.steps):
            step()
        synchronize(config)
        groups.append((time.perf_counter() - start) / config.steps)
    return statistics.median(groups)


def synchronize(config: Config) -> None:
    if config.device == "cuda":
        torch.cuda.synchronize()


def torch_step(params: list[Tensor], grads: list[Tensor], fused: bool) -> Callable[[], None]:
    leaves = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(leaves, 1e-4, fused=fused, foreach=not fused)

    def step() -> None:
        for p, g in zip(leaves, grads, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(leaves, 1.0, foreach=True)
        optimizer.step()

    return step


def our_step(
    params: dict[str, Tensor], grads: dict[str, Tensor], combo: bool
) -> Callable[[], None]:
    params = {name: p.clone() for name, p in params.items()}
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-4))
    state = optimizer.init(params)
    update_ = torch.compile(
        optim.in_place(optimizer), fullgraph=True, options={"combo_kernels": combo}
    )
    return lambda: update_(grads, state, params)


def main(config: Config) -> None:
    table = Table("parameters", "side", "ms a step", "GiB/s", "first call s", title="AdamW + clip")
    models = {"GPT-2 124M": gpt2(), "Transformer base": base()}
    if config.device == "cpu":
        models = {"small": {f"{i}": (64, 64) for i in range(8)}}
    for model, shapes in models.items():
        keys = random.split(random.key(0, device=config.device), len(shapes))
        params = {
            name: random.uniform(k, shape)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        grads = {name: p * 1e-3 for name, p in params.items()}
        moved = 8 * sum(p.nbytes for p in params.values())
        sides: dict[str, Callable[[], Callable[[], None]]] = {
            "torch foreach": lambda p=params, g=grads: torch_step(
                [*p.values()], [*g.values()], False
            ),
            "torch fused": lambda p=params, g=grads: torch_step([*p.values()], [*g.values()], True),
            "ours": lambda p=params, g=grads: our_step(p, g, False),
            "ours, combo": lambda p=params, g=grads: our_step(p, g, True),
        }
        for side, make in sides.items():
            torch.compiler.reset()
            step = make()
            start = time.perf_counter()
            step()
            synchronize(config)
            first = time.perf_counter() - start
            took = seconds(step, config)
            table.add_row(
                f"{model}, {len(shapes)} tensors",
                side,
                f"{took * 1e3:.3f}",
                f"{moved / took / 2**30:.0f}",
                f"{first:.1f}",
            )
    Console(width=100).print(table)
    if config.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
