"""A process in which Triton interprets kernels on the CPU, one for all tests of a run.

Triton decides when it is imported whether it interprets, and importing it and torch takes as long
as many tests, so that all tests share one such process.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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


@contextmanager
def interpreting() -> Iterator[Callable[..., Any]]:
    """run(fn, *args) calls fn, which is a module's, in that process."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=patch_once) as pool:
        try:
            pool.submit(os.getpid).result()
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before
        yield lambda fn, *args: pool.submit(fn, *args).result()
