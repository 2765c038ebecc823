"""Sets of pictures with captions or classes as tensors in memory: real ones, from files or the Hub.

    cifar10(folder)            zips (or folders) of <class>/<name>.png
    mnist(folder)              idx files, gzipped or not
    folder(path)               pictures with captions: metadata.jsonl or .csv, or a .txt beside
                               each; else the folder that a picture lies in is its class
    hub(name)                  columns of pictures and of captions or classes; a name on the Hub,
                               or a folder with its parquet files
    load("cifar10:DIR", 32)    whichever of these a string names

All pictures get one size and 8 bits: 60,000 of 32 x 32 x 3 take 176 MiB, those of 256 x 256 11 GiB,
which `limit` bounds. Files that cannot be read are left out, counted, told (`images.Unreadable`).
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from msfs_functional import images
from msfs_functional.image_corpora import IMAGE_COLUMNS, TEXT_COLUMNS, column_of, undecoded

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LABELS = ("label", "labels", "class", "fine_label", "coarse_label")


@dataclass(frozen=True)
class ImageSet:
    """Pictures, and for each a caption, a class, or neither."""

    pictures: UInt8[Tensor, "N C Y X"]
    captions: tuple[str, ...] | None = None
    labels: Int64[Tensor, "N"] | None = None
    classes: tuple[str, ...] = ()  # names of the labels

    def __len__(self) -> int:
        return len(self.pictures)


def gathered(
    sources: Iterable[tuple[images.Source, Any]], size: int, *, where: str, **options: Any
) -> tuple[UInt8[Tensor, "N C size size"], list[Any]]:
    """`images.gather`, which tells what could not be read."""
    found, notes, unreadable = images.gather(sources, size, where=where, **options)
    if unreadable.count:
        print(f"note: {where}: {unreadable}", file=sys.stderr)
    return found, notes


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a zip ({error}): fetch it again") from None


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """(path, name in it) of every picture in a folder or zip, sorted."""
    if path.is_dir():
        names = (file.relative_to(path).as_posix() for file in path.rglob("*"))
    else:
        with _opened(path) as archive:
            names = archive.namelist()
    return [(path, n) for n in sorted(names) if PurePosixPath(n).suffix.lower() in SUFFIXES]


def _read(files: Sequence[tuple[Path, str]]) -> Iterator[tuple[images.Source, str]]:
    """(picture, name of the folder that it lies in) of each."""
    for path, group in itertools.groupby(files, lambda file: file[0]):
        with contextlib.nullcontext() if path.is_dir() else _opened(path) as archive:
            for _, name in group:
                if archive is None:
                    yield path / name, (path / name).parent.name
                    continue
                try:
                    content = archive.read(name)
                except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):
                    # Broken, under a password or in no known compression: told of as other
                    # pictures that cannot be read.
                    content = b""
                source = {"path": f"{path}:{name}", "bytes": content}
                yield source, PurePosixPath(name).parent.name


def _evenly(count: int, limit: int | None) -> Sequence[int]:
    """At most `limit` of 0, ..., count - 1, evenly: sets often lie class by class."""
    n = count if limit is None else min(count, limit)
    return [i * count // n for i in range(n)]


def by_folder(
    paths: Sequence[Path],
    size: int,
    *,
    channels: int = 3,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """Pictures in zips or folders whose class is the name of the folder that they lie in.

    Args:
        limit: at most so many pictures, evenly taken.
        classes: names in the order of their labels; default: those found, sorted.

    Raises:
        ValueError: nothing there; a class that is not among `classes`.
    """
    where = ", ".join(map(str, paths))
    files = [file for path in paths for file in _files_of(path)]
    chosen = [files[i] for i in _evenly(len(files), limit)]
    pictures, names = gathered(_read(chosen), size, channels=channels, limit=limit, where=where)
    known = tuple(classes) if classes else tuple(sorted(set(names)))
    if strange := sorted(set(names) - set(known)):
        raise ValueError(f"{where} holds classes {strange[:4]} that are not among {list(known)}")
    order = {name: i for i, name in enumerate(known)}
    return ImageSet(pictures, labels=torch.tensor([order[n] for n in names]), classes=known)


CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())


def cifar10(
    path: str | Path, split: str = "train", *, size: int = 32, limit: int | None = None
) -> ImageSet:
    """CIFAR-10 from a folder with `*train*.zip` or `train/`, and the same for the test split.

    Raises:
        ValueError: an unknown split, or no such files.
    """
    path = Path(path)
    if split not in ("train", "test"):
        raise ValueError(f"split ({split!r}) must be 'train' or 'test'")
    zips = sorted(path.glob(f"*{split}*.zip"))
    places = [path / split] if (path / split).is_dir() else zips
    if not places:
        raise ValueError(
            f"no *{split}*.zip and no folder {split} in {path}: name CIFAR-10's folder"
        )
    return by_folder(places, size, limit=limit, classes=CIFAR10)


def _idx(path: Path, stem: str) -> np.ndarray:
    """An array of an idx file: two zeros, type, number of dims, dims, values; all big-endian."""
    found = [p for p in (path / stem, path / f"{stem}.gz") if p.is_file()]
    if not found:
        raise ValueError(f"no {stem}.gz in {path}: name the folder of MNIST's four files")
    try:
        opened = gzip.open(found[0]) if found[0].suffix == ".gz" else found[0].open("rb")
        with opened as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{found[0]} cannot be unpacked ({error}): fetch it again") from None
    dims = np.frombuffer(data, ">i4", data[3] if len(data) > 3 else 0, 4) if len(data) > 8 else ()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * len(dims))
    if data[:3] != b"\0\0\x08" or not len(dims) or values.size != np.prod(dims):
        raise ValueError(f"{found[0]} is no idx file of bytes, or it is cut off: fetch it again")
    return values.reshape([int(n) for n in dims])


def mnist(
    path: str | Path, split: str = "train", *, size: int = 28, limit: int | None = None
) -> ImageSet:
    """MNIST (or Fashion-MNIST) from its idx files; 32 lays a border of two pixels around.

    Raises:
        ValueError: an unknown split, missing or broken files, a size below 28.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split ({split!r}) must be 'train' or 'test'")
    if size < 28:
        raise ValueError(f"size ({size}) must be at least 28, the digits': a border is added")
    stem = "train" if split == "train" else "t10k"
    pictures = torch.from_numpy(_idx(Path(path), f"{stem}-images-idx3-ubyte").copy())[:limit, None]
    labels = torch.from_numpy(_idx(Path(path), f"{stem}-labels-idx1-ubyte").copy()).long()[:limit]
    if len(labels) != len(pictures):
        raise ValueError(f"{path} has {len(pictures)} pictures and {len(labels)} labels: mixed up")
    low = (size - 28) // 2
    pictures = torch.nn.functional.pad(pictures, (low, size - 28 - low, low, size - 28 - low))
    return ImageSet(pictures, labels=labels, classes=tuple("0123456789"))


