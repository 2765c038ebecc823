r"""Teach a decoder to follow instructions from rewards on its own answers.

    python recipes/align_ppo.py                                    # GRPO against the checker
    python recipes/align_ppo.py --rl.algorithm ppo                 # with a critic
    python recipes/align_ppo.py --rl.reward model                  # against a reward model
    python recipes/align_ppo.py --rl.reward my_rewards.py:polite   # against any function
    python recipes/align_ppo.py --rl.trust-region 0.003            # natural gradient steps
    python recipes/align_ppo.py --preset problems --data.files gsm8k.jsonl

    torchrun --nproc-per-node 2 recipes/align_ppo.py --mesh.dp-shard 2

Stages of each seed, in folders of their own (--resume goes on where it was stopped):

    1  sft      a small decoder imitates demonstrations whose writer mostly falls into habits
    2  rewards  (--rl.reward model) an ensemble learns in one vmapped step which answers the checker
                prefers
    3  rl       rollouts on the training parameters, rewards, advantages, updates

The report says how many answers to held-out prompts the checker finds right before and after.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from msfs_functional import advantages as adv
from msfs_functional import agreement, checkpoint, errors, masked, ppo, random, rewards
from msfs_functional import config as configs
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional.aligning import (
    Mesh,
    Model,
    Result,
    Setup,
    Stage,
    assess,
    check_room,
    fine_tune,
    joined,
    leave,
    optimizer_of,
    own_pairs,
    pretrain,
    roller,
    say,
    set_up,
    step_of,
    tell,
)
from msfs_functional.alignment_tasks import Data, Task, built_in, from_problems
from msfs_functional.curvature import trust_region_step
from msfs_functional.generation import Sampling, Settings
from msfs_functional.pairs import Shuffled, encode_pairs
from msfs_functional.params import Params, cast
from msfs_functional.reward_training import RewardModel, accuracy, rewards_of, train_rewards
from msfs_functional.rollouts import Rollout, SampleTable, width_of
from msfs_functional.scoring import answer_logps, answer_statistics
from msfs_functional.stages import CHECKPOINTS, stopped
from msfs_functional.tokenizer import EOS, PAD
from msfs_functional.tracking import Tracker
from msfs_functional.train import TrainState, init_state

MAY_BE_ZERO = ("seed", "warmup")
VALUE = "value.weight"  # of the critic, which reads the policy's states
Buffer = dict[str, Tensor]


@dataclass(frozen=True)
class Learning:
    """The stage of reinforcement."""

    # ppo: with a critic; grpo, dr_grpo: advantages within the answers to a prompt; rloo: the same,
    # leave-one-out, ratios of whole answers; reinforce: REINFORCE++, whitened returns
    algorithm: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    # "rule" (the checker), "model" (an ensemble trained on its preferences) or FILE.py:FUNCTION
    reward: str = "rule"
    iterations: int = 40  # rollouts
    prompts: int = 32  # of a rollout
    samples: int = 8  # answers to each
    epochs: int = 1  # passes over a rollout
    minibatches: int = 4  # updates of a pass
    rate: float = 5e-4  # peak learning rate
    warmup: int = 10  # updates
    # KL of an update [nats a token]: a natural gradient step by the exact Fisher matrix in place of
    # the optimizer's; None: the optimizer
    trust_region: float | None = None
    temperature: float = 1.0  # of the rollouts
    clip: float = 0.2  # of ratios
    clip_high: float | None = None  # above 1, where it differs
    kl: float = 0.02  # coefficient of the pull to the reference
    # where the pull is; None: loss for grpo and dr_grpo, reward for the others
    kl_in: Literal["reward", "loss"] | None = None
    estimator: Literal["k1", "k2", "k3"] = "k3"  # of the pull in the loss; in the reward it is k1
    target_kl: float | None = None  # nats an answer that the coefficient is steered to; None: fixed
    horizon: int = 2000  # answers over which a full error moves the coefficient by 20%
    gamma: float = 1.0  # discount of a token
    lam: float = 0.95  # of GAE
    value_weight: float = 0.1  # of the critic's loss
    value_clip: float = 0.2  # of the critic's step
    entropy: float = 0.0  # weight of the bonus [1/nat]
    truncation: float = 2.0  # most that a token's trainer / sampler ratio may weigh
    members: int = 4  # reward models
    aggregate: Literal["mean", "min", "uncertainty"] = "mean"  # of their rewards
    penalty: float = 1.0  # of their variance, with "uncertainty"
    patience: int = 3  # rollouts in a row without a usable reward before the run stops


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train"]] = "train"
    # settings that the other options start from; problems: for --data.files on a GPU
    preset: Literal["default", "problems"] = "default"
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
    save_every: int = 40  # updates between checkpoints
    debug: bool = False  # show tracebacks
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    # with --data.files: reading before imitating
    pretrain: Stage = field(default_factory=lambda: Stage(1000, 64, 2e-3))
    sft: Stage = field(default_factory=lambda: Stage(650, 16, 3e-3))
    rewards: Stage = field(default_factory=lambda: Stage(150, 32, 1e-3))
    rl: Learning = field(default_factory=Learning)


# ------------------------------------------------------------------------------------- experience


def kl_in_reward(rl: Learning) -> bool:
    return (rl.kl_in or ("loss" if "grpo" in rl.algorithm else "reward")) == "reward"


def body(params: Params) -> Params:
    """The policy without its critic."""
    return {name: value for name, value in params.items() if name != VALUE}


def values_of(params: Params, states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, (states.float() * params[VALUE].float()).sum(-1), 0.0)


def opinions(
    rl: Learning, setup: Setup, params: Params, reference: Params, rollout: Rollout
) -> Buffer:
    """What policy, critic and reference think of each token, without gradients."""
    tokens, mask = rollout.tokens, rollout.mask
    own, before = cast(params, setup.dtype), cast(reference, setup.dtype)
    options: dict[str, Any] = {
        "temperature": rl.temperature,
        "implementation": setup.implementation,
    }
    with torch.no_grad():
        logps, entropies, states = answer_statistics(
            setup.plain, body(own), tokens, mask, **options
        )
        found = {
            "tokens": tokens,
            "mask": mask,
            "logps": logps,
            "reference": answer_logps(setup.plain, before, tokens, mask, **options),
            "entropies": entropies,
            # the sampler computes in another order, and says what it thinks at temperature 1
            "sampler": rollout.logps if rl.temperature == 1 else logps,
        }
        values = values_of(own, states, mask) if VALUE in own else torch.zeros_like(logps)
        return {**found, "values": values}


def experience(rl: Learning, found: Buffer, scores: Tensor, coefficient: Tensor) -> Buffer:
    """All that updates need of a rollout: opinions, and the advantages of the rewards."""
    mask, logps, values = found["mask"], found["logps"], found["values"]
    kl = ppo.kl_estimate(logps, found["reference"], "k1")
    penalty = coefficient if kl_in_reward(rl) else 0.0
    per_token = adv.token_rewards(scores, mask, kl=kl, kl_coefficient=penalty)
    returns = torch.zeros_like(logps)
    if rl.algorithm == "ppo":
        advantages, returns = adv.gae(per_token, values, mask, gamma=rl.gamma, lam=rl.lam)
        advantages = masked.whiten(advantages, mask)
    elif rl.algorithm == "reinforce":
        advantages = adv.discounted_returns(per_token, mask, gamma=rl.gamma)
        advantages = masked.whiten(advantages, mask)
    else:
        whole = per_token.sum(-1)
        if rl.algorithm == "rloo":
            each = adv.leave_one_out_advantages(whole, rl.samples)
        else:
            scale = "group" if rl.algorithm == "grpo" else "none"
            each = adv.group_advantages(whole, rl.samples, scale=scale)
        advantages = torch.where(mask, each[:, None], 0.0)
    weights = ppo.importance_weights(logps, found["sampler"], mask, maximum=rl.truncation)
    kept = {name: value for name, value in found.items() if name != "sampler"}
    return {**kept, "advantages": advantages, "returns": returns, "weights": weights}


def collected(setup: Setup, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order that one process would have them."""
    if setup.share[1] == 1:
        return rows
    plain = rows.to(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
    parts = [torch.empty_like(plain) for _ in range(setup.share[1])]
    dist.all_gather(parts, plain)
    return torch.cat(parts).to(rows.dtype)


def make_loss(rl: Learning, setup: Setup, new: int):
    """The clipped surrogate of a minibatch, with what the algorithm adds to it."""
    over = {"grpo": "sequences", "rloo": "sequences", "dr_grpo": "constant"}.get(
        rl.algorithm, "tokens"
    )
    level = "sequence" if rl.algorithm == "rloo" else "token"

    def loss_fn(params: Params, batch: Buffer, key: Tensor):
        own, mask = setup.ready(params), batch["mask"]
        logps, entropies, states = answer_statistics(
            setup.model,
            body(own),
            batch["tokens"],
            mask,
            temperature=rl.temperature,
            implementation=setup.implementation,
        )
        out = ppo.policy_loss(
            logps,
            batch["logps"],
            batch["advantages"],
            mask,
            clip=rl.clip,
            clip_high=rl.clip_high,
            level=level,
        )
        losses = out.losses * batch["weights"]
        if not kl_in_reward(rl):
            losses = losses + batch["coefficient"][0] * ppo.kl_estimate(
                logps, batch["reference"], rl.estimator
            )
        loss = masked.average(losses, mask, over=over, length=new)  # pyright: ignore
        entropy = masked.masked_mean(entropies, mask)
        drift = (batch["logps"] - logps).detach()
        rows = (mask.any(-1) if over != "constant" else torch.ones_like(mask[:, 0])).sum()
        metrics = {
            "weight": mask.sum() if over == "tokens" else rows,  # of this process's rows
            "policy_loss": loss.detach(),
            "entropy": entropy.detach(),
            "clip_fraction": masked.masked_mean(out.clipped.float(), mask),
            "ratio_max": torch.where(mask, out.ratio, 1.0).max(),
            "ratio_min": torch.where(mask, out.ratio, 1.0).min(),
            "step_kl": masked.masked_mean(drift, mask),
        }
        if rl.entropy:
            loss = loss - rl.entropy * entropy
        if VALUE in params:
            values = values_of(own, states, mask)
            errors_ = ppo.value_loss(
                values, batch["values"], batch["returns"], mask, clip=rl.value_clip
            )
            critic = masked.masked_mean(errors_, mask)
            metrics["value_loss"] = critic.detach()
            metrics["explained_variance"] = adv.explained_variance(
                values.detach(), batch["returns"], mask
            )
            loss = loss + rl.value_weight * critic
        return loss, metrics

    return loss_fn


def natural_step(rl: Learning, setup: Setup):
    """An update by `curvature.trust_region_step`, in the form of a compiled step."""
    options = {"implementation": "flash", "method": "hidden"}
    assert rl.trust_region is not None
    radius = rl.trust_region

    def step(state: TrainState, batch: Buffer) -> tuple[TrainState, dict[str, Tensor]]:
        tokens, mask = batch["tokens"], batch["mask"][:, 1:]
        rows = {name: batch[name][:, 1:] for name in ("logps", "advantages", "weights")}

        def logits_fn(params: Params) -> Tensor:
            states = setup.model.apply(params, tokens[:, :-1], **options)
            return setup.model.apply(params, states, method="logits").float() / rl.temperature

        def surrogate(params: Params) -> Tensor:
            logps = logits_fn(params).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            out = ppo.policy_loss(logps, rows["logps"], rows["advantages"], mask, clip=None)
            return -masked.masked_mean(out.losses * rows["weights"], mask)

        found = trust_region_step(surrogate, logits_fn, state.params, mask, radius=radius)
        with torch.no_grad():
            for name, value in state.params.items():  # in place, as rollouts read this memory
                value.copy_(found.params[name])
            state.step.add_(1)
        scale = torch.tensor(found.scale)
        return state, {"loss": -found.gain, "step_kl": found.kl, "step_scale": scale}

    return step


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Loop:
    """What stands between two updates, beside the parameters; saved with them."""

    iteration: int = 0  # rollouts made, skipped ones included
    failed: int = 0  # of them in a row, without a reward
    skipped: int = 0


def learn(
    config: Config,
    setup: Setup,
    task: Task,
    reference: Params,
    reward: rewards.RewardFn,
    seed: int,
    folder: Path,
) -> Params:
    """Rollouts and updates; every update may be the last before a resume."""
    rl, device = config.rl, setup.device
    per = rl.epochs * rl.minibatches
    total = rl.iterations * per
    own = setup.enter(reference)
    if rl.algorithm == "ppo":
        own[VALUE] = torch.zeros(config.model.width, device=device)
    optimizer = optimizer_of(Stage(total, rl.prompts, rl.rate, rl.warmup))
    state = init_state(own, optimizer, random.key(seed, device=device))
    step = step_of(setup, make_loss(rl, setup, task.new), optimizer)
    if rl.trust_region is not None:
        step = natural_step(rl, setup)
    every = {"index": torch.arange(len(task.prompts))}
    prompts = Shuffled(every, rl.prompts, seed, setup.share)
    longest = max(len(prompt.ids) for prompt in task.prompts)
    settings = Settings(
        task.new, Sampling(rl.temperature), samples=rl.samples, stop_tokens=(EOS,), pad=PAD
    )
    loop, buffer = Loop(), empty_buffer(rl, width_of(longest, settings), device)
    coefficient = torch.full((), rl.kl, device=device)
    root = folder / CHECKPOINTS
    if checkpoint.checkpoints(root):
        saved = checkpoints.load(root)
        like = {"train": state, "buffer": buffer, "coefficient": coefficient}
        found = checkpoints.load(saved.path, like).state
        state, buffer, coefficient = found["train"], found["buffer"], found["coefficient"]
        loop = Loop(**saved.extra["loop"])
    first = int(state.step)
    if first >= total:
        return setup.leave(body(state.params))
    whole = setup.leave(state.params)
    roll = roller(setup, body(whole), settings, longest=longest)
    patience = rewards.Patience(rl.patience, loop.failed, loop.skipped)
    writer = checkpoints.Writer(root, keep_last=1)
    options: dict[str, Any] = {"step": first, "every": per, "rank": setup.rank}
    tracker = Tracker(folder, total, name=folder.name, **options)
    samples = SampleTable(folder / "samples.jsonl", loop.iteration) if setup.rank == 0 else None

    def save(count: int) -> None:
        tracker.flush()
        loop.failed, loop.skipped = patience.failed, patience.skipped
        kept = {"train": state, "buffer": buffer, "coefficient": coefficient}
        writer.save(count, kept, extra={"loop": vars(loop)})

    with tracker, writer, errors.interruptible() as stop:
        values: dict[str, Any] = {}
        begin = None  # of the updates after a rollout
        for count in range(first + 1, total + 1):
            part = (count - 1) % per
            while part == 0:  # until a rollout has rewards
                loop.iteration += 1
                started = time.perf_counter()
                prompts.restore({"done": loop.iteration - 1})
                asked = [task.prompts[i] for i in next(prompts)["index"].tolist()]
                key = random.fold_in(random.fold_in(state.key, loop.iteration), 1)
                first_row = setup.share[0] * len(asked)
                keys = random.fold_in(key, torch.arange(first_row, first_row + len(asked)).to(key))
                whole = setup.leave(state.params)
                rollout = roll([prompt.ids for prompt in asked], keys, body(whole))
                took = time.perf_counter() - started
                ids = rollout.completions()
                try:
                    scores = judged(task, reward, asked, ids, rl.samples).to(device)
                except rewards.RewardError as error:
                    failure = str(error)
                else:
                    failure = None
                failures = [each for each in agreement.from_all(failure) if each is not None]
                if failures:
                    error = rewards.RewardError(failures[0])
                    try:
                        tracker.note(patience.skip(loop.iteration, error))
                    except rewards.RewardError:
                        save(count - 1)  # nothing computed is lost
                        raise
                    continue
                patience.fine()
                if samples is not None:
                    samples.add(loop.iteration, table_rows(task, asked, ids, scores, rl.samples))
                found = opinions(rl, setup, whole, reference, rollout)
                found = {name: collected(setup, rows) for name, rows in found.items()}
                scores = collected(setup, scores)
                buffer = experience(rl, found, scores, coefficient)
                ended = collected(setup, rollout.ended)
                values = told(buffer, scores, ended, took)
                values["skipped_rollouts"] = patience.skipped
                if rl.target_kl is not None:
                    coefficient = ppo.adaptive_kl_coefficient(
                        coefficient,
                        values["kl"],
                        target=rl.target_kl,
                        horizon=rl.horizon,
                        items=len(scores),
                    )
                values["kl_coefficient"] = coefficient
                begin = time.perf_counter()
                break
            batch = minibatch(rl, buffer, state.key, loop.iteration, part, setup.share)
            batch["coefficient"] = coefficient.expand(len(batch["tokens"]))
            state, metrics = step(state, batch)
            if count % per == 0 and begin is not None:
                float(metrics["loss"])  # waits for the device, once a rollout
                seconds = time.perf_counter() - begin
                values["update_tokens/s"] = rl.epochs * buffer["mask"].numel() / seconds
            metrics.pop("weight", None)
            tracker.log(count, {**metrics, **values})
            values = {}
            halt = agreement.highest(stop.received or 0) if count < total else 0
            if halt or count % config.save_every == 0 or count == total:
                save(count)
            if halt:
                writer.wait()
                raise stopped(tracker, count, halt, resume_command(config))
        writer.wait()
    return setup.leave(body(state.params))


def empty_buffer(rl: Learning, width: int, device: str) -> Buffer:
    """A buffer of the shapes that every rollout has."""
    shape = (rl.prompts * rl.samples, width)
    buffer = {
        name: torch.zeros(shape, device=device)
        for name in (
            "logps", "reference", "advantages", "values", "returns", "weights", "entropies",
        )
    }  # fmt: skip
    buffer["tokens"] = torch.zeros(shape, dtype=torch.int64, device=device)
    buffer["mask"] = torch.zeros(shape, dtype=torch.bool, device=device)
    return buffer


def minibatch(
    rl: Learning, buffer: Buffer, key: Tensor, iteration: int, part: int, share: tuple[int, int]
) -> Buffer:
    """This process's rows of update `part` of a rollout, in an order of their own each pass."""
    epoch, number = divmod(part, rl.minibatches)
    rows = len(buffer["tokens"])
    order = random.permutation(random.fold_in(random.fold_in(key, iteration), 2 + epoch), rows)
    size = rows // rl.minibatches
    chosen = order[number * size : (number + 1) * size].tensor_split(share[1])[share[0]]
    return {name: value[chosen] for name, value in buffer.items()}


def judged(
    task: Task, reward: rewards.RewardFn, asked: Sequence[Any], ids: list[list[int]], samples: int
) -> Tensor:
    """Checked rewards of the completions, called on texts or on ids."""
    rows = [prompt for prompt in asked for _ in range(samples)]
    metadata = [prompt.metadata for prompt in rows]
    if rewards.takes_tokens(reward):
        return rewards.called(reward, [prompt.ids for prompt in rows], ids, metadata)
    texts = task.tokenizer.decode(ids)
    return rewards.called(reward, [prompt.text for prompt in rows], texts, metadata)


def told(buffer: Buffer, scores: Tensor, ended: Tensor, seconds: float) -> dict[str, Any]:
    """Figures of a rollout."""
    mask = buffer["mask"]
    made = mask.sum()
    drift = (buffer["logps"] - buffer["reference"]).sum(-1)
    return {
        "reward": scores.mean(),
        "reward_spread": scores.std(),
        "kl": drift.mean(),
        "rollout_entropy": masked.masked_mean(buffer["entropies"], mask),
        "length": mask.sum(-1).float().mean(),
        "ended": ended.float().mean(),
        "rollout_tokens/s": float(made) / seconds,
    }


def table_rows(
    task: Task, asked: Sequence[Any], ids: list[list[int]], scores: Tensor, samples: int
) -> list[dict[str, Any]]:
    """The first answer to some of the prompts."""
    some = range(0, min(4, len(asked)))
    texts = task.tokenizer.decode([ids[i * samples] for i in some])
    return [
        {"prompt": asked[i].text, "answer": text, "reward": float(scores[i * samples])}
        for i, text in zip(some, texts, strict=True)
    ]


# ------------------------------------------------------------------------------------------- stages


def make_reward(
    config: Config, setup: Setup, task: Task, params: Params, seed: int, folder: Path
) -> tuple[rewards.RewardFn, dict[str, float]]:
    """The reward that the configuration names, and figures of it."""
    if config.rl.reward == "rule":
        assert task.graded is not None
        return task.graded, {}
    if config.rl.reward != "model":
        return rewards.load(config.rl.reward), {}
    pairs = own_pairs(setup, task, params, task.prompts, seed, 4, right=False)
    stacked = train_rewards(
        setup,
        params,
        encode_pairs(pairs, longest=setup.length),
        config.rewards,
        seed,
        config.rl.members,
        folder / "rewards",
        resume_command(config),
    )
    unseen = own_pairs(setup, task, params, task.held_out, seed + 1, 4, right=False)
    rows = [(pair.prompt, side) for pair in unseen for side in (pair.chosen, pair.rejected)]
    right = accuracy(rewards_of(setup, stacked, rows)).mean() if rows else math.nan
    reward = RewardModel(setup, stacked, config.rl.aggregate, config.rl.penalty)
    return reward, {"reward model accuracy": round(float(right), 4)}


def run_seed(config: Config, machine: configs.Machine, seed: int, run: Path) -> Result:
    """All stages of one seed; figures before and after."""
    folder = run / f"seed-{seed}"
    if config.data.files:
        task = from_problems(config.data, config.model.length)
        say("\n".join(task.notes))
    else:
        task = built_in(config.data, seed)
    setup, resume = set_up(config.model, task, machine, config.mesh), resume_command(config)
    start = pretrain(setup, task, config.pretrain, seed, folder / "pretrain", resume)
    reference = fine_tune(setup, task, config.sft, seed, folder / "sft", resume, start)
    before = assess(setup, reference, reference, task, seed)
    reward, notes = make_reward(config, setup, task, reference, seed, folder)
    params = learn(config, setup, task, reference, reward, seed, folder / "rl")
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


def resume_command(config: Config) -> str:
    return f"python recipes/align_ppo.py --resume --out {config.out} --name {config.name}"


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range, options that exclude each other.
    """
    configs.check_numbers(replace(config, mesh=Mesh(dp_shard=1)), MAY_BE_ZERO)
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    rl = config.rl
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
    if rl.reward not in ("rule", "model"):
        rewards.load(rl.reward)
    check_room(config.data, config.model)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and (rl.algorithm == "ppo" or rl.reward == "model" or rl.trust_region is not None):
        raise ValueError(
            "a critic, an ensemble of reward models and a trust region are for one process: start "
            "without torchrun, or choose another --rl.algorithm"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(config, name=config.name or configs.free_name(config.out, "align_ppo"))


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
    leave(run, [run_seed(config, machine, seed, run) for seed in seeds], "rl", PANELS)
    say(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=())
    return configs.parse(start, args, description=str(__doc__), prog="align_ppo.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
