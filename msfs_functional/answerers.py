"""Who answers the prompts of a rollout: this process, or one beside it while this one updates.

    answerer = Answerer(work, task, setup, params)
    judged = answerer.ask(iteration, params)        # this process's share, with rewards

    ahead = Beside(work, answerer, params)          # the same numbers, from another process
    ahead.begin(iteration, params)                  # comes back at once
    ...                                             # updates
    judged = ahead.finish()

What is asked in iteration i, and with which random numbers, is a function of the seed and i alone.

    fresh     ask 1 | update 1 | ask 2 | update 2 | ...    by the newest parameters
    beside    ask 1 | update 1          | update 2 | ...   by those before the last updates, whose
              ask 2 ........... | ask 3 ......... |        ratio to the newest ones is a weight

Dimension key: N rows, T tokens.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional import config as configs
from msfs_functional import random, rewards
from msfs_functional.aligning import Model, Setup, set_up
from msfs_functional.alignment_tasks import Prompt, Task
from msfs_functional.generation import Sampling, Settings
from msfs_functional.judging import roller
from msfs_functional.pairs import Shuffled
from msfs_functional.params import Params
from msfs_functional.reinforcement import Learning
from msfs_functional.reward_training import RewardModel
from msfs_functional.rollouts import Rollout, width_of
from msfs_functional.tokenizer import EOS, PAD


class Judged(NamedTuple):
    """Answers to this process's share of an iteration's prompts, and their rewards."""

    asked: list[Prompt]
    rollout: Rollout
    scores: Tensor  # (N,) float32; zeros where there is a failure
    failure: str | None  # why there is no reward


@dataclass(frozen=True)
class Work:
    """What an answerer is to do."""

    rl: Learning
    machine: configs.Machine
    seed: int
    share: tuple[int, int]
    ensemble: Params | None = None  # of reward models, stacked


def reward_of(work: Work, task: Task, setup: Setup) -> rewards.RewardFn:
    """The reward that the options name.

    Raises:
        ValueError: a file without such a function.
    """
    if work.rl.reward == "rule":
        assert task.graded is not None
        return task.graded
    if work.rl.reward == "model":
        assert work.ensemble is not None
        return RewardModel(setup, work.ensemble, work.rl.aggregate, work.rl.penalty)
    return rewards.load(work.rl.reward)


class Answerer:
    """Answers and judges in this process.

    Args:
        params: whole ones; generation reads them where they lie.
    """

    def __init__(self, work: Work, task: Task, setup: Setup, params: Params):
        rl, self.task, self.setup = work.rl, task, setup
        self.reward = reward_of(work, task, setup)
        self.samples, self.share = rl.samples, work.share
        every = {"index": torch.arange(len(self.task.prompts))}
        self.prompts = Shuffled(every, rl.prompts, work.seed, work.share)
        longest = max(len(prompt.ids) for prompt in self.task.prompts)
        settings = Settings(
            self.task.new,
            Sampling(rl.temperature),
            samples=rl.samples,
            stop_tokens=(EOS,),
            pad=PAD,
        )
        self.width = width_of(longest, settings)
        self.roll = roller(self.setup, params, settings, longest=longest)
        self.key = random.key(work.seed, device=self.setup.device)

    def asked(self, iteration: int) -> list[Prompt]:
        """This process's prompts of an iteration, which count from 1."""
        self.prompts.restore({"done": iteration - 1})
        return [self.task.prompts[i] for i in next(self.prompts)["index"].tolist()]

    def ask(self, iteration: int, params: Params) -> Judged:
        """Rolls out and judges."""
        asked = self.asked(iteration)
        key = random.fold_in(random.fold_in(self.key, iteration), 1)
        first = self.share[0] * len(asked)
        keys = random.fold_in(key, torch.arange(first, first + len(asked)).to(key))
        rollout = self.roll([prompt.ids for prompt in asked], keys, params)
        try:
            scores, failure = self.judge(asked, rollout.completions()), None
        except rewards.RewardError as error:
            scores, failure = torch.zeros(len(rollout.tokens)), str(error)
        return Judged(asked, rollout, scores.to(self.setup.device), failure)

    def judge(self, asked: list[Prompt], ids: list[list[int]]) -> Tensor:
        """Checked rewards of the completions, called on texts or on ids."""
        rows = [prompt for prompt in asked for _ in range(self.samples)]
        metadata = [prompt.metadata for prompt in rows]
        if rewards.takes_tokens(self.reward):
            return rewards.called(self.reward, [prompt.ids for prompt in rows], ids, metadata)
        texts = self.task.tokenizer.decode(ids)
        return rewards.called(self.reward, [prompt.text for prompt in rows], texts, metadata)


# ------------------------------------------------------------------------- parameters in one block

Layout = dict[str, tuple[torch.Size, torch.dtype]]  # of parameters by name


