r"""Teach a decoder to follow instructions from rewards on its own answers.

    python recipes/align_ppo.py                                    # GRPO against the checker
    python recipes/align_ppo.py --rl.algorithm ppo                 # with a critic
    python recipes/align_ppo.py --rl.reward model                  # against a reward model
    python recipes/align_ppo.py --rl.reward my_rewards.py:polite   # against any function
    python recipes/align_ppo.py --rl.trust-region 0.003            # natural gradient steps
    python recipes/align_ppo.py --rl.rollouts beside               # answers while it updates
    python recipes/align_ppo.py --preset problems --data.files gsm8k.jsonl

    torchrun --nproc-per-node 4 recipes/align_ppo.py --mesh.tp 2       # 2 x 2 processes
    torchrun --nproc-per-node 4 recipes/align_ppo.py --mesh.cp 2

Stages of each seed, in folders of their own (--resume goes on where it was stopped):

    1  sft      a small decoder imitates demonstrations whose writer mostly falls into habits
    2  rewards  (--rl.reward model) an ensemble learns in one vmapped step which answers the checker
                prefers
    3  rl       rollouts on the training parameters, rewards, advantages, updates

The report says how many answers to held-out prompts the checker finds right before and after. With
seeds 10, 11 and 12 (--seed 10), which no setting was chosen by, torch 2.11, two cores of a Xeon:
28.5% sampled and 23.8% greedy before, 67.9% and 77.8% after, 1.2 nats of KL an answer, in
264 seconds.

A rollout that gets no usable reward is named and skipped; after --rl.patience of them in a row the
run saves and stops. Several processes: each answers its share of the prompts with whole parameters,
also in a tp or cp group, whose processes work on the same rows in updates, which are on the mesh.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import torch

from msfs_functional import agreement, checkpoint, errors, launching, ppo, random, rewards
from msfs_functional import config as configs
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional.aligning import (
    Model,
    Prepared,
    Stage,
    fine_tune,
    optimizer_of,
    prepare,
    pretrain,
    say,
    step_of,
)
from msfs_functional.alignment_runs import (
    Options,
    Result,
    begin,
    draw_seeds,
    each_seed,
    leave,
    resume_command,
    tell,
)
from msfs_functional.alignment_tasks import Data, checked_task
from msfs_functional.answerers import Ahead, Answerer, Beside, Judged, Work
from msfs_functional.judging import assess, own_pairs
from msfs_functional.pairs import encode_pairs
from msfs_functional.params import Params
from msfs_functional.reinforcement import (
    VALUE,
    Buffer,
    Learning,
    body,
    collected,
    empty_answers,
    empty_buffer,
    experience,
    make_loss,
    minibatch,
    natural_step,
    opinions,
    told,
)
from msfs_functional.reward_training import PANELS as REWARD_PANELS
from msfs_functional.reward_training import accuracy, rewards_of, train_rewards
from msfs_functional.rollouts import SampleTable
from msfs_functional.stages import CHECKPOINTS, interruptible, stopped
from msfs_functional.tracking import Tracker
from msfs_functional.train import init_state

NAME = "align_ppo"


@dataclass(frozen=True)
class Config(Options):
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # settings that the other options start from; problems: for --data.files on a GPU
    preset: Literal["default", "problems"] = "default"
    save_every: int = 40  # updates between checkpoints
    rewards: Stage = field(default_factory=lambda: Stage(300, 32, 1e-3))  # reward models
    rl: Learning = field(default_factory=Learning)


# ----------------------------------------------------------------------------------- reward models


def ensemble_of(
    config: Config, ready: Prepared, params: Params, seed: int, folder: Path
) -> tuple[Params | None, dict[str, float]]:
    """Reward models of the checker's preferences, stacked, if they are wanted; figures of them."""
    if config.rl.reward != "model":
        return None, {}
    task, setup, _ = ready
    pairs = own_pairs(setup, task, params, task.prompts, seed, 4, right=False)
    stacked = train_rewards(
        setup,
        params,
        encode_pairs(pairs, longest=setup.length),
        config.rewards,
        seed,
        config.rl.members,
        folder,
        resume_command(NAME, config),
    )
    unseen = own_pairs(setup, task, params, task.held_out, seed + 1, 4, right=False)
    rows = [(pair.prompt, side) for pair in unseen for side in (pair.chosen, pair.rejected)]
    right = float(accuracy(rewards_of(setup, stacked, rows)).mean()) if rows else math.nan
    return stacked, {"reward model accuracy": round(right, 4)}


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Loop:
    """What stands between two updates, beside tensors; saved with them."""

    iteration: int = 0  # rollouts used, skipped ones included
    failed: int = 0  # of them in a row, without a reward
    skipped: int = 0
    pending: int = 0  # iteration whose answers are there already, or asked for; 0: none
    failure: str | None = None  # why those have no reward


