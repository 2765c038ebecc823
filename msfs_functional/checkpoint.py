"""Checkpoints that survive kill -9, a full disk and a flipped bit.

A checkpoint is a directory, and a root directory holds several of them:

    checkpoints/step_00001000/
        state.safetensors    every tensor of the state, named by its path in the pytree
        meta.json            the leaves that are no tensors, and the caller's `extra`
        tokenizer.json ...   files that the caller hands over
        manifest.json        step, metric, size and sha256 of every file above

It is visible only when it is complete and on the disk, an old one is deleted only after that
(`durable` says how), every byte is checked before it is used, and nothing is ever unpickled.
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optree
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msfs_functional import durable
from msfs_functional.durable import verify
from msfs_functional.side_by_side import address
from msfs_functional.transforms import NAMESPACE

STATE, META = "state.safetensors", "meta.json"
_NAME = re.compile(r"step_(\d{8,})")

Which = Literal["latest", "best"] | int


class Checkpoint(NamedTuple):
    """One checkpoint as its manifest describes it; `intact` says that the manifest can be read."""

    path: Path
    step: int
    written: int  # nanoseconds since 1970: the order of saving, which may differ from that of steps
    metric: float | None
    higher_is_better: bool
    intact: bool


class Restored(NamedTuple):
    """What `load` gives back. `files` are the caller's files as bytes."""

    state: Any
    extra: dict[str, Any]
    files: dict[str, bytes]
    step: int
    metric: float | None
    path: Path


def _entry_name(entry: optree.PyTreeEntry) -> str:
    named = entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry
    return str(named)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path: {"params/encoder.0.weight": ..., "opt_state/0/mu/...": ...}.

    Raises:
        ValueError: two leaves have the same name (keys 1 and "1", or a key that holds a slash).
    """
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree, namespace=NAMESPACE)
    named: dict[str, Any] = {}
    for accessor, leaf in zip(accessors, leaves, strict=True):
        name = "/".join(map(_entry_name, accessor)) or "state"
        if name in named or name == "__metadata__":
            raise ValueError(f"leaf name {name!r} is taken: every leaf needs a path of its own")
        named[name] = leaf
    return named


def _split_leaves(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU and dense, for safetensors; plain Python values for JSON."""
    tensors, values, owners = {}, {}, set()
    for name, leaf in named_leaves(state).items():
        if isinstance(leaf, Tensor):
            plain = type(leaf) is Tensor or isinstance(leaf, torch.nn.Parameter)
            if not plain or leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
                raise ValueError(
                    f"leaf {name!r} is a {type(leaf).__name__} of layout {leaf.layout} on "
                    f"{leaf.device}: only plain dense tensors with data can be saved; gather or "
                    "convert it first"
                )
            if leaf.dtype == torch.complex128:
                raise ValueError(f"leaf {name!r} is complex128: save torch.view_as_real of it")
            tensor = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
            owner = tensor.untyped_storage().data_ptr()
            if owner in owners:  # two names for one memory, which safetensors refuses
                tensor = tensor.clone()
            owners.add(owner)
            tensors[name] = tensor
        elif isinstance(leaf, bool | int | float | str):
            values[name] = leaf
        else:
            raise ValueError(
                f"leaf {name!r} is a {type(leaf).__name__}: a state holds tensors, bool, int, "
                "float and str; convert it or keep it out of the state"
            )
    return tensors, values


def json_text(what: str, value: Any) -> str:
    """`value` as JSON; a ValueError says of `what` why it is none."""
    for accessor in optree.tree_accessors(value):
        for entry in accessor:
            if isinstance(entry, optree.MappingEntry) and not isinstance(entry.entry, str):
                raise ValueError(f"{what} has the key {entry.entry!r}: JSON keys must be strings")
    try:
        return json.dumps(value, indent=1)
    except TypeError as error:
        raise ValueError(f"{what} must be JSON: {error}") from error


def _describe(path: Path, step: int) -> Checkpoint:
    try:
        about = durable.read_manifest(path)["about"]
    except ValueError:  # the directory's own time stands in, so that a damaged latest stays latest
        return Checkpoint(path, step, path.stat().st_mtime_ns, None, True, intact=False)
    return Checkpoint(path, **about, intact=True)


def checkpoints(root: str | Path) -> list[Checkpoint]:
    """The checkpoints of a root, oldest first; empty if there are none (or no such directory).

    Cheap: only manifests are read. `verified` reads every byte.
    """
    named = durable.published(Path(root), _NAME)
    found = [_describe(path, int(name.removeprefix("step_"))) for name, path in named.items()]
    return sorted(found, key=lambda checkpoint: (checkpoint.written, checkpoint.step))


def verified(root: str | Path) -> list[Checkpoint]:
    """The checkpoints of a root that `verify` passes, oldest first."""

    def passes(checkpoint: Checkpoint) -> bool:
        try:
            verify(checkpoint.path)
        except (ValueError, OSError):
            return False
        return True

    return [checkpoint for checkpoint in checkpoints(root) if passes(checkpoint)]


