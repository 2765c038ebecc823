"""The claim of resuming: k + n steps are k steps, kill -9, resume and n steps, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from test_checkpoint import assert_same
from torch import Tensor

from msfs_functional import checkpoint, optim, random, schedules
from msfs_functional.params import Params
from msfs_functional.train import LossFn, Metrics, TrainState, init_state, make_step

EMA = 0.9
STEPS = 12


def loss_fn(params: Params, batch: Tensor, key: Tensor | None) -> tuple[Tensor, Metrics]:
    hidden = random.dropout(key, torch.tanh(batch @ params["in.weight"]), 0.25)
    return ((hidden @ params["out.weight"] - batch.sum(-1, keepdim=True)) ** 2).mean(), {}


def loss_without_dropout(params: Params, batch: Tensor, _: Tensor) -> tuple[Tensor, Metrics]:
    return loss_fn(params, batch, None)


def optimizer() -> optim.Transformation:
    schedule = schedules.cosine(1e-2, STEPS, warmup=3)
    return optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(schedule, weight_decay=0.1))


def fresh_state() -> TrainState:
    keys = random.split(random.key(0), 2)
    params = {
        "in.weight": random.normal(keys[0], (6, 16)) / 3,
        "out.weight": random.normal(keys[1], (16, 1)),
    }
    return init_state(params, optimizer(), random.key(7), ema_decay=EMA)


def batch_of(step: int) -> Tensor:
    return random.normal(random.fold_in(random.key(1), step), (8, 6))


def step_fn(loss: LossFn = loss_fn, **options: Any) -> Any:
    return make_step(loss, optimizer(), ema_decay=EMA, **options)


def test_leaves_of_a_training_state_carry_its_field_names() -> None:
    names = list(checkpoint.named_leaves(fresh_state()))
    assert {"params/in.weight", "ema/out.weight", "step", "skipped", "key"} <= set(names)
    assert all(name.split("/")[0] in TrainState.__dataclass_fields__ for name in names)


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    step = step_fn(loss_without_dropout)  # half the time to compile
    state = fresh_state()
    for index in range(4):
        state, metrics = step(state, batch_of(index))
        if index == 1:
            checkpoint.save(tmp_path, 2, state)
    restored = checkpoint.load(tmp_path, fresh_state()).state
    assert isinstance(restored, TrainState)
    for index in range(2, 4):
        restored, again = step(restored, batch_of(index))
    assert_same(optree.tree_leaves(restored, namespace="msfs_functional"), leaves(state))
    assert_same(again, metrics)


def leaves(state: TrainState) -> list[Any]:
    return optree.tree_leaves(state, namespace="msfs_functional")  # pyright: ignore


KILLED_RUN = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from test_checkpoint import assert_same
from test_resume import STEPS, batch_of, fresh_state, leaves, step_fn
from msfs_functional import checkpoint
torch.set_num_threads(1)
root = Path(sys.argv[1])

def train(root, report=None):
    state, first = fresh_state(), 0
    if checkpoint.checkpoints(root):
        restored = checkpoint.load(root, state)
        state, first = restored.state, restored.extra["data"]["position"]
    step = step_fn(compile=False, accumulation=2)
    for index in range(first, STEPS):
        if report is not None:
            os.write(report, b".")
        state, _ = step(state, batch_of(index))
        if index % 2 or index == STEPS - 1:
            extra = {"data": {"position": index + 1}}
            checkpoint.save(root, index + 1, state, extra=extra, keep_last=1)

def child(work):
    number = os.fork()
    if number == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return number

train(root / "whole")
draw, kills = random.Random(0), 0
while True:
    reports, report = os.pipe()
    number = child(lambda: train(root / "killed", report))
    os.close(report)
    wanted = draw.randrange(1, 5)  # enough steps to get on in the end
    start = time.perf_counter()
    steps = 0
    while steps < wanted and os.read(reports, 1):
        steps += 1
    time.sleep(draw.uniform(0.0, (time.perf_counter() - start) / max(steps, 1)))
    os.kill(number, signal.SIGKILL)
    status = os.waitpid(number, 0)[1]
    os.close(reports)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    kills += 1
whole, killed = (checkpoint.load(root / name, fresh_state()) for name in ("whole", "killed"))
assert whole.step == killed.step == STEPS
assert_same(leaves(killed.state), leaves(whole.state))
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 3
