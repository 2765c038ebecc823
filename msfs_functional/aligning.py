"""What the alignment recipes share: the task, the policy's first training, its answers, figures.

    task = alignment_tasks.built_in(Data(), seed)             # prompts and demonstrations as ids
    setup = set_up(Model(), task, machine)       # the decoder and how it is computed
    params = fine_tune(setup, task, Stage(...), seed, folder)
    answers = answer(setup, params, task, prompts, key)       # texts, ids, log-probabilities
    figures = assess(setup, params, params, task, seed)       # what the checker finds right

Dimension key: N rows, T tokens.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional import agreement, meshes, optim, random, schedules, tracking
from msfs_functional.alignment_tasks import Data, Prompt, Task
from msfs_functional.compiling import graphed
from msfs_functional.config import Machine
from msfs_functional.gathering import Sharded, gathered, sharded
from msfs_functional.generation import GREEDY, Sampling, Settings
from msfs_functional.layouts import DECODER
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models import decoder as models
from msfs_functional.packing import PackedBatches
from msfs_functional.pairs import Pair
from msfs_functional.params import Functional, Params, cast
from msfs_functional.pictures import save_png, training_curves
from msfs_functional.preference import check_reference
from msfs_functional.rewards import called
from msfs_functional.rollouts import Roller, Rollout
from msfs_functional.scoring import answer_logps
from msfs_functional.sft import AnswerBatches
from msfs_functional.sharding import gather, shard
from msfs_functional.stages import run_stage
from msfs_functional.tokenizer import EOS, PAD
from msfs_functional.train import init_state, make_step


@dataclass(frozen=True)
class Model:
    """Size of the decoder."""

    width: int = 96
    depth: int = 3  # blocks
    heads: int = 4
    length: int = 64  # tokens of a packed row, the most that a prompt and its answer have
    dropout: float = 0.0  # probability, while imitating and in reward models


@dataclass(frozen=True)
class Stage:
    """Training of one stage; the learning rate warms up and falls to 0 as a cosine."""

    steps: int
    batch: int  # rows: packed ones of fine-tuning, pairs of preferences
    rate: float  # peak learning rate
    warmup: int = 30  # steps


class Setup(NamedTuple):
    """A decoder and how it is computed.

    Stages take and return whole parameters; between them, under torchrun, a step works on shards:
    `enter` cuts them, `leave` puts them together.
    """

    model: Functional  # that losses call: of sharded parameters on a mesh
    device: str
    dtype: torch.dtype  # of the computation
    compile: bool
    implementation: str  # of attention
    length: int  # most tokens of a row
    dropout: bool
    plain: Functional  # of whole parameters
    share: tuple[int, int] = (0, 1)  # (number, count) of this process among those with other rows
    rank: int = 0

    def ready(self, params: Params) -> Params:
        """Parameters in the dtype of the computation; a sharded model casts what it gathers."""
        return params if isinstance(self.model, Sharded) else cast(params, self.dtype)

    def enter(self, params: Params) -> Params:
        """What a donating step may write into: copies, or this rank's shards."""
        if isinstance(self.model, Sharded):
            return shard(params, self.model.layout.rules, self.model.mesh)
        return {name: value.clone() for name, value in params.items()}

    def leave(self, params: Params) -> Params:
        """Whole parameters, on every rank; all ranks call it together."""
        return gather(params)


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism under torchrun, whose product is the number of processes."""

    dp_replicate: int = 1  # processes with equal parameters and other rows
    dp_shard: int = -1  # processes with a shard of each parameter and other rows; -1: the rest


def check_room(data: Data, own: Model) -> None:
    """Raises ValueError where an answer fills the context, or a file of the data is not there."""
    if data.new >= own.length:
        raise ValueError(
            f"--data.new ({data.new}) leaves no room for a prompt in --model.length ({own.length})"
        )
    for path in (*data.files, *data.texts):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: check the path")


def set_up(own: Model, task: Task, machine: Machine, mesh: Mesh | None = None) -> Setup:
    """A decoder for the task's vocabulary; under torchrun its steps are on the mesh."""
    config = models.tiny(
        task.tokenizer.vocab_size,
        width=own.width,
        depth=own.depth,
        heads=own.heads,
        kv_heads=own.heads,
        hidden=3 * own.width,
        max_length=own.length,
        qk_norm=True,
        dropout=own.dropout,
    )
    attention = "flash" if machine.device.startswith("cuda") else "sdpa"
    dtype, plain = getattr(torch, machine.dtype), models.decoder(config)
    model, share = plain, (0, 1)
    if agreement.world() > 1:
        degrees = {} if mesh is None else dataclasses.asdict(mesh)
        on = meshes.mesh(**degrees, device=torch.device(machine.device).type)
        model = sharded(plain, DECODER, on, dtype=dtype, reduce_dtype=torch.float32)
        share = meshes.data_rank(on)
    return Setup(
        model,
        machine.device,
        dtype,
        machine.compile,
        attention,
        own.length,
        own.dropout > 0,
        plain,
        share,
        agreement.rank(),
    )


