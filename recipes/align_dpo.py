r"""Teach a decoder to follow instructions from preferences, without a reward model.

    python recipes/align_dpo.py                          # three seeds, from nothing to a table

    python recipes/align_dpo.py --dpo.loss ipo --dpo.beta 0.3
    python recipes/align_dpo.py --sweep 0.03 0.1 0.3 1   # four policies in one vmapped step
    python recipes/align_dpo.py --dpo.flipped 0.2 --influence 300 --seeds 1     # who does harm?
    python recipes/align_dpo.py --preset people --data.files a.jsonl.gz b.jsonl.gz   # human pairs

    torchrun --nproc-per-node 2 recipes/align_dpo.py --mesh.dp-shard 2

Stages of each seed, in folders of their own (--resume goes on where it was stopped):

    1  sft    a small decoder imitates demonstrations whose writer mostly falls into habits
    2  pairs  it answers training prompts several times; the checker prefers one answer to another
    3  dpo    the same parameters learn from the pairs, the start of the stage is the reference;
              then it answers again, for a second round

The report says how many answers to held-out prompts the checker finds right before and after.
Measured with the defaults and seed 0, torch 2.13, one thread of a busy CPU: 27.0% sampled and 20.5%
greedy before, 79.3% and 91.3% after, 1.4 nats of KL an answer. Three seeds together are not timed.

With --data.files the pairs are people's: reward models (single ones and an ensemble, by which DPO's
win rate is judged) and DPO, split by prompt. Several processes: the steps are on shards, the rest
on whole parameters.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import torch
import tyro
from torch import Tensor

from msfs_functional import agreement, errors, random
from msfs_functional import config as configs
from msfs_functional.aligning import (
    Mesh,
    Model,
    Result,
    Setup,
    Stage,
    answer,
    assess,
    check_room,
    draw_seeds,
    fine_tune,
    joined,
    leave,
    mean_and_spread,
    optimizer_of,
    own_pairs,
    pretrain,
    say,
    set_up,
    step_of,
    tell,
)
from msfs_functional.alignment_tasks import Data, Prompt, Task, built_in, from_pairs
from msfs_functional.curvature import influences
from msfs_functional.logps import sequence_logps
from msfs_functional.pairs import Pair, Shuffled, encode_pairs, padded
from msfs_functional.params import Params, cast, stack, unstack
from msfs_functional.preference import dpo, dpo_hinge, ipo, kto, kto_kl, orpo, robust_dpo, simpo
from msfs_functional.reward_models import aggregate
from msfs_functional.reward_training import RewardModel, accuracy, rewards_of, train_rewards
from msfs_functional.scoring import answer_logps, in_parts
from msfs_functional.stages import run_stage
from msfs_functional.train import init_state
from msfs_functional.transforms import ggn_vp
from msfs_functional.updates import by_group, stateless

MAY_BE_ZERO = ("seed", "warmup", "influence")
Loss = Literal["sigmoid", "hinge", "ipo", "cdpo", "robust", "simpo", "orpo", "kto"]
BETA = "beta"  # a member's own, in sweeps: a leaf that the optimizer leaves alone
BETAS = {"ipo": 0.1, "simpo": 2.0, "orpo": 1.0}  # of losses that are not on the scale of DPO


@dataclass(frozen=True)
class Preferences(Stage):
    """The stage of preferences."""

    loss: Loss = "sigmoid"
    beta: float | None = None  # strength of the pull to the reference; None: one that suits
    label_smoothing: float = 0.1  # cdpo, robust: share of preferences believed to be flipped
    margin: float = 1.0  # simpo: between mean log-probabilities, times beta
    # weight of the mean negative log-probability of the chosen answer's tokens (RPO, Pang et al.
    # 2024), which keeps the chosen answers from becoming improbable beside the rejected ones
    imitation: float = 0.2
    right: bool = True  # whether the chosen answer must be right, or only better than the other
    rounds: int = 2  # times that the policy answers, its answers are judged and it learns
    samples: int = 4  # answers to each prompt, which pairs are made of
    flipped: float = 0.0  # share of pairs to swap on purpose, for cdpo, robust and --influence


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train"]] = "train"
    # settings that the other options start from; people: for --data.files on a GPU
    preset: Literal["default", "people"] = "default"
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
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    # with --data.files: reading before imitating, reward models, members of their ensemble
    pretrain: Stage = field(default_factory=lambda: Stage(1000, 64, 2e-3))
    rewards: Stage = field(default_factory=lambda: Stage(150, 64, 3e-4))
    members: int = 8
    sft: Stage = field(default_factory=lambda: Stage(650, 16, 3e-3))
    # betas to train side by side in one vmapped step, in place of the seeds
    sweep: tuple[float, ...] = ()
    influence: int = 0  # pairs to score by their influence on the loss of held-out pairs
    dpo: Preferences = field(default_factory=lambda: Preferences(80, 64, 5e-4))


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


def sums_of(config: Preferences, setup: Setup, params: Params, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the answers of P pairs: (2 P,), for KTO P more under other prompts."""
    rows, mask = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)
    if config.loss == "kto":
        rows = torch.cat([rows, batch["wrong"]])
        mask = torch.cat([mask, batch["wrong_mask"]])
    params = setup.ready(params)
    logps = answer_logps(setup.model, params, rows, mask, implementation=setup.implementation)
    return sequence_logps(logps, mask)[0]


