"""A process in which Triton interprets kernels on the CPU, one for all tests of a run.

Triton decides when it is imported whether it interprets, and importing it and torch takes as long
as many tests, so that all tests share one such process. Where it dies, the test that it died in
says how, and the next one gets a new process.
"""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Kept:
    """In place of a scope that would be undone: another one has made its changes."""

    def restore(self) -> None:
        pass


class First:
    """The scope of a kernel: when it ends, so does what `patch_once` knows."""

    def __init__(self, scope: Any, known: set[int]):
        self.scope, self.known = scope, known

    def restore(self) -> None:
        self.known.clear()
        self.scope.restore()


def patch_once() -> None:
    """Triton patches its language anew at every call of a device function, for a third of all the
    time that interpreting takes; here once a launch for each module.
    """
    import torch
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    patch, known = getattr(interpreter, "_patch_lang", None), set()
    if patch is None or not hasattr(interpreter, "_LangPatchScope"):  # another Triton: as it is
        return

    def patched(fn: Callable) -> Any:
        module = id(fn.__globals__)
        if module in known:
            return Kept()
        first = not known
        known.add(module)
        scope = patch(fn)
        return First(scope, known) if first else scope

    interpreter._patch_lang = patched  # pyright: ignore[reportPrivateUsage]


def prepare(prepared: Callable[[], None], log: Path) -> None:
    faulthandler.enable(log.open("w"))  # which stays open as long as the process lives
    prepared()


class Interpreter:
    """run(fn, *args) calls fn, which is a module's, in that process.

    Raises:
        RuntimeError: the process died: by which signal or with which exit code, and where.
    """

    def __init__(self, prepared: Callable[[], None], log: Path):
        self.prepared, self.log = prepared, log
        self.pool: ProcessPoolExecutor | None = None

    def start(self) -> ProcessPoolExecutor:
        spawn, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
        pool = ProcessPoolExecutor(1, spawn, prepare, (self.prepared, self.log))
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            pool.submit(os.getpid)  # starts the process
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before
        (self.process,) = set(multiprocessing.active_children()) - set(others)
        return pool

    def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        if self.pool is None:
            self.pool = self.start()
        try:
            return self.pool.submit(fn, *args).result()
        except BrokenProcessPool as error:
            self.process.join()
            self.close()
            code = self.process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            where = self.log.read_text() if self.log.exists() else ""
            call = f"{fn.__name__}{args}"
            raise RuntimeError(f"the process that ran {call} died: {how}\n{where}") from error

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = None


@contextmanager
def interpreting(prepared: Callable[[], None] = patch_once) -> Iterator[Interpreter]:
    with tempfile.TemporaryDirectory() as folder:
        run = Interpreter(prepared, Path(folder) / "faults.log")
        try:
            yield run
        finally:
            run.close()
