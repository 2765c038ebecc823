"""What a run tells: on the terminal, in metrics.jsonl, in TensorBoard.

    runs/toy/metrics.jsonl      one record a line: step, seconds, tokens, tokens/s, loss, ...
    runs/toy/tensorboard/       the same as events
    runs/toy/<name>.png         pictures

Only rank 0 writes and prints. Metrics of a training step may be tensors on the device: they are
kept as they are and read once an interval, so that tracking never makes a step wait.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
Number = float | int | Tensor


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a killed process left torn is passed over.

    Raises:
        ValueError: a line before the last is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError("no record with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is damaged ({error}): repair or remove it"
            ) from None
        records.append(record)
    return records


def _check(metrics: Mapping[str, Number]) -> None:
    taken = {"step", "seconds", "tokens", "tokens/s", "memory_GiB"} & metrics.keys()
    if taken:
        raise ValueError(
            f"metrics may not be called {sorted(taken)}: the tracker writes these itself"
        )
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.ndim > 1:
            shape = tuple(value.shape)
            raise ValueError(f"metric {name!r} has shape {shape}: give one value, or one a member")


def _summary(values: Sequence[Number]) -> float | int | list[float] | list[int]:
    """Mean over the interval of real values, the last one of integers (they count something)."""
    last = values[-1]
    if isinstance(last, Tensor):
        if not last.is_floating_point():
            return last.tolist()
        same = [v.detach() for v in values if isinstance(v, Tensor) and v.shape == last.shape]
        return torch.stack(same).float().mean(0).tolist()
    if isinstance(last, int):
        return int(last)
    return sum(map(float, values)) / len(values)


def _flat(name: str, value: Any) -> dict[str, float | int]:
    """A value for each member of an ensemble becomes their mean and loss/0, loss/1, ..."""
    if not isinstance(value, list):
        return {name: value}
    each = {f"{name}/{member}": one for member, one in enumerate(value)}
    return {name: sum(value) / len(value), **each}


def _short(value: float) -> str:
    for limit, unit, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Tracker:
    """Records of one run, as a context manager.

        with Tracker(run_dir, total_steps, name="translate", step=restored.step) as tracker:
            for step, batch in ...:
                state, metrics = train_step(state, batch)
                tracker.log(step, metrics, tokens=batch_tokens)
            tracker.record(step, {"valid/bleu": 31.2})

    Args:
        run_dir: directory of the run; made if missing.
        total_steps: what the bar and the time left count to.
        name: word before the bar and the lines.
        rank: all but rank 0 do nothing.
        step: the step the run goes on from. Records of later steps, which a killed run may have
            left, are dropped; `seconds` and `tokens` go on from the last one kept.
        every: steps from one record to the next. A record holds the mean over them of each real
            metric and the last value of each integer one.
        line_seconds: at least this long from line to line where the output is no terminal.
        tensorboard: write events too.
        console: where to print; None is standard output.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        *,
        name: str = "train",
        rank: int = 0,
        step: int = 0,
        every: int = 10,
        line_seconds: float = 10.0,
        tensorboard: bool = True,
        console: Console | None = None,
    ) -> None:
        if total_steps < 1 or every < 1 or step < 0:
            raise ValueError(
                f"total_steps ({total_steps}) and every ({every}) must be >= 1, step ({step}) >= 0"
            )
        self.run_dir, self.total_steps, self.name = Path(run_dir), total_steps, name
        self.every, self.line_seconds, self.rank = every, line_seconds, rank
        self._step = self._flushed_step = step
        self._held: dict[str, list[Number]] = {}
        self._held_tokens: list[int | Tensor] = []
        if rank != 0:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        earlier = self._keep_records(step)
        self._tokens = max((r["tokens"] for r in earlier if "tokens" in r), default=0)
        self._start = time.perf_counter() - max((r["seconds"] for r in earlier), default=0.0)
        self._file = (self.run_dir / METRICS).open("a", encoding="utf-8")
        self._writer = self._events(step) if tensorboard else None
        self._console = console or Console()
        plain = self._console.is_jupyter or self._console.is_dumb_terminal
        self._bar = None if plain or not self._console.is_terminal else self._make_bar(step)
        self._flushed_at, self._paused = time.perf_counter(), 0.0
        self._line_at = -float("inf")

    def _keep_records(self, step: int) -> list[dict[str, Any]]:
        path = self.run_dir / METRICS
        if not path.exists():
            return []
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        if step == 0:
            kept = []
        aside = path.with_name(f".{METRICS}.writing")
        aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(aside, path)
        return kept

    def _events(self, step: int) -> Any:
        from torch.utils.tensorboard.writer import SummaryWriter  # 2 s, and only rank 0 needs it

        purge = step + 1 if step else None
        return SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)

    def _make_bar(self, step: int) -> Progress:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),  # what the words leave
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = bar.add_task(self.name, total=self.total_steps, completed=step, status="")
        bar.start()
        return bar

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # after an error the device may be unable to give the last metrics; the error counts more
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            self.close()

    def log(self, step: int, metrics: Mapping[str, Number], *, tokens: int | Tensor = 0) -> None:
        """Keep the metrics of one training step; every `every` steps they become a record.

        Args:
            step: number of steps done.
            metrics: by name, numbers or 0-d tensors on any device (1-d: one value a member).
            tokens: how many the step processed.
        """
        if self.rank != 0:
            return
        _check(metrics)
        for name, value in metrics.items():
            self._held.setdefault(name, []).append(value)
        self._held_tokens.append(tokens)
        self._step = step
        if self._bar:
            self._bar.update(self._task, completed=step)
        if step % self.every == 0 or step >= self.total_steps:
            self.flush()

    def flush(self) -> None:
        """Write what is kept now; call it before a checkpoint, so that a resumed run has it."""
        if self.rank != 0 or not self._held_tokens:
            return
        kept, counts = self._held, self._held_tokens
        self._held, self._held_tokens = {}, []
        values: dict[str, float | int] = {}
        for name, held in kept.items():
            values.update(_flat(name, _summary(held)))
        tokens = sum(int(count) for count in counts)
        now = time.perf_counter()  # after the values have arrived, so after the work is done
        busy = max(now - self._flushed_at - self._paused, 1e-9)
        steps = max(self._step - self._flushed_step, 1)
        self._tokens += tokens
        record: dict[str, float | int] = {"tokens": self._tokens, "tokens/s": tokens / busy}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            record["memory_GiB"] = torch.cuda.max_memory_allocated() / 2**30
        left = _clock((self.total_steps - self._step) * busy / steps)
        status = self._describe({**values, **record}, left)
        self._flushed_at, self._flushed_step, self._paused = now, self._step, 0.0
        self._write(self._step, {**record, **values})
        if self._bar:
            self._bar.update(self._task, status=status)
        elif now - self._line_at >= self.line_seconds or self._step >= self.total_steps:
            self._print(f"{self.name} {self._step}/{self.total_steps}  {status}")
            self._line_at = now

    def _describe(self, values: Mapping[str, float | int], left: str) -> str:
        shown = ("loss",) if self._bar else ("loss", "grad_norm")  # 80 columns hold no more
        parts = [f"{key} {_short(values[key])}" for key in shown if key in values]
        if values["tokens/s"]:
            parts.append(f"{_short(values['tokens/s'])} tokens/s")
        parts.append(f"{left} left")
        if "memory_GiB" in values:
            parts.append(f"{values['memory_GiB']:.1f} GiB")
        return "  ".join(parts)

    def record(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Write and print these values now: scores of an evaluation, not of a training step."""
        if self.rank != 0:
            return
        _check(metrics)
        self.flush()
        values: dict[str, float | int] = {}
        for name, value in metrics.items():
            values.update(_flat(name, _summary([value])))
        self._write(step, values)
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        self._print(f"{self.name} {step}/{self.total_steps}  {text}")

    def _write(self, step: int, values: Mapping[str, float | int]) -> None:
        record = {"step": step, "seconds": time.perf_counter() - self._start, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (evaluation, saving) does not count against tokens/s and the time left."""
        self.flush()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.rank == 0:
                self._paused += time.perf_counter() - start

    def note(self, text: str) -> None:
        """Print a text above the bar, and keep it with the events."""
        if self.rank != 0:
            return
        self._print(text)
        if self._writer:
            self._writer.add_text("notes", f"```\n{text}\n```", self._step)

    def figure(self, name: str, figure: "Figure", *, dpi: int = 150) -> None:
        """Write a picture as `<name>.png` into the run, and to the events; needs no display.

        Characters that no installed font has are drawn as boxes.
        """
        if self.rank != 0:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        if name != Path(name).name or name.startswith("."):
            raise ValueError(f"figure name {name!r} must be a plain file name without .png")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(self.run_dir / f"{name}.png", dpi=dpi)
            if self._writer:
                canvas = FigureCanvasAgg(figure)
                canvas.draw()
                pixels = np.asarray(canvas.buffer_rgba()).copy()  # height, width, RGBA
                self._writer.add_image(name, pixels, self._step, dataformats="HWC")

    def _print(self, text: str) -> None:
        if self._bar:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)

    def close(self) -> None:
        """Write what is kept and close every file; safe to call twice."""
        if self.rank != 0 or self._file.closed:
            return
        try:
            self.flush()
        finally:
            if self._bar:
                self._bar.stop()
            if self._writer:
                self._writer.close()
            self._file.close()