def joined(device: str | None) -> None:
    """Takes part in the process group where torchrun has started several; rank 0 alone prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        meshes.join(torch.device(device).type if device else None)


def say(text: str) -> None:
    """Prints on rank 0."""
    if agreement.rank() == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------- fine-tuning


def optimizer_of(stage: Stage) -> optim.Transformation:
    warmup = min(stage.warmup, stage.steps // 2)
    rate = schedules.cosine(stage.rate, stage.steps, warmup=warmup)
    return optim.adamw(rate, 0.9, 0.98, weight_decay=0.1, decay=models.DECAY)


def step_of(setup: Setup, loss_fn: Any, optimizer: optim.Transformation, **options: Any) -> Any:
    """The step as this machine runs it best: on a GPU one CUDA graph for each set of shapes."""
    compile, alone = "regions" if setup.compile else False, not isinstance(setup.model, Sharded)
    if not alone:
        loss_fn = gathered(loss_fn, setup.model)
    step = make_step(loss_fn, optimizer, clip_norm=1.0, compile=compile, dynamic=False, **options)
    graph = alone and setup.compile and setup.device.startswith("cuda")
    return graphed(step) if graph else step


def fine_tuning_loss(setup: Setup):
    """Mean cross-entropy of the answers' tokens in packed rows [nats/token]."""

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params = setup.ready(params)
        states = setup.model.apply(
            params,
            batch["tokens"],
            segment_ids=batch["segments"],
            positions=batch["positions"],
            key=key if setup.dropout else None,
            implementation=setup.implementation,
            method="hidden",
        )
        weight = models.output_weight(params)
        total, count = linear_cross_entropy(states, weight, batch["labels"], ignore_index=PAD)
        return total / count.clamp(min=1), {"weight": count}

    return loss_fn


def pretrain(
    setup: Setup, task: Task, stage: Stage, seed: int, folder: Path, resume: str
) -> Params | None:
    """A decoder that has read the task's texts, from random parameters; None if it has none."""
    if not task.texts:
        return None
    batches = PackedBatches(task.texts, setup.length, stage.batch, seed, setup.share)
    return imitate(setup, batches, stage, seed, folder, resume, None)


def fine_tune(
    setup: Setup,
    task: Task,
    stage: Stage,
    seed: int,
    folder: Path,
    resume: str,
    start: Params | None = None,
) -> Params:
    """A policy that imitates the demonstrations, from `start` or from random parameters."""
    documents = [[*prompt, *answer] for prompt, answer in task.demonstrations]
    prompts = [len(prompt) for prompt, _ in task.demonstrations]
    batches = AnswerBatches(
        documents, setup.length, stage.batch, seed, setup.share, prompts=prompts
    )
    return imitate(setup, batches, stage, seed, folder, resume, start)


def imitate(
    setup: Setup,
    batches: PackedBatches,
    stage: Stage,
    seed: int,
    folder: Path,
    resume: str,
    start: Params | None,
) -> Params:
    optimizer = optimizer_of(stage)
    params = start or setup.plain.init(seed, device=setup.device)
    trained = run_stage(
        folder,
        stage.steps,
        init_state(setup.enter(params), optimizer, random.key(seed, device=setup.device)),
        step_of(setup, fine_tuning_loss(setup), optimizer),
        batches,
        device=setup.device,
        resume=resume,
        tokens=lambda batch: (batch["labels"] != PAD).sum(),
    )
    return setup.leave(trained.params)


