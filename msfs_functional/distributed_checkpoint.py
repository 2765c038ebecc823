"""Checkpoints that all ranks write at once, in the background, and any other number of them reads.

    with Writer(run / "checkpoints", keep_last=2) as writer:
        writer.save(step, state, extra={"batches": batches.state()})    # returns when it is copied
    state = load(run / "checkpoints", like=state).state                 # on any mesh, or on none

The same root, manifest and promises as `checkpoint`, with torch.distributed.checkpoint's files in
place of one safetensors file:

    checkpoints/step_00001000/
        __0_0.distcp ...     what each rank wrote, tensors named by their paths in the state
        .metadata            where each part of each tensor lies
        meta.json            the caller's `extra`
        tokenizer.json ...   files that the caller hands over
        manifest.json        step, metric, size and sha256 of every file above

Shards go into a hidden directory first. When the last rank has written, rank 0 seals it and gives
it its name; of a save that a crash cut short nothing is ever seen. The directory must be one that
all nodes share. Reading unpickles nothing but the plain records of `.metadata`.
"""

import functools
import io
import json
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import optree
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from msfs_functional import agreement, checkpoint, durable
from msfs_functional.checkpoint import META, Restored, Which, named_leaves
from msfs_functional.transforms import NAMESPACE

PARTS = ".parts"  # of hidden directories that ranks write into
METADATA = ".metadata"


class Parts(dcp.FileSystemWriter):
    """Where ranks write one checkpoint; when all have, rank 0 calls `publish`."""

    def __init__(self, directory: Path, publish: Any):
        super().__init__(directory)
        self.publish = publish

    def finish(self, metadata: metadata.Metadata, results: Any) -> None:
        super().finish(metadata, results)
        self.publish()


class Writer:
    """Writes the checkpoints of one run; every rank has one and calls it with the others.

    Args:
        root: directory of the checkpoints, on a disk that all nodes share; made if missing.
        keep_last: how many of the last written checkpoints stay, >= 1.
        keep_best: how many of the best by metric stay besides, >= 0.
        higher_is_better: how metrics compare.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        higher_is_better: bool = True,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last ({keep_last}) must be at least 1, keep_best ({keep_best}) at least 0"
            )
        self.root, self.higher_is_better = Path(root), higher_is_better
        self.keep_last, self.keep_best = keep_last, keep_best
        self.group: Any = dist.new_group(backend="gloo") if agreement.world() > 1 else None
        self.pending: Any = None  # a Future
        self.target = self.root
        _expect_one_process()
        with agreement.together():
            if agreement.rank() == 0:
                with durable.only_writer(self.root):
                    for left in self.root.glob(f".*{PARTS}"):
                        shutil.rmtree(left)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None or kind is SystemExit:  # after a failure other ranks may not answer
            self.wait()

    def save(
        self,
        step: int,
        state: Any,
        *,
        extra: Mapping[str, Any] | None = None,
        files: Mapping[str, str | bytes] | None = None,
        metric: float | None = None,
    ) -> None:
        """Copies the state to the CPU and goes on writing `root/step_00001000` in the background.

        An earlier save is waited for first. Arguments are those of `checkpoint.save`, but the state
        holds tensors only; DTensors are written shard by shard.

        Raises:
            ValueError: a leaf that is no tensor, `extra` that is no JSON.
            OSError: the earlier save found the disk full or failing; no checkpoint was harmed.
        """
        self.wait()
        tensors = _tensors(state)
        meta = checkpoint.json_text("extra", {"leaves": {}, "extra": dict(extra or {})})
        self.target = self.root / f"step_{step:08d}"
        parts = self.target.with_name(f".{self.target.name}{PARTS}")
        contents = {META: meta, **(files or {})}
        publish = functools.partial(self._publish, parts, self.target, step, contents, metric)
        self.pending = dcp.async_save(
            tensors,
            storage_writer=Parts(parts, publish),
            process_group=self.group,
            no_dist=self.group is None,
        )

    def wait(self) -> None:
        """Until the last save is on the disk; raises what went wrong with it, on every rank."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            _raise(error, self.target)

    def _publish(
        self,
        parts: Path,
        target: Path,
        step: int,
        contents: Mapping[str, str | bytes],
        metric: float | None,
    ) -> None:
        def fill(directory: Path) -> None:
            for path in parts.iterdir():
                path.rename(directory / path.name)
            for name, content in contents.items():
                data = content.encode() if isinstance(content, str) else content
                (directory / name).write_bytes(data)
            known = {part.relative_path for part in _metadata(directory).storage_data.values()}
            if away := sorted(name for name in known if not (directory / name).exists()):
                raise OSError(
                    f"{away[0]} was written by another node and is not in {self.root}: put --out on"
                    f" a disk that all nodes share"
                )

        with durable.only_writer(self.root):
            newest = max((c.written for c in checkpoint.checkpoints(self.root)), default=0)
            about = {
                "step": step,
                "written": max(time.time_ns(), newest + 1),
                "metric": metric,
                "higher_is_better": self.higher_is_better,
            }
            durable.publish(target, fill, about)
            shutil.rmtree(parts)
            intact = [c for c in checkpoint.checkpoints(self.root) if c.intact]
            best = checkpoint.best_first(intact)[: self.keep_best]
            kept = {c.path for c in intact[-self.keep_last :] + best}
            for old in intact:
                if old.path not in kept:
                    durable.delete(old.path)


