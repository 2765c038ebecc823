"""What rollouts beside updates gain: iterations of GRPO on GPT-2 124M, answers in turn and beside.

    python recipes/bench_rollouts.py          # answers on a second GPU, where there is one

An iteration is 64 prompts x 8 samples x 128 new tokens, what policy and reference think of them,
and an update in four minibatches, by the functions that align_ppo.py calls. In turn the newest
parameters answer; beside, a process of its own answers the next prompts by the parameters before
the update (one step off-policy), while this one updates. Random weights; the reward costs nothing.
Both processes compile at the same time and are then timed in turns.

Two H200s, torch 2.11: 1,170 ms in turn, of them 339 for answers, 842 ms beside, 1.39 times as fast;
updates have since left out the logits of the prompts, which was not measured.

`--small` shows on a CPU that all of it works; its figures mean nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from bench_align import FULL, SMALL, Sizes, diversity, shape_of
from measuring import synchronize

from msfs_functional import config as configs
from msfs_functional import errors, random, rewards
from msfs_functional.aligning import Model, Stage, optimizer_of, set_up, step_of
from msfs_functional.alignment_tasks import Prompt, Task
from msfs_functional.answerers import Answerer, Beside, Judged, Work
from msfs_functional.reinforcement import Learning, experience, make_loss, minibatch, opinions, told
from msfs_functional.train import init_state


@dataclass(frozen=True)
class Config:
    """What to measure, and for how long."""

    small: bool = False  # sizes that a CPU manages, eager: to see that it works
    steps: int = 5  # timed iterations of each side in a round
    rounds: int = 2  # of the two sides in turns; the faster median of each counts
    warmup: int = 2  # iterations before, compiling included
    beside_on: str | None = None  # device of the answers; None: another GPU, if there is one
    debug: bool = False  # show tracebacks


class Numbers:
    """A tokenizer of that many ids without texts."""

    def __init__(self, vocab: int):
        self.vocab_size = vocab

    def encode(
        self, lines: Sequence[str], *, bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        raise ValueError(f"there are no texts to encode, got {len(lines)}")

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


@rewards.on_tokens
def various(prompts: Any, completions: Any, metadata: Any) -> list[float]:
    """A reward that costs nothing."""
    return diversity(completions)


Iteration = Callable[[], dict[str, float]]


def measured(name: str, iterate: Iteration, config: Config) -> float:
    """Median seconds of an iteration; prints them and their parts."""
    took, parts = [], []
    for _ in range(config.steps):
        begun = time.perf_counter()
        parts.append(iterate())
        synchronize()
        took.append(time.perf_counter() - begun)
    shares = {k: statistics.median(p[k] for p in parts) for k in parts[0]}
    said = ", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in shares.items())
    seconds = statistics.median(took)
    print(f"{name:9} {seconds * 1e3:8.1f} ms an iteration ({said})", flush=True)
    return seconds


def repeated(iterate: Iteration, times: int) -> None:
    for _ in range(times):
        iterate()


def main(config: Config) -> dict[str, float]:
    if not (config.small or torch.cuda.is_available()):
        raise ValueError("no GPU here, where these figures mean something: --small runs on a CPU")
    size: Sizes = SMALL if config.small else FULL
    dtype = "float32" if config.small else "bfloat16"
    machine = configs.machine("cpu" if config.small else "cuda", dtype, not config.small)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size.vocab, (4 * size.prompts, size.prompt), generator=generator)
    prompts = [Prompt("", row) for row in ids.tolist()]
    task = Task(Numbers(size.vocab), prompts, [], [], size.new, graded=various)
    rl = Learning(
        prompts=size.prompts,
        samples=size.samples,
        iterations=1000,
        rollouts="beside",
        beside_on=config.beside_on,
        rate=1e-6,
    )
    setup = set_up(Model(length=size.prompt + size.new), task, machine, config=shape_of(size))
    reference = setup.plain.init(0, device=setup.device)
    optimizer = optimizer_of(Stage(4000, rl.prompts, rl.rate, rl.warmup))
    state = init_state(setup.enter(reference), optimizer, random.key(0, device=setup.device))
    step = step_of(setup, make_loss(rl, setup, task.new), optimizer)
    work = Work(rl, machine, 0, setup.place)
    answerer = Answerer(work, task, setup, state.params)
    coefficient = torch.full((), rl.pull, device=setup.device)
    count = 0

    def update(judged: Judged) -> float:
        """What learning makes of answers; seconds."""
        nonlocal state
        begun = time.perf_counter()
        found = opinions(rl, setup, state.params, reference, judged.rollout, task.new)
        buffer = experience(rl, found, judged.scores, coefficient)
        told(buffer, judged.scores, judged.rollout.ended, 1.0)
        for part in range(rl.minibatches):
            batch = minibatch(rl, buffer, state.key, count, part, setup.share)
            batch["coefficient"] = coefficient.expand(len(batch["tokens"]))
            state, _ = step(state, batch)
        synchronize()
        return time.perf_counter() - begun

    def in_turn() -> dict[str, float]:
        nonlocal count
        count += 1
        begun = time.perf_counter()
        judged = answerer.ask(count, state.params)
        synchronize()
        asked = time.perf_counter() - begun
        return {"answers": asked, "update": update(judged)}

    ahead = Beside(work, answerer, state.params)

    def beside() -> dict[str, float]:
        nonlocal count
        count += 1
        begun = time.perf_counter()
        if not ahead.pending:
            ahead.begin(count, state.params)
        judged = ahead.finish()
        waited = time.perf_counter() - begun
        begun = time.perf_counter()
        ahead.begin(count + 1, state.params)
        sent = time.perf_counter() - begun
        return {"waiting for answers": waited, "parameters": sent, "update": update(judged)}

    seconds: dict[str, list[float]] = {"in turn": [], "beside": []}
    name = "CPU" if config.small else torch.cuda.get_device_name()
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    begun = time.perf_counter()
    try:
        ahead.begin(1, state.params)  # that process compiles while this one does
        repeated(in_turn, config.warmup)
        print(f"in turn compiled after {time.perf_counter() - begun:.0f} s", flush=True)
        ahead.finish()
        print(f"beside compiled after {time.perf_counter() - begun:.0f} s", flush=True)
        for _ in range(config.rounds):
            seconds["in turn"].append(measured("in turn", in_turn, config))
            repeated(beside, 2)  # the first finds no answers on their way
            seconds["beside"].append(measured("beside", beside, config))
            ahead.finish()  # nobody answers while the other side is timed
            gain = min(seconds["in turn"]) / min(seconds["beside"])
            print(
                f"{name} ({cards} visible), torch {torch.__version__}: beside {gain:.2f}x as fast",
                flush=True,
            )
    finally:
        ahead.close()
    return {side: min(found) for side, found in seconds.items()}


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
