"""merge_attention: attention over all keys from attention over parts of them."""

import itertools

import pytest
import torch
from msfs_kernels import flash_attention, merge_attention
from torch.func import grad, jvp, vmap


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = randn(2, 4, 5, 8), randn(2, 2, 9, 8, seed=1), randn(2, 2, 9, 3, seed=2)


def in_parts(q, k, v, cuts=(0, 2, 3, 9), lengths=None):
    parts = []
    for start, stop in itertools.pairwise(cuts):
        own = None if lengths is None else (lengths - start).clamp(0, stop - start)
        keys, values = k[:, :, start:stop], v[:, :, start:stop]
        parts.append(flash_attention(q, keys, values, key_lengths=own, return_lse=True))
    return merge_attention(*zip(*parts, strict=True))


def test_merged_parts_equal_the_whole():
    torch.testing.assert_close(in_parts(Q, K, V), flash_attention(Q, K, V, return_lse=True))


def test_parts_that_hide_all_their_keys_take_nothing_away():
    lengths = torch.tensor([0, 3])
    want = flash_attention(Q, K, V, key_lengths=lengths, return_lse=True)
    torch.testing.assert_close(in_parts(Q, K, V, lengths=lengths), want)


def test_merging_is_right_under_transforms():
    lengths = torch.tensor([0, 7])

    def merged(q, k, v):
        o, lse = in_parts(q, k, v, lengths=lengths)
        return o.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()

    def whole(q, k, v):
        o, lse = flash_attention(q, k, v, key_lengths=lengths, return_lse=True)
        return o.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()

    x, every = (Q, K, V), (0, 1, 2)
    for transform in (
        lambda f: grad(f, every)(*x),
        lambda f: jvp(f, x, x),
        lambda f: jvp(grad(f, every), x, x),
        lambda f: vmap(grad(f, every), in_dims=(0, None, None))(torch.stack([Q, -Q]), K, V),
    ):
        torch.testing.assert_close(transform(merged), transform(whole))


def test_what_does_not_pair_up_is_refused():
    o, lse = flash_attention(Q, K, V, return_lse=True)
    for outputs, lses in (
        ([], []),
        ([o], [lse, lse]),
        ([o], [lse[:1]]),
        ([o, o[:1]], [lse, lse[:1]]),
    ):
        with pytest.raises(ValueError, match="must"):
            merge_attention(outputs, lses)