def learn(
    config: Config,
    ready: Prepared,
    reference: Params,
    work: Work,
    seed: int,
    folder: Path,
) -> Params:
    """Rollouts and updates; every update may be the last before a resume."""
    rl, (task, setup, _) = config.rl, ready
    per = rl.epochs * rl.minibatches
    total = rl.iterations * per
    first_params = dict(reference)
    if rl.algorithm == "ppo":
        first_params[VALUE] = torch.zeros_like(reference["norm.weight"])
    optimizer = optimizer_of(Stage(total, rl.prompts, rl.rate, rl.warmup))
    state = init_state(setup.enter(first_params), optimizer, random.key(seed, device=setup.device))
    step = step_of(setup, make_loss(rl, setup, task.new), optimizer)
    if rl.trust_region is not None:
        step = natural_step(rl, setup)

    whole = setup.leave(state.params)
    answerer = Answerer(work, task, setup, body(whole))
    loop, buffer = Loop(), empty_buffer(rl, answerer.width, setup.device)
    nothing = empty_answers(rl, answerer.width, setup.device)  # in flight
    coefficient = torch.full((), rl.pull, device=setup.device)
    in_flight = nothing
    root = folder / CHECKPOINTS
    if agreement.from_all(bool(checkpoint.checkpoints(root)))[0]:
        saved = checkpoints.load(root)
        in_flight = {name: value.clone() for name, value in nothing.items()}
        like = {"train": state, "buffer": buffer, "next": in_flight, "coefficient": coefficient}
        found = checkpoints.load(saved.path, like).state
        state, buffer, coefficient = found["train"], found["buffer"], found["coefficient"]
        loop = Loop(**saved.extra["loop"])
    done = int(state.step)
    if done >= total:
        return setup.leave(body(state.params))
    ahead = None
    if rl.rollouts != "fresh":
        ahead = Ahead(answerer)
        if rl.rollouts == "beside":
            ahead = Beside(work, answerer, body(whole))
        if loop.pending:
            share, shares = setup.place
            own = {name: x.tensor_split(shares)[share] for name, x in in_flight.items()}
            ahead.restore(loop.pending, own, loop.failure)
    patience = rewards.Patience(rl.patience, loop.failed, loop.skipped)
    writer = checkpoints.Writer(root, keep_last=1)
    options: dict[str, Any] = {"step": done, "every": per, "rank": setup.rank}
    tracker = Tracker(folder, total, name=f"{folder.parent.name} {folder.name}", **options)
    samples = SampleTable(folder / "samples.jsonl", loop.iteration) if setup.rank == 0 else None

    def save(count: int) -> None:
        tracker.flush()
        loop.failed, loop.skipped = patience.failed, patience.skipped
        loop.pending, loop.failure, flying = 0, None, nothing
        if ahead is not None and ahead.pending:
            loop.pending, loop.failure = ahead.pending, first_failure(ahead.ready())
            flying = {name: collected(setup, x) for name, x in ahead.kept().items()}
        kept = {"train": state, "buffer": buffer, "next": flying, "coefficient": coefficient}
        writer.save(count, kept, extra={"loop": vars(loop)})

    def answers(count: int) -> Judged:
        """This iteration's; with `ahead` the next one's are asked for as well."""
        nonlocal whole
        whole = setup.leave(state.params)
        if ahead is None:
            return answerer.ask(loop.iteration, body(whole))
        if not ahead.pending:
            ahead.begin(loop.iteration, body(whole))
        judged = ahead.finish()
        if count + per <= total or first_failure(judged) is not None:
            ahead.begin(loop.iteration + 1, body(whole))
        return judged

    def next_experience(count: int) -> tuple[Buffer, dict[str, Any]]:
        """The first rollout that has rewards, as experience, and its figures."""
        nonlocal coefficient
        while True:
            loop.iteration += 1
            begun = time.perf_counter()
            judged = answers(count)
            seconds = time.perf_counter() - begun
            if (failure := first_failure(judged)) is not None:
                try:
                    tracker.note(patience.skip(loop.iteration, rewards.RewardError(failure)))
                except rewards.RewardError:
                    save(count - 1)  # nothing computed is lost
                    raise
                continue
            patience.fine()
            if samples is not None:
                samples.add(loop.iteration, table_rows(ready, judged, rl.samples))
            found = opinions(rl, setup, whole, reference, judged.rollout, task.new)
            found = {name: collected(setup, rows) for name, rows in found.items()}
            scores = collected(setup, judged.scores)
            made = experience(rl, found, scores, coefficient)
            figures = told(made, scores, collected(setup, judged.rollout.ended), seconds)
            if rl.target_kl is not None:
                coefficient = ppo.adaptive_kl_coefficient(
                    coefficient,
                    figures["kl"],
                    target=rl.target_kl,
                    horizon=rl.horizon,
                    items=len(scores),
                )
            more = {"skipped_rollouts": patience.skipped, "kl_coefficient": coefficient}
            return made, {**figures, **more}

    try:
        with tracker, writer, interruptible() as stop:
            figures: dict[str, Any] = {}
            begun = None  # of the updates after a rollout
            for count in range(done + 1, total + 1):
                part = (count - 1) % per
                if part == 0:
                    buffer, figures = next_experience(count)
                    begun = time.perf_counter()
                batch = minibatch(rl, buffer, state.key, loop.iteration, part, setup.share)
                batch["coefficient"] = coefficient.expand(len(batch["tokens"]))
                state, metrics = step(state, batch)
                if count % per == 0 and begun is not None:
                    float(metrics["loss"])  # waits for the device, once a rollout
                    seconds = time.perf_counter() - begun
                    figures["update_tokens/s"] = rl.epochs * buffer["mask"].numel() / seconds
                metrics.pop("weight", None)
                tracker.log(count, {**metrics, **figures})
                figures = {}
                halt = agreement.highest(stop.received or 0) if count < total else 0
                if halt or count % config.save_every == 0 or count == total:
                    save(count)
                if halt:
                    writer.wait()
                    raise stopped(tracker, count, halt, resume_command(NAME, config))
            writer.wait()
    finally:
        if ahead is not None:
            ahead.close()
    return setup.leave(body(state.params))


