"""Pairs of texts from anywhere: the Hugging Face Hub, local files, or the corpus of this project.

    load_pairs()                                                  # embedded English-Italian
    load_pairs("opus_books", config="en-it")                      # the Hub
    load_pairs("pairs.tsv.gz", seed=1)                            # one file, split here
    load_pairs(["train.en", "train.de"], valid=["val.en", "val.de"], test=["test.en", "test.de"])

Whatever is not split yet is split here, by a fixed seed, before anybody looks at it, and by
distinct source sentence: two translations of one sentence never stand on two sides.
"""

import contextlib
import gzip
import hashlib
import json
import logging
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import datasets.exceptions
import datasets.table
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from msfs_functional.synthetic.english_italian import english_italian

EMBEDDED = "english_italian"
FORMATS = (".tsv", ".txt", ".jsonl", ".parquet")
Location = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Splits:
    """Three sets of pairs, columns "source" and "target" (str).

    `dropped` counts the pairs that were left out, by reason.
    """

    train: datasets.Dataset
    valid: datasets.Dataset
    test: datasets.Dataset
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pairs:
    source: list[str]
    target: list[str]

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows) -> "_Pairs":
        return _Pairs([self.source[i] for i in rows], [self.target[i] for i in rows])

    def dataset(self) -> datasets.Dataset:
        """With a fingerprint of its content, so that what is cached for it is found again."""
        digest = hashlib.sha256()
        for text in (*self.source, "", *self.target):
            digest.update(text.encode() + b"\n")
        table = pa.table({"source": self.source, "target": self.target})
        return datasets.Dataset(
            datasets.table.InMemoryTable(table), fingerprint=digest.hexdigest()[:16]
        )


def _read_bytes(path: Path) -> tuple[bytes, str]:
    """Unpacked content of a plain, .gz or .zip file and the suffix of what was in it."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name the file in it")
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()), path.with_suffix("").suffix
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/")]
                names = [n for n in names if not n.startswith("__MACOSX")]
                if len(names) != 1:
                    raise ValueError(
                        f"{path} holds {len(names)} files ({', '.join(names[:5])}), not one: "
                        "unpack it and name the file"
                    )
                return archive.read(names[0]), Path(names[0]).suffix
        return path.read_bytes(), path.suffix
    except FileNotFoundError:
        raise ValueError(f"no file {path}: check the path (here is {Path.cwd()})") from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or pack it again") from None


def _lines(path: Path, data: bytes) -> list[str]:
    """Lines end at newlines alone: Unicode's other separators may stand inside a sentence."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: convert the file, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty: it must hold one sentence or pair a line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _choose(available: Sequence[str], source: str | None, target: str | None, where) -> list[str]:
    """The two column names to read; by default source and target, else the first two."""
    defaults = ["source", "target"]
    if not set(defaults) <= set(available):
        defaults = list(available[:2])
    if len(defaults) < 2:
        raise ValueError(f"{where} has only {list(available)}: pairs need two columns")
    chosen = [source or defaults[0], target or defaults[1]]
    for name in chosen:
        if name not in available:
            raise ValueError(
                f"{where} has no column {name!r}, it has {', '.join(available)}: "
                "name two of these as source and target"
            )
    return chosen


def _check_text(values: list, name: str, where) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"{where}, row {row + 1}: column {name!r} is {value!r}, not text: "
                "name a column of strings as source and target"
            )
    return values


def _from_table(columns: dict[str, list], source, target, where) -> _Pairs:
    """Plain columns, or the Hub's one column "translation" of {language: text}."""
    if "translation" in columns:
        records = columns["translation"]
        names = _choose(list(records[0]) if records else [], source, target, where)
        columns = {name: [record.get(name) for record in records] for name in names}
    else:
        names = _choose(list(columns), source, target, where)
    return _Pairs(*(_check_text(columns[name], name, where) for name in names))


def _from_tsv(path: Path, lines: list[str], source, target) -> _Pairs:
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line]
    header = rows[0][1]
    named = [source or "source", target or "target"]
    if set(named) <= set(header):
        columns, rows = [header.index(name) for name in named], rows[1:]
    elif all(name is None or name.isdecimal() for name in (source, target)):
        columns = [int(source or 0), int(target or 1)]
    else:
        raise ValueError(
            f"{path} has no header with {named[0]!r} and {named[1]!r}, its first line is "
            f"{header}: leave source and target out for the first two columns, or count "
            "columns from 0"
        )
    for number, row in rows:
        if len(row) <= max(columns):
            raise ValueError(
                f"{path}, line {number}: {len(row)} tab-separated fields, column "
                f"{max(columns)} (from 0) is needed: mend the line or choose other columns"
            )
    return _Pairs(*([row[column] for _, row in rows] for column in columns))