# ------------------------------------------------------------------------------------- answers


class Answers(NamedTuple):
    """Completions of prompts, in their order, samples of a prompt one after the other."""

    texts: list[str]
    ids: list[list[int]]
    rollouts: list[Rollout]


def answer(
    setup: Setup,
    params: Params,
    task: Task,
    prompts: Sequence[Prompt],
    key: Tensor,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    batch: int = 256,
) -> Answers:
    """Answers of a policy; every batch has `batch` rows of prompts, the last one filled up."""
    kind = Sampling(temperature) if temperature else GREEDY
    settings = Settings(task.new, kind, samples=samples, stop_tokens=(EOS,), pad=PAD)
    batch = min(batch, len(prompts))
    roll = roller(setup._replace(compile=False), params, settings)  # compiling takes longer
    ids: list[list[int]] = []
    rollouts = []
    for start in range(0, len(prompts), batch):
        rows = [min(i, len(prompts) - 1) for i in range(start, start + batch)]
        keys = torch.stack([random.fold_in(key, i) for i in range(start, start + batch)])
        rollouts.append(roll([prompts[i].ids for i in rows], keys))
        ids += rollouts[-1].completions()
    ids = ids[: len(prompts) * samples]
    return Answers(task.tokenizer.decode(ids), ids, rollouts)


def roller(setup: Setup, params: Params, settings: Settings, **options: Any) -> Roller:
    return Roller(
        setup.plain,
        params,
        settings,
        dtype=setup.dtype,
        compile=setup.compile,
        implementation=setup.implementation,
        **options,
    )


def drift(
    setup: Setup, params: Params, reference: Params, rollouts: Sequence[Rollout], rows: int
) -> float:
    """KL(policy || reference) [nats an answer], from `rows` of the policy's own answers (k1)."""
    check_reference(params, reference)
    total, left = 0.0, rows
    with torch.no_grad():
        both = cast(params, setup.dtype), cast(reference, setup.dtype)
        for rollout in rollouts:
            part = Rollout(*(x[:left] for x in rollout))
            left -= len(part.tokens)
            after, before = (
                answer_logps(
                    setup.plain, p, part.tokens, part.mask, implementation=setup.implementation
                )
                for p in both
            )
            total += float((after - before).sum())
    return total / rows


class Figures(NamedTuple):
    """Of a policy on held-out prompts."""

    sampled: float  # share of right answers at temperature 1
    greedy: float
    kl: float  # nats an answer, to the policy before
    length: float  # tokens of a sampled answer
    texts: list[str]  # greedy


def assess(setup: Setup, params: Params, reference: Params, task: Task, seed: int) -> Figures:
    """The checker's verdict on answers to held-out prompts."""
    assert task.right is not None
    key, asked = random.key(seed + 1000, device=setup.device), task.held_out
    both = [
        answer(setup, params, task, asked, key, temperature=temperature)
        for temperature in (1.0, 0.0)
    ]
    texts, metadata = [p.text for p in asked], [p.metadata for p in asked]
    sampled, greedy = (
        float(called(task.right, texts, each.texts, metadata).mean()) for each in both
    )
    kl = drift(setup, params, reference, both[0].rollouts, len(asked))
    length = sum(map(len, both[0].ids)) / len(asked)
    return Figures(sampled, greedy, kl, length, both[1].texts)


def own_pairs(
    setup: Setup,
    task: Task,
    params: Params,
    prompts: Sequence[Prompt],
    seed: int,
    samples: int,
    *,
    right: bool = True,
) -> list[Pair]:
    """Pairs of a policy's answers to each prompt, of which the checker's grades prefer one.

    Args:
        right: whether the preferred answer must be right in all; else the better grade will do.
    """
    key = random.key(seed, device=setup.device)
    answers = answer(setup, params, task, prompts, key, samples=samples)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    texts, metadata = [p.text for p in asked], [p.metadata for p in asked]
    assert task.graded is not None
    scores = called(task.graded, texts, answers.texts, metadata).tolist()
    return best_with_worst(prompts, answers, scores, least=1.0 if right else -math.inf)


