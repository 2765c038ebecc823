"""The edge between a program and the person who runs it: errors as one line, Ctrl-C as a request.

    if __name__ == "__main__":
        errors.run(main, lambda: tyro.cli(Config, description=__doc__))

Expected errors (bad values, files, disk, network) end with one line on stderr and exit code 2;
everything else is a bug and keeps its traceback. `--debug` keeps it always.
"""

import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXPECTED = 2  # exit code; tyro and argparse use the same for a bad command line
FIRST_SPEAKS = 5.0  # seconds that the others of a machine wait with what they have to say
_NETWORK_LIBRARIES = {"aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3"}
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another directory",
    errno.EDQUOT: "free some of your quota or choose another directory",
    errno.EACCES: "choose a path that you may use",
    errno.EPERM: "choose a path that you may use",
    errno.EROFS: "choose a directory that can be written",
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another path",
    errno.EISDIR: "give a file, not a directory",
    errno.ENOTDIR: "give a directory, not a file",
}


def _is_network(error: BaseException) -> bool:
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(libraries & _NETWORK_LIBRARIES)


def is_expected(error: BaseException) -> bool:
    """Whether an error tells of the user's input, files, disk or network, not of a bug."""
    return isinstance(error, ValueError | OSError) or _is_network(error)


def one_line(error: BaseException) -> str:
    """What an error says, with the remedy where the operating system or the network gives none."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        encoding = error.encoding
        text = f"byte {error.start} is not valid {encoding}: convert the text to {encoding}"
    elif isinstance(error, OSError) and error.strerror:
        text = str(error.strerror)
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([" -> ".join(places), text] if places else [text])
        if error.errno is not None and error.strerror == os.strerror(error.errno):
            text += f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    if _is_network(error):
        text += "; check the network, or use data that is already on this machine"
    return " ".join(text.split()) or type(error).__name__


def _nobody_reads_stdout() -> bool:
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file: a notebook, a test
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextlib.contextmanager
def friendly(debug: bool = False) -> Iterator[None]:
    """Inside it, expected errors become one line on stderr and exit code 2.

    A closed pipe (`| head`) ends quietly with 141 and Ctrl-C with 130, as a shell expects.
    With `debug` every error passes unchanged.
    """
    if debug:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            sys.exit(128 + signal.SIGPIPE)
        if not is_expected(error):
            raise
        print(f"error: {one_line(error)} (--debug shows the traceback)", file=sys.stderr)
        sys.exit(EXPECTED)


@contextlib.contextmanager
def after_the_first() -> Iterator[None]:
    """Of processes that torchrun starts, not yet joined, the first of each machine tells errors.

    What is wrong with the command line is wrong with that of all: the others wait before they
    speak, and when the first has ended torchrun ends them.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except (Exception, SystemExit):  # Ctrl-C is not kept waiting
        time.sleep(FIRST_SPEAKS)
        raise
    finally:
        sys.stderr.write(told.getvalue())


def run(main: Callable[[Any], object], config: Any, *, debug: bool | None = None) -> None:
    """Call `main(config)` with errors for people; the last line of every recipe.

    Args:
        main: the recipe.
        config: its configuration, or a function without arguments that makes it (such as
            `lambda: tyro.cli(Config)`), so that errors of the command line are covered too.
        debug: keep tracebacks; None takes `config.debug`, and `--debug` while there is no config.
    """
    if isinstance(config, type):
        raise ValueError(
            f"config ({config.__name__}) must be an instance or a function, not a class"
        )
    if callable(config):
        shown = "--debug" in sys.argv[1:] if debug is None else debug
        with friendly(shown), after_the_first():
            config = config()
    with friendly(getattr(config, "debug", False) if debug is None else debug):
        main(config)


class Interrupt:
    """False until Ctrl-C or SIGTERM arrives; then `received` says which."""

    received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None


@contextlib.contextmanager
def interruptible(notice: str | None = None, *, launched: bool = False) -> Iterator[Interrupt]:
    """Turn the first Ctrl-C or SIGTERM into a flag that a loop reads after a finished step.

        with interruptible() as stop:
            for batch in batches:
                state, metrics = step(state, batch)
                if stop:
                    save(...)
                    break

    The second one ends the process at once, even inside native code. A run on several ranks has to
    agree on the flag (an all-reduce) before it acts on it. Outside of the main thread, where Python
    takes no signals, the flag stays False.

    Args:
        notice: what the first signal prints on stderr; None for the usual words, "" for nothing.
        launched: by torchrun, say, which passes SIGTERM on to processes that a scheduler has sent
            it to already: a second SIGTERM then is the first one again, only Ctrl-C ends at once.
    """
    stop = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    text = "stopping after this step; once more ends at once" if notice is None else notice
    handled = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        stop.received = signal.Signals(number)
        for each in handled:
            known = launched and each == signal.SIGTERM
            signal.signal(each, signal.SIG_IGN if known else signal.SIG_DFL)
        if text:  # a buffered print may not be entered twice, a plain write may
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar may have hidden it
            os.write(2, f"{cursor}\n{stop.received.name}: {text}\n".encode())

    before = {each: signal.signal(each, note) for each in handled}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
