"""Directories that are there completely or not at all, with a checksum for every byte.

`publish` fills a hidden directory, seals it with a manifest (size and sha256 of each file, and of
itself), flushes everything to the disk and only then renames it, so a visible directory is complete
even after a power cut. Replaced and deleted directories are hidden first. One writer works on a
root at a time: a file lock says so and dies with its process, so any hidden directory that a new
writer finds is what a dead one left.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, LOCK = "manifest.json", ".lock"
WRITING, REPLACED, DELETED = ".writing", ".replaced", ".deleted"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hidden(directory: Path, why: str) -> Path:
    return directory.with_name(f".{directory.name}{why}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, itself intact: {"format": 1, "about": {...}, "files": {name: {...}}}.

    Raises:
        ValueError: it is missing, truncated, altered or of another format.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        seal = manifest.pop("sha256")
        version, names = manifest["format"], list(manifest["files"])
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is truncated or altered") from None
    if seal != _seal(manifest):
        raise ValueError(f"{path} is altered: its sha256 differs")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}: this version reads format {FORMAT}")
    if any(name != Path(name).name for name in names):
        raise ValueError(f"{path} names a file outside of its directory")
    return manifest


def verify(directory: str | Path) -> dict[str, Any]:
    """The manifest of a directory whose every byte is as it was written.

    Raises:
        ValueError: a file is missing, truncated or altered; the message names it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} is truncated or altered: {size} of {entry['bytes']} bytes")
        if _sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is altered: its sha256 differs from the manifest's")
    return manifest


@contextlib.contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Make `root`, wait until no other process writes to it, and clear up after dead ones."""
    root.mkdir(parents=True, exist_ok=True)
    _flush(root.parent)
    with (root / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for hidden in root.glob(".*"):
            visible = root / hidden.name.removeprefix(".").removesuffix(REPLACED)
            if hidden.name.endswith(REPLACED) and not visible.exists():
                hidden.rename(visible)  # its writer died before the new one took the place
            elif hidden.name.endswith((WRITING, REPLACED, DELETED)):
                shutil.rmtree(hidden, ignore_errors=True)
        yield


def publish(directory: Path, fill: Callable[[Path], None], about: Mapping[str, Any]) -> None:
    """Write `directory`, completely or not at all; one that is there already is replaced.

    To be called inside `only_writer(directory.parent)`.

    Args:
        directory: where the result will be.
        fill: writes plain files into the (hidden) directory that it is given.
        about: JSON-able words kept in the manifest.
    """
    writing, replaced = _hidden(directory, WRITING), _hidden(directory, REPLACED)
    try:
        writing.mkdir()
        fill(writing)
        files = {}
        for path in sorted(writing.iterdir()):
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {"format": FORMAT, "about": dict(about), "files": files}
        manifest["sha256"] = _seal(manifest)
        (writing / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(writing / MANIFEST)
        _flush(writing)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(replaced)
    writing.rename(directory)
    _flush(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def delete(directory: Path) -> None:
    """Hidden first: a writer that dies half-way leaves nothing that looks complete."""
    hidden = _hidden(directory, DELETED)
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def published(root: Path, pattern: re.Pattern[str]) -> dict[str, Path]:
    """The directories of `root` whose names match entirely, and where each of them lies.

    One that a dead writer was about to replace is still there, under its hidden name.
    """
    found = {}
    for path in [*root.glob(f".*{REPLACED}"), *root.glob("[!.]*")]:
        name = path.name.removeprefix(".").removesuffix(REPLACED)
        if pattern.fullmatch(name) and path.is_dir():
            found[name] = path
    return found
