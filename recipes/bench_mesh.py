"""Tokens a second of one sharded training step: the functional path beside FSDP2, in one run.

    python recipes/bench_mesh.py --preset tiny --steps 3                     # CPU, one process
    torchrun --nproc-per-node 4 recipes/bench_mesh.py                        # 1.3B, 2 x 4096 a GPU
    torchrun --nproc-per-node 4 recipes/bench_mesh.py --mesh.tp 2 --paths functional
    torchrun --nproc-per-node 4 recipes/bench_mesh.py --mesh.cp 4 --batch 8 --paths functional

Each path trains the same decoder on the same random tokens: bf16 products, fp32 shards, fp32 sums
of gradients, fused linear and cross-entropy, AdamW, blocks recomputed if asked; tp also cuts tokens
and vocabulary, cp cuts the sequences.

    functional   blocks compiled once for all; gathers and sums beside them (`overlap`), by copies
                 between the GPUs of a host (`peer_copies`); on GPUs the whole step, communication
                 included, is one CUDA graph
    collectives  the same, gathers and sums by NCCL
    launched     functional without the CUDA graph
    fsdp2        fully_shard with every block compiled, behind the same step (`fsdp`)
    torch        the same module in a loop of torch's own: clip_grad_norm_, fused AdamW
    whole        the functional loss as one graph of Inductor's, which reorders collectives

It prints the first step's seconds (what a process's first compilation does once comes before, on
every path, and is printed apart), tokens/s a rank, model FLOPs utilisation, peak memory of rank 0
and the first losses, which must agree. MFU is that of `pretrain.py`, with 989 TFLOP/s as the peak.
--trace adds how much of the communication had computation beside it, and the kernels that took
longest.
"""

import collections
import functools
import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any, Literal

import torch
import torch._inductor.config as inductor
import tyro
from measuring import fresh, measure, synchronize
from torch.distributed.tensor import DTensor

from msfs_functional import context_parallel, errors, optim, peer_copies, random
from msfs_functional.compiling import graphed, prepare_compiler
from msfs_functional.fsdp import fully_sharded
from msfs_functional.gathering import gathered, sharded
from msfs_functional.layouts import DECODER_BY_TOKENS
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.meshes import axis_size, data_rank, mesh
from msfs_functional.models import decoder as models
from msfs_functional.params import Functional
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import remat
from msfs_functional.vocabulary_parallel import sharded_linear_cross_entropy

Path = Literal["functional", "collectives", "launched", "fsdp2", "torch", "whole"]
BY_REGIONS = ("functional", "collectives", "launched")
PEAK = 989e12  # of an H100 or H200 in bfloat16 [FLOP/s]
RATE = 3e-5  # learning rate: at a larger one rounding alone drives the paths apart in ten steps


@dataclass(frozen=True)
class Mesh:
    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1
    cp: int = 1


@dataclass(frozen=True)
class Config:
    preset: str = "large"  # of models.decoder
    vocab: int = 50304
    depth: int | None = None  # blocks; default: the preset's
    length: int = 4096  # tokens of a sequence, at most the preset's max_length
    batch: int = 2  # sequences of a data rank
    steps: int = 10  # timed, after three others
    paths: tuple[Path, ...] = ("functional", "collectives", "launched", "fsdp2", "torch")
    recompute: bool = False  # blocks are recomputed in the backward pass
    trace: bool = False
    traces: File | None = None  # folder to keep the traces in
    compile: bool = True
    mesh: Mesh = field(default_factory=Mesh)
    debug: bool = False


class WithLoss(models.Decoder):
    """fully_shard gathers around a module's forward only: the loss belongs into it."""

    def forward(self, tokens, labels, **options):  # pyright: ignore
        states = self.hidden(tokens, **options)
        weight = (self.embedding if self.config.tied else self.output).weight
        return linear_cross_entropy(states, weight, labels, ignore_index=-1)


def make_loss(config: Config, path: Path, model: Functional, on: Any) -> Callable[..., Any]:
    options: dict[str, Any] = {"around_block": remat} if config.recompute else {}
    loss_of = sharded_linear_cross_entropy(on, config.vocab)
    if config.mesh.cp > 1:
        options["implementation"] = context_parallel.ring_attention(on)

    def loss_fn(params, batch, key):
        tokens, labels, positions = batch
        if path in ("fsdp2", "torch"):
            loss, count = model.apply(params, tokens, labels, **options)
        else:
            states = model.apply(params, tokens, positions=positions, method="hidden", **options)
            loss, count = loss_of(states, models.output_weight(params), labels, ignore_index=-1)
        return loss / count, {}

    return gathered(loss_fn, model)


