"""How fast a GPT-2 of 124M parameters trains on one GPU: ours beside a compiled PyTorch module.

    python recipes/bench_pretrain.py                      # all sides, 32 x 1024 tokens, bf16
    python recipes/bench_pretrain.py --depths 12 48 --sides regions    # compile time over depth
    python recipes/bench_pretrain.py --sides ours --profile            # where the time goes
    python recipes/bench_pretrain.py --small              # on a CPU: to see that all of it works

The sides do the same work from the same parameters on the same tokens, clipped to a norm of 1, with
AdamW, dropout 0 and matrices without biases:

    peer      nn.Module as nanoGPT trains one: torch.compile, autocast to bf16, torch's attention,
              cross-entropy of all logits, clip_grad_norm_, fused AdamW
    ours      make_step: the loss compiled as one graph, linear cross-entropy in chunks, flash
              attention, q, k and v in one matrix, AdamW in place; one CUDA graph a step
    regions   the same, but each block compiled once for all; one CUDA graph a step
    thrifty   `regions`, but activations that one pass over memory makes are made again in the
              backward pass
    launched  `ours` without the CUDA graph

Each runs in a process of its own that finds no compiled code of an earlier one. It prints tokens/s
(steps timed together), GiB (torch's peak of allocated memory), MFU (`msfs_functional.utilisation`),
the losses of the first steps, which must agree (later ones drift apart: the rate is at its peak
from the start, and the peer's residual stream is float32), and two times: `first step`, the seconds
until the step is done once (of ours from its making on), and `ready`, the same from where the
process begins to work: to prepare the compiler, as all sides do first, and to draw parameters.
"""

import functools
import json
import math
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from measuring import Figures, fresh, kernels, measure
from torch import Tensor, nn

from msfs_functional import errors, optim, random
from msfs_functional.compiling import graphed, prepare_compiler
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models.decoder import DECAY, DecoderConfig, decoder, gpt2, output_weight
from msfs_functional.params import Params, cast
from msfs_functional.regions import region_of
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import in_dtype
from msfs_functional.utilisation import flops_per_token, peak_flops

Side = Literal["ours", "regions", "thrifty", "launched", "peer"]
GOALS = {"tokens/s over the peer's": 1.12, "GiB": 12.0, "first step [s]": 10.0}


@dataclass(frozen=True)
class Config:
    """What to measure, and for how long."""

    sides: tuple[Side, ...] = ("ours", "peer", "regions", "launched")
    depths: tuple[int, ...] = (12,)  # blocks; each is measured
    batch: int = 32  # sequences
    length: int = 1024  # tokens
    steps: int = 30  # timed
    warmup: int = 10  # steps before, compiling included
    small: bool = False  # sizes that a CPU manages, eager: to see that it works
    profile: bool = False  # print the kernels of the first side
    check: bool = False  # exit code 1 unless the goals are met
    out: Path | None = None  # also write the figures here, as JSON
    debug: bool = False  # show tracebacks


def shape_of(config: Config, depth: int) -> DecoderConfig:
    """GPT-2's; the vocabulary is padded to a multiple of 128 as nanoGPT does."""
    sizes: dict[str, Any] = {"max_length": config.length, "depth": depth, "fused": True}
    if config.small:
        sizes |= {"vocab": 300, "width": 32, "heads": 2, "hidden": 64}
    bare = dict.fromkeys(("qkv_bias", "output_bias", "hidden_bias", "norm_bias"), False)
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    return gpt2(**{"vocab": 50_304, **bare, **none, **sizes})


