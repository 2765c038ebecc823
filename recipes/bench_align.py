"""Preference and reinforcement learning beside TRL: GPT-2 124M, random weights, the same work.

    python recipes/bench_align.py dpo        # a step on 64 pairs of 512 tokens
    python recipes/bench_align.py grpo       # 64 prompts x 8 samples x 128 new tokens and an update

Both sides compute in bfloat16; ours keeps float32 parameters, TRL's are bfloat16 (its fastest
setting), its model runs without dropout and, unless `--peer-checkpointing`, without gradient
checkpointing. Both use AdamW, fused at TRL. DPO's reference is a forward pass in the step on both
sides. TRL runs offline: its model is made here, so are its tokenizer and its data.

One H200, torch 2.11, TRL 1.16: DPO 2.80 times TRL's tokens/s in 41% of its memory, GRPO 5.17 times.

`--small` shows on a CPU that all of it works; its figures mean nothing.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from measuring import Figures, fresh, measure, synchronize
from torch import Tensor

from msfs_functional import errors, optim, random
from msfs_functional.advantages import group_advantages
from msfs_functional.compiling import graphed
from msfs_functional.generation import Sampling, Settings
from msfs_functional.logps import completion_logps, sequence_logps
from msfs_functional.masked import average
from msfs_functional.models.decoder import DecoderConfig, decoder, gpt2, output_weight
from msfs_functional.params import Functional, Params, cast
from msfs_functional.ppo import policy_loss
from msfs_functional.preference import dpo
from msfs_functional.rollouts import Roller
from msfs_functional.train import init_state, make_step


@dataclass(frozen=True)
class Config:
    """What to measure, and for how long."""

    mode: tyro.conf.Positional[Literal["dpo", "grpo"]]
    small: bool = False  # sizes that a CPU manages, eager: to see that it works
    steps: int = 5  # timed steps
    warmup: int = 3  # steps before, compiling included
    sides: tuple[Literal["ours", "trl"], ...] = ("ours", "trl")
    accumulation: int = 1  # our microbatches of a DPO step
    microbatches: int = 4  # of an update of GRPO, on both sides
    peer_checkpointing: bool = False  # TRL's gradient checkpointing, which it turns on by default
    peer_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of TRL's parameters
    profile: bool = False  # print our kernels
    debug: bool = False  # show tracebacks


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step."""

    vocab: int
    width: int
    depth: int
    heads: int
    pairs: int
    length: int  # tokens of a side, half of them the prompt
    prompts: int
    samples: int
    prompt: int  # tokens
    new: int  # tokens
    max_length: int = 1024


FULL = Sizes(50257, 768, 12, 12, 64, 512, 64, 8, 128, 128)
SMALL = Sizes(300, 32, 2, 2, 4, 32, 4, 4, 8, 8, 64)


def shape_of(size: Sizes) -> DecoderConfig:
    return gpt2(
        size.vocab,
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        hidden=4 * size.width,
        max_length=size.max_length,
        dropout=0.0,
        attention_dropout=0.0,
        fused=True,
    )


def our_model(size: Sizes) -> Functional:
    return decoder(shape_of(size))


def report(name: str, one: Figures, tokens: int) -> None:
    print(
        f"{name:5}  {one.seconds * 1e3:9.1f} ms  {tokens / one.seconds / 1e3:8.1f}k tokens/s  "
        f"{one.memory:6.2f} GiB  first {one.first:5.1f} s",
        flush=True,
    )


# ------------------------------------------------------------------------------------------- ours