def _metadata(path: Path) -> list[tuple[Path, str]] | None:
    """(file, caption) of a metadata.jsonl or metadata.csv; None where there is none."""
    lines, table = path / "metadata.jsonl", path / "metadata.csv"
    rows: list[dict[str, Any]]
    if lines.is_file():
        rows = []
        for i, line in enumerate(lines.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{lines}, line {i} is no JSON object ({error})") from None
    elif table.is_file():
        rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    else:
        return None
    name = lines if lines.is_file() else table
    if not rows:
        raise ValueError(f"{name} is empty: one row for each picture is needed")
    column = next((c for c in TEXT_COLUMNS if c in rows[0]), None)
    if "file_name" not in rows[0] or column is None:
        raise ValueError(
            f"{name} has the columns {list(rows[0])}: it needs file_name and one of {TEXT_COLUMNS}"
        )
    return [(path / str(row["file_name"]), _one_caption(row.get(column))) for row in rows]


def folder(path: str | Path, size: int, *, channels: int = 3, limit: int | None = None) -> ImageSet:
    """Pictures of a local folder, with captions where it has some and classes where it has folders.

    Raises:
        ValueError: no such folder, nothing to read in it, a broken metadata file.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no folder {path}: check the path")
    captioned = _metadata(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if captioned is None and any(file.with_suffix(".txt").is_file() for file in files):
        captioned = []
        for file in files:
            text = file.with_suffix(".txt")
            captioned.append((file, text.read_text(encoding="utf-8") if text.is_file() else ""))
    if captioned is not None:
        pairs = ((file, " ".join(text.split())) for file, text in captioned)
        pictures, notes = gathered(pairs, size, channels=channels, limit=limit, where=str(path))
        return ImageSet(pictures, captions=tuple(notes))
    found = by_folder([path], size, channels=channels, limit=limit)
    return found if len(found.classes) > 1 else replace(found, labels=None, classes=())


def _one_caption(value: Any) -> str:
    """The caption; the first of several; "" for none."""
    if isinstance(value, dict):
        value = next((value[c] for c in ("raw", *TEXT_COLUMNS) if c in value), None)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None else " ".join(str(value).split())


def of_table(
    data: Any,
    size: int,
    *,
    picture: str | None = None,
    caption: str | None = None,
    channels: int = 3,
    limit: int | None = None,
    where: str = "the data set",
) -> ImageSet:
    """A `datasets.Dataset` with a column of pictures and one of captions or classes.

    Args:
        picture, caption: names of the columns; default: the first one with a usual name. A column
            of class labels may stand for the captions.
        limit: at most so many rows, evenly taken.

    Raises:
        ValueError: no such columns, or nothing that can be read.
    """
    columns, usual = data.column_names, (*TEXT_COLUMNS, *LABELS)
    pictures_in = column_of(columns, picture, IMAGE_COLUMNS, "images")
    told = None
    if caption is not None or any(name in columns for name in usual):
        told = column_of(columns, caption, usual, "captions or classes")
    rows = undecoded(data, pictures_in).select_columns([c for c in (pictures_in, told) if c])
    if limit is not None and limit < len(rows):
        rows = rows.select(_evenly(len(rows), limit))
    sources = ((row[pictures_in], None if told is None else row[told]) for row in rows)
    options: dict[str, Any] = {"channels": channels, "limit": limit, "where": where}
    found, notes = gathered(sources, size, **options)
    if told is None:
        print(f"note: {where}: pictures alone, no usual name among {columns}", file=sys.stderr)
        return ImageSet(found)
    feature = data.features[told]
    names = getattr(feature, "names", None)
    if names is None and all(isinstance(note, int) for note in notes):
        names = [str(i) for i in range(max(notes) + 1)]
    if names is None:
        return ImageSet(found, captions=tuple(map(_one_caption, notes)))
    labels = torch.tensor(notes, dtype=torch.int64)
    if bool(((labels < 0) | (labels >= len(names))).any()):
        raise ValueError(f"{where} has labels outside of [0, {len(names)}): a split without them?")
    return ImageSet(found, labels=labels, classes=tuple(names))


def hub(name: str, size: int, *, config: str | None = None, split: str = "train", **options: Any):
    """A data set of the Hub (or one that `datasets` finds on this disk); options as `of_table`.

    Raises:
        ValueError: it cannot be found or fetched, or has no such columns.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever its loader, the network or the files lead to
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data set {name!r} (config {config!r}, split {split!r}) cannot be loaded: {reason}; "
            f"check these names and the network, or name a folder with its files"
        ) from None
    return of_table(data, size, where=f"data set {name!r}", **options)