def room(shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of a parameter, rounded up to whole lines of 64."""
    return -(-shape.numel() * dtype.itemsize // 64) * 64


def bytes_of(layout: Layout) -> int:
    return sum(room(*each) for each in layout.values())


def views_of(block: Tensor, layout: Layout, device: str) -> Params:
    """Parameters that lie in a block of bytes one after the other.

    For a GPU the block is page-locked: a card then copies it at the rate of its bus, several times
    that of memory which may be paged out. Where the system locks no more pages it stays slow.
    """
    if device.startswith("cuda"):
        runtime = torch.cuda.cudart()
        assert runtime is not None  # what a device named cuda implies
        runtime.cudaHostRegister(block.data_ptr(), block.numel(), 0)
    views, start = {}, 0
    for name, (shape, dtype) in layout.items():
        part = block[start : start + shape.numel() * dtype.itemsize]
        views[name] = part.view(dtype).view(shape)
        start += room(shape, dtype)
    return views


def wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------- ahead of updates


class Ahead:
    """Answers of the next iteration, asked for before this one's updates, in this process.

    begin(i, params) ... finish() -> Judged; `pending` is the iteration in flight, `kept()` what a
    checkpoint needs of it.
    """

    def __init__(self, answerer: Answerer):
        self.answerer, self.pending = answerer, 0
        self.judged: Judged | None = None

    def begin(self, iteration: int, params: Params) -> None:
        self.pending, self.judged = iteration, self.answerer.ask(iteration, params)

    def ready(self) -> Judged:
        """The answers in flight; waits for them."""
        assert self.judged is not None
        return self.judged

    def finish(self) -> Judged:
        judged, self.judged, self.pending = self.ready(), None, 0
        return judged

    def kept(self) -> dict[str, Tensor]:
        """The answers in flight as tensors."""
        judged = self.ready()
        return {**judged.rollout._asdict(), "scores": judged.scores}

    def restore(self, iteration: int, kept: Mapping[str, Tensor], failure: str | None) -> None:
        rollout = Rollout(*(kept[name] for name in Rollout._fields))
        asked = self.answerer.asked(iteration)
        self.pending, self.judged = iteration, Judged(asked, rollout, kept["scores"], failure)

    def close(self) -> None:
        pass


class Beside(Ahead):
    """The same from a process of its own, on the same device or another one.

    Parameters go there through one block of shared memory in the dtype of the computation,
    page-locked for GPUs, answers come back as they are. It ends with this process, and leaves
    signals to it.

    Raises:
        RuntimeError: that process has ended.
    """

    def __init__(self, work: Work, answerer: Answerer, params: Params):
        super().__init__(answerer)
        dtype = answerer.setup.dtype
        layout: Layout = {
            name: (value.shape, dtype if value.is_floating_point() else value.dtype)
            for name, value in params.items()
        }
        self.block = torch.empty(bytes_of(layout), dtype=torch.uint8).share_memory_()
        ensemble = work.ensemble
        if ensemble is not None:
            ensemble = {name: value.cpu().share_memory_() for name, value in ensemble.items()}
        work = replace(
            work, ensemble=ensemble, machine=work.machine._replace(device=place_for(work))
        )
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        # the parts of the task that answering takes, and the decoder's configuration
        lean = replace(answerer.task, demonstrations=(), texts=(), pairs=[], held_out_pairs=[])
        setup = answerer.setup
        own = Model(length=setup.length), setup.plain.skeleton.config
        call = (other, work, lean, own, self.block, layout, torch.get_num_threads())
        self.process = context.Process(target=serve, args=call, daemon=True, name="answers")
        self.process.start()
        other.close()
        self.shared = views_of(self.block, layout, setup.device)

    def begin(self, iteration: int, params: Params) -> None:
        for name, value in params.items():
            self.shared[name].copy_(value, non_blocking=True)
        wait_for(self.answerer.setup.device)
        self.pending = iteration
        self.pipe.send(iteration)

    def ready(self) -> Judged:
        if self.judged is None:
            try:
                tensors, failure = self.pipe.recv()
            except EOFError:
                self.process.join()
                code = self.process.exitcode
                raise RuntimeError(f"the process that answers ended with code {code}") from None
            device = self.answerer.setup.device
            *rollout, scores = (torch.from_numpy(x).to(device) for x in tensors)
            asked = self.answerer.asked(self.pending)
            self.judged = Judged(asked, Rollout(*rollout), scores, failure)
        return self.judged

    def close(self) -> None:
        self.pipe.close()
        self.process.join(5)
        self.process.kill()


def place_for(work: Work) -> str:
    """The device of a process beside this one."""
    if work.rl.beside_on is not None or not work.machine.device.startswith("cuda"):
        return work.rl.beside_on or work.machine.device
    own, taken = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = own + taken
    return f"cuda:{free}" if free < torch.cuda.device_count() else f"cuda:{own}"


def serve(
    pipe: Any,
    work: Work,
    task: Task,
    decoder: tuple[Model, Any],
    block: Tensor,
    layout: Layout,
    threads: int,
) -> None:
    """The process of `Beside`: takes iterations, gives answers, until the pipe closes."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(threads)
    device = torch.device(work.machine.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # no rank of the run
        os.environ.pop(name, None)
    setup = set_up(decoder[0], task, work.machine, config=decoder[1])
    if work.ensemble is not None:
        ensemble = {name: value.to(device) for name, value in work.ensemble.items()}
        work = replace(work, ensemble=ensemble)
    shared = views_of(block, layout, work.machine.device)
    own = {name: value.to(device, copy=True) for name, value in shared.items()}
    answerer = Answerer(work, task, setup, own)
    try:
        while True:
            iteration = pipe.recv()
            for name, value in own.items():
                value.copy_(shared[name], non_blocking=True)
            judged = answerer.ask(iteration, own)
            tensors = [x.cpu().numpy() for x in (*judged.rollout, judged.scores)]
            pipe.send((tensors, judged.failure))
    except (EOFError, ConnectionError):  # closed, also with an answer on its way
        pass
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