def first_failure(judged: Judged) -> str | None:
    """Why a rollout has no rewards, on whichever process; None: it has."""
    return next((said for said in agreement.from_all(judged.failure) if said is not None), None)


def table_rows(ready: Prepared, judged: Judged, samples: int) -> list[dict[str, Any]]:
    """The first answer to some of the prompts."""
    ids, some = judged.rollout.completions(), range(0, min(4, len(judged.asked)))
    texts = ready.task.tokenizer.decode([ids[i * samples] for i in some])
    return [
        {
            "prompt": judged.asked[i].text,
            "answer": text,
            "reward": float(judged.scores[i * samples]),
        }
        for i, text in zip(some, texts, strict=True)
    ]


# -------------------------------------------------------------------------------------------- runs


def run_seed(config: Config, machine: configs.Machine, seed: int, run: Path) -> Result:
    """All stages of one seed; figures before and after."""
    folder, resume = run / f"seed-{seed}", resume_command(NAME, config)
    ready = prepare(checked_task, config.data, config.model, machine, config.mesh, seed)
    task, setup, _ = ready
    if task.notes:
        say("\n".join(task.notes))
    start = pretrain(ready, config.pretrain, seed, folder / "pretrain", resume)
    reference = fine_tune(setup, task, config.sft, seed, folder / "sft", resume, start)
    before = assess(setup, reference, reference, task, seed)
    ensemble, notes = ensemble_of(config, ready, reference, seed, folder / "rewards")
    work = Work(config.rl, machine, seed, setup.place, ensemble)
    params = learn(config, ready, reference, work, seed, folder / "rl")
    after = assess(setup, params, reference, task, seed)
    result = Result(seed, before, after, [prompt.text for prompt in task.held_out], notes)
    say(tell(result))
    return result