def _from_jsonl(path: Path, lines: list[str], source, target) -> _Pairs:
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}: each line is one object") from None
        if not isinstance(records[-1], dict):
            raise ValueError(f"{path}, line {number}: {line[:40]} is no object of columns")
    columns = {name: [record.get(name) for record in records] for name in records[0]}
    return _from_table(columns, source, target, path)


def _from_file(path: Path, source, target) -> _Pairs:
    data, suffix = _read_bytes(path)
    if suffix == ".parquet":
        try:
            table = pyarrow.parquet.read_table(pa.BufferReader(data))
        except pa.ArrowException as error:
            raise ValueError(f"{path} is no Parquet file ({error}): write it again") from None
        return _from_table(table.to_pydict(), source, target, path)
    if suffix not in FORMATS:
        raise ValueError(
            f"{path} ends in {suffix or 'no suffix'!r}: one file of pairs must be "
            f"{', '.join(FORMATS)} (.gz or .zip too), two aligned text files are passed as two"
        )
    read = _from_jsonl if suffix == ".jsonl" else _from_tsv
    return read(path, _lines(path, data), source, target)


def _from_text_files(paths: Sequence[Path]) -> _Pairs:
    sides = [_lines(path, _read_bytes(path)[0]) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{paths[0]} has {len(sides[0])} lines, {paths[1]} has {len(sides[1])}: "
            "aligned files need one line for each line of the other"
        )
    return _Pairs(*sides)


@contextlib.contextmanager
def hub_errors(name: str, config: str | None, split: str, *, embedded: str) -> Iterator[None]:
    """What goes wrong with a dataset of the Hub, as ValueErrors of one line; without a network it
    names the `embedded` data."""
    retries = logging.getLogger("huggingface_hub")  # one line a try; what they end in is raised
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"unknown dataset {name!r} ({error}): it is no file here and no dataset on the Hub"
        ) from None
    except ConnectionError as error:
        raise ValueError(
            f"cannot fetch dataset {name!r} ({error}): connect to the network, name local files, "
            f"or use {embedded}, which needs none"
        ) from None
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        # An unknown config or split, most often: the message lists the ones there are.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset {name!r} does not load with config {config!r} and split {split!r}: {reason}"
        ) from None
    finally:
        retries.setLevel(level)


def _from_hub(name: str, config: str | None, split: str, source, target) -> _Pairs:
    with hub_errors(name, config, split, embedded=repr(EMBEDDED)):
        data = datasets.load_dataset(name, config, split=split)
    assert isinstance(data, datasets.Dataset)
    columns = {column: list(data[column]) for column in data.column_names}
    return _from_table(columns, source, target, f"dataset {name!r}")


def _paths(location: Location) -> list[Path] | None:
    """The one or two files that a location names; None where it is the name of a dataset."""
    if isinstance(location, Sequence) and not isinstance(location, str):
        if len(location) not in (1, 2):
            raise ValueError(
                f"{len(location)} files ({location}): pass one file of pairs or two aligned ones"
            )
        if len(location) == 2:
            return [Path(part) for part in location]
        location = location[0]
    path = Path(location)
    suffixes = set(path.suffixes)
    if isinstance(location, Path) or path.is_file() or suffixes & {*FORMATS, ".gz", ".zip"}:
        return [path]
    return None


def _read(location: Location, source: str | None, target: str | None) -> _Pairs:
    paths = _paths(location)
    assert paths is not None
    return _from_text_files(paths) if len(paths) == 2 else _from_file(paths[0], source, target)


def _key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _size(value: float | None, groups: int, name: str) -> int:
    """Number of sentences to hold out: a count, a fraction below 1, or 5% and at most 1000."""
    if value is None:
        return min(1000, max(1, groups // 20))
    if value <= 0 or (value > 1 and value != int(value)):
        raise ValueError(f"{name} ({value}) must be a count or a fraction between 0 and 1")
    return int(value) if value >= 1 else max(1, round(value * groups))


def _hold_out(pairs: _Pairs, sizes: Sequence[int], seed: int) -> list[_Pairs]:
    """[held out..., rest]: groups of equal sources drawn by the seed; one pair a held-out group."""
    groups: dict[str, list[int]] = {}
    for row, text in enumerate(pairs.source):
        groups.setdefault(_key(text), []).append(row)
    rows = list(groups.values())
    if sum(sizes) >= len(rows):
        raise ValueError(
            f"valid and test take {sum(sizes)} of {len(rows)} distinct source sentences and leave "
            "none to train on: make them smaller or bring more data"
        )
    # Raw Philox words, sorted: the same split with every version of numpy.
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(rows)), kind="stable")
    parts, start = [], 0
    for size in sizes:
        held = sorted(rows[i][0] for i in order[start : start + size])
        parts.append(pairs.take(held))
        start += size
    parts.append(pairs.take(sorted(row for i in order[start:] for row in rows[i])))
    return parts