def our_dpo(size: Sizes, config: Config, device: str) -> Callable[[], object]:
    model = our_model(size)
    half = size.length // 2
    generator = torch.Generator().manual_seed(0)
    shape = (size.pairs, size.length)
    prompts = torch.randint(1, size.vocab - 1, (size.pairs, half), generator=generator)
    sides = [torch.randint(1, size.vocab - 1, shape, generator=generator) for _ in range(2)]
    for side in sides:
        side[:, :half] = prompts
    mask = torch.arange(size.length) >= half
    batch = {
        # pairs in dim 0, so that microbatches hold whole pairs
        "tokens": torch.stack(sides, 1).to(device),
        "mask": mask.expand(size.pairs, 2, -1).contiguous().to(device),
    }
    params = model.init(0, device=device)
    reference = cast(model.init(1, device=device), torch.bfloat16)
    most = size.pairs // config.accumulation * 2 * (size.length - half)

    def sums_of(params: Params, tokens: Tensor, mask: Tensor) -> Tensor:
        states = model.apply(params, tokens[:, :-1], method="hidden")
        weight = output_weight(params)
        logps = completion_logps(states, weight, tokens[:, 1:], mask[:, 1:], most=most)
        return sequence_logps(logps, mask[:, 1:])[0].unflatten(0, (-1, 2))

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        tokens, mask = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)
        with torch.no_grad():
            before = sums_of(reference, tokens, mask)
        after = sums_of(cast(params, torch.bfloat16), tokens, mask)
        out = dpo(*after.unbind(1), *before.unbind(1))
        return out.losses.mean(), {"margin": out.margins.mean()}

    optimizer = optim.adamw(1e-6, weight_decay=0.0)
    compile = False if config.small else "regions"
    step = make_step(
        loss_fn, optimizer, compile=compile, dynamic=False, accumulation=config.accumulation
    )
    state = init_state(params, optimizer, random.key(0, device=device))
    step = step if config.small else graphed(step)
    return lambda: step(state, batch)


def our_grpo(size: Sizes, config: Config, device: str) -> Callable[[], object]:
    model = our_model(size)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, size.vocab - 1, (size.prompts, size.prompt), generator=generator)
    dtype = torch.float32 if config.small else torch.bfloat16
    optimizer = optim.adamw(1e-6, weight_decay=0.0)
    state = init_state(model.init(0, device=device), optimizer, random.key(0, device=device))
    settings = Settings(size.new, Sampling(), samples=size.samples, stop_tokens=(size.vocab - 1,))
    roll = Roller(model, state.params, settings, dtype=dtype, compile=not config.small)
    rows = size.prompts * size.samples

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params, mask = cast(params, dtype), batch["mask"][:, 1:]
        states = model.apply(params, batch["tokens"][:, :-1], method="hidden")
        logps = completion_logps(
            states,
            output_weight(params),
            batch["tokens"][:, 1:],
            mask,
            most=rows // config.microbatches * size.new,
        )
        found = policy_loss(logps, batch["logps"][:, 1:], batch["advantages"], mask)
        count = mask.sum().clamp(min=1)
        return average(found.losses, mask), {"weight": count}

    step = make_step(
        loss_fn,
        optimizer,
        accumulation=config.microbatches,
        compile=False if config.small else "regions",
        dynamic=False,
    )
    step = step if config.small else graphed(step)
    count, seconds = 0, {"rollout": [], "update": []}

    def iteration() -> None:
        nonlocal count, state
        begin = time.perf_counter()
        rollout = roll(prompts, random.fold_in(state.key, count))
        synchronize()
        middle = time.perf_counter()
        scores = diversity(rollout.completions())
        advantages = group_advantages(torch.tensor(scores), size.samples)
        batch = {
            "tokens": rollout.tokens,
            "mask": rollout.mask,
            "logps": rollout.logps,
            "advantages": advantages.to(device),
        }
        state, _ = step(state, batch)
        count += 1
        synchronize()
        seconds["rollout"].append(middle - begin)
        seconds["update"].append(time.perf_counter() - middle)

    iteration.seconds = seconds  # pyright: ignore[reportFunctionMemberAccess]
    return iteration