class Peer(nn.Module):
    """The same model as an ordinary module, its parameters named as ours."""

    def __init__(self, shape: DecoderConfig):
        super().__init__()
        width, hidden, self.heads = shape.width, shape.hidden, shape.heads
        self.embedding = nn.Embedding(shape.vocab, width)
        self.positions = nn.Embedding(shape.max_length, width)
        linear = functools.partial(nn.Linear, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention_norm": nn.LayerNorm(width, bias=False),
                    "attention": nn.ModuleDict(
                        {"qkv": linear(width, 3 * width), "o": linear(width, width)}
                    ),
                    "feed_forward_norm": nn.LayerNorm(width, bias=False),
                    "feed_forward": nn.ModuleDict(
                        {"up": linear(width, hidden), "down": linear(hidden, width)}
                    ),
                }
            )
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            layers: Any = block
            qkv = layers["attention"]["qkv"](layers["attention_norm"](x))
            q, k, v = (
                y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layers["attention"]["o"](y.transpose(1, 2).flatten(2))
            y = layers["feed_forward"]["up"](layers["feed_forward_norm"](x))
            x = x + layers["feed_forward"]["down"](F.gelu(y, approximate="tanh"))
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def peer_step(params: Params, shape: DecoderConfig, batch: dict[str, Tensor], compiled: bool):
    """() -> loss: the usual training step."""
    device = batch["tokens"].device
    torch.set_float32_matmul_precision("high")
    model = Peer(shape).to(device)
    model.load_state_dict(params)
    own = dict(model.named_parameters())
    matrices = [p for p in own.values() if p.ndim == 2]
    vectors = [p for p in own.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    forward = torch.compile(model) if compiled else model

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(batch["tokens"], batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(
    side: Side, params: Params, shape: DecoderConfig, batch: dict[str, Tensor], compiled: bool
):
    """() -> loss: the step that pretrain.py takes, here of a config with q, k, v in one matrix."""
    model, regions = decoder(shape), side in ("regions", "thrifty")
    block_fn = functools.partial(region_of, thrifty=True) if side == "thrifty" else None

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params = cast(params, torch.bfloat16)
        states = model.apply(params, batch["tokens"], method="hidden", around_block=block_fn)
        total, count = linear_cross_entropy(
            states, output_weight(params), batch["labels"], ignore_index=-1
        )
        return total / count, {}

    decay = [(r"embedding|positions", True), *DECAY]  # as the peer does
    optimizer = optim.adamw(6e-4, 0.9, 0.95, 1e-8, 0.1, decay)
    compile = ("regions" if regions else True) if compiled else False
    gradient = in_dtype(torch.bfloat16) if regions else None  # of a single graph it is part
    options: dict[str, Any] = {"compile": compile, "dynamic": False, "gradient": gradient}
    step = make_step(loss_fn, optimizer, clip_norm=1.0, **options)
    state = init_state(params, optimizer, random.key(0, device=batch["tokens"].device))
    if compiled and side != "launched":
        step = graphed(step)
    return lambda: step(state, batch)[1]["loss"]


def run(side: Side, config: Config, depth: int, profile: bool) -> dict[str, Any]:
    """Measures one side in this process."""
    start = time.perf_counter()
    device, compiled = "cpu" if config.small else "cuda", not config.small
    if compiled:
        prepare_compiler()
    shape = shape_of(config, depth)
    model = decoder(shape)
    params, flops = model.init(0, device=device), flops_per_token(model, config.length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab - 47, (config.batch, config.length + 1), generator=generator)
    batch = {"tokens": ids[:, :-1].to(device), "labels": ids[:, 1:].to(device)}
    batch = {name: value.contiguous() for name, value in batch.items()}
    begin = time.perf_counter()
    if side == "peer":
        step, made = peer_step(params, shape, batch, compiled), 0.0
    else:
        step = our_step(side, params, shape, batch, compiled)
        made = time.perf_counter() - begin  # which starts to compile
    del params
    fresh()
    before = time.perf_counter() - start
    losses: list[Tensor] = []

    def once() -> None:
        loss = step()
        if len(losses) < 4:
            losses.append(loss)

    figures: Figures = measure(once, config.warmup, config.steps)
    if profile:
        print(kernels(step, 3))
    rate = config.batch * config.length / figures.seconds
    return {
        "tokens/s": rate,
        "GiB": figures.memory,
        "first step [s]": made + figures.first,
        "ready [s]": before + figures.first,
        "MFU": rate * flops / peak_flops(device),
        "losses": [float(loss) for loss in losses],
    }


def alone(side: Side, config: Config, depth: int, profile: bool) -> dict[str, Any]:
    """`run` in a process that shares no compiled code with others."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(run, side, config, depth, profile).result()


def main(config: Config) -> None:
    known = {"regions", "peer"} <= set(config.sides) and 12 in config.depths
    if config.check and (config.small or not known):
        raise ValueError(
            "--check compares regions with peer at depth 12: ask for both, not --small"
        )
    if config.small:
        config = replace(config, batch=2, length=16, steps=2, warmup=1, depths=(2,))
    elif not torch.cuda.is_available():
        raise ValueError("no GPU here, where these figures mean something: --small runs on a CPU")
    chip = platform.machine() if config.small else torch.cuda.get_device_name()
    print(f"{chip}, torch {torch.__version__}, {config.batch} x {config.length} tokens, bf16")
    found: dict[str, dict[str, Any]] = {}
    for depth in config.depths:
        for side in config.sides:
            first = config.profile and not found
            one = found[f"{side}, {depth} blocks"] = alone(side, config, depth, first)
            peer = found.get(f"peer, {depth} blocks", {"tokens/s": math.nan})
            print(
                f"{side:9} {depth:3} blocks  {one['tokens/s'] / 1e3:8.1f}k tokens/s  "
                f"{one['GiB']:6.2f} GiB  first step {one['first step [s]']:5.1f} s, "
                f"ready {one['ready [s]']:5.1f} s  MFU {one['MFU']:5.1%}  "
                f"{one['tokens/s'] / peer['tokens/s']:5.2f}x the peer's tokens/s  "
                f"losses {' '.join(f'{loss:.4f}' for loss in one['losses'])}",
                flush=True,
            )
    if config.out is not None:
        config.out.write_text(json.dumps(found, indent=1))
    if config.check:
        check(found)


def check(found: dict[str, dict[str, Any]]) -> None:
    """Of the side that `pretrain.py` takes."""
    ours, peer = found["regions, 12 blocks"], found["peer, 12 blocks"]
    ratio = ours["tokens/s"] / peer["tokens/s"]
    missed = {
        "tokens/s over the peer's": ratio < GOALS["tokens/s over the peer's"],
        **{name: ours[name] > GOALS[name] for name in ("GiB", "first step [s]")},
    }
    if any(missed.values()):
        raise SystemExit(f"goals not met: {[name for name, bad in missed.items() if bad]}")


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