def best_first(found: list[Checkpoint]) -> list[Checkpoint]:
    """Those that carry a metric, the best first, the newer first among equals."""

    def score(checkpoint: Checkpoint) -> tuple[float, int]:
        assert checkpoint.metric is not None
        value = checkpoint.metric if checkpoint.higher_is_better else -checkpoint.metric
        return (-math.inf if math.isnan(value) else value), checkpoint.written

    return sorted((c for c in found if c.metric is not None), key=score, reverse=True)


def disk_error(error: Exception, target: Path) -> Exception:
    """The error of a full or failing disk, with what became of checkpoints; others as they are."""
    number = getattr(error, "errno", None)
    if number is None:  # safetensors keeps the number in its text only
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            return error
        number = int(match[1])
    before = [checkpoint.path for checkpoint in checkpoints(target.parent)]
    before = [path for path in before if path != target]
    kept = f"the previous checkpoint {before[-1]} is untouched" if before else "there is none yet"
    return OSError(
        number,
        f"cannot save {target}: {os.strerror(number)}; {kept}; free some space or choose another "
        "directory, then resume",
    )


def save(
    root: str | Path,
    step: int,
    state: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    metric: float | None = None,
    keep_last: int = 3,
    keep_best: int = 1,
    higher_is_better: bool = True,
) -> Path:
    """Write `root/step_00001000` completely or not at all, then delete what is not to be kept.

    Args:
        root: directory of the checkpoints of one run; made if missing.
        step: training step, >= 0; a checkpoint of the same step is replaced.
        state: pytree of dense tensors, bool, int, float and str.
        extra: JSON-able dict (config, position of the data, ...); tuples come back as lists.
        files: further files by plain name, e.g. {"tokenizer.json": text}.
        metric: the figure that `which="best"` and `keep_best` compare; NaN counts as the worst.
        keep_last: how many of the last written checkpoints stay, >= 1 (the new one is among them).
        keep_best: how many of the best by metric stay besides, >= 0.

    Returns:
        The directory of the new checkpoint.

    Raises:
        ValueError: a value is out of range, or a leaf, file name or `extra` cannot be kept.
        OSError: the disk is full or failing; earlier checkpoints are as they were.
    """
    root, extra, files = Path(root), dict(extra or {}), dict(files or {})
    if step < 0 or keep_last < 1 or keep_best < 0:
        raise ValueError(
            f"step ({step}) and keep_best ({keep_best}) must be >= 0, keep_last ({keep_last}) >= 1"
        )
    for name in files:
        taken = name in (STATE, META, durable.MANIFEST)
        if name != Path(name).name or name.startswith(".") or taken:
            raise ValueError(f"file name {name!r} must be plain, visible and not one of our own")
    tensors, values = _split_leaves(state)
    meta = json_text("extra", {"leaves": values, "extra": extra})

    def fill(directory: Path) -> None:
        save_file(tensors, directory / STATE)
        for name, content in {META: meta, **files}.items():
            data = content.encode() if isinstance(content, str) else content
            (directory / name).write_bytes(data)

    target = root / f"step_{step:08d}"
    try:
        with durable.only_writer(root):
            newest = max((checkpoint.written for checkpoint in checkpoints(root)), default=0)
            about = {
                "step": step,
                "written": max(time.time_ns(), newest + 1),
                "metric": None if metric is None else float(metric),
                "higher_is_better": higher_is_better,
            }
            durable.publish(target, fill, about)
            intact = [checkpoint for checkpoint in checkpoints(root) if checkpoint.intact]
            kept = {c.path for c in intact[-keep_last:] + best_first(intact)[:keep_best]}
            for checkpoint in intact:
                if checkpoint.path not in kept:
                    durable.delete(checkpoint.path)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, target) from error
    return target


def find(place: Path, which: Which) -> Path:
    """The directory of the checkpoint that `load` is to read."""
    if (place / durable.MANIFEST).is_file() or _NAME.fullmatch(place.name):
        return place
    found = checkpoints(place)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {place}: give a run's checkpoint directory")
    if which == "latest":
        return found[-1].path
    if which == "best":
        damaged = [checkpoint for checkpoint in found if not checkpoint.intact]
        ranked = damaged or best_first(found)  # a damaged one may be the best: say so, not guess
        if not ranked:
            raise ValueError(f"no checkpoint in {place} carries a metric: load the latest instead")
        return ranked[0].path
    for checkpoint in found:
        if checkpoint.step == which:
            return checkpoint.path
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise ValueError(f"no checkpoint of step {which!r} in {place}: there are {steps}")


