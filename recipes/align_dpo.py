r"""Teach a decoder to follow instructions from preferences, without a reward model.

    python recipes/align_dpo.py                          # three seeds, from nothing to a table

    python recipes/align_dpo.py --dpo.loss ipo --dpo.beta 0.3

Stages of each seed, in folders of their own (--resume goes on where it was stopped):

    1  sft    a small decoder imitates demonstrations whose writer mostly falls into habits
    2  pairs  it answers training prompts several times; the checker prefers one answer to another
    3  dpo    the same parameters learn from the pairs, the start of the stage is the reference

The report says how many answers to held-out prompts the checker finds right before and after.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import torch
import tyro
from torch import Tensor

from msfs_functional import config as configs
from msfs_functional import errors, optim, pictures, random, schedules, tracking
from msfs_functional.aligning import (
    Task,
    answer,
    built_in,
    drift,
    fine_tuning_loss,
    sampled_pairs,
)
from msfs_functional.logps import sequence_logps
from msfs_functional.models import decoder as models
from msfs_functional.pairs import Shuffled, encode_pairs
from msfs_functional.params import Functional, Params, cast
from msfs_functional.preference import dpo, dpo_hinge, ipo, kto, kto_kl, orpo, robust_dpo, simpo
from msfs_functional.scoring import answer_logps, in_parts
from msfs_functional.sft import AnswerBatches
from msfs_functional.stages import run_stage
from msfs_functional.synthetic import instructions as synthetic
from msfs_functional.tokenizer import PAD
from msfs_functional.train import init_state, make_step

MAY_BE_ZERO = ("seed", "warmup")
Loss = Literal["sigmoid", "hinge", "ipo", "cdpo", "robust", "simpo", "orpo", "kto"]
BETAS = {"ipo": 0.1, "simpo": 2.0, "orpo": 1.0}  # of losses that are not on the scale of DPO


@dataclass(frozen=True)
class Data:
    """The task, and how much of it."""

    demonstrations: int = 12_000  # to imitate
    prompts: int = 3000  # to answer, for pairs
    held_out: int = 400  # prompts that nothing is trained on
    samples: int = 4  # answers to each prompt
    new: int = 12  # longest answer [tokens]


@dataclass(frozen=True)
class Model:
    """Size of the decoder."""

    width: int = 128
    depth: int = 3  # blocks
    heads: int = 4
    length: int = 64  # tokens of a packed row, the most that a prompt and its answer have


@dataclass(frozen=True)
class Stage:
    """Training of one stage; the learning rate warms up and falls to 0 as a cosine."""

    steps: int
    batch: int  # rows: packed ones in sft, pairs in dpo
    rate: float  # peak learning rate
    warmup: int = 30  # steps


@dataclass(frozen=True)
class Preferences(Stage):
    """The stage of preferences."""

    loss: Loss = "sigmoid"
    beta: float | None = None  # strength of the pull to the reference; None: one that suits
    label_smoothing: float = 0.1  # cdpo, robust: share of preferences believed to be flipped
    margin: float = 1.0  # simpo: between mean log-probabilities, times beta


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train"]] = "train"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoints
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0  # of the first run; the others count on from it
    seeds: int = 3  # runs, each from its own data and parameters
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None  # None: on a GPU
    threads: int | None = None  # CPU threads; None: all cores
    debug: bool = False  # show tracebacks
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    sft: Stage = field(default_factory=lambda: Stage(600, 24, 3e-3))
    dpo: Preferences = field(default_factory=lambda: Preferences(200, 64, 3e-4))


# ------------------------------------------------------------------------------------------- losses


def preference_loss(
    config: Preferences,
    sums: Tensor,
    lengths: Tensor,
    reference: Tensor,
    wrong: Tensor | None = None,
    wrong_reference: Tensor | None = None,
    beta: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses, margins of the implicit rewards) of B pairs.

    Args:
        sums, lengths, reference: (B, 2), chosen then rejected.
        wrong, wrong_reference: (B,), answers under another prompt, for KTO.
        beta: in place of the configured one.
    """
    beta = beta if beta is not None else config.beta or BETAS.get(config.loss, 0.1)
    sides, means = sums.unbind(1), (sums / lengths).unbind(1)
    before = reference.unbind(1)
    options: dict[str, Any] = {"beta": beta}
    if config.loss in ("cdpo", "robust"):
        options["label_smoothing"] = config.label_smoothing
    if config.loss == "kto":
        assert wrong is not None and wrong_reference is not None
        good = torch.tensor([True, False], device=sums.device).repeat(len(sums))
        kl = kto_kl(wrong, wrong_reference)
        losses, rewards = kto(sums.flatten(), reference.flatten(), good, kl, **options)
        rewards = rewards.unflatten(0, (-1, 2))
        return losses.unflatten(0, (-1, 2)).sum(1), rewards[:, 0] - rewards[:, 1]
    if config.loss == "simpo":
        out = simpo(*means, margin=config.margin, **options)
    elif config.loss == "orpo":
        out = orpo(*means, **options)
    elif config.loss == "ipo":  # on means, which keeps its target independent of the lengths
        out = ipo(*means, *(reference / lengths).unbind(1), **options)
    else:
        fn = {"hinge": dpo_hinge, "robust": robust_dpo}.get(config.loss, dpo)
        out = fn(*sides, *before, **options)
    return out.losses, out.margins