def load(
    place: str | Path,
    like: Any = None,
    *,
    which: Which = "latest",
    partial: bool = False,
) -> Restored:
    """Reads a checkpoint into `like`, each rank its own shards; all ranks call it together.

    The mesh may be another one than the checkpoint's, or none.

    Args:
        place: root of several checkpoints, or the directory of one.
        like: pytree of tensors and DTensors, which are filled in place; bare `torch.Size` leaves
            become CPU tensors. None restores no state, and checks of its files only that they are
            there in their sizes.
        which, partial: as in `checkpoint.load`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is missing, truncated or altered, or the checkpoint is of another model;
            on every rank.
    """
    path = Path(place)
    with agreement.together():
        if agreement.rank() == 0:
            path = _checked(checkpoint.find(path, which), every_byte=like is not None)
    path = agreement.from_all(path)[0]
    with agreement.together():
        manifest = durable.read_manifest(path)
        meta = json.loads((path / META).read_bytes())
        own = [name for name in manifest["files"] if name == META or _is_part(name)]
        files = {n: (path / n).read_bytes() for n in manifest["files"] if n not in own}
        saved = _metadata(path)
    state = None if like is None else _read(path, saved, like, partial)
    about = manifest["about"]
    return Restored(state, meta["extra"], files, about["step"], about["metric"], path)


def last_good(root: str | Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None if there is none.

    For runs that start again by themselves: those that are passed over are named on stderr. All
    ranks call it together.
    """
    good = None
    with agreement.together():
        if agreement.rank() == 0:
            for found in reversed(checkpoint.checkpoints(root)):
                try:
                    good = _checked(found.path, every_byte=True)
                    break
                except (ValueError, OSError) as error:
                    print(f"note: passed over: {error}", file=sys.stderr)
    return agreement.from_all(good)[0]


def _expect_one_process() -> None:
    """torch warns of a run without ranks even where it is told of it, from another thread."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def _is_part(name: str) -> bool:
    return name == METADATA or name.endswith(".distcp")


def _checked(path: Path, every_byte: bool) -> Path:
    if not (path / METADATA).exists() and (path / checkpoint.STATE).exists():
        raise ValueError(f"{path} was written by `checkpoint.save`: read it with `checkpoint.load`")
    try:
        if every_byte:
            durable.verify(path)
        for name, entry in durable.read_manifest(path)["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"{path / name} is missing")
            if (path / name).stat().st_size != entry["bytes"]:
                raise ValueError(f"{path / name} is truncated or altered")
    except ValueError as error:
        good = [c for c in checkpoint.verified(path.parent) if c.path != path]
        remedy = (
            f"copy the file back, or delete {path} to go on from the last good one, {good[-1].path}"
            if good
            else "no other one is good: copy the file back, or start anew"
        )
        raise ValueError(f"{error}; {remedy}") from error
    return path


def _read(path: Path, saved: metadata.Metadata, like: Any, partial: bool) -> Any:
    wanted = named_leaves(like)
    there = {}
    for name, entry in saved.state_dict_metadata.items():
        assert isinstance(entry, metadata.TensorStorageMetadata)
        there[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    checkpoint.compare(path, wanted, there, partial)
    into = {
        name: torch.empty(leaf, dtype=there[name].dtype) if isinstance(leaf, torch.Size) else leaf
        for name, leaf in wanted.items()
    }
    _expect_one_process()
    try:
        dcp.load(into, storage_reader=Reader(path), no_dist=agreement.world() == 1)
    except CheckpointException as error:
        _raise(error, path)
    structure = optree.tree_structure(like, namespace=NAMESPACE)
    return optree.tree_unflatten(structure, list(into.values()))


def _raise(error: CheckpointException, target: Path) -> NoReturn:
    """The first rank's own error, in the place of all their tracebacks."""
    rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(first, OSError):
        first = checkpoint.disk_error(first, target)
    elif not isinstance(first, ValueError):
        first = RuntimeError(f"rank {rank}, {target}: {type(first).__name__}: {first}")
    raise first from error


def _tensors(state: Any) -> dict[str, Tensor]:
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"leaf {name!r} is a {type(leaf).__name__}: a state of several ranks holds tensors "
                f"only; put it into extra"
            )
    return {name: leaf.detach() for name, leaf in leaves.items()}


class Reader(dcp.FileSystemReader):
    """torch's reader, which unpickles no more than records of shapes, offsets and file names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return _metadata(Path(self.path))


def _metadata(directory: Path) -> metadata.Metadata:
    try:
        found = Records(io.BytesIO((directory / METADATA).read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"{directory / METADATA} is no checkpoint's metadata: {error}") from None
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"{directory / METADATA} is no checkpoint's metadata")
    return found


class Records(pickle.Unpickler):
    """Refuses everything but the dataclasses and enums of torch.distributed.checkpoint's metadata,
    sizes, dtypes and paths."""

    def find_class(self, module: str, name: str) -> Any:
        record = module == metadata.__name__ or (module, name) == (
            filesystem.__name__,
            "_StorageInfo",
        )
        allowed = {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
        if "." not in name:
            found = super().find_class(module, name) if record or module == "torch" else None
            if record and isinstance(found, type) and found.__module__ == module:
                return found
            if isinstance(found, torch.dtype):
                return found
        if (module, name) in allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of it")
