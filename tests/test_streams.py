"""Streams: each document once an epoch, the same batches for any number of processes, resuming."""

import itertools
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from msfs_functional.documents import (
    held_out,
    is_held_out,
    open_stream,
    read_documents,
    read_file,
)
from msfs_functional.packing import FIELDS
from msfs_functional.streams import StreamedBatches

TEXTS = [f"{'x' * (i % 9)} {i}" for i in range(100)]


def encode(texts):
    return [[1, *(3 + ord(letter) for letter in text), 2] for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same documents as three files of JSON lines, one Parquet file and one of plain text."""
    root = tmp_path_factory.mktemp("stream")
    for number, part in enumerate((TEXTS[:40], TEXTS[40:70], TEXTS[70:])):
        lines = (json.dumps({"id": i, "text": text, "score": 2.5}) for i, text in enumerate(part))
        (root / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    table = pa.table({"text": TEXTS, "url": ["http://x"] * len(TEXTS)})
    pyarrow.parquet.write_table(table, root / "all.parquet", row_group_size=30)
    (root / "all.txt").write_text("\n\n".join(TEXTS))
    return root


def batches(folder, pattern="part-*.jsonl", share=(0, 1), lanes=2, **options):
    options = {"length": 32, "batch": 4, "chunk": 16, **options}
    stream = open_stream(str(folder / pattern))
    return StreamedBatches(stream, encode, share=share, lanes=lanes, **options)


def merged(streams):
    """The whole place, through JSON as in a checkpoint."""
    states = [json.loads(json.dumps(stream.state())) for stream in streams]
    return {name: value for state in states for name, value in state.items()}


def assert_equal(a, b):
    assert all(torch.equal(a[name], b[name]) for name in FIELDS)


def documents_of(batch):
    """The texts in a batch's rows."""
    for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
        for segment in range(1, int(segments.max()) + 1):
            yield "".join(chr(int(i) - 3) for i in tokens[segments == segment][1:])


@pytest.mark.parametrize("pattern, lanes", [("part-*.jsonl", 1), ("part-*.jsonl", 2),
                                            ("part-*.jsonl", 3), ("all.parquet", 2),
                                            ("all.txt", 1)])  # fmt: skip
def test_every_document_comes_once_in_an_epoch(folder, pattern, lanes):
    """Lanes share one file, or have files of their own (three of three)."""
    stream = batches(folder, pattern, lanes=lanes, batch=lanes)
    found = Counter()
    for lane in stream.lanes:
        while lane.place["epoch"] == 0:
            part = lane.take(1)[0]
            rows = {name: torch.tensor(x) for name, x in zip(FIELDS, part, strict=True)}
            found.update(documents_of(rows))
    assert found == Counter(TEXTS)


def test_batches_do_not_depend_on_the_number_of_processes(folder):
    whole = batches(folder)
    halves = [batches(folder, share=(i, 2)) for i in range(2)]
    for _ in range(30):  # some epochs
        batch, parts = next(whole), [next(half) for half in halves]
        assert_equal(batch, {name: torch.cat([part[name] for part in parts]) for name in FIELDS})
    assert whole.lanes[0].place["epoch"] > 1


@pytest.mark.parametrize("steps", [0, 1, 5, 11, 24])
def test_another_number_of_processes_goes_on_where_one_stopped(folder, steps):
    whole = batches(folder)
    halves = [batches(folder, share=(i, 2)) for i in range(2)]
    for half in halves:
        for _ in range(steps):
            next(half)
    state = merged(halves)
    for _ in range(steps):
        next(whole)
    again = batches(folder)
    again.restore(state)
    for _ in range(12):
        assert_equal(next(again), next(whole))


def test_what_is_set_aside_is_never_trained_on(folder):
    stream = open_stream(str(folder / "all.parquet"))
    aside = held_out(stream, number=1000, share=0.2)
    assert aside == [text for text in TEXTS if is_held_out(text, 0.2)] and 5 < len(aside) < 40
    assert held_out(stream, number=3, share=0.2) == aside[:3]
    training = batches(folder, skip_fn=lambda text: is_held_out(text, 0.2))
    found = Counter(itertools.chain.from_iterable(map(documents_of, [next(training)])))
    while training.lanes[0].place["epoch"] < 1 or training.lanes[1].place["epoch"] < 1:
        found.update(documents_of(next(training)))
    assert set(found) == set(TEXTS) - set(aside)


@pytest.mark.parametrize(
    "location, options, said",
    [
        ("part-*.jsonl", {"field": "body"}, "has no column 'body', it has id, text, score"),
        ("nothing-*.jsonl", {}, r"no file .*nothing-\*.jsonl"),
        ("broken.jsonl", {}, "cannot be read"),
        ("table.csv", {}, "must be one of .jsonl"),
        ("empty.jsonl", {}, "holds no document|cannot be read"),
    ],
)
def test_streams_that_cannot_be_are_told(folder, location, options, said):
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "table.csv").write_text("text\na\n")
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=said):
        open_stream(str(folder / location), **options)


def test_lanes_and_corpora_that_do_not_fit_are_told(folder):
    with pytest.raises(ValueError, match=r"lanes \(3\) must .* divide the batch \(4 rows\)"):
        batches(folder, lanes=3)
    with pytest.raises(ValueError, match=r"lanes \(1\) must be a multiple of the data ranks \(2\)"):
        batches(folder, share=(0, 2), lanes=1)
    with pytest.raises(ValueError, match=r"lane 0 of 2 holds .* fewer than one sequence of 4000"):
        next(batches(folder, length=4000))
    with pytest.raises(ValueError, match="is one of 2 lanes, not of 1"):
        batches(folder, lanes=1).restore(batches(folder).state())
    with pytest.raises(ValueError, match="no document of the stream is among the share of 1e-09"):
        held_out(open_stream(str(folder / "all.txt")), number=1, share=1e-9)
    (folder / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match="'text' holds 1, not text"):
        next(batches(folder, "numbers.jsonl", lanes=1))


def test_documents_of_text_files_stand_between_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One\ntwo \n\n\n three\n \nfour\n")
    assert read_file(path) == ["One\ntwo", "three", "four"]


def test_documents_of_files_and_their_share_for_validation(folder):
    train, valid, _ = read_documents([folder / "all.txt"], valid_share=0.1)
    assert len(valid) == 10 and sorted(train + valid) == sorted(text.strip() for text in TEXTS)