def best_with_worst(
    prompts: Sequence[Prompt],
    answers: Answers,
    scores: Sequence[float],
    *,
    most: int = 2,
    least: float = -math.inf,
) -> list[Pair]:
    """Pairs of answers to one prompt whose scores differ: the best with the worst, then the next.

    Args:
        scores: of each answer.
        most: pairs of one prompt.
        least: score that the better answer must have.
    """
    samples = len(answers.ids) // len(prompts)
    pairs = []
    for i, prompt in enumerate(prompts):
        mine = range(i * samples, (i + 1) * samples)
        order = sorted(mine, key=lambda n: scores[n], reverse=True)
        for high, low in list(zip(order, order[::-1], strict=True))[: min(most, samples // 2)]:
            if scores[high] > scores[low] and scores[high] >= least:
                pairs.append(Pair(prompt.ids, answers.ids[high], answers.ids[low]))
    return pairs


# ------------------------------------------------------------------------------------- the report


class Result(NamedTuple):
    """Of one seed."""

    seed: int
    before: Figures
    after: Figures
    prompts: list[str]
    notes: dict[str, float]  # further figures of the run


def tell(result: Result) -> str:
    """One line of a seed."""
    before, after = result.before, result.after
    notes = "".join(f", {name} {value:g}" for name, value in result.notes.items())
    return (
        f"seed {result.seed}: right before {before.sampled:.1%} sampled, {before.greedy:.1%} "
        f"greedy; after {after.sampled:.1%} sampled, {after.greedy:.1%} greedy; "
        f"KL {after.kl:.2f} nats an "
        f"answer{notes}"
    )


def mean_and_spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return f"{mean:.1%} ± {spread:.1%}"


def table(results: Sequence[Result]) -> str:
    """The figures over all seeds, with the standard deviation from seed to seed."""
    lines = []
    for kind in ("sampled", "greedy"):
        before = [getattr(r.before, kind) for r in results]
        after = [getattr(r.after, kind) for r in results]
        gain = 100 * (sum(after) - sum(before)) / len(results)
        lines.append(
            f"right answers to held-out prompts, {kind}: {mean_and_spread(before)} before, "
            f"{mean_and_spread(after)} after, {gain:+.1f} points, {len(results)} seeds"
        )
    kl = sum(r.after.kl for r in results) / len(results)
    return "\n".join([*lines, f"KL to the reference: {kl:.2f} nats an answer"])


def leave(
    run: Path, results: Sequence[Result], stage: str, panels: dict[str, str], show: int = 8
) -> None:
    """Prints the table and samples; leaves results.json, samples.txt and curves.png in the run.

    Args:
        stage: whose metrics are drawn, a line for each seed.
        panels: {label of the y axis: metric}.
    """
    if agreement.rank() != 0:
        return
    print(table(results))
    first = results[0]
    rows = zip(first.prompts, first.before.texts, first.after.texts, strict=True)
    lines = [f"{prompt}  before: {a!r}  after: {b!r}" for prompt, a, b in rows]
    print("\n".join(lines[:show]))
    (run / "samples.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    kept = []
    for r in results:
        one: dict[str, Any] = {"seed": r.seed, **r.notes}
        for when, figures in (("before", r.before), ("after", r.after)):
            own = figures._asdict()
            one |= {f"{when}/{name}": v for name, v in own.items() if name != "texts"}
        kept.append(one)
    (run / "results.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    draw_seeds(run, [r.seed for r in results], stage, panels)


def draw_seeds(run: Path, seeds: Sequence[int], stage: str, panels: dict[str, str]) -> None:
    """Leaves curves.png: a panel for each metric that the stages have recorded, a line a seed."""
    curves: list[dict[str, Any]] = []
    for seed in seeds:
        for record in tracking.read_metrics(run / f"seed-{seed}" / stage / tracking.METRICS):
            values = {f"{name}/{seed}": v for name, v in record.items() if name != "step"}
            curves.append({"step": record["step"], **values})
    known = {name for record in curves for name in record}
    lines_of = {
        unit: {f"{name}/{seed}": f"seed {seed}" for seed in seeds}
        for unit, name in panels.items()
        if f"{name}/{seeds[0]}" in known
    }
    save_png(training_curves(curves, lines_of), run / "curves.png")