def _drop_empty(pairs: _Pairs, name: str) -> tuple[_Pairs, int]:
    rows = [
        i
        for i, (source, target) in enumerate(zip(pairs.source, pairs.target, strict=True))
        if source.strip() and target.strip()
    ]
    if not rows:
        raise ValueError(f"{name} holds no pair with text on both sides: bring other data")
    return (pairs if len(rows) == len(pairs) else pairs.take(rows)), len(pairs) - len(rows)


def load_pairs(
    dataset: Location = EMBEDDED,
    *,
    config: str | None = None,
    split: str = "train",
    valid: Location | None = None,
    test: Location | None = None,
    source: str | None = None,
    target: str | None = None,
    valid_size: float | None = None,
    test_size: float | None = None,
    seed: int = 0,
) -> Splits:
    """Reads pairs of texts and gives train, valid and test.

    What is cut off here shares no source sentence with the rest (case and spaces aside) and keeps
    the first pair of each, because the metrics compare with one reference; the others are dropped
    and counted, as are pairs with an empty side. Files that are given stay as they are.

    Args:
        dataset: "english_italian" (embedded), a name on the Hugging Face Hub, one file of pairs
            (.tsv, .txt with tabs, .jsonl, .parquet; .gz and .zip too), or two aligned text files.
        config: the Hub's configuration, for example "en-it".
        split: the Hub's split to train on.
        valid, test: files like `dataset`, or names of splits on the Hub; None cuts them off the
            training data.
        source, target: names of columns or languages; None takes "source" and "target" or the
            first two. Columns of a .tsv without header are counted from 0.
        valid_size, test_size: number of source sentences to cut off, or a fraction below 1;
            None means 5%, at most 1000.
        seed: of the cut, and of the embedded corpus.

    Raises:
        ValueError: unknown dataset, config, split or column; no network; a file that is missing,
            empty, damaged, misaligned or not UTF-8. One line: value, rule, remedy.
    """
    if seed < 0:
        raise ValueError(f"seed ({seed}) must be at least 0")
    if dataset == EMBEDDED:
        if config or valid or test:
            raise ValueError(
                f"dataset {EMBEDDED!r} has its own splits and no config: leave config, valid and "
                "test out, or name other data"
            )
        sizes = {"valid": valid_size, "test": test_size}
        counts = {k: _size(v, 30_000, k + "_size") for k, v in sizes.items() if v is not None}
        corpus = english_italian(seed=seed, **counts)
        sides = _choose(["en", "it"], source, target, f"dataset {EMBEDDED!r}")
        columns = [("en", "it").index(side) for side in sides]
        parts = [_Pairs(*([pair[c] for pair in part] for c in columns)) for part in corpus]
        train_set, valid_set, test_set = (part.dataset() for part in parts)
        return Splits(train_set, valid_set, test_set)

    local = _paths(dataset) is not None

    def read(location: Location) -> _Pairs:
        if local or _paths(location) is not None:
            return _read(location, source, target)
        return _from_hub(str(dataset), config, str(location), source, target)

    given = {name: place for name, place in (("valid", valid), ("test", test)) if place is not None}
    parts, dropped = {}, 0
    for name, place in {"train": dataset if local else split, **given}.items():
        parts[name], empty = _drop_empty(read(place), f"the {name} data")
        dropped += empty

    groups = len({_key(text) for text in parts["train"].source})
    wanted = {"valid": valid_size, "test": test_size}
    missing = {
        name: _size(wanted[name], groups, f"{name}_size") for name in wanted if name not in given
    }
    held = _hold_out(parts["train"], list(missing.values()), seed)
    before = len(parts["train"])
    parts.update(zip([*missing, "train"], held, strict=True))
    other = before - sum(map(len, held))
    train_set, valid_set, test_set = (parts[name].dataset() for name in ("train", "valid", "test"))
    dropped = {"empty": dropped, "other translations of held-out sentences": other}
    return Splits(train_set, valid_set, test_set, dropped)
