"""recipes/pretrain.py, with a fault of one rank; torchrun starts it in place of the recipe.

FAULTS is JSON, an element for each attempt: [kind, rank, step of the attempt] or null. The kinds:
"die" in the middle of a step, when the save before it has landed, and "die saving" with SIGKILL,
"hang" in a step, "preempt" in one with SIGTERM.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import torch

sys.modules["msfs_functional.pictures"] = Mock()  # what it imports takes most of a tiny run
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import pretrain  # noqa: E402

from msfs_functional import distributed_checkpoint, tracking  # noqa: E402
from msfs_functional.watchdog import Watchdog  # noqa: E402

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
kind, of_rank, at_step = json.loads(os.environ["FAULTS"])[attempt] or ("", -1, -1)
make_loss, write_data = pretrain.make_loss, distributed_checkpoint.Parts.write_data
save = distributed_checkpoint.Writer.save
joined = Watchdog.joined
HANG = 4.0  # seconds that the watchdogs wait once a rank hangs


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(1)


def preempt() -> None:
    """The scheduler tells every process, and torchrun, which it tells too, tells them again."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


def joining(self: Watchdog) -> None:
    assert self.timeout == 77, "--mesh.timeout does not reach the watchdog"
    faulty_loss.watchdog = self
    joined(self)


def faulty_loss(config, model, **options):
    loss_fn = make_loss(config, model, **options)

    def run(params, batch, key):
        out = loss_fn(params, batch, key)
        if torch.is_grad_enabled():
            step = faulty_loss.steps = faulty_loss.steps + 1
            if step == at_step and kind == "hang":
                faulty_loss.watchdog.timeout = HANG
            if step == at_step and kind in happens and rank == of_rank:
                if kind == "die":
                    faulty_loss.writer.pending.result()  # on a busy machine it takes several steps
                happens[kind]()
        return out

    return run


def faulty_save(self, *args, **kwargs):
    faulty_loss.writer = self
    save(self, *args, **kwargs)


def faulty_write(self, plan, planner):
    written = write_data(self, plan, planner)
    faulty_loss.saves += 1
    if kind == "die saving" and rank == of_rank and faulty_loss.saves == at_step:
        die()
    return written


happens = {"die": die, "hang": hang, "preempt": preempt}
faulty_loss.steps = faulty_loss.saves = 0  # of this attempt
pretrain.make_loss, Watchdog.joined = faulty_loss, joining
distributed_checkpoint.Parts.write_data = faulty_write
distributed_checkpoint.Writer.save = faulty_save
pretrain.report = pretrain.draw = lambda *args: None
pretrain.Tracker = functools.partial(tracking.Tracker, tensorboard=False)
torch.set_num_threads(1)
print(f"attempt {attempt} of rank {rank}", file=sys.stderr, flush=True)
pretrain.errors.run(pretrain.main, lambda: pretrain.command_line(sys.argv[1:], ""))
