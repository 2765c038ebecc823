"""Packed rows: every document once, nothing crosses documents, shares, resuming."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from msfs_functional.models.decoder import DecoderConfig, decoder
from msfs_functional.packing import FIELDS, PackedBatches, pack

DOCUMENTS = [[1, 5 + i, *range(6, 6 + i % 7), 2] for i in range(40)]


def test_the_picture_of_the_docstring():
    rows = pack([[1, 11, 12, 2], [1, 13, 2]], 6)
    assert [row.tolist() for row in rows] == [
        [[1, 11, 12, 1, 13, 0]],
        [[11, 12, 2, 13, 2, 0]],
        [[1, 1, 1, 2, 2, 0]],
        [[0, 1, 2, 0, 1, 0]],
    ]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=100), st.integers(1, 20))
def test_every_pair_of_neighbours_is_predicted_once(sizes, length):
    ids = iter(range(1, 10_000))
    documents = [[next(ids) for _ in range(size)] for size in sizes]
    rows = pack(documents, length)
    real = rows.segments > 0
    found = sorted(zip(rows.tokens[real].tolist(), rows.labels[real].tolist(), strict=True))
    assert found == [pair for text in documents for pair in itertools.pairwise(text)]
    assert not rows.labels[~real].any() and rows.tokens.shape[1] == length


def test_packed_documents_compute_what_each_computes_alone():
    model = decoder(DecoderConfig(64, width=16, depth=2, heads=2, hidden=24, max_length=16))
    params = model.init(0, dtype=torch.float64)
    rows = pack(DOCUMENTS[:8], 16)
    tokens, _, segments, positions = (torch.from_numpy(x).long() for x in rows)
    packed = model.apply(params, tokens, segment_ids=segments, positions=positions)
    for n, row in enumerate(segments):
        for segment in range(1, int(row.max()) + 1):
            mine = row == segment
            alone = model.apply(params, tokens[n, mine][None])[0]
            torch.testing.assert_close(packed[n, mine], alone, rtol=1e-10, atol=1e-12)


def test_shares_of_a_batch_are_the_batch():
    whole = PackedBatches(DOCUMENTS, 16, 4)
    parts = [PackedBatches(DOCUMENTS, 16, 4, share=(i, 2)) for i in range(2)]
    for _ in range(8):
        batch, halves = next(whole), [next(part) for part in parts]
        for name in FIELDS:
            assert torch.equal(batch[name], torch.cat([half[name] for half in halves]))


def test_a_restored_stream_goes_on_as_it_would_have_and_epochs_differ():
    one, other = PackedBatches(DOCUMENTS, 16, 4), PackedBatches(DOCUMENTS, 16, 4)
    seen = [next(one) for _ in range(5)]
    assert one.state()["epoch"] > 0
    other.restore(one.state())
    for _ in range(5):
        a, b = next(one), next(other)
        assert all(torch.equal(a[name], b[name]) for name in FIELDS)
    first = PackedBatches(DOCUMENTS, 16, 4).rows().tokens
    assert not np.array_equal(first[:4], one.rows().tokens[:4]) and len(seen) == 5


def test_corpora_and_shares_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="fewer than one batch of 64 x 16"):
        PackedBatches(DOCUMENTS, 16, 64)
    with pytest.raises(ValueError, match="3 data ranks must divide the batch"):
        PackedBatches(DOCUMENTS, 16, 4, share=(0, 3))
    with pytest.raises(ValueError, match=r"length \(0\)"):
        pack(DOCUMENTS, 0)
