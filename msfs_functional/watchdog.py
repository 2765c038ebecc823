"""A run in which nothing happens any more ends with a message, not in silence.

    with Watchdog(600) as watchdog:
        watchdog.joined()
        for step in range(steps):
            watchdog.at(f"step {step}")      # within 600 seconds it must come here again
            ...

A collective waits for ever for a rank that hangs, and nobody sees which one it is. Each rank
therefore notes what it is doing; a thread of each looks whether the note grows too old, and then
puts it into the store that the ranks share. The first one to do so tells all notes:

    error: nothing has happened for 600 s: rank 3 in the data of step 70; ranks 0, 1, 2 in step 70

When a rank dies, its launcher tells the others (SIGTERM), waits 30 seconds and kills them. One that
waits for a dead rank on its GPU hears nothing; the thread does, and ends the process earlier:

    error: nothing has happened for 10 s, since SIGTERM came: rank 0 in step 70
"""

import collections
import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from msfs_functional import agreement, errors

ANSWER = 3.0  # seconds that ranks differ in finding out
PATIENCE = 10.0  # seconds, beside what a step takes, in which one that has been told must answer


class Watchdog:
    """Ends the process, and so by its launcher the whole job, when `at` is not called in time.

    Args:
        timeout: seconds, > 0; math.inf for a watchdog that sleeps.
        remedy: how to go on; ends the message.
        traces: a directory for `stack-<rank>.txt`, where each thread of a hanging rank stands.
    """

    def __init__(self, timeout: float, *, remedy: str = "", traces: Path | None = None):
        if not timeout > 0:
            raise ValueError(f"timeout ({timeout}) must be positive [seconds]")
        self.timeout, self.remedy, self.traces = timeout, remedy, traces
        self.note, self.since, self.token = "the start", time.monotonic(), ""
        self.told = math.inf  # when SIGTERM came, if nothing has happened since
        self.took: collections.deque[float] = collections.deque([0.0], maxlen=4)
        self.signals: tuple[int, int] | None = None  # a pipe, on which C tells of signals at once
        self.before = -1  # what it told before
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, note: str) -> None:
        """What the process does from now on."""
        self._sigterm()  # what came before, the process has time to act on from here
        now = time.monotonic()
        self.took.append(now - self.since)
        self.note, self.since, self.told = note, now, math.inf

    def joined(self) -> None:
        """To be called by all ranks together, once they can talk: they will tell one another."""
        self.token = agreement.token()

    def __enter__(self) -> "Watchdog":
        self.since = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self.before = signal.set_wakeup_fd(self.signals[1], warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.thread.join()
        if self.signals is not None:
            signal.set_wakeup_fd(self.before)
            for end in self.signals:
                os.close(end)
            self.signals = None

    def close(self) -> None:
        """From now on anything may take as long as it likes."""
        self.closed.set()

    def _sigterm(self) -> bool:
        """Whether SIGTERM came since this was last asked, to a process that handles it."""
        with contextlib.suppress(BlockingIOError):
            return self.signals is not None and signal.SIGTERM in os.read(self.signals[0], 64)
        return False

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.timeout / 4)):
            now = time.monotonic()
            if self.token and self._sigterm():
                self.told = now
            passed, since = self.timeout, ""
            if now - self.told > PATIENCE + 2 * max(self.took):
                passed, since = round(now - self.told), ", since SIGTERM came"
            if since or now - self.since > self.timeout:
                try:
                    self._tell(f"nothing has happened for {passed:g} s{since}")
                finally:
                    os._exit(errors.EXPECTED)

    def _tell(self, what: str) -> None:
        rank = int(os.environ.get("RANK", 0))
        if self.traces is not None:
            with (self.traces / f"stack-{rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        notes, world = {rank: self.note}, agreement.world() if self.token else 0
        if world > 1:
            try:
                found = self._exchange(rank, world)
            except dist.DistError:  # the store is gone, too: each rank speaks for itself
                found = notes
            if found is None:
                return
            notes = found
        told = describe(notes, world)
        text = f"error: {what}: {told}{self.remedy}\n"
        os.write(sys.stderr.fileno(), text.encode())

    def _exchange(self, rank: int, world: int) -> dict[int, str] | None:
        """All notes for the rank that asks first, which will tell them; None for the others."""
        store = dist.PrefixStore(self.token, dist.distributed_c10d._get_default_store())
        store.set(str(rank), self.note)
        if store.add("asked", 1) > 1:
            time.sleep(2 * ANSWER)  # the first one, which speaks, is to be the first to end
            return None
        time.sleep(ANSWER)
        there = [other for other in range(world) if store.check([str(other)])]
        return {other: store.get(str(other)).decode() for other in there}


def describe(notes: dict[int, str], world: int) -> str:
    """Which ranks are in what, those in the rarest first, and which do not answer."""
    where: dict[str, list[int]] = {}
    for rank in sorted(notes):
        where.setdefault(notes[rank], []).append(rank)
    parts = [
        f"{_ranks(ranks)} in {note}"
        for note, ranks in sorted(where.items(), key=lambda item: len(item[1]))
    ]
    if silent := [rank for rank in range(world) if rank not in notes]:
        parts.insert(0, f"no answer from {_ranks(silent)}")
    return "; ".join(parts)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
