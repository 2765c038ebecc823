"""How fast translation trains: beside transformers' Marian, beside perfect data, as an ensemble.

    python recipes/bench_train.py marian       # Transformer base, the same work on both sides

    python recipes/bench_train.py data         # batches from the loader against the same on device

    python recipes/bench_train.py ensemble     # 8 members in one step against 8 runs, step by step

`--small` shows on a CPU that all of it works; its figures mean nothing.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import translate
import translate_settings as settings
import tyro
from measuring import fresh, kernels, measure, synchronize
from torch import Tensor

from msfs_functional import errors, optim, random
from msfs_functional.compiling import graphed
from msfs_functional.data import Prefetch, TokenBatches
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models.transformer import TransformerConfig, output_weight, transformer
from msfs_functional.params import cast
from msfs_functional.train import init_state, make_step
from msfs_functional.translation import Tokenizers


def tiny30k() -> settings.Config:
    """The tiny model on Multi30k, in few shapes: what an ensemble has members of."""
    preset = settings.PRESETS["multi30k"]
    return replace(
        preset,
        data=replace(preset.data, buckets=2),
        model=settings.Model("tiny", dropout=0.3),
        train=replace(preset.train, consistency=0.0),
    )


@dataclass(frozen=True)
class Config:
    """What to measure, and for how long."""

    mode: tyro.conf.Positional[Literal["marian", "data", "ensemble"]]
    """marian: against transformers' MarianMT; data: loader against a batch on device; ensemble:
    members of one step against as many runs"""
    small: bool = False
    """sizes that a CPU manages, eager: to see that it works"""
    steps: int = 30
    """timed steps"""
    warmup: int = 10
    """steps before, compiling included"""
    members: int = 8
    """of the ensemble"""
    sides: tuple[Literal["ours", "graphed", "marian"], ...] = ("ours", "graphed", "marian")
    """marian: what to measure, of our step, our step as one CUDA graph, transformers"""
    profile: bool = False
    """marian and ensemble: print the kernels of a step"""
    recipe: settings.Config = field(default_factory=tiny30k)
    """data and ensemble: the training to take the step from"""
    debug: bool = False
    """show tracebacks"""


def hardware() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}"


# ------------------------------------------------------------------------------- against Marian


def sizes(small: bool) -> dict[str, int]:
    if small:
        return {"width": 32, "depth": 1, "heads": 2, "hidden": 64, "vocab": 500, "B": 4, "T": 16}
    return {
        "width": 512,
        "depth": 6,
        "heads": 8,
        "hidden": 2048,
        "vocab": 32_000,
        "B": 256,
        "T": 128,
    }


def made_up_batch(size: dict[str, int], device: str) -> dict[str, Tensor]:
    """B x (T + T) tokens; lengths of sources are uniform in [0.56 T, T], which pads 22% of them."""
    generator = torch.Generator().manual_seed(0)
    B, T = size["B"], size["T"]
    lengths = torch.linspace(0.56 * T, T, B).round().long()
    source, target = torch.randint(4, size["vocab"], (2, B, T + 1), generator=generator)
    source = source[:, :T].masked_fill(torch.arange(T) >= lengths[:, None], 0)
    batch = {"source": source, "source_lengths": lengths, "target": target}
    return {name: value.to(device) for name, value in batch.items()}


def our_step(
    size: dict[str, int], batch: dict[str, Tensor], compiled: bool, graph: bool = False
) -> Callable[[], object]:
    device = batch["source"].device
    model = transformer(
        TransformerConfig(
            size["vocab"],
            width=size["width"],
            depth=size["depth"],
            heads=size["heads"],
            hidden=size["hidden"],
        )
    )

    def loss_fn(params: dict[str, Tensor], batch: dict[str, Tensor], key: Tensor):
        params = cast(params, torch.bfloat16)
        states = model.apply(
            params,
            batch["source"],
            batch["target"][:, :-1],
            source_lengths=batch["source_lengths"],
            key=key,
            method="hidden",
        )
        total, tokens = linear_cross_entropy(states, output_weight(params), batch["target"][:, 1:])
        return total / tokens, {}

    optimizer = optim.adamw(1e-4, 0.9, 0.98, weight_decay=0.0)
    compile = "regions" if compiled else False
    step = make_step(loss_fn, optimizer, compile=compile, dynamic=False)
    state = init_state(model.init(0, device=device), optimizer, random.key(0, device=device))
    if graph and compiled:
        step = graphed(step)
    return lambda: step(state, batch)


def marian_step(
    size: dict[str, int], batch: dict[str, Tensor], compiled: bool
) -> Callable[[], object]:
    """The usual training of transformers: autocast, fused AdamW, the whole model compiled."""
    from transformers import MarianConfig, MarianMTModel

    device = batch["source"].device
    config = MarianConfig(
        vocab_size=size["vocab"],
        d_model=size["width"],
        encoder_layers=size["depth"],
        decoder_layers=size["depth"],
        encoder_attention_heads=size["heads"],
        decoder_attention_heads=size["heads"],
        encoder_ffn_dim=size["hidden"],
        decoder_ffn_dim=size["hidden"],
        max_position_embeddings=1024,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation_function="relu",
        scale_embedding=True,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model: Any = MarianMTModel(config)
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0,
        fused=device.type == "cuda",
    )  # fmt: skip
    forward = torch.compile(model) if compiled else model
    inputs = {
        "input_ids": batch["source"],
        "attention_mask": (batch["source"] != 0).long(),
        "decoder_input_ids": batch["target"][:, :-1].contiguous(),
        "labels": batch["target"][:, 1:].contiguous(),
    }

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def against_marian(config: Config) -> None:
    size = sizes(config.small)
    device = "cpu" if config.small else "cuda"
    batch = made_up_batch(size, device)
    padding = 1 - batch["source_lengths"].float().mean().item() / size["T"]
    tokens = 2 * size["B"] * size["T"]
    print(f"{hardware()}: {size}, {padding:.0%} of the source is padding, bf16")
    figures = {}
    ours_graphed = functools.partial(our_step, graph=True)
    sides = {"ours": our_step, "graphed": ours_graphed, "marian": marian_step}
    for name in config.sides:
        fresh()
        compiled = not config.small
        step = sides[name](size, batch, compiled)
        one = measure(step, config.warmup, config.steps)
        figures[name] = one
        rate = tokens / one.seconds
        print(
            f"{name:8}  {rate / 1e6:7.3f}M padded tokens/s  {one.memory:6.2f} GiB  "
            f"first step {one.first:5.1f} s"
        )
        if config.profile and name != "ours":
            print(kernels(step))
    if "marian" in figures:
        for name in figures.keys() - {"marian"}:
            ratio = figures["marian"].seconds / figures[name].seconds
            print(f"{name} / marian: {ratio:.2f}x tokens/s")


# ------------------------------------------------------------------------- steps of the recipe


def recipe_step(config: settings.Config) -> tuple[Callable, Any, TokenBatches]:
    """The recipe's own step, its first state and its stream of batches."""
    splits = translate.read_data(config.data)
    tokenizers = Tokenizers.learn(splits.train, **asdict(config.vocabulary))
    batches = translate.make_batches(config.data, splits.train, tokenizers, seed=0)
    model = translate.make_model(config, tokenizers)
    optimizer = translate.make_optimizer(config.optimizer, config.train.steps)
    return *translate.make_train_step(config, model, optimizer), batches