def make_loss(config: Config, model: Functional):
    """Mean loss of a batch of pairs, whose reference log-probabilities are part of the data."""
    dtype = getattr(torch, str(config.dtype))

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params, tokens, mask = cast(params, dtype), batch["tokens"], batch["mask"]
        pairs = len(tokens)
        rows, answers = tokens.flatten(0, 1), mask.flatten(0, 1)
        if config.dpo.loss == "kto":
            rows = torch.cat([rows, batch["wrong"]])
            answers = torch.cat([answers, batch["wrong_mask"]])
        logps = answer_logps(model, params, rows, answers, implementation=attention(config))
        sums, lengths = sequence_logps(logps, answers)
        losses, margins = preference_loss(
            config.dpo,
            sums[: 2 * pairs].unflatten(0, (-1, 2)),
            lengths[: 2 * pairs].unflatten(0, (-1, 2)),
            batch["reference"],
            sums[2 * pairs :],
            batch.get("wrong_reference"),
        )
        chosen = sums[: 2 * pairs].unflatten(0, (-1, 2))[:, 0] - batch["reference"][:, 0]
        return losses.mean(), {
            "margin": margins.mean(),
            "accuracy": (margins > 0).float().mean(),
            "chosen_logratio": chosen.mean().detach(),
        }

    return loss_fn


# ------------------------------------------------------------------------------------------ stages


def attention(config: Config) -> str:
    return "flash" if str(config.device).startswith("cuda") else "sdpa"


def make_model(config: Config, task: Task) -> Functional:
    own = config.model
    return models.decoder(
        models.tiny(
            task.tokenizer.vocab_size,
            width=own.width,
            depth=own.depth,
            heads=own.heads,
            kv_heads=own.heads,
            hidden=3 * own.width,
            max_length=own.length,
            qk_norm=True,
        )
    )


