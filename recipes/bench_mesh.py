"""Tokens a second of one sharded training step: the functional path beside FSDP2, in one run.

    python recipes/bench_mesh.py --preset tiny --steps 3                     # CPU, one process
    torchrun --nproc-per-node 2 recipes/bench_mesh.py                        # 1.3B, 2 x 4096 a GPU
    torchrun --nproc-per-node 4 recipes/bench_mesh.py --mesh.tp 2 --paths functional

Each path trains the same decoder on the same random tokens: bf16 products, fp32 shards, fp32 sums
of gradients, AdamW, blocks recomputed if asked; tp also cuts tokens and vocabulary. It prints the
first step's seconds, tokens/s a rank (median of the steps after two), peak memory of rank 0 and the
loss, which must agree.
"""

import functools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch._inductor.config as inductor
import tyro

from msfs_functional import errors, optim, random
from msfs_functional.fsdp import fully_sharded
from msfs_functional.gathering import gathered, sharded
from msfs_functional.layouts import DECODER_BY_TOKENS
from msfs_functional.losses import cross_entropy
from msfs_functional.meshes import data_rank, mesh
from msfs_functional.models import decoder as models
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import remat
from msfs_functional.vocabulary_parallel import sharded_linear_cross_entropy

Path = Literal["functional", "regions", "fsdp2"]


@dataclass(frozen=True)
class Mesh:
    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1


@dataclass(frozen=True)
class Config:
    preset: str = "large"  # of models.decoder
    vocab: int = 50304
    depth: int | None = None  # blocks; default: the preset's
    length: int = 4096  # tokens of a sequence, at most the preset's max_length
    batch: int = 2  # sequences a rank
    steps: int = 10
    paths: tuple[Path, ...] = ("functional", "regions", "fsdp2")
    overlap: bool = True  # Inductor buckets collectives and reorders them beside computation
    recompute: bool = False  # blocks are recomputed in the backward pass
    mesh: Mesh = field(default_factory=Mesh)
    debug: bool = False


def run(path: Path, config: Config) -> str:
    on = mesh(config.mesh.dp_replicate, config.mesh.dp_shard, config.mesh.tp)
    options = {} if config.depth is None else {"depth": config.depth}
    plain = models.decoder(models.PRESETS[config.preset](config.vocab, **options))
    make = fully_sharded if path == "fsdp2" else sharded
    model = make(plain, DECODER_BY_TOKENS, on, dtype=torch.bfloat16, reduce_dtype=torch.float32)
    around: dict[str, Any] = {"around_block": remat} if config.recompute else {}

    loss_of = sharded_linear_cross_entropy(on, config.vocab)

    def loss_fn(params, tokens, key):
        if config.mesh.tp > 1:
            states = model.apply(params, tokens[:, :-1], method="hidden", **around)
            weight = models.output_weight(params)
            loss, count = loss_of(states, weight, tokens[:, 1:], ignore_index=-1)
        else:
            logits = model.apply(params, tokens[:, :-1], **around)
            loss, count = cross_entropy(logits, tokens[:, 1:], ignore_index=-1)
        return loss / count, {}

    optimizer = optim.adamw(3e-4)
    gradient, compile = None, path if path == "regions" else True
    if path == "fsdp2":
        gradient = model.gradient  # pyright: ignore[reportAttributeAccessIssue]
        for block in model.module.blocks:  # pyright: ignore
            block.compile()
    state = init_state(model.init(0), optimizer, random.key(0))
    step = make_step(
        gathered(loss_fn, model), optimizer, clip_norm=1.0, compile=compile, gradient=gradient
    )
    device, share = torch.device(on.device_type), data_rank(on)[0]
    length = min(config.length, plain.skeleton.config.max_length)  # pyright: ignore
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    generator = torch.Generator().manual_seed(share)
    tokens = torch.randint(0, config.vocab, (config.batch, length + 1), generator=generator)
    tokens, seconds, metrics = tokens.to(device), [], {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(config.steps):
        start = time.perf_counter()
        state, metrics = step(state, tokens)
        sync()
        seconds.append(time.perf_counter() - start)
    rate = tokens[:, 1:].numel() / statistics.median(seconds[2:] or seconds) / config.mesh.tp
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    return (
        f"{path:12} first step {seconds[0]:6.1f} s  {rate:10,.0f} tokens/s a rank  "
        f"{peak:6.1f} GiB  loss {loss:.5f}  norm {norm:.4f}"
    )


def main(config: Config) -> None:
    if config.overlap and torch.cuda.is_available():
        inductor.reorder_for_compute_comm_overlap = True
        inductor.bucket_all_gathers_fx = inductor.bucket_reduce_scatters_fx = "all"
    for path in config.paths:
        torch._dynamo.reset()
        line = run(path, config)
        if not torch.distributed.get_rank():
            print(line, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    errors.run(main, functools.partial(tyro.cli, Config, description=__doc__))
