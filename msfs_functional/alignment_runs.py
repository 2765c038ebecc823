"""A run of an alignment recipe: its options, its folder, its seeds side by side, its report.

    with launching.joined(config.device):
        config, machine, run = begin(config, "align_dpo")    # checked on all ranks, folder made
        results = each_seed(run_seed, config, machine, run)  # run_seed(config, machine, seed, run)
        leave(run, results, "dpo-1", PANELS)                 # table, samples, curves

Seeds are runs of their own, so on a CPU several of them run at a time, each in a process with its
share of the cores: small models gain more from that than from more threads.
"""

import json
import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from msfs_functional import agreement, errors, launching, tracking
from msfs_functional import config as configs
from msfs_functional.aligning import Mesh, Model, Stage, check_room, say
from msfs_functional.alignment_tasks import Data
from msfs_functional.judging import Figures
from msfs_functional.pictures import save_png, training_curves


@dataclass(frozen=True)
class Options:
    """What every alignment recipe takes; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train"]] = "train"
    preset: str = "default"  # settings that the other options start from
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoints
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0  # of the first run; the others count on from it
    seeds: int = 3  # runs, each from its own data and parameters
    # seeds at a time, each in a process; None: one for each core of a CPU, all of them where they
    # are less than twice as many, one on a GPU
    workers: int | None = None
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None  # None: on a GPU
    threads: int | None = None  # CPU threads of all workers together; None: all cores
    debug: bool = False  # show tracebacks
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    # reading before imitating, with files that hold texts
    pretrain: Stage = field(default_factory=lambda: Stage(1000, 64, 2e-3))
    sft: Stage = field(default_factory=lambda: Stage(650, 16, 3e-3))  # imitating


SeedFn = Callable[[Any, configs.Machine, int, Path], Any]


class Begun(NamedTuple):
    """A run that may start."""

    config: Any
    machine: configs.Machine
    run: Path


def begin(config: Options, program: str, may_be_zero: Sequence[str] = ()) -> Begun:
    """Fills in what was left to the machine, makes the run's folder; within `launching.joined`.

    Args:
        program: the recipe's name, from which runs without a name get theirs.
        may_be_zero: integer options for which zero has a meaning.

    Raises:
        ValueError: on all ranks: a number out of range, options that exclude each other, a run that
            exists, or none to go on with.
    """
    with agreement.together():
        config = _checked(config, program, ("seed", "warmup", *may_be_zero))
        machine = configs.machine(config.device, config.dtype, config.compile)
    config = replace(config, name=agreement.from_all(config.name)[0])
    if machine.note:
        say(f"note: {machine.note}")
    run = config.out / str(config.name)
    with agreement.together():
        if not config.resume and agreement.rank() == 0:
            configs.new_run(run, config, overwrite=config.overwrite)
    return Begun(config, machine, run)


def _checked(config: Options, program: str, may_be_zero: Sequence[str]) -> Options:
    configs.check_numbers(replace(config, mesh=Mesh(dp_shard=1)), may_be_zero)
    configs.check_run(config)
    check_room(config.data, config.model, config.mesh)
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(config, name=config.name or configs.free_name(config.out, program))


def resume_command(program: str, config: Options) -> str:
    return launching.resume_command(f"recipes/{program}.py", config.out / str(config.name))


# ------------------------------------------------------------------------------ seeds side by side


def workers_of(config: Options, machine: configs.Machine) -> int:
    """Seeds at a time."""
    if agreement.world() > 1:
        return 1
    cores = config.threads or len(os.sched_getaffinity(0))
    # three seeds on two cores: in 1.5 times one seed's time, where two and then one take twice it
    side_by_side = config.seeds if config.seeds < 2 * cores else cores
    wanted = config.workers or (side_by_side if machine.device == "cpu" else 1)
    return max(1, min(wanted, config.seeds))


def each_seed(seed_fn: SeedFn, config: Options, machine: configs.Machine, run: Path) -> list[Any]:
    """seed_fn(config, machine, seed, run) of each seed, in their order.

    Raises:
        Exception: what a seed raised; seeds that run then stop at a checkpoint, the others do not
            begin.
    """
    seeds = list(range(config.seed, config.seed + config.seeds))
    workers = workers_of(config, machine)
    if workers == 1:
        return [seed_fn(config, machine, seed, run) for seed in seeds]
    cores = config.threads or len(os.sched_getaffinity(0))
    options = max(1, cores // workers), config.debug
    context = multiprocessing.get_context("spawn")
    waiting, found = list(seeds), {}
    running: dict[Any, tuple[int, Any]] = {}  # (seed, its process) by where its result arrives
    failure: BaseException | None = None
    with _passed_on(running) as stopped:
        while running or (waiting and failure is None):
            while waiting and len(running) < workers and failure is None:
                seed = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                call = (sender, *options, seed_fn, config, machine, seed, run)
                process = context.Process(target=_worker, args=call, name=f"seed {seed}")
                running[receiver] = seed, process
                process.start()
                sender.close()
            for receiver in connection.wait(list(running)):
                seed, process = running.pop(receiver)
                try:
                    found[seed], error = receiver.recv()  # pyright: ignore
                except EOFError:
                    process.join()
                    error = _ended(seed, process.exitcode, stopped)
                process.join()
                if error is not None and failure is None:
                    failure = error
                    for _, other in running.values():
                        other.terminate()  # SIGTERM: it saves and stops
    if failure is not None:
        raise failure
    return [found[seed] for seed in seeds]


@contextmanager
def _passed_on(running: Mapping[Any, tuple[int, Any]]) -> Iterator[list[int]]:
    """SIGTERM goes on to the workers, and to no other child of this process; Ctrl-C reaches them by
    itself, and this process waits.

    Yields the signals that came.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for _, process in list(running.values()):
            if process.pid is not None and number == signal.SIGTERM:
                os.kill(process.pid, number)

    handled = (signal.SIGINT, signal.SIGTERM)
    inside = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, note) for each in handled} if inside else {}
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _ended(seed: int, code: int | None, stopped: Sequence[int]) -> BaseException:
    """What a worker that left no result stands for: a run that was stopped, or a failure."""
    kept = "what its finished stages saved is kept: --resume goes on from there"
    if stopped and code == -stopped[0]:
        print(f"seed {seed} was stopped between two checkpoints; {kept}", flush=True)
        return SystemExit(128 + stopped[0])
    return RuntimeError(f"seed {seed} ended with code {code}; {kept}")


def _worker(sender: Any, threads: int, debug: bool, seed_fn: SeedFn, *call: Any) -> None:
    torch.set_num_threads(threads)
    os.environ["TTY_COMPATIBLE"] = "0"  # to rich: no bar, which several would write into each other
    result, failure = None, None
    try:
        result = seed_fn(*call)
    except (Exception, SystemExit) as error:
        failure = error
        if debug or not (isinstance(error, SystemExit) or errors.is_expected(error)):
            traceback.print_exc()
    sender.send((result, failure))


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


def draw_seeds(
    run: Path,
    seeds: Sequence[int],
    stage: str,
    panels: dict[str, str],
    file: str = "curves.png",
) -> None:
    """Leaves a picture: a panel for each metric that the stages have recorded, a line a seed."""
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
    save_png(training_curves(curves, lines_of), run / file)