def load(
    source: str,
    size: int,
    *,
    config: str | None = None,
    split: str = "train",
    channels: int = 3,
    limit: int | None = None,
    picture: str | None = None,
    caption: str | None = None,
) -> ImageSet:
    """What a string names: "cifar10:DIR", "mnist:DIR", a folder of this disk, else the Hub.

    A folder with parquet files, a copy of a data set of the Hub, is read as that.

    Args:
        config, picture, caption: of a data set of the Hub.
        split: of one, of CIFAR-10 or of MNIST.
        limit: at most so many pictures.

    Raises:
        ValueError: as the functions above; an option that the source does not have.
    """
    kind, _, path = source.partition(":")
    known = kind if kind in ("cifar10", "mnist") and path else ""
    here = Path(source).is_dir()
    local = bool(known) or (here and not any(Path(source).rglob("*.parquet")))
    if not local and not here and ("\\" in source or source.startswith((".", "/", "~"))):
        raise ValueError(f"no folder {source}: check the path")
    given = {"config": config, "picture": picture, "caption": caption}
    given |= {} if known else {"split": None if split == "train" else split}
    if local and (strange := [f"{name} ({value})" for name, value in given.items() if value]):
        raise ValueError(f"{', '.join(strange)}: {source} has no such choice, leave it out")
    if known == "cifar10":
        return cifar10(path, split, size=size, limit=limit)
    if known == "mnist":
        return mnist(path, split, size=size, limit=limit)
    options: dict[str, Any] = {"channels": channels, "limit": limit}
    if local:
        return folder(source, size, **options)
    options |= {"picture": picture, "caption": caption}
    return hub(source, size, config=config, split=split, **options)
