"""Claims of msfs_functional.tracking: right figures, no waiting, files that go on."""

import io
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from msfs_functional import tracking
from msfs_functional.tracking import Tracker, read_metrics


class Clock:
    """A perf_counter that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(tracking, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def quiet(run_dir: Path, total: int = 100, **options: Any) -> Tracker:
    console = Console(file=io.StringIO(), force_terminal=False)
    return Tracker(run_dir, total, **{"tensorboard": False, "console": console, **options})


def printed(tracker: Tracker) -> str:
    file = tracker._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def records(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def test_a_record_holds_means_of_reals_and_the_last_of_integers(
    tmp_path: Path, clock: Clock
) -> None:
    with quiet(tmp_path, every=2) as tracker:
        for step in (1, 2, 3, 4):
            clock.now += 0.5
            metrics = {
                "loss": torch.tensor(float(step)),
                "rate": step / 2,
                "skipped": torch.tensor(step),
            }
            tracker.log(step, {**metrics, "seen": step}, tokens=300)
    assert records(tmp_path) == [
        {
            "step": 2,
            "seconds": 1.0,
            "tokens": 600,
            "tokens/s": 600.0,
            "loss": 1.5,
            "rate": 0.75,
            "skipped": 2,
            "seen": 2,
        },
        {
            "step": 4,
            "seconds": 2.0,
            "tokens": 1200,
            "tokens/s": 600.0,
            "loss": 3.5,
            "rate": 1.75,
            "skipped": 4,
            "seen": 4,
        },
    ]


def test_a_value_for_each_member_becomes_their_mean_and_one_each(tmp_path: Path) -> None:
    with quiet(tmp_path, every=2) as tracker:
        tracker.log(1, {"loss": torch.tensor([1.0, 3.0]), "skipped": torch.tensor([0, 1])})
        tracker.log(2, {"loss": torch.tensor([2.0, 6.0]), "skipped": torch.tensor([0, 2])})
    (record,) = records(tmp_path)
    assert (record["loss"], record["loss/0"], record["loss/1"]) == (3.0, 1.5, 4.5)
    assert (record["skipped"], record["skipped/0"], record["skipped/1"]) == (1.0, 0, 2)


def test_metrics_are_read_once_an_interval_only(tmp_path: Path) -> None:
    """A tensor on the meta device has no value: whoever reads it fails."""
    with quiet(tmp_path, every=5) as tracker:
        for step in (1, 2, 3, 4):
            tracker.log(step, {"loss": torch.zeros((), device="meta")}, tokens=10)
        with pytest.raises(RuntimeError, match="meta"):
            tracker.log(5, {"loss": torch.zeros((), device="meta")}, tokens=10)


@pytest.mark.gpu
def test_logging_never_waits_for_the_gpu_between_intervals(tmp_path: Path) -> None:
    with quiet(tmp_path, every=10) as tracker:
        for step in range(1, 10):
            loss = torch.full((), float(step), device="cuda")
            torch.cuda.set_sync_debug_mode("error")
            try:
                tracker.log(step, {"loss": loss}, tokens=5)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        tracker.log(10, {"loss": torch.full((), 10.0, device="cuda")}, tokens=5)
    (record,) = records(tmp_path)
    assert record["loss"] == 5.5
    assert 0 < record["memory_GiB"] < 1


def test_values_that_are_not_finite_are_kept_as_they_are(tmp_path: Path) -> None:
    with quiet(tmp_path, every=1) as tracker:
        tracker.log(1, {"loss": torch.tensor(math.nan)})
        tracker.log(2, {"loss": torch.tensor(math.inf)})
    first, second = records(tmp_path)
    assert math.isnan(first["loss"]) and second["loss"] == math.inf


def test_a_resumed_run_goes_on_where_the_checkpoint_was(tmp_path: Path, clock: Clock) -> None:
    with quiet(tmp_path, every=10) as tracker:
        for step in range(1, 41):
            clock.now += 1
            tracker.log(step, {"loss": float(step)}, tokens=7)
        tracker.record(40, {"valid/bleu": 30.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # the process died while it wrote
    clock.now += 1000
    with quiet(tmp_path, every=10, step=25) as tracker:
        for step in range(26, 31):
            clock.now += 1
            tracker.log(step, {"loss": float(step)}, tokens=7)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [10, 20, 30]
    assert found[-1]["loss"] == 28.0
    assert found[-1]["seconds"] == 25.0  # those of the steps whose records were kept, and five more
    assert found[-1]["tokens"] == 20 * 7 + 5 * 7
    assert found[-1]["tokens/s"] == 7.0


def test_flushing_before_a_checkpoint_keeps_every_step(tmp_path: Path) -> None:
    tracker = quiet(tmp_path, every=10)
    for step in range(1, 16):
        tracker.log(step, {"loss": float(step)}, tokens=1)
        if step == 13:
            tracker.flush()  # and the process is killed at step 15
    with quiet(tmp_path, every=10, step=13) as tracker:
        for step in range(14, 21):
            tracker.log(step, {"loss": float(step)}, tokens=1)
    assert [record["step"] for record in records(tmp_path)] == [10, 13, 20]
    assert records(tmp_path)[-1]["tokens"] == 20


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with quiet(tmp_path) as tracker:
            tracker.log(1, {"loss": 1.0})
    assert len(records(tmp_path)) == 1


def test_a_damaged_line_is_named_and_a_torn_last_one_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        read_metrics(path)


def test_every_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    tracker = quiet(tmp_path, every=1)
    tracker.log(1, {"loss": 1.0})
    assert len(records(tmp_path)) == 1
    tracker.record(1, {"bleu": 2.0})
    assert records(tmp_path)[1]["bleu"] == 2.0
    tracker.close()
    tracker.close()


def test_what_was_kept_is_written_when_a_step_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), quiet(tmp_path, every=10) as tracker:
        tracker.log(1, {"loss": 1.0})
        raise ZeroDivisionError
    assert records(tmp_path)[0]["loss"] == 1.0
    with pytest.raises(ZeroDivisionError), quiet(tmp_path, every=10) as tracker:
        tracker.log(1, {"loss": torch.zeros((), device="meta")})  # a value that cannot be read
        raise ZeroDivisionError


def test_evaluation_does_not_count_against_the_speed(tmp_path: Path, clock: Clock) -> None:
    with quiet(tmp_path, every=2) as tracker:
        tracker.log(1, {}, tokens=100)
        clock.now += 1
        with tracker.paused():
            clock.now += 50
            tracker.record(1, {"bleu": 1.0})
        clock.now += 1
        tracker.log(2, {}, tokens=100)
    speeds = [record["tokens/s"] for record in records(tmp_path) if "tokens/s" in record]
    assert speeds == [100.0, 100.0]
    assert records(tmp_path)[-1]["seconds"] == 52.0


def test_lines_are_plain_and_seconds_apart(tmp_path: Path, clock: Clock) -> None:
    with quiet(tmp_path, 100, every=1, line_seconds=10, name="toy") as tracker:
        for step in range(1, 101):
            clock.now += 1
            tracker.log(step, {"loss": 2.0, "grad_norm": 0.5}, tokens=12_345)
        tracker.note("[bold]done[/bold]")
    lines = printed(tracker).splitlines()
    assert lines[0] == "toy 1/100  loss 2  grad_norm 0.5  12.35k tokens/s  0:01:39 left"
    assert [line.split()[1] for line in lines[1:-2]] == [
        f"{step}/100" for step in range(11, 92, 10)
    ]
    assert lines[-2].startswith("toy 100/100") and lines[-2].endswith("0:00:00 left")
    assert lines[-1] == "[bold]done[/bold]"
    assert "\x1b" not in printed(tracker)


def test_standard_output_is_the_default_and_no_terminal_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, 1, tensorboard=False) as tracker:
        tracker.log(1, {"loss": 1.0}, tokens=1)
    out = capsys.readouterr().out
    assert out.startswith("train 1/1  loss 1 ") and out.count("\n") == 1


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_shows_a_bar_with_speed_loss_time_left_and_memory(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12.3 * 2**30)
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm"}
    )
    steps = {"step": 11_980, "every": 5, "console": console, "name": "translate"}
    with quiet(tmp_path, 12_000, **steps) as tracker:
        for step in range(11_981, 11_996):
            tracker.log(step, {"loss": 2.512, "grad_norm": 0.1234}, tokens=100)
        tracker.note("[x] a translation")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed(tracker))
    assert re.search(
        r"translate [━╸╺]+ 11995/12000 loss 2.512  \S+ tokens/s  0:\d\d:\d\d left  12.3 GiB", text
    )
    assert "[x] a translation" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_write_and_print_nothing(tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    run_dir = tmp_path / "run"
    with Tracker(run_dir, 3, rank=1, console=console, every=1) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": torch.zeros((), device="meta")}, tokens=1)
            with tracker.paused():
                tracker.record(step, {"bleu": 1.0})
        tracker.note("x")
        tracker.figure("f", Figure())
        tracker.flush()
    assert not run_dir.exists()
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total": 0}, r"total_steps \(0\)"),
        ({"every": 0}, r"every \(0\) must be >= 1"),
        ({"step": -1}, r"step \(-1\) >= 0"),
    ],
)
def test_bad_options_raise(tmp_path: Path, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quiet(tmp_path, **options)


def test_metrics_with_taken_names_or_too_many_dims_raise(tmp_path: Path) -> None:
    with quiet(tmp_path) as tracker:
        with pytest.raises(ValueError, match="'seconds'"):
            tracker.log(1, {"seconds": 1.0})
        with pytest.raises(ValueError, match=r"'loss' has shape \(2, 2\)"):
            tracker.log(1, {"loss": torch.zeros(2, 2)})
        with pytest.raises(ValueError, match="plain file name"):
            tracker.figure("a/b", Figure())


def picture() -> Figure:
    figure = Figure(figsize=(2, 2))
    axes = figure.add_subplot()
    axes.plot([1, 2])
    axes.set_xlabel("▁perché 日本 \N{GRINNING FACE}")
    return figure


@pytest.mark.filterwarnings("error")
def test_a_picture_is_a_png_whatever_its_letters(tmp_path: Path) -> None:
    with quiet(tmp_path) as tracker:
        tracker.figure("curve", picture(), dpi=50)
    assert matplotlib.image.imread(tmp_path / "curve.png").shape == (100, 100, 4)


def test_tensorboard_gets_scalars_notes_and_pictures_and_forgets_dropped_steps(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path, every=1, tensorboard=True) as tracker:
        for step in range(1, 5):
            tracker.log(step, {"loss": float(step)}, tokens=10)
        tracker.note("a note")
        tracker.figure("curve", picture())
    time.sleep(1)  # files are read in the order of their names: of seconds, then 10 before 9
    with quiet(tmp_path, every=1, tensorboard=True, step=2) as tracker:
        for step in range(3, 5):
            tracker.log(step, {"loss": step * 10.0}, tokens=10)
        tracker.record(4, {"valid/bleu": 31.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert {"tokens/s", "tokens", "valid/bleu"} <= set(events.Tags()["scalars"])
    assert events.Tags()["tensors"] == ["notes/text_summary"]
    assert len(records(tmp_path)) == 5


def test_records_are_json_that_other_programs_read(tmp_path: Path) -> None:
    with quiet(tmp_path, every=1) as tracker:
        tracker.log(1, {"loss": torch.tensor(0.1), "flag": True}, tokens=torch.tensor(4))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert list(record) == ["step", "seconds", "tokens", "tokens/s", "loss", "flag"]
    assert (record["tokens"], record["flag"]) == (4, 1)