def recipe_config(config: Config) -> settings.Config:
    if not config.small:
        return settings.checked(config.recipe)
    tiny = replace(
        settings.Config(), model=settings.Model("tiny", width=16, heads=2, depth=1, hidden=32)
    )
    return settings.checked(replace(tiny, data=replace(tiny.data, batch=512)))


def timed(step: Callable, state: Any, batches: Iterator, steps: int) -> float:
    synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, next(batches))
    synchronize()
    return (time.perf_counter() - begin) / steps


def against_perfect_data(config: Config) -> None:
    """The same batches, once from the loader and once from the device's own memory."""
    recipe = recipe_config(config)
    step, state, stream = recipe_step(recipe)
    steps = min(stream.steps_per_epoch, 10 * config.steps)
    position = stream.state()
    resident = Prefetch(stream, str(recipe.device))
    kept = [next(resident) for _ in range(steps)]
    resident.close()
    timed(step, state, iter(kept), steps)  # every shape compiles
    loaded, perfect = [], []
    for _ in range(5):  # taking turns, so that a machine that slows down slows both
        stream.restore(position)
        loader = Prefetch(stream, str(recipe.device))
        loaded.append(timed(step, state, loader, steps))
        loader.close()
        perfect.append(timed(step, state, iter(kept), steps))
    ratio = statistics.median(loaded) / statistics.median(perfect)
    print(
        f"{hardware()}: {steps} steps, median of 5: {1e3 * statistics.median(loaded):.2f} ms from "
        f"the loader, {1e3 * statistics.median(perfect):.2f} ms from the device, ratio {ratio:.3f}"
    )


def against_single_runs(config: Config) -> None:
    """Time of a step of N members over the time of N steps of one."""
    recipe = recipe_config(config)
    seconds = {}
    for members in (1, config.members):
        step, state, stream = recipe_step(replace(recipe, members=members))
        batches = Prefetch(stream, str(recipe.device))
        kept = [next(batches) for _ in range(min(stream.steps_per_epoch, 10 * config.steps))]
        batches.close()
        timed(step, state, iter(kept), len(kept))
        seconds[members] = timed(step, state, iter(kept), len(kept))
        if config.profile:
            print(kernels(lambda: step(state, kept[0])))  # noqa: B023
        print(f"{members} members: {1e3 * seconds[members]:.2f} ms a step")
    ratio = seconds[config.members] / (config.members * seconds[1])
    print(f"{hardware()}: {config.members} members take {ratio:.2f} of the time of as many runs")


def main(config: Config) -> None:
    if not (config.small or torch.cuda.is_available()):
        raise ValueError("no GPU here, where these figures mean something: --small runs on a CPU")
    modes = {
        "marian": against_marian,
        "data": against_perfect_data,
        "ensemble": against_single_runs,
    }
    modes[config.mode](config)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a first step is a cold one
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