def loss_of(
    config: Preferences, sums: Tensor, batch: dict[str, Tensor], beta: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and figures of a batch, from what `sums_of` gives."""
    count = 2 * len(batch["tokens"])
    sides = sums[:count].unflatten(0, (-1, 2))
    losses, margins = preference_loss(
        config,
        sides,
        batch["mask"].sum(-1),
        batch["reference"],
        sums[count:],
        batch.get("wrong_reference"),
        beta,
    )
    loss = losses.mean()
    if config.imitation and config.loss != "orpo":  # which has it already
        loss = loss - config.imitation * (sides[:, 0] / batch["mask"][:, 0].sum(-1)).mean()
    return loss, {
        "margin": margins.mean(),
        "accuracy": (margins > 0).float().mean(),
        "chosen_logratio": (sides - batch["reference"])[:, 0].mean().detach(),
    }


def make_loss(config: Preferences, setup: Setup):
    """Mean loss of a batch of pairs, whose reference log-probabilities are part of the data."""

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        beta = params[BETA].detach() if BETA in params else None
        body = {name: value for name, value in params.items() if name != BETA}
        return loss_of(config, sums_of(config, setup, body, batch), batch, beta)

    return loss_fn


# ------------------------------------------------------------------------------------------ stages


def judged_pairs(
    config: Preferences,
    setup: Setup,
    task: Task,
    params: Params,
    prompts: Sequence[Prompt],
    seed: int,
) -> list[Pair]:
    """Pairs of the policy's own answers, of which the checker prefers one."""
    options: dict[str, Any] = {"samples": config.samples, "right": config.right}
    return own_pairs(setup, task, params, prompts, seed, **options)


def as_data(
    config: Preferences, setup: Setup, params: Params, pairs: list[Pair]
) -> dict[str, Tensor]:
    """Pairs as tensors, with the reference's log-probabilities."""
    encoded = encode_pairs(pairs, longest=setup.length)
    data = {"tokens": encoded.tokens, "mask": encoded.mask}
    if config.loss == "kto":  # each prompt with the chosen answer of the next pair
        wrong = [
            (one.prompt, other.chosen[: encoded.tokens.shape[-1] - len(one.prompt)])
            for one, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        data["wrong"], data["wrong_mask"] = padded(wrong, encoded.tokens.shape[-1])
    return with_reference(setup, params, data)


def with_reference(setup: Setup, params: Params, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The data with the sums of the reference's log-probabilities, computed once."""
    data = {name: x.to(setup.device) for name, x in data.items()}
    frozen = cast(params, setup.dtype)

    def sums(tokens: Tensor, mask: Tensor) -> Tensor:
        logps = answer_logps(setup.plain, frozen, tokens, mask, implementation=setup.implementation)
        return sequence_logps(logps, mask)[0]

    flat = {name: data[name].flatten(0, 1) for name in ("tokens", "mask")}
    data["reference"] = in_parts(sums, flat, 256).unflatten(0, (-1, 2))
    if "wrong" in data:
        wrong = {"tokens": data["wrong"], "mask": data["wrong_mask"]}
        data["wrong_reference"] = in_parts(sums, wrong, 256)
    return data


def optimise(
    config: Config, setup: Setup, params: Params, data: dict[str, Tensor], seed: int, folder: Path
) -> Params:
    """The parameters move, the reference stays in the data."""
    optimizer = optimizer_of(config.dpo)
    trained = run_stage(
        folder,
        config.dpo.steps,
        init_state(setup.enter(params), optimizer, random.key(seed, device=setup.device)),
        step_of(setup, make_loss(config.dpo, setup), optimizer),
        Shuffled(data, config.dpo.batch, seed, setup.share),
        device=setup.device,
        resume=resume_command(config),
        tokens=lambda batch: batch["mask"].sum(),
    )
    return setup.leave(trained.params)


def run_seed(config: Config, machine: configs.Machine, seed: int, run: Path) -> Result:
    """All stages of one seed; figures before and after."""
    folder, task = run / f"seed-{seed}", built_in(config.data, seed)
    setup, resume = set_up(config.model, task, machine, config.mesh), resume_command(config)
    reference = fine_tune(setup, task, config.sft, seed, folder / "sft", resume)
    before = assess(setup, reference, reference, task, seed)
    params, data, flipped, count = reference, {}, torch.zeros(0), 0
    for number in range(1, config.dpo.rounds + 1):
        key = config.dpo.rounds * seed + number
        pairs = judged_pairs(config.dpo, setup, task, params, task.prompts, key)
        if number > 1 and len(pairs) < config.dpo.batch:
            say(f"round {number} finds {len(pairs)} pairs, fewer than a batch: done")
            break
        pairs, flipped = flip(pairs, config.dpo.flipped, key)
        data, count = as_data(config.dpo, setup, params, pairs), count + len(pairs)
        place = folder / f"dpo-{number}"
        start = params  # the reference of this round, which stays as it is
        params = optimise(config, setup, start, data, key, place)
    after = assess(setup, params, reference, task, seed)
    prompts = [prompt.text for prompt in task.held_out]
    result = Result(seed, before, after, prompts, {"pairs": count})
    say(tell(result))
    if config.influence and seed == config.seed:
        show_influence(config, setup, task, reference, params, data, flipped, seed)
    return result


def flip(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], Tensor]:
    """The pairs with this share of them swapped, and which ones."""
    swapped = random.bernoulli(random.key(seed + 7), share, (len(pairs),))
    mixed = [
        pair._replace(chosen=pair.rejected, rejected=pair.chosen) if swap else pair
        for pair, swap in zip(pairs, swapped.tolist(), strict=True)
    ]
    return mixed, swapped


# ------------------------------------------------------------------------- preferences of people


def run_files(config: Config, machine: configs.Machine, run: Path) -> None:
    """Preferences in files: reward models, single and as an ensemble, and DPO judged by it."""
    task = from_pairs(config.data, config.model.length)
    setup, resume = set_up(config.model, task, machine), resume_command(config)
    print("\n".join(task.notes), flush=True)
    seed = config.seed
    start = pretrain(setup, task, config.pretrain, seed, run / "pretrain", resume)
    reference = fine_tune(setup, task, config.sft, seed, run / "sft", resume, start)
    figures: dict[str, Any] = reward_models(config, setup, task, reference, run)
    judge = figures.pop("judge")
    data = as_data(config.dpo, setup, reference, task.pairs)
    unseen = as_data(config.dpo, setup, reference, task.held_out_pairs)
    key = random.key(seed + 1000, device=setup.device)
    before = answer(setup, reference, task, task.held_out, key)
    asked = [prompt.ids for prompt in task.held_out]
    won, agreed = [], []
    for own in range(seed, seed + config.seeds):
        params = optimise(config, setup, reference, data, own, run / f"seed-{own}" / "dpo")
        after = answer(setup, params, task, task.held_out, key)
        better = judge(asked, after.ids) > judge(asked, before.ids)
        equal = [a == b for a, b in zip(after.ids, before.ids, strict=True)]
        won.append(float((better.float() + 0.5 * torch.tensor(equal).to(better)).mean()))
        agreed.append(implicit_accuracy(config.dpo, setup, params, unseen))
        print(f"seed {own}: DPO wins {won[-1]:.1%} of {len(asked)} prompts", flush=True)
        if own == seed:
            leave_answers(run, task, before.texts, after.texts)
    print(
        f"held-out pairs ranked right by DPO's implicit rewards: {mean_and_spread(agreed)}\n"
        f"DPO's answers beat those before it, by the ensemble: {mean_and_spread(won)} of "
        f"{len(asked)} held-out prompts, {config.seeds} seeds"
    )
    figures |= {"win_rates": won, "implicit_accuracies": agreed}
    (run / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw_seeds(run, range(seed, seed + config.seeds), "dpo", PANELS)


def reward_models(
    config: Config, setup: Setup, task: Task, start: Params, run: Path
) -> dict[str, Any]:
    """Held-out accuracy of single reward models and of an ensemble, which comes back as a judge."""
    pairs, resume = encode_pairs(task.pairs, longest=setup.length), resume_command(config)
    rows = [(p.prompt, side) for p in task.held_out_pairs for side in (p.chosen, p.rejected)]
    alone = []
    for seed in range(config.seed, config.seed + config.seeds):
        folder = run / f"seed-{seed}" / "rewards"
        single = train_rewards(setup, start, pairs, config.rewards, seed, 1, folder, resume)
        alone.append(float(accuracy(rewards_of(setup, single, rows))[0]))
    members = config.members
    stacked = train_rewards(
        setup, start, pairs, config.rewards, config.seed + 100, members, run / "ensemble", resume
    )
    every = rewards_of(setup, stacked, rows)
    ensembles = {
        how: float(accuracy(aggregate(every, how)[None])[0])  # pyright: ignore[reportArgumentType]
        for how in ("mean", "min", "uncertainty")
    }
    of_members = accuracy(every)
    shares = ", ".join(f"{how} {share:.1%}" for how, share in ensembles.items())
    print(
        f"reward models on {len(rows) // 2} held-out pairs: alone {mean_and_spread(alone)} "
        f"({len(alone)} seeds); {members} in one step: each {mean_and_spread(of_members.tolist())},"
        f" together: {shares}",
        flush=True,
    )
    return {
        "reward_models": alone,
        "members": of_members.tolist(),
        "ensemble": ensembles,
        "judge": RewardModel(setup, stacked, "mean"),
    }


def implicit_accuracy(
    config: Preferences, setup: Setup, params: Params, data: dict[str, Tensor]
) -> float:
    """Share of pairs whose chosen answer the policy has come to prefer more than the reference."""
    after = with_reference(setup, params, {name: data[name] for name in ("tokens", "mask")})
    gain = after["reference"] - data["reference"]
    return float((gain[:, 0] > gain[:, 1]).float().mean())


def leave_answers(run: Path, task: Task, before: list[str], after: list[str]) -> None:
    rows = zip(task.held_out, before, after, strict=True)
    lines = [
        json.dumps({"prompt": prompt.text, "before": a, "after": b}, ensure_ascii=False)
        for prompt, a, b in rows
    ]
    (run / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print("\n".join(lines[:3]))


# ------------------------------------------------------------------------------ what functions give


def run_sweep(config: Config, machine: configs.Machine, run: Path) -> None:
    """One policy for each beta, all in one vmapped step on the same batches."""
    task, seed = built_in(config.data, config.seed), config.seed
    setup, resume = set_up(config.model, task, machine), resume_command(config)
    reference = fine_tune(setup, task, config.sft, seed, run / "sft", resume)
    pairs = judged_pairs(config.dpo, setup, task, reference, task.prompts, seed)
    data = as_data(config.dpo, setup, reference, pairs)
    betas = torch.tensor(config.sweep, device=setup.device)
    stacked = {**stack([reference] * len(betas)), BETA: betas}
    keys = random.split(random.key(seed, device=setup.device), len(betas))
    still = stateless(lambda grads, params: {n: 0 * g for n, g in grads.items()})
    optimizer = by_group([(f"^{BETA}$", still), (r"", optimizer_of(config.dpo))])
    mapped = setup._replace(implementation="flash")  # torch's own attention is slow under vmap
    stacked = run_stage(
        run / "sweep",
        config.dpo.steps,
        init_state(stacked, optimizer, keys),
        step_of(mapped, make_loss(config.dpo, mapped), optimizer, members=len(betas)),
        Shuffled(data, config.dpo.batch, seed),
        device=setup.device,
        resume=resume,
        tokens=lambda batch: len(betas) * batch["mask"].sum(),
    ).params
    stacked.pop(BETA)
    before = assess(setup, reference, reference, task, seed)
    print(f"before: {before.sampled:.1%} right, {before.greedy:.1%} greedy")
    rows = []
    for beta, params in zip(config.sweep, unstack(stacked), strict=True):
        after = assess(setup, params, reference, task, seed)
        rows.append(
            {"beta": beta, "sampled": after.sampled, "greedy": after.greedy, "kl": after.kl}
        )
        print(
            f"beta {beta:g}: {after.sampled:.1%} right, {after.greedy:.1%} greedy, KL "
            f"{after.kl:.2f} nats an answer"
        )
    (run / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def show_influence(
    config: Config,
    setup: Setup,
    task: Task,
    reference: Params,
    params: Params,
    data: dict[str, Tensor],
    flipped: Tensor,
    seed: int,
) -> None:
    """Which training pairs hurt held-out pairs the most, and how many of those were flipped."""
    exact = setup._replace(implementation="flash", dtype=torch.float32)
    unseen = judged_pairs(config.dpo, setup, task, reference, task.held_out, seed + 1)
    held_out = as_data(config.dpo, setup, reference, unseen)
    count = min(config.influence, len(data["tokens"]))
    examples = {name: x[:count] for name, x in data.items()}

    def loss_fn(params: Params, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(config.dpo, sums_of(config.dpo, exact, params, batch), batch)[0]

    def one(params: Params, example: dict[str, Tensor]) -> Tensor:
        return loss_fn(params, {name: x[None] for name, x in example.items()})

    def gauss_newton(v: Params) -> Params:  # the Hessian of a network has negative curvature, too
        return ggn_vp(
            lambda p: sums_of(config.dpo, exact, p, examples),
            lambda sums: loss_of(config.dpo, sums, examples)[0],
            params,
            v,
        )

    target = torch.func.grad(loss_fn)(params, held_out)
    scores, solved = influences(
        one, params, examples, target, damping=1e-2, steps=20, product=gauss_newton
    )
    worst = scores.argsort(descending=True)
    head = worst[: max(1, count // 10)]
    share, overall = flipped[:count][head].float().mean(), flipped[:count].float().mean()
    print(
        f"influence of {count} pairs (residual of the solve {solved.residual:.2g}): of the "
        f"{len(head)} most harmful ones {share:.0%} were flipped, of all {overall:.0%}"
    )
    for name, rows in (("harmful", worst[:3]), ("helpful", worst.flip(0)[:3])):
        for i in rows.tolist():
            texts = task.tokenizer.decode(data["tokens"][i].tolist())
            print(f"  {name} {scores[i]:+.3g}: {texts[0]!r} over {texts[1]!r}")


PANELS = {
    "loss": "loss",
    "margin of implicit rewards": "margin",
    "share of pairs agreed with": "accuracy",
    "log-ratio of the chosen [nats]": "chosen_logratio",
}


PRESETS = {
    "default": Config(),
    # preferences of people, on a GPU: --data.files harmless.jsonl.gz helpful.jsonl.gz
    "people": Config(
        preset="people",
        data=Data(vocabulary=6000, new=96, held_out=256),
        model=Model(width=384, depth=6, heads=6, length=320, dropout=0.1),
        pretrain=Stage(500, 64, 2e-3, 100),
        sft=Stage(150, 32, 5e-4),
        rewards=Stage(80, 64, 2e-4, 10),
        dpo=Preferences(80, 64, 1e-4, 10, imitation=0.0),
    ),
}


def resume_command(config: Config) -> str:
    return f"python recipes/align_dpo.py --resume --out {config.out} --name {config.name}"


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range; a run that exists, or none to go on with.
    """
    configs.check_numbers(replace(config, mesh=Mesh(dp_shard=1)), MAY_BE_ZERO)
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    own, smoothing = config.dpo, config.dpo.label_smoothing
    for name, beta in [("dpo.beta", own.beta), *(("sweep", beta) for beta in config.sweep)]:
        if beta is not None and not beta > 0:
            raise ValueError(f"--{name} ({beta}) must be above 0: leave it out for one that suits")
    if own.loss in ("cdpo", "robust") and not 0 <= smoothing < 0.5:
        raise ValueError(f"--dpo.label-smoothing ({smoothing}) must be in [0, 0.5)")
    if not 0 <= own.flipped < 1:
        raise ValueError(f"--dpo.flipped ({own.flipped}) must be in [0, 1)")
    check_room(config.data, config.model)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (config.data.files or config.sweep):
        raise ValueError(
            "--data.files and --sweep train ensembles, in one process: start them without torchrun"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(config, name=config.name or configs.free_name(config.out, "align_dpo"))


def main(config: Config) -> None:
    begin = time.perf_counter()
    joined(config.device)
    with agreement.together():
        config = checked(config)
        machine = configs.machine(config.device, config.dtype, config.compile)
    config = replace(config, name=agreement.from_all(config.name)[0])
    if machine.note:
        say(f"note: {machine.note}")
    run = config.out / str(config.name)
    with agreement.together():
        if not config.resume and agreement.rank() == 0:
            configs.new_run(run, config, overwrite=config.overwrite)
    seeds = range(config.seed, config.seed + config.seeds)
    if config.data.files:
        run_files(config, machine, run)
    elif config.sweep:
        run_sweep(config, machine, run)
    else:
        results = [run_seed(config, machine, seed, run) for seed in seeds]
        leave(run, results, "dpo-1", PANELS)
    say(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=())
    return configs.parse(start, args, description=str(__doc__), prog="align_dpo.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