def optimizer_of(stage: Stage) -> optim.Transformation:
    warmup = min(stage.warmup, stage.steps // 2)
    rate = schedules.cosine(stage.rate, stage.steps, warmup=warmup)
    return optim.adamw(rate, 0.9, 0.98, weight_decay=0.1, decay=models.DECAY)


def compiled(config: Config) -> Any:
    return "regions" if config.compile else False


def fine_tune(config: Config, task: Task, model: Functional, seed: int, folder: Path) -> Params:
    """Stage 1: the policy that imitates the demonstrations."""
    documents = [[*prompt, *answer] for prompt, answer in task.demonstrations]
    prompts = [len(prompt) for prompt, _ in task.demonstrations]
    batches = AnswerBatches(documents, config.model.length, config.sft.batch, seed, prompts=prompts)
    optimizer, device = optimizer_of(config.sft), str(config.device)
    dtype = getattr(torch, str(config.dtype))
    loss_fn = fine_tuning_loss(model, dtype, attention(config))
    step = make_step(loss_fn, optimizer, clip_norm=1.0, compile=compiled(config))
    state = init_state(model.init(seed, device=device), optimizer, random.key(seed, device=device))
    return run_stage(
        folder / "sft",
        config.sft.steps,
        state,
        step,
        batches,
        device=device,
        resume=resume_command(config),
        tokens=lambda batch: (batch["labels"] != PAD).sum(),
    ).params


def make_pairs(config: Config, task: Task, model: Functional, params: Params, seed: int):
    """Stage 2: pairs of the policy's own answers as tensors, with reference log-probabilities."""
    answers = answer(
        model,
        params,
        task.tokenizer,
        task.prompts,
        random.key(seed, device=config.device),
        new=config.data.new,
        samples=config.data.samples,
        **how(config),
    )
    texts = [prompt.text for prompt in task.prompts for _ in range(config.data.samples)]
    scores = synthetic.graded(texts, answers.texts)
    pairs = sampled_pairs(task.prompts, answers, scores, most=2)
    encoded = encode_pairs(pairs, longest=config.model.length)
    data = {"tokens": encoded.tokens, "mask": encoded.mask}
    if config.dpo.loss == "kto":  # each prompt with the chosen answer of the next pair
        wrong = [
            replace_answer(pair.prompt, other.chosen, encoded.tokens.shape[-1])
            for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        data["wrong"] = torch.stack([tokens for tokens, _ in wrong])
        data["wrong_mask"] = torch.stack([mask for _, mask in wrong])
    return with_reference(config, model, params, data), len(pairs)


def replace_answer(prompt: Sequence[int], answer: Sequence[int], width: int):
    tokens, mask = torch.full((width,), PAD), torch.zeros(width, dtype=torch.bool)
    ids = [*prompt, *answer][:width]
    tokens[: len(ids)] = torch.tensor(ids)
    mask[len(prompt) : len(ids)] = True
    return tokens, mask


def with_reference(config: Config, model: Functional, params: Params, data: dict[str, Tensor]):
    """The data with the sums of the reference's log-probabilities, computed once."""
    data = {name: x.to(str(config.device)) for name, x in data.items()}
    frozen = cast(params, getattr(torch, str(config.dtype)))

    def sums(tokens: Tensor, mask: Tensor) -> Tensor:
        logps = answer_logps(model, frozen, tokens, mask, implementation=attention(config))
        return sequence_logps(logps, mask)[0]

    flat = {name: data[name].flatten(0, 1) for name in ("tokens", "mask")}
    data["reference"] = in_parts(sums, flat, 256).unflatten(0, (-1, 2))
    if "wrong" in data:
        wrong = {"tokens": data["wrong"], "mask": data["wrong_mask"]}
        data["wrong_reference"] = in_parts(sums, wrong, 256)
    return data


def optimise(
    config: Config, model: Functional, params: Params, data: dict[str, Tensor], seed: int, to: Path
) -> Params:
    """Stage 3: the parameters move, the reference stays in the data."""
    optimizer, device = optimizer_of(config.dpo), str(config.device)
    step = make_step(make_loss(config, model), optimizer, clip_norm=1.0, compile=compiled(config))
    copies = {name: value.clone() for name, value in params.items()}
    state = init_state(copies, optimizer, random.key(seed, device=device))
    return run_stage(
        to / "dpo",
        config.dpo.steps,
        state,
        step,
        Shuffled(data, config.dpo.batch, seed),
        device=device,
        resume=resume_command(config),
        tokens=lambda batch: batch["mask"].sum(),
    ).params


# ------------------------------------------------------------------------------------------ report


class Figures(NamedTuple):
    """Of a policy on held-out prompts."""

    sampled: float  # share of right answers at temperature 1
    greedy: float
    kl: float  # nats an answer, to the policy before
    length: float  # tokens of a sampled answer
    texts: list[str]  # greedy


def how(config: Config) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, str(config.dtype)),
        "implementation": attention(config),
        "compile": config.compile,
    }


def assess(
    config: Config, task: Task, model: Functional, params: Params, reference: Params, seed: int
) -> Figures:
    """The checker's verdict on answers to held-out prompts."""
    texts = [prompt.text for prompt in task.held_out]
    key = random.key(seed + 1000, device=config.device)
    both = [
        answer(
            model,
            params,
            task.tokenizer,
            task.held_out,
            key,
            new=config.data.new,
            temperature=temperature,
            **how(config),
        )
        for temperature in (1.0, 0.0)
    ]
    shares = [sum(synthetic.right(texts, each.texts)) / len(texts) for each in both]
    kl = drift(
        model,
        params,
        reference,
        both[0].rollouts,
        len(texts),
        dtype=getattr(torch, str(config.dtype)),
        implementation=attention(config),
    )
    length = sum(map(len, both[0].ids)) / len(texts)
    return Figures(*shares, kl / len(texts), length, both[1].texts)


