"""The process in which Triton interprets says how it died, and the next test gets a new one."""

import os

import pytest
from interpreting import interpreting


def nothing() -> None:
    """In place of importing torch and Triton, which no process here needs."""


def test_a_process_that_dies_says_how_and_is_replaced():
    with interpreting(nothing) as run:
        first = run(os.getpid)
        assert run(os.getenv, "TRITON_INTERPRET") == "1"
        with pytest.raises(RuntimeError, match=r"_exit\(3,\) died: exit code 3"):
            run(os._exit, 3)
        second = run(os.getpid)
        assert second not in (first, os.getpid())
        with pytest.raises(RuntimeError, match=r"SIGABRT\n.*Aborted(.|\n)*_process_worker"):
            run(os.abort)
    with pytest.raises(ValueError, match="invalid literal"), interpreting(nothing) as run:
        run(int, "what a function raises is raised here")
