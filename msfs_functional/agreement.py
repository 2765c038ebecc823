"""What the processes of a run do as one: they start alike, stop together and fail together.

    with together():                       # a rank's error becomes every rank's: none waits for it
        documents = read(path)
    start_alike({"configuration": text})   # or each of them raises
    if highest(signal_number):             # did anybody get a signal?

All ranks call these together, on the CPU: nothing here waits for a device. In a run of one process
they cost nothing and need no process group.
"""

import contextlib
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from msfs_functional import errors

# Beside torch: what numbers, streams of data and files depend on.
LIBRARIES = ("msfs_functional", "triton", "numpy", "datasets", "tokenizers", "safetensors")


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_all(value: Any) -> list[Any]:
    """What every rank passed, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def token() -> str:
    """A name that all ranks get together and no ranks got before, for what they put into a store:
    it may outlive them."""
    return from_all(secrets.token_hex(8))[0]


def highest(value: int) -> int:
    """The greatest of what the ranks pass."""
    if world() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An expected error inside of it, on any rank, is raised by all ranks at its end.

    The block must be a rank's own work: one that fails would not come to a collective in it. A bug
    (an error that is not expected) ends its own rank only, and the launcher ends the others.

    Raises:
        ValueError: what the lowest of the ranks that failed says, named on the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not errors.is_expected(error):
            raise
        failure = error
    said = from_all(None if failure is None else errors.one_line(failure))
    if failure is not None:
        raise failure
    for number, text in enumerate(said):
        if text is not None:
            raise ValueError(f"rank {number}: {text}")


@contextlib.contextmanager
def said_once(seconds: float = 5.0) -> Iterator[None]:
    """Around a program: of an expected error that all ranks have, rank 0 alone speaks.

    The others exit with the code that `errors.friendly` would give them. One that rank 0 does not
    have within these seconds is raised under its rank's name.
    """
    failed = f"{token()}: rank 0 has failed"
    try:
        yield
    except Exception as error:
        if world() == 1 or not errors.is_expected(error):
            raise
        store = dist.distributed_c10d._get_default_store()
        if rank() == 0:
            store.set(failed, "")
            raise
        try:
            store.wait([failed], timedelta(seconds=seconds))
        except dist.DistError:
            raise ValueError(f"rank {rank()}: {errors.one_line(error)}") from error
        raise SystemExit(errors.EXPECTED) from None


def start_alike(facts: Mapping[str, Any]) -> None:
    """Checks that every rank holds what rank 0 holds, and runs the same Python and libraries.

    Args:
        facts: JSON-able; dicts in them are compared entry by entry, so that the message can name
            the one that differs.

    Raises:
        ValueError: on every rank, one that differs and how.
    """
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    mine = _flat(json.loads(json.dumps({**facts, "version": versions}, default=str)))
    first, *others = from_all(mine)
    for number, theirs in enumerate(others, start=1):
        for name in sorted(first.keys() | theirs.keys()):
            here, there = first.get(name), theirs.get(name)
            if here != there:
                raise ValueError(
                    f"{name} is {there!r} on rank {number}, {here!r} on rank 0: start all processes"
                    f" with the same command and the same installation"
                )


def _flat(tree: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{within}{name}"
        found |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found
