"""Philox-4x32-10: four random 32-bit words out of a 128-bit counter and a 64-bit key.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
One round takes words (c0, c1, c2, c3), key (k0, k1) and two odd constants M0, M1:

    c0 <- hi(M1 c2) ^ c1 ^ k0        hi, lo: upper and lower 32 bits of the 64-bit product
    c1 <- lo(M1 c2)
    c2 <- hi(M0 c0) ^ c3 ^ k1        then k0 += W0, k1 += W1 (mod 2**32)
    c3 <- lo(M0 c0)

`philox_4x32` is that, in plain integer arithmetic. `philox_words`, `dropout_bits` and `fold_in` are
registered ops around it. They are ops, and not traced through, because the 150 operations of one
call would cost a compiler seconds for each dropout of a model. On CUDA they are Triton kernels, on
the CPU numpy, whose integers are four times as fast as torch's; other devices ask the CPU.

Words are Python integers, or int64 tensors or arrays, in [0, 2**32): torch has no arithmetic on
uint32. All of it is exact: the same numbers on every device, eager, compiled or mapped.

Dimension key: R keys (rows), N counters of a key.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Word = Any  # int, or int64 Tensor or array; words broadcast against one another

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, in units of 2**-32
LOW32 = 0xFFFFFFFF

# The last counter word says what a draw is for, so that draws for different ends never meet.
NUMBERS, FOLD, SPLIT, DROPOUT = range(4)

CHUNK = 2**13  # counters at a time on the CPU: the temporaries stay in cache
FEW = 8  # counters for which Python's integers are faster than 150 calls of numpy
# `triton_op` imports Dynamo and Inductor, which takes seconds: not where there can be no GPU.
CAN_HAVE_GPU = torch.version.cuda is not None or torch.version.hip is not None
HAS_TRITON = CAN_HAVE_GPU and importlib.util.find_spec("triton") is not None


def multiply_32(word: Word, constant: int) -> tuple[Word, Word]:
    """Upper and lower 32 bits of word * constant; word in [0, 2**32), constant in [2**31, 2**32).

    The 64-bit product can exceed 2**63, and C++ compilers may assume that signed products never
    wrap. So the constant loses 2**32, which keeps the product in (-2**63, 0], and the upper half
    gets `word` back.
    """
    product = word * (constant - 2**32)
    return (product >> 32) + word, product & LOW32


def philox_4x32(
    c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word, *, rounds: int = 10
) -> tuple[Word, Word, Word, Word]:
    """The four output words, bit for bit those of Random123 (and of triton's `tl.philox`).

    Args:
        c0, c1, c2, c3: counter words, least significant first.
        k0, k1: key words.
        rounds: 10 is the published default, 7 the fewest that pass BigCrush (the paper, table 2).
    """
    for i in range(rounds):
        if i > 0:
            k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
        hi0, lo0 = multiply_32(c0, MULTIPLIERS[0])
        hi1, lo1 = multiply_32(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0, c1, c2, c3


def philox_words(key: Tensor, counter: Tensor, domain: int) -> Tensor:
    """philox_4x32(counter, counter >> 32, 0, domain, *key) for every counter of every key.

    Args:
        key: int64 (..., 2), words in [0, 2**32).
        counter: int64 (..., N); its leading dims broadcast against the key's.
        domain: 32-bit integer, the last counter word.

    Returns:
        int64 (..., N, 4), words in [0, 2**32).
    """
    return (_cuda_words if key.is_cuda and HAS_TRITON else _words)(key, counter, domain)


def dropout_bits(key: Tensor, count: int, threshold: int) -> Tensor:
    """`count` random bits, 8 a byte, each 0 with probability threshold / 2**16.

    One Philox call makes one byte: its four words, halved, are eight 16-bit numbers, and bit i of
    byte n (element 8 n + i) says whether number i of counter n is at least the threshold.

    Args:
        key: int64 (..., 2), words in [0, 2**32).
        count: at most 2**35; the last byte is filled up with further random bits.
        threshold: in [0, 2**16].

    Returns:
        uint8 (..., ceil(count / 8)).
    """
    return (_cuda_bits if key.is_cuda and HAS_TRITON else _bits)(key, count, threshold)


def check_key(key: Tensor) -> None:
    """Raises a ValueError unless `key` is one key: int64 (2,)."""
    if key.shape != (2,) or key.dtype != torch.int64:
        raise ValueError(
            f"a key is an int64 tensor (2,), got {key.dtype} {tuple(key.shape)}: make one with "
            "random.key(seed), map over a batch of keys with torch.vmap"
        )


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key out of a key and an integer, or one key for each integer of a tensor.

    The new key is words 0 and 1 of philox_4x32(counter=(data, data >> 32, 0, 1), key). Random
    numbers have another last counter word: a folded key is none of them.

    Args:
        key: int64 (2,), words in [0, 2**32).
        data: an integer in [-2**63, 2**63), or an integer tensor (...) on the key's device.

    Returns:
        int64 (..., 2); (2,) for an int.
    """
    check_key(key)
    if not isinstance(data, Tensor):
        if not -(2**63) <= data < 2**63:
            raise ValueError(f"data ({data}) must fit in 64 bits, signed")
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    if data.is_floating_point() or data.device != key.device:
        raise ValueError(
            f"data must be integers on {key.device}, the key's device, got {data.dtype} on "
            f"{data.device}"
        )
    words = philox_words(key, data.to(torch.int64).reshape(-1), FOLD)
    return words[:, :2].reshape(*data.shape, 2)


def _rows(key: Tensor, counter: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """Broadcast leading dims; keys as (R, 2); counters as (R, N), or (1, N) if all keys share."""
    lead = list(torch.broadcast_shapes(key.shape[:-1], counter.shape[:-1]))
    n = counter.shape[-1]
    keys = key.expand(*lead, 2).reshape(-1, 2)
    shared = counter.shape[:-1].numel() == 1
    counters = counter.reshape(1, n) if shared else counter.expand(*lead, n).reshape(len(keys), n)
    return lead, keys, counters


def _chunks(key_R2: Tensor, counter_RN: Tensor, domain: int) -> Iterator[tuple[slice, np.ndarray]]:
    """The words of some counters after the others: (slice of N, uint32 array (R, n, 4))."""
    keys, counters = key_R2.cpu().numpy(), counter_RN.cpu().numpy()
    rows, n = len(keys), counters.shape[1]
    step = max(CHUNK // max(rows, 1), 1)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        c = counters[:, part]
        words = philox_4x32(c & LOW32, (c >> 32) & LOW32, 0, domain, keys[:, :1], keys[:, 1:])
        joined = np.empty((rows, part.stop - start, 4), dtype=np.uint32)
        for i, word in enumerate(words):
            joined[..., i] = word
        yield part, joined


@torch.library.custom_op("msfs_kernels::philox_words", mutates_args=())
def _words(key: Tensor, counter: Tensor, domain: int) -> Tensor:
    lead, keys, counters = _rows(key, counter)
    rows, n = len(keys), counters.shape[1]
    if 0 < rows * n <= FEW:
        pairs = zip(keys.tolist(), counters.expand(rows, n).tolist(), strict=True)
        few = [
            philox_4x32(c & LOW32, (c >> 32) & LOW32, 0, domain, *k) for k, cs in pairs for c in cs
        ]
        return torch.tensor(few, device=key.device).view(*lead, n, 4)
    out = np.empty((rows, n, 4), dtype=np.int64)
    for part, words in _chunks(keys, counters, domain):
        out[:, part] = words
    return torch.from_numpy(out).view(*lead, n, 4).to(key.device)


@torch.library.custom_op("msfs_kernels::dropout_bits", mutates_args=())
def _bits(key: Tensor, count: int, threshold: int) -> Tensor:
    lead, keys, counters = _rows(key, torch.arange((count + 7) // 8))
    rows, n = len(keys), counters.shape[1]
    out = np.empty((rows, n), dtype=np.uint8)
    for part, words in _chunks(keys, counters, DROPOUT):
        keep = words.astype("<u4", copy=False).view("<u2") >= threshold  # the lower half first
        out[:, part] = np.packbits(keep.reshape(-1), bitorder="little").reshape(rows, -1)
    return torch.from_numpy(out).view(*lead, n).to(key.device)


if HAS_TRITON:

    @torch.library.triton_op("msfs_kernels::philox_words_triton", mutates_args=())
    def _cuda_words(key: Tensor, counter: Tensor, domain: int) -> Tensor:
        from . import philox_triton

        lead, keys, counters = _rows(key, counter)
        rows, n = len(keys), counters.shape[1]
        out = keys.new_empty(rows, n, 4)
        philox_triton.words(torch.library.wrap_triton, keys, counters, domain, out)
        return out.view(*lead, n, 4)

    @torch.library.triton_op("msfs_kernels::dropout_bits_triton", mutates_args=())
    def _cuda_bits(key: Tensor, count: int, threshold: int) -> Tensor:
        from . import philox_triton

        n = (count + 7) // 8
        keys = key.reshape(-1, 2)
        out = torch.empty(len(keys), n, dtype=torch.uint8, device=key.device)
        philox_triton.bits(torch.library.wrap_triton, keys, threshold, out, DROPOUT)
        return out.view(*key.shape[:-1], n)

else:
    _cuda_words, _cuda_bits = _words, _bits


@_words.register_fake
def _(key: Tensor, counter: Tensor, domain: int) -> Tensor:
    lead = torch.broadcast_shapes(key.shape[:-1], counter.shape[:-1])
    return key.new_empty(*lead, counter.shape[-1], 4)


@_bits.register_fake
def _(key: Tensor, count: int, threshold: int) -> Tensor:
    return key.new_empty(*key.shape[:-1], (count + 7) // 8, dtype=torch.uint8)


def _map_words(info, in_dims, key: Tensor, counter: Tensor, domain: int):
    """The mapped dim becomes the first leading dim of whichever argument has it."""
    key_dim, counter_dim, _ = in_dims
    rank = max(key.ndim - (key_dim is not None), counter.ndim - (counter_dim is not None))

    def front(x: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return x
        x = x.movedim(dim, 0)
        return x.reshape(x.shape[0], *[1] * (rank - x.ndim + 1), *x.shape[1:])

    return philox_words(front(key, key_dim), front(counter, counter_dim), domain), 0


def _map_bits(info, in_dims, key: Tensor, count: int, threshold: int):
    return dropout_bits(key.movedim(in_dims[0], 0), count, threshold), 0


for op in {_words, _cuda_words}:
    op.register_vmap(_map_words)
for op in {_bits, _cuda_bits}:
    op.register_vmap(_map_bits)
