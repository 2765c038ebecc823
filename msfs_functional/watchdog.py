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
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from msfs_functional import agreement, errors

ANSWER = 3.0  # seconds that ranks differ in finding out


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
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, note: str) -> None:
        """What the process does from now on."""
        self.note, self.since = note, time.monotonic()

    def joined(self) -> None:
        """To be called by all ranks together, once they can talk: they will tell one another."""
        self.token = agreement.token()

    def __enter__(self) -> "Watchdog":
        self.since = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on anything may take as long as it likes."""
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self.since > self.timeout:
                try:
                    self._tell()
                finally:
                    os._exit(errors.EXPECTED)

    def _tell(self) -> None:
        rank = int(os.environ.get("RANK", 0))
        if self.traces is not None:
            with (self.traces / f"stack-{rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        notes, world = {rank: self.note}, 0
        if self.token:
            world = agreement.world()
            try:
                found = self._exchange(rank, world)
            except dist.DistError:  # the store is gone, too: each rank speaks for itself
                found = notes
            if found is None:
                return
            notes = found
        told = describe(notes, world)
        text = f"error: nothing has happened for {self.timeout:g} s: {told}{self.remedy}\n"
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
