"""Claims of msfs_functional.errors, each with a real process: its exit code and what it prints."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from msfs_functional import errors

HEAD = """
import dataclasses, errno, os, signal, sys, time
from msfs_functional import errors

# As a terminal starts it: what a script's shell starts behind & ignores Ctrl-C, and so do these.
signal.signal(signal.SIGINT, signal.default_int_handler)

@dataclasses.dataclass(frozen=True)
class Config:
    heads: int = 8
    debug: bool = False

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"heads ({self.heads}) must be >= 1")

"""


def recipe(body: str) -> str:
    return f"""{HEAD}
import tyro

def main(config):
    {body}

errors.run(main, lambda: tyro.cli(Config))
"""


def loop(seconds: float, options: str = "") -> str:
    return f"""{HEAD}
with errors.interruptible({options}) as stop:
    step = 0
    while not stop:
        step += 1
        print("begin", step, flush=True)
        end = time.monotonic() + {seconds}
        while time.monotonic() < end:
            pass
        print("end", step, flush=True)
print("saved at", step, stop.received.name)
restored = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
assert restored == (signal.default_int_handler, signal.SIG_DFL)
"""


def start(script: str, *args: str) -> subprocess.Popen[str]:
    root = Path(errors.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def finish(script: str, *args: str) -> tuple[int, str, str]:
    process = start(script, *args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            "raise ValueError('heads (7) must\\n divide width (64)')",
            "heads (7) must divide width (64)",
        ),
        ("open('/nowhere/x')", "/nowhere/x: No such file or directory; check the path"),
        ("raise OSError(errno.ENOSPC, 'cannot save /a; free some')", "cannot save /a; free some"),
        (
            "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/a')",
            "/a: No space left on device; free some space or choose another directory",
        ),
        (
            "raise ConnectionError('no route to the hub')",
            "no route to the hub; check the network, or use data that is already on this machine",
        ),
        (
            "b'\\xff'.decode('utf-8')",
            "byte 0 is not valid utf-8: convert the text to utf-8",
        ),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_2(body: str, line: str) -> None:
    code, out, err = finish(recipe(body))
    assert (code, out) == (2, "")
    assert err == f"error: {line} (--debug shows the traceback)\n"


def test_debug_keeps_the_traceback() -> None:
    code, _, err = finish(recipe("raise ValueError('no')"), "--debug")
    assert code == 1
    assert err.startswith("Traceback") and err.endswith("ValueError: no\n")


def test_a_bug_keeps_its_traceback() -> None:
    code, _, err = finish(recipe("return 1 // 0"))
    assert code == 1
    assert err.startswith("Traceback") and "ZeroDivisionError" in err


@pytest.mark.parametrize("args", [["--heads", "x"], ["--heads", "-1"], ["--hedas", "1"]])
def test_a_bad_command_line_ends_with_2_and_no_traceback(args: list[str]) -> None:
    code, _, err = finish(recipe("print('ran')"), *args)
    assert code == 2
    assert "Traceback" not in err and "head" in err


def test_a_good_run_ends_with_0() -> None:
    assert finish(recipe("print(config.heads)"), "--heads", "3") == (0, "3\n", "")


def test_a_config_that_cannot_be_made_is_one_line_too() -> None:
    script = HEAD + "errors.run(print, lambda: Config(heads=0))"
    line = "error: heads (0) must be >= 1 (--debug shows the traceback)\n"
    assert finish(script) == (2, "", line)
    assert finish(script, "--debug")[0] == 1
    with pytest.raises(ValueError, match="not a class"):
        errors.run(print, dict)


def test_main_gets_the_config_and_its_debug_flag_counts() -> None:
    @dataclass(frozen=True)
    class Config:
        debug: bool

    def main(config: Config) -> None:
        raise ValueError(str(config.debug))

    with pytest.raises(ValueError, match="True"):
        errors.run(main, Config(True))
    with pytest.raises(SystemExit) as caught:
        errors.run(main, Config(False))
    assert caught.value.code == 2
    with pytest.raises(ValueError, match="False"):
        errors.run(main, Config(False), debug=True)


def test_errors_of_network_libraries_are_expected_though_they_are_no_oserrors() -> None:
    class ConnectError(Exception):
        __module__ = "httpx._exceptions"

    assert errors.is_expected(ConnectError("refused"))
    assert errors.one_line(ConnectError("refused")).startswith("refused; check the network")
    assert errors.one_line(ValueError()) == "ValueError"
    assert not errors.is_expected(KeyError("x")) and not errors.is_expected(RuntimeError("x"))


def test_a_closed_pipe_ends_quietly() -> None:
    """As `python recipe.py | head -1` does."""
    process = start(recipe("[print(i) for i in range(10**6)]"))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_ctrl_c_outside_of_a_loop_ends_with_130_and_no_traceback() -> None:
    process = start(recipe("print('up', flush=True); time.sleep(60)"))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_finish_and_the_run_save(number: signal.Signals) -> None:
    process = start(loop(0.2))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == f"end 1\nsaved at 1 {number.name}\n"
    assert err == f"\n{number.name}: stopping after this step; once more ends at once\n"
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(number: signal.Signals) -> None:
    process = start(loop(60))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.send_signal(number)
    process.stderr.readline(), process.stderr.readline()
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == -number


def test_the_sigterm_of_a_scheduler_and_of_its_launcher_are_one() -> None:
    process = start(loop(0.5, "launched=True"))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.stderr.readline(), process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "end 1\nsaved at 1 SIGTERM\n"
    assert process.returncode == 0


def test_an_error_in_the_loop_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), errors.interruptible() as stop:
        assert not stop and stop.received is None
        assert signal.getsignal(signal.SIGINT) is not before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_importing_errors_is_cheap() -> None:
    script = "import sys, msfs_functional.errors; print('torch' in sys.modules)"
    assert finish(script)[1] == "False\n"


def test_of_processes_that_torchrun_starts_the_first_tells_what_is_wrong(monkeypatch, capsys):
    """The others wait with it, and speak if nobody ends them meanwhile."""

    def bad() -> None:
        print("usage", file=sys.stderr)
        raise ValueError("3 is odd: use 4")

    monkeypatch.setattr(errors, "FIRST_SPEAKS", 0.2)
    for rank, seconds in (("0", 0.0), ("1", 0.2)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        begin = time.monotonic()
        with pytest.raises(SystemExit):
            errors.run(print, bad, debug=False)
        told = capsys.readouterr().err
        assert told == "usage\nerror: 3 is odd: use 4 (--debug shows the traceback)\n"
        assert (time.monotonic() - begin >= 0.2) == (seconds > 0)
