"""Runs under torchrun whose processes are killed, hang or are told to stop: for real, over gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port
from test_pretrain import TINY, metrics_without_time, pretrain, recipe

from msfs_functional import checkpoint
from msfs_functional.watchdog import Watchdog, describe

HERE = Path(__file__).parent
SHORT = [*TINY, "--train.steps", "8", "--train.eval-every", "2", "--mesh.timeout", "77"]


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    monkeypatch.setattr(pretrain, "report", lambda *args: None)
    monkeypatch.setattr(pretrain, "draw", lambda *args: None)


def torchrun(faults: list, *args: object, nodes: int = 1, ranks: int = 2, restarts: int = 0):
    """[(exit code, stdout, stderr)] of an agent for each node."""
    environment = {
        **os.environ,
        "FAULTS": json.dumps(faults),
        "PYTHONPATH": f"{HERE.parent}:{HERE.parent / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(nodes > 1)),
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", ranks,
        "--max-restarts", restarts, "--monitor-interval", 0.1, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", HERE / "faulty_pretrain.py", *args,
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [
        subprocess.Popen([str(word) for word in command], env=environment, **pipes)
        for _ in range(nodes)
    ]
    ended = []
    for agent in agents:
        try:
            out, err = agent.communicate(timeout=280)
        finally:
            agent.kill()
        ended.append((agent.returncode, out, err))
    return ended


def losses(run: Path) -> dict[int, float]:
    records = metrics_without_time(run)
    assert len([r for r in records if "loss" in r]) == len({r["step"] for r in records})
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.ranks
def test_killed_processes_are_started_again_and_a_hanging_one_ends_the_job(tmp_path):
    """A rank is killed in a step, then in a save, then it hangs; then one process goes on alone."""
    faults = [["die", 1, 4], ["die saving", 1, 1], ["hang", 1, 5]]
    where = ["--out", tmp_path, "--name", "faulty"]
    start = time.monotonic()
    [(code, _, told)] = torchrun(faults, *SHORT, *where, restarts=2)
    assert code != 0 and time.monotonic() - start < 280
    assert [told.count(f"attempt {i} of rank 0") for i in range(4)] == [1, 1, 1, 0], told[-3000:]
    message = "nothing has happened for 4 s: ranks 0, 1 in step 7; go on with: torchrun"
    assert told.count(f"error: {message}") == 1, told[-5000:]
    # The save of step 4 was cut short in the second attempt, and done in the third.
    assert checkpoint.verified(tmp_path / "faulty/checkpoints")[-1].step == 6
    recipe("--resume", *where)
    recipe(*SHORT, "--out", tmp_path, "--name", "whole")
    got, want = losses(tmp_path / "faulty"), losses(tmp_path / "whole")
    assert got == pytest.approx(want, rel=2e-5)


@pytest.mark.ranks
def test_two_nodes_start_again_and_save_when_they_are_preempted(tmp_path):
    """Two agents on this machine: a process is killed, then SIGTERM reaches one of the new ones."""
    where = ["--out", tmp_path, "--name", "preempted"]
    ended = torchrun(
        [["die", 1, 4], ["preempt", 1, 1]], *SHORT, *where, nodes=2, ranks=1, restarts=1
    )
    assert [code for code, *_ in ended] == [0, 0], ended
    told = "".join(out for _, out, _ in ended)
    step = checkpoint.verified(tmp_path / "preempted/checkpoints")[-1].step
    assert step in (1, 3)  # of a new run, or of one that goes on from step 2
    command = "torchrun --nnodes 2 --nproc-per-node 1 recipes/pretrain.py --resume --out"
    assert told.count(f"saved after step {step}; go on with: {command}") == 1, told
    assert list(losses(tmp_path / "preempted")) == list(range(1, step + 1))


def test_a_process_in_which_nothing_happens_ends_in_time(tmp_path):
    """The main thread sleeps; its stack is left behind."""
    program = (
        "import pathlib, time\nfrom msfs_functional.watchdog import Watchdog\n"
        f"with Watchdog(0.5, remedy='; bye', traces=pathlib.Path({str(tmp_path)!r})) as watchdog:\n"
        "    watchdog.at('a dream')\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent / 'kernels'}"}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == "error: nothing has happened for 0.5 s: rank 0 in a dream; bye\n"
    assert "line 5 in <module>" in (tmp_path / "stack-0.txt").read_text()


def test_a_process_that_does_not_hear_sigterm_ends_before_it_is_killed():
    """It waits for what a dead one would have done; one that does something has all its time."""
    program = (
        "import time\nfrom msfs_functional import errors, watchdog\n"
        "watchdog.PATIENCE = 0.5\n"
        "with watchdog.Watchdog(60) as dog, errors.interruptible(launched=True) as stop:\n"
        "    dog.joined()\n    dog.at('step 1')\n    print('ready', flush=True)\n"
        "    while not stop:\n        time.sleep(0.01)\n"
        "    dog.at('saving')\n    time.sleep(3)\n    print('saved', flush=True)\n"
        "    import signal, os\n    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent / 'kernels'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "saved\n"), told
    assert re.search(
        r"^error: nothing has happened for \d+ s, since SIGTERM came: rank 0 in saving$", told, re.M
    ), told


def test_the_watchdog_gives_back_who_hears_of_signals():
    ends = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(ends[1])
    with Watchdog(60):
        pass
    assert signal.set_wakeup_fd(before) == ends[1]


def test_the_watchdog_says_who_is_where():
    notes = {0: "step 7", 1: "step 7", 3: "the data of step 8"}
    said = "no answer from rank 2; rank 3 in the data of step 8; ranks 0, 1 in step 7"
    assert describe(notes, 4) == said