def _shape_dtype(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return f"shape {tuple(leaf)}" if isinstance(leaf, torch.Size) else type(leaf).__name__


def _fits(like: Any, saved: Any) -> bool:
    if isinstance(like, torch.Size):
        return isinstance(saved, Tensor) and saved.shape == like
    if isinstance(like, Tensor):
        return isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (like.shape, like.dtype)
    return type(like) is type(saved)


def compare(path: Path, like: dict[str, Any], saved: dict[str, Any], partial: bool) -> None:
    """Raises a ValueError that names the leaves in which `like` and the checkpoint differ."""
    missing = [name for name in like if name not in saved]
    extra = [] if partial else [name for name in saved if name not in like]
    other = [name for name in like if name in saved and not _fits(like[name], saved[name])]
    if not (missing or extra or other):
        return
    parts = []
    for names, text in ((missing, "not in the checkpoint"), (extra, "only in the checkpoint")):
        if names:
            parts.append(f"{len(names)} {text}: {', '.join(map(repr, names[:3]))}")
    if other:
        pairs = (
            f"{name!r} is {_shape_dtype(saved[name])} in the checkpoint, "
            f"{_shape_dtype(like[name])} here"
            for name in other[:3]
        )
        parts.append(f"{len(other)} of another shape or dtype: {', '.join(pairs)}")
    raise ValueError(
        f"{path} is the checkpoint of another model: {'; '.join(parts)}; "
        "build the model with the configuration it was saved with"
    )


def _place(
    like: Any, saved: Any, device: torch.device | str | None, memory: dict[Any, Tensor]
) -> Any:
    """A copy with the device and the strides of `like`: a resumed run takes the same kernels.

    Leaves that share memory, as an ensemble's do, share it again: `memory`.
    """
    if isinstance(like, torch.Size):
        return saved.to(device or "cpu", copy=True)
    if not isinstance(like, Tensor):
        return saved
    where = device or ("cpu" if like.is_meta else like.device)
    place = address(like)
    size = 0 if place is None else like.untyped_storage().nbytes() // like.itemsize
    with torch.no_grad():
        if size <= like.numel():
            return torch.empty_like(like, device=where, requires_grad=False).copy_(saved)
        key = place, like.dtype
        if key not in memory:
            memory[key] = torch.empty(size, dtype=like.dtype, device=where)
        own = memory[key].as_strided(like.shape, like.stride(), like.storage_offset())
        return own.copy_(saved)


def load(
    place: str | Path,
    like: Any = None,
    *,
    which: Which = "latest",
    partial: bool = False,
    device: torch.device | str | None = None,
) -> Restored:
    """Read a checkpoint, every byte verified, into the structure of `like`.

    Args:
        place: root of several checkpoints, or the directory of one (then `which` is not used).
        like: pytree with the structure, shapes, dtypes and devices to restore. Tensors on the meta
            device and bare `torch.Size` leaves are placed on the CPU. None restores no state:
            config and files can be read before the model exists.
        which: "latest" written, "best" by metric, or the number of a step.
        partial: the checkpoint may hold leaves that `like` lacks,
            e.g. `like={"params": params}` of a whole training state.
        device: place every tensor here instead.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is truncated or altered (names it and the newest checkpoint that is not),
            or the checkpoint is of another model (names the first leaves that differ).
    """
    path = find(Path(place), which)
    try:
        manifest = verify(path)
    except ValueError as error:
        good = [checkpoint for checkpoint in verified(path.parent) if checkpoint.path != path]
        remedy = (
            f"the last good checkpoint is {good[-1].path}: load it (which={good[-1].step}), or "
            "delete the damaged ones to go on from it"
            if good
            else f"no other checkpoint in {path.parent} is good: start again"
        )
        raise ValueError(f"{error}; {remedy}") from error
    meta = json.loads((path / META).read_bytes())
    own = (STATE, META)
    files = {name: (path / name).read_bytes() for name in manifest["files"] if name not in own}
    state = None
    if like is not None:
        with safe_open(path / STATE, framework="pt") as file:
            saved = {**meta["leaves"], **{name: file.get_tensor(name) for name in file.keys()}}
            wanted = named_leaves(like)
            compare(path, wanted, saved, partial)
            memory: dict[Any, Tensor] = {}
            leaves = [_place(leaf, saved[name], device, memory) for name, leaf in wanted.items()]
        structure = optree.tree_structure(like, namespace=NAMESPACE)
        state = optree.tree_unflatten(structure, leaves)
    about = manifest["about"]
    return Restored(state, meta["extra"], files, about["step"], about["metric"], path)


def to_evaluate(root: str | Path, which: Literal["latest", "best"], average: int = 1) -> list[Path]:
    """The checkpoints whose mean parameters are to be used: one, or the `average` last ones.

    Where none carries a metric, the best is the latest.
    """
    found = checkpoints(root)
    if average > 1 and found:
        return [each.path for each in found[-average:]]
    scored = any(each.metric is not None for each in found)
    return [load(root, which=which if scored else "latest").path]


def mean(
    places: Sequence[Path],
    part: str,
    shapes: Mapping[str, Sequence[int]],
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The mean over checkpoints of the tensors under `part`, such as "params" or "ema".

    Raises:
        ValueError: as `load`, with `shapes` for what it is to be like.
    """
    like = {name: torch.Size(shape) for name, shape in shapes.items()}
    loaded = [
        load(place, {part: like}, partial=True, device=device).state[part] for place in places
    ]
    return {name: torch.stack([each[name] for each in loaded]).mean(0) for name in like}