def diversity(completions: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: the share of tokens that occur once."""
    return [len(set(ids)) / max(1, len(ids)) for ids in completions]


# -------------------------------------------------------------------------------------------- TRL


def peer_parts(size: Sizes, config: Config, device: str) -> tuple[Any, Any]:
    """GPT-2 of transformers and a tokenizer whose words are w0, w1, ... one id each."""
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(size.vocab - 1)} | {"<end>": size.vocab - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="w0", unk_token="w0"
    )
    shape = transformers.GPT2Config(
        vocab_size=size.vocab,
        n_embd=size.width,
        n_layer=size.depth,
        n_head=size.heads,
        n_positions=size.max_length,
        eos_token_id=size.vocab - 1,
        bos_token_id=size.vocab - 1,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(shape)
    dtype = torch.float32 if config.small else getattr(torch, config.peer_dtype)
    return model.to(device=device, dtype=dtype), tokenizer


def common(config: Config, folder: str) -> dict[str, Any]:
    """Settings of both trainers."""
    return {
        "output_dir": folder,
        "max_steps": config.warmup + config.steps,
        "bf16": not config.small,
        "use_cpu": config.small,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-6,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": config.peer_checkpointing,
        "dataloader_pin_memory": False,
    }


def words_of(ids: Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


def time_trainer(trainer: Any, warmup: int) -> Figures:
    """Runs the trainer; the median time between ends of steps after the warm-up."""
    import transformers

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    begin = time.perf_counter()
    trainer.train()
    each = [b - a for a, b in itertools.pairwise(ends)][warmup - 1 :]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return Figures(ends[0] - begin, statistics.median(each), memory)


def trl_dpo(size: Sizes, config: Config, device: str, folder: str) -> Figures:
    import datasets
    import trl

    model, tokenizer = peer_parts(size, config, device)
    reference, _ = peer_parts(size, config, device)
    half, generator = size.length // 2, torch.Generator().manual_seed(0)
    rows = size.pairs * (config.warmup + config.steps)

    def text(count: int) -> list[str]:
        ids = torch.randint(1, size.vocab - 1, (rows, count), generator=generator)
        return [words_of(row) for row in ids]

    # the end token that TRL adds is the last of a side's tokens
    chosen, rejected = ([f" {t}" for t in text(half - 1)] for _ in range(2))
    data = datasets.Dataset.from_dict(
        {"prompt": text(half), "chosen": chosen, "rejected": rejected}
    )
    args = trl.DPOConfig(
        **common(config, folder), per_device_train_batch_size=size.pairs, max_length=size.length
    )
    trainer = trl.DPOTrainer(
        model, reference, args=args, train_dataset=data, processing_class=tokenizer
    )
    seen = next(iter(trainer.get_train_dataloader()))["input_ids"].shape
    print(f"TRL's batches are {tuple(seen)}", flush=True)
    return time_trainer(trainer, config.warmup)


def trl_grpo(size: Sizes, config: Config, device: str, folder: str) -> Figures:
    import datasets
    import trl

    model, tokenizer = peer_parts(size, config, device)
    generator = torch.Generator().manual_seed(0)
    rows = size.prompts * (config.warmup + config.steps)
    ids = torch.randint(1, size.vocab - 1, (rows, size.prompt), generator=generator)
    data = datasets.Dataset.from_dict({"prompt": [words_of(row) for row in ids]})
    args = trl.GRPOConfig(
        **common(config, folder),
        per_device_train_batch_size=size.prompts * size.samples // config.microbatches,
        gradient_accumulation_steps=config.microbatches,
        num_generations=size.samples,
        max_completion_length=size.new,
        temperature=1.0,
        beta=0.0,
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return diversity(completion_ids)

    rewards: Any = reward
    trainer = trl.GRPOTrainer(
        model, reward_funcs=rewards, args=args, train_dataset=data, processing_class=tokenizer
    )
    return time_trainer(trainer, config.warmup)


# --------------------------------------------------------------------------------------- the table


def main(config: Config) -> dict[str, Figures]:
    if not (config.small or torch.cuda.is_available()):
        raise ValueError("no GPU here, where these figures mean something: --small runs on a CPU")
    size, device = (SMALL, "cpu") if config.small else (FULL, "cuda")
    name = "CPU" if config.small else torch.cuda.get_device_name()
    ours: Mapping[str, Any] = {"dpo": our_dpo, "grpo": our_grpo}
    peer: Mapping[str, Any] = {"dpo": trl_dpo, "grpo": trl_grpo}
    tokens = {
        "dpo": 2 * size.pairs * size.length,
        "grpo": size.prompts * size.samples * size.new,
    }[config.mode]
    print(f"{name}, torch {torch.__version__}, {config.mode}, {size}", flush=True)
    found: dict[str, Figures] = {}
    for side in config.sides:
        fresh()
        if side == "ours":
            step = ours[config.mode](size, config, device)
            found[side] = measure(step, config.warmup, config.steps)
            if hasattr(step, "seconds"):
                parts = {k: statistics.median(v[config.warmup :]) for k, v in step.seconds.items()}
                print("ours: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in parts.items()))
            if config.profile:
                profiled(step)
            del step
        else:
            with tempfile.TemporaryDirectory() as folder:
                found[side] = peer[config.mode](size, config, device, folder)
        report(side, found[side], tokens)
    if len(found) == 2:
        a, b = found["ours"], found["trl"]
        memory = f", {a.memory / b.memory:.0%} of its memory" if b.memory else ""
        print(f"ours: {b.seconds / a.seconds:.2f}x TRL's tokens/s{memory}")
    return found


def profiled(step: Callable[[], object]) -> None:
    with torch.profiler.profile() as profile:
        step()
        synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