def run_seed(config: Config, seed: int, run: Path) -> dict[str, Any]:
    """All stages of one seed; figures before and after."""
    folder, data = run / f"seed-{seed}", config.data
    task = built_in(seed, data.demonstrations, data.prompts, data.held_out)
    model = make_model(config, task)
    reference = fine_tune(config, task, model, seed, folder)
    before = assess(config, task, model, reference, reference, seed)
    pairs, count = make_pairs(config, task, model, reference, seed)
    params = optimise(config, model, reference, pairs, seed, folder)
    after = assess(config, task, model, params, reference, seed)
    print(
        f"seed {seed}: {count} pairs; right before {before.sampled:.1%} sampled, "
        f"{before.greedy:.1%} greedy; after {after.sampled:.1%} sampled, {after.greedy:.1%} "
        f"greedy; KL {after.kl:.2f} nats an answer",
        flush=True,
    )
    samples = [
        {"prompt": prompt.text, "before": a, "after": b}
        for prompt, a, b in zip(task.held_out, before.texts, after.texts, strict=True)
    ]
    named = {"before": before._asdict(), "after": after._asdict()}
    figures = {
        f"{name}/{key}": value
        for name, each in named.items()
        for key, value in each.items()
        if key != "texts"
    }
    return {"seed": seed, "pairs": count, **figures, "samples": samples}


def resume_command(config: Config) -> str:
    return f"python recipes/align_dpo.py --resume --out {config.out} --name {config.name}"


def mean_and_spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return f"{mean:.1%} ± {spread:.1%}"


def report(config: Config, run: Path, results: list[dict[str, Any]]) -> None:
    """The table over seeds, samples, curves."""
    for kind in ("sampled", "greedy"):
        before, after = ([r[f"{when}/{kind}"] for r in results] for when in ("before", "after"))
        gain = 100 * (sum(after) - sum(before)) / len(results)
        print(
            f"right answers to held-out prompts, {kind}: {mean_and_spread(before)} before, "
            f"{mean_and_spread(after)} after, {gain:+.1f} points, {len(results)} seeds"
        )
    kl = sum(r["after/kl"] for r in results) / len(results)
    print(f"KL to the reference: {kl:.2f} nats an answer")
    lines = [
        f"{one['prompt']}  before: {one['before']!r}  after: {one['after']!r}"
        for one in results[0]["samples"]
    ]
    print("\n".join(lines[:8]))
    (run / "samples.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    kept = [{k: v for k, v in r.items() if k != "samples"} for r in results]
    (run / "results.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    seeds = [f"seed-{r['seed']}" for r in results]
    curves: list[dict[str, Any]] = []
    for seed in seeds:
        for record in tracking.read_metrics(run / seed / "dpo" / tracking.METRICS):
            values = {f"{name}/{seed}": value for name, value in record.items() if name != "step"}
            curves.append({"step": record["step"], **values})
    panels = {
        unit: {f"{name}/{seed}": seed for seed in seeds}
        for unit, name in {
            "loss": "loss",
            "margin of implicit rewards": "margin",
            "share of pairs agreed with": "accuracy",
            "log-ratio of the chosen [nats]": "chosen_logratio",
        }.items()
    }
    pictures.save_png(pictures.training_curves(curves, panels), run / "curves.png")


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range; a run that exists, or none to go on with.
    """
    configs.check_numbers(config, MAY_BE_ZERO)
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    machine = configs.machine(config.device, config.dtype, config.compile)
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(
        config,
        name=config.name or configs.free_name(config.out, "align_dpo"),
        device=machine.device,
        dtype=machine.dtype,
        compile=machine.compile,
    )


def main(config: Config) -> None:
    begin, config = time.perf_counter(), checked(config)
    run = config.out / str(config.name)
    if not config.resume:
        configs.new_run(run, config, overwrite=config.overwrite)
    seeds = range(config.seed, config.seed + config.seeds)
    report(config, run, [run_seed(config, seed, run) for seed in seeds])
    print(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, {"default": Config()}, modes=())
    return configs.parse(start, args, description=str(__doc__), prog="align_dpo.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
