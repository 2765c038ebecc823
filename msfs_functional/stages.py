"""A stage of a run: a step, its batches, checkpoints of its own, its curves.

Runs of several stages (fine-tune, then train a reward model, then optimise) go through each with
`run_stage`, which goes on where the stage was stopped and does nothing where it was done; so do
runs of a single one:

    runs/<name>/sft/checkpoints/ metrics.jsonl ...
    runs/<name>/dpo/checkpoints/ ...
"""

import multiprocessing
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from msfs_functional import agreement, checkpoint, errors
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional.tracking import Tracker
from msfs_functional.train import Step, TrainState

CHECKPOINTS = "checkpoints"


class Batches(Protocol):
    """Batches without end that know where they are."""

    def __next__(self) -> dict[str, Tensor]: ...

    def state(self) -> dict[str, int]: ...

    def restore(self, state: Any) -> None: ...


def stopped(tracker: Tracker, count: int, number: int, resume: str) -> SystemExit:
    """Tells how to go on after a signal; raise what it returns.

    A preempted process of several (SIGTERM) ends with 0: torchrun takes anything else for a failure
    and starts all again.
    """
    tracker.note(f"saved after step {count}; go on with: {resume}")
    preempted = number == signal.SIGTERM and agreement.world() > 1
    return SystemExit(0 if preempted else 128 + number)


def interruptible() -> AbstractContextManager[errors.Interrupt]:
    """`errors.interruptible` of a stage.

    A process that another one has started, torchrun or a run of several seeds, may get SIGTERM both
    from that one and from a scheduler: the second one must not end it before it has saved.
    """
    launched = agreement.world() > 1 or multiprocessing.parent_process() is not None
    return errors.interruptible(launched=launched)


def check_skipped(state: TrainState, most: int | None, name: str) -> None:
    """Raises where a stage skipped more than `most` steps; waits for the device."""
    skipped = int(state.skipped.sum())
    if most is not None and skipped > most:
        raise ValueError(
            f"{skipped} steps of the {name} had a loss that is not finite, more than most_skipped "
            f"({most}): lower its learning rate"
        )


def run_stage(
    folder: Path,
    steps: int,
    state: TrainState,
    step: Step,
    batches: Batches,
    *,
    device: str,
    resume: str,
    every: int = 20,
    save_every: int | None = None,
    keep: int = 1,
    files: Mapping[str, str | bytes] | None = None,
    tokens: Callable[[Mapping[str, Tensor]], int | Tensor] = lambda batch: 0,
    evaluate: Callable[[int, TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    most_skipped: int | None = None,
) -> TrainState:
    """The state after `steps` steps; all processes call it together.

    Args:
        folder: of the stage; its last two parts name it on the terminal.
        state: at the start; a checkpoint in the folder goes before it.
        batches: of this process, or a `Prefetch` of them.
        resume: the command that goes on with the run.
        every: steps between records.
        save_every: steps between checkpoints; None: only at the end and when stopped.
        keep: the latest checkpoints, so many.
        files: what each checkpoint holds beside the state, by name.
        tokens: how many tokens a batch has.
        evaluate: figures to record, every `evaluate_every` steps and at the end.
        most_skipped: steps whose loss or gradient was not finite, after which the stage stops; it
            looks at each record and before each checkpoint. None: it never does.

    Raises:
        SystemExit: after a checkpoint, when Ctrl-C or SIGTERM came.
        ValueError: more steps than `most_skipped` were skipped; the last checkpoint stays.
    """
    root = folder / CHECKPOINTS
    if agreement.from_all(bool(checkpoint.checkpoints(root)))[0]:
        saved = checkpoints.load(root)
        state = checkpoints.load(saved.path, state).state
        batches.restore(saved.extra["batches"])
    first = int(state.step)
    if first >= steps:
        return state
    rank = agreement.rank()
    writer = checkpoints.Writer(root, keep_last=keep)
    name = f"{folder.parent.name} {folder.name}"
    tracker = Tracker(folder, steps, name=name, step=first, every=every, rank=rank)
    with tracker, writer, interruptible() as stop:
        for count in range(first + 1, steps + 1):
            batch = {name: x.to(device) for name, x in next(batches).items()}
            state, metrics = step(state, batch)
            metrics.pop("weight", None)
            tracker.log(count, metrics, tokens=tokens(batch))
            if count % every == 0:  # the record has just waited for the device
                check_skipped(state, most_skipped, folder.name)
            if evaluate and (count == steps or count % (evaluate_every or steps) == 0):
                with tracker.paused():
                    tracker.record(count, evaluate(count, state))
            halt = agreement.highest(stop.received or 0) if count < steps else 0
            if halt or count == steps or count % (save_every or steps) == 0:
                tracker.flush()
                check_skipped(state, most_skipped, folder.name)
                writer.save(count, state, files=files or {}, extra={"batches": batches.state()})
            if halt:
                writer.wait()
                raise stopped(tracker, count, halt, resume)
        writer.wait()
    return state