PANELS = {
    "reward": "reward",
    "KL to the reference [nats an answer]": "kl",
    "entropy [nats a token]": "rollout_entropy",
    "share of tokens clipped": "clip_fraction",
    "largest ratio": "ratio_max",
    "smallest ratio": "ratio_min",
    "explained variance of the critic": "explained_variance",
    "length [tokens]": "length",
    "tokens/s of rollouts": "rollout_tokens/s",
    "tokens/s of updates": "update_tokens/s",
}


PRESETS = {
    "default": Config(),
    # questions with worked answers, on a GPU: --data.files train.jsonl
    "problems": Config(
        preset="problems",
        seeds=1,
        save_every=200,
        data=Data(vocabulary=4000, new=144, held_out=512, share=0.08),
        model=Model(width=512, depth=8, heads=8, length=304, dropout=0.1),
        pretrain=Stage(500, 64, 1.5e-3, 100),
        sft=Stage(350, 64, 8e-4),
        rl=Learning(iterations=60, prompts=64, samples=16, minibatches=4, rate=5e-5, kl=0.01),
    ),
}


def check(config: Config) -> None:
    """Raises ValueError for options that exclude each other."""
    rl = config.rl
    if config.data.texts and not config.data.files:
        raise ValueError(
            f"--data.texts ({[str(path) for path in config.data.texts]}) are read beside "
            "--data.files, of which there are none: give problems too"
        )
    if rl.prompts * rl.samples % rl.minibatches:
        raise ValueError(
            f"--rl.minibatches ({rl.minibatches}) must divide the {rl.prompts} x {rl.samples} "
            "answers of a rollout: change one"
        )
    if rl.samples < 2 and rl.algorithm in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(
            f"--rl.samples ({rl.samples}) must be at least 2 with {rl.algorithm}: an answer is "
            "judged against others of its prompt"
        )
    if rl.trust_region is not None and rl.algorithm == "ppo":
        raise ValueError(
            f"--rl.trust-region ({rl.trust_region}) moves no critic: choose another --rl.algorithm"
        )
    if rl.trust_region is not None and config.mesh.cp > 1:
        raise ValueError(
            f"--rl.trust-region ({rl.trust_region}) is of whole rows, which --mesh.cp "
            f"({config.mesh.cp}) cuts: use --mesh.cp 1, with dp or tp in its place"
        )
    if rl.reward not in ("rule", "model"):
        rewards.load(rl.reward)


def main(config: Config) -> None:
    started = time.perf_counter()
    check(config)
    with launching.joined(config.device, debug=config.debug):
        config, machine, run = begin(config, NAME)
        results = each_seed(run_seed, config, machine, run)
        leave(run, results, "rl", PANELS)
        if config.rl.reward == "model" and agreement.rank() == 0:
            seeds = [result.seed for result in results]
            draw_seeds(run, seeds, "rewards", REWARD_PANELS, "rewards.png")
        say(f"{time.perf_counter() - started:.0f} seconds; everything is in {run}")


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=())
    return configs.parse(start, args, description=str(__doc__), prog=f"{NAME}.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
