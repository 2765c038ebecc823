"""Documents to pretrain on: read whole from local files, or streamed from files or the Hub.

    train, valid = read_documents(["a.txt", "b.jsonl.gz"], valid_share=0.05)
    stream = open_stream("HuggingFaceFW/fineweb-edu", config="sample-10BT")
    stream = open_stream("corpus/*.parquet")
    valid = held_out(stream, number=200, share=0.05)    # training leaves out what `is_held_out`

A stream is read as it is needed and held nowhere. What of it is set aside for validation is decided
by each document's own text, so that no copy of it, on no process, is ever trained on.
"""

import contextlib
import glob
import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # importing it takes seconds, which what is in memory does not need
    from datasets import IterableDataset

LOCAL = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
PACKING = (".gz", ".zst", ".bz2", ".xz")


def read_file(path: Path, field: str = "text") -> list[str]:
    """The documents of a .txt (blank lines between them) or .jsonl file, also .gz, stripped; empty
    ones are left out."""
    packed = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if packed else path.suffix
    if kind not in (".txt", ".raw", ".jsonl"):
        raise ValueError(f"{path} must be .txt or .jsonl, or one of them as .gz: rename it")
    try:
        text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it") from None
    if kind != ".jsonl":
        documents = "\n".join(line.rstrip() for line in text.splitlines()).split("\n\n")
    else:
        documents = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                documents.append(json.loads(line)[field])
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {number} is no JSON object with {field!r}: name its text with "
                    f"--data.field"
                ) from None
    return [stripped for document in documents if (stripped := document.strip())]


class Corpus(NamedTuple):
    """What there is to train and to validate on."""

    train: list[str]  # documents; of a stream some of the first ones
    valid: list[str]
    stream: "IterableDataset | None" = None


def read_documents(
    files: Sequence[Path],
    valid: Sequence[Path] = (),
    *,
    valid_share: float = 0.05,
    field: str = "text",
    seed: int = 0,
) -> Corpus:
    """Documents to train and to validate on, all of them in memory.

    Args:
        valid: files of the latter; without any, `valid_share` of the former, drawn by the seed.

    Raises:
        ValueError: a file that cannot be read, too few documents.
    """
    train = [text for path in files for text in read_file(path, field)]
    aside = [text for path in valid for text in read_file(path, field)]
    if not valid:
        cut = math.ceil(len(train) * valid_share)
        order = np.random.default_rng(seed).permutation(len(train))
        train, aside = [train[i] for i in order[cut:]], [train[i] for i in order[:cut]]
    if not train or not aside:
        raise ValueError(
            f"{len(train)} documents to train and {len(aside)} to validate on: give more text, "
            f"with blank lines between documents, or --data.valid"
        )
    return Corpus(train, aside)


def local_files(location: str) -> list[str]:
    """The files that a path or pattern names; none if it is the name of a dataset."""
    found = sorted(glob.glob(location, recursive=True))
    plain = location.removesuffix(Path(location).suffix) if location.endswith(PACKING) else location
    if not found and Path(plain).suffix in LOCAL:
        raise ValueError(f"no file {location}: check the path (here is {Path.cwd()})")
    return [path for path in found if Path(path).is_file()]


@contextlib.contextmanager
def stream_errors(what: str) -> Iterator[None]:
    """What a damaged file does to its reader, as a ValueError of one line."""
    import datasets.exceptions
    import pyarrow

    logger = logging.getLogger("datasets.packaged_modules.json.json")  # says the same
    logger.disabled = True
    try:
        yield
    except (pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{what} cannot be read ({reason}): mend the file") from None
    finally:
        logger.disabled = False


def open_stream(
    location: str, *, config: str | None = None, split: str = "train", field: str = "text"
) -> "IterableDataset":
    """Documents one after the other, nothing of them fetched before it is read.

    Args:
        location: a dataset of the Hugging Face Hub, or a path or pattern of local .jsonl, .parquet
            or .txt files (blank lines between documents), packed (.gz, .zst) too.
        config, split: of a dataset of the Hub.
        field: the column of texts.

    Raises:
        ValueError: nothing of that name, no network, no such column. One line.
    """
    import datasets

    from msfs_functional.corpora import hub_errors

    files = local_files(location)
    try:
        if files:
            plain = Path(files[0])
            plain = plain.with_suffix("") if plain.suffix in PACKING else plain
            if plain.suffix not in LOCAL:
                raise ValueError(f"{files[0]} must be one of {', '.join(LOCAL)}: convert it")
            kind = LOCAL[plain.suffix]
            options: dict[str, Any] = {"sample_by": "paragraph"} if kind == "text" else {}
            stream = datasets.load_dataset(
                kind, data_files=files, split="train", streaming=True, **options
            )
        else:
            with hub_errors(location, config, split, embedded="the embedded corpus"):
                stream = datasets.load_dataset(location, config, split=split, streaming=True)
        assert isinstance(stream, datasets.IterableDataset)
        with stream_errors(location):
            names = stream.column_names or list(next(iter(stream)))
    except StopIteration:
        raise ValueError(f"{location} holds no document: give other data") from None
    if field not in names:
        raise ValueError(
            f"{location} has no column {field!r}, it has {', '.join(names)}: name the one of texts "
            f"with --data.field"
        )
    return stream.select_columns([field])


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is set aside for validation; its text alone decides."""
    return zlib.crc32(text.encode()) < share * 2**32


def held_out(
    stream: "IterableDataset", *, number: int, share: float, field: str = "text"
) -> list[str]:
    """The first documents of the stream that are set aside.

    Raises:
        ValueError: the stream ends before there is one.
    """
    found = []
    for record in stream:
        if record[field].strip() and is_held_out(record[field], share):
            found.append(record[field])
            if len(found) == number:
                break
    if not found:
        raise ValueError(
            f"no document of the stream is among the share of {share} set aside: raise "
            f"--data.valid-share or give more text"
        )
    return found


def stream_documents(
    location: str,
    valid: Sequence[Path] = (),
    *,
    config: str | None = None,
    split: str = "train",
    field: str = "text",
    valid_share: float = 0.05,
    valid_documents: int = 200,
    first: int = 0,
) -> Corpus:
    """A stream with what is set aside of it, and its first documents to learn a vocabulary from.

    Args:
        location, config, split, field: as in `open_stream`.
        valid: files to validate on; without any, the first `valid_documents` of the share of the
            stream that `is_held_out`, which training must leave out.
        first: documents to take for `train`, those set aside left out.
    """
    stream = open_stream(location, config=config, split=split, field=field)
    if valid:
        aside, valid_share = [text for path in valid for text in read_file(path, field)], 0.0
    else:
        aside = held_out(stream, number=valid_documents, share=valid_share, field=field)
    texts = (record[field] for record in stream.take(first)) if first else ()
    return Corpus([text for text in texts if not is_held_out(text, valid_share)], aside, stream)