def make_batch(config: Config, on: Any, length: int) -> tuple[torch.Tensor, ...]:
    """Tokens, labels and positions that this rank holds; sequence i is the same on every mesh."""
    first, rows = data_rank(on)[0] * config.batch, []
    for i in range(first, first + config.batch):
        generator = torch.Generator().manual_seed(i)
        rows.append(torch.randint(0, config.vocab, (length + 1,), generator=generator))
    tokens = torch.stack(rows)
    parts = tokens[:, :-1], tokens[:, 1:], torch.arange(length)[None]
    own = [context_parallel.own_tokens(x, on).contiguous().to(on.device_type) for x in parts]
    return own[0], own[1], own[2][0]


def flops_per_token(config: models.DecoderConfig, shapes: dict[str, torch.Size]) -> float:
    looked_up = "embedding" if not config.tied else "positions"
    matrices = [math.prod(s) for n, s in shapes.items() if len(s) == 2 and looked_up not in n]
    attention = config.depth * config.heads * config.size_of_head * config.max_length
    return 6 * sum(matrices) + 6 * attention


def build(path: Path, config: Config, on: Any) -> tuple[Any, models.DecoderConfig]:
    options: dict[str, Any] = {} if config.depth is None else {"depth": config.depth}
    preset = models.PRESETS[config.preset](config.vocab)
    sizes = replace(preset, max_length=min(config.length, preset.max_length), **options)
    plain, make = models.decoder(sizes), sharded
    if path in ("fsdp2", "torch"):
        make = fully_sharded
        with torch.device("meta"):
            plain = replace(plain, skeleton=WithLoss(sizes))
    given: dict[str, Any] = {"dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    if path == "collectives":
        given["transport"] = path
    model: Any = make(plain, DECODER_BY_TOKENS, on, **given)
    if make is fully_sharded and config.compile:
        for block in model.module.blocks:
            block.compile()
    return model, sizes


def our_step(path: Path, config: Config, model: Any, on: Any, batch: Any) -> Callable[[], Any]:
    optimizer = optim.adamw(RATE)
    state = init_state(model.init(0), optimizer, random.key(0))
    compile = config.compile and ("regions" if path in BY_REGIONS else True)
    gradient = None if path == "whole" else model.gradient
    loss_fn = make_loss(config, path, model, on)
    step = make_step(loss_fn, optimizer, clip_norm=1.0, compile=compile, gradient=gradient)
    if path in BY_REGIONS and path != "launched" and torch.cuda.is_available():
        step = graphed(step)

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"], metrics["grad_norm"]

    return once


def torch_step(model: Any, batch: Any) -> Callable[[], Any]:
    """What users of fully_shard write."""
    model.init(0)
    module, world = model.module, torch.distributed.get_world_size()
    weights = list(module.parameters())
    fused = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(weights, RATE, weight_decay=0.01, fused=fused)
    tokens, labels, _ = batch

    def once() -> Any:
        total, count = module(tokens, labels)
        loss = total / count
        (loss / world).backward()  # gradients are sums over ranks (see fully_sharded)
        norm: Any = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return once


def run(path: Path, config: Config) -> str:
    on = mesh(config.mesh.dp_replicate, config.mesh.dp_shard, config.mesh.tp, config.mesh.cp)
    model, sizes = build(path, config, on)
    batch = make_batch(config, on, sizes.max_length)
    step = torch_step(model, batch) if path == "torch" else our_step(path, config, model, on, batch)
    history = []

    def once() -> None:
        history.append(step())

    fresh()
    found = measure(once, 3, config.steps)
    told = ", ".join(f"{mean(loss):.4f} ({whole(norm):.3f})" for loss, norm in history[:4])
    shares = axis_size(on, "tp") * axis_size(on, "cp")
    rate = config.batch * sizes.max_length / found.seconds / shares
    used = rate * flops_per_token(sizes, model.shapes) / PEAK
    memory = found.memory + peer_copies.shared_bytes() / 2**30
    line = (
        f"{path:10} first step {found.first:5.1f} s  {1e3 * found.seconds:7.1f} ms  "
        f"{rate:8,.0f} tokens/s a rank  MFU {used:.1%}  {memory:5.1f} GiB\n"
        f"    losses (and gradient norms) of the first steps: {told}"
    )
    return line + (f"\n{traced(once, path, config.traces)}" if config.trace else "")


def mean(loss: torch.Tensor) -> float:
    """Over ranks: torch's loop has each rank's own."""
    loss = loss.clone()
    torch.distributed.all_reduce(loss)
    return float(loss) / torch.distributed.get_world_size()


def whole(norm: Any) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def traced(once: Callable[[], Any], name: str, kept: File | None) -> str:
    """What the GPU did in two steps: how much of the communication was hidden, the top kernels."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA if torch.cuda.is_available() else kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        once()
        once()
        synchronize()
    if torch.distributed.get_rank():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = (kept or File(folder)) / f"trace-{name}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return "no kernels: nothing ran on a GPU"
    begin = min(e["ts"] for e in kernels)
    spans = [(e["ts"] - begin, e["ts"] - begin + e["dur"], talks(e)) for e in kernels]
    talk, work = (union([s[:2] for s in spans if s[2] == yes]) for yes in (True, False))
    all_of_it = union([s[:2] for s in spans])
    length = lambda found: sum(b - a for a, b in found) / 2e3  # noqa: E731  [ms a step]
    hidden = length(talk) + length(work) - length(all_of_it)
    whole = max(b for _, b, _ in spans) / 2e3
    lines = [
        f"    a step of {whole:.1f} ms: computation {length(work):.1f} ms, communication "
        f"{length(talk):.1f} ms, {hidden / max(length(talk), 1e-9):.0%} of it hidden, "
        f"idle {whole - length(all_of_it):.1f} ms"
    ]
    bare = sorted(without(talk, work), key=lambda s: s[0] - s[1])[:8]
    at = ", ".join(f"{(b - a) / 1e3:.2f} at {a / 1e3:.1f}" for a, b in sorted(bare))
    lines.append(f"    longest communication of two steps with nothing beside it [ms]: {at}")
    times, counts = collections.Counter(), collections.Counter()
    for e in kernels:
        times[e["name"]] += e["dur"] / 2e3
        counts[e["name"]] += 1
    for name, ms in times.most_common(22):
        lines.append(f"    {ms:7.2f} ms {counts[name] / 2:6.1f} x {name[:90]}")
    return "\n".join(lines)


def talks(event: dict[str, Any]) -> bool:
    """Whether it is communication: NCCL's kernels, copies between GPUs and waits for them."""
    name = event["name"]
    return "nccl" in name or "barrier" in name or event["cat"] == "gpu_memcpy"


def without(
    spans: list[tuple[float, float]], others: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The parts of `spans` in which none of `others` is; both as `union` makes them."""
    found = []
    for a, b in spans:
        for c, d in others:
            if c < b and d > a:
                if a < c:
                    found.append((a, c))
                a = max(a, d)
        if a < b:
            found.append((a, b))
    return found


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time in spans that do not overlap."""
    found: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(b, found[-1][1]))
        else:
            found.append((a, b))
    return found


def main(config: Config) -> None:
    mesh(config.mesh.dp_replicate, config.mesh.dp_shard, config.mesh.tp, config.mesh.cp)
    first, begin = not torch.distributed.get_rank(), time.perf_counter()
    if config.compile:
        prepare_compiler()
    if first:
        kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        world = torch.distributed.get_world_size()
        took = time.perf_counter() - begin
        print(f"{world} x {kind}, torch {torch.__version__}, {config.mesh}")
        print(f"compiler prepared in {took:.1f} s", flush=True)
    for path in config.paths:
        torch._dynamo.reset()
        whole = path == "whole" and torch.cuda.is_available()
        bucket = "all" if whole else "none"
        with inductor.patch(
            reorder_for_compute_comm_overlap=whole,
            bucket_all_gathers_fx=bucket,
            bucket_reduce_scatters_fx=bucket,
        ):
            line = run(path, config)
        if first:
            print(line, flush=True)
        peer_copies.forget()
        fresh()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    errors.run(main, functools.partial(tyro.cli, Config, description=__doc__))
