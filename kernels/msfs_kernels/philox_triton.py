"""The Triton kernels of `philox.philox_words` and `philox.dropout_bits`.

Programs form one line, row after row: row = program // blocks, block = program % blocks.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def load_key(keys, row):
    """The 64-bit key of a row, as tl.philox takes it."""
    return tl.load(keys + 2 * row) | (tl.load(keys + 2 * row + 1) << 32)


@triton.jit
def words_kernel(
    keys, counters, out, n, row_stride, blocks, DOMAIN: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    i = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    counter = tl.load(counters + row * row_stride + i, inside, 0)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low & 0
    w0, w1, w2, w3 = tl.philox(load_key(keys, row), low, high, zero, zero + DOMAIN)
    to = out + 4 * (row * n + i)
    tl.store(to, w0.to(tl.int64), inside)
    tl.store(to + 1, w1.to(tl.int64), inside)
    tl.store(to + 2, w2.to(tl.int64), inside)
    tl.store(to + 3, w3.to(tl.int64), inside)


@triton.jit
def pack(word, threshold):
    """Two bits: is the lower half of the word, is the upper, at least the threshold."""
    lower = ((word & 0xFFFF) >= threshold).to(tl.uint32)
    upper = ((word >> 16) >= threshold).to(tl.uint32)
    return lower | (upper << 1)


@triton.jit
def bits_kernel(keys, out, n, threshold, blocks, DOMAIN: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    i = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    c0 = i.to(tl.uint32)
    zero = c0 & 0
    w0, w1, w2, w3 = tl.philox(load_key(keys, row), c0, zero, zero, zero + DOMAIN)
    byte = pack(w0, threshold) | (pack(w1, threshold) << 2)
    byte |= (pack(w2, threshold) << 4) | (pack(w3, threshold) << 6)
    tl.store(out + row * n + i, byte.to(tl.uint8), i < n)


def words(wrap: Callable[[Any], Any], keys: Tensor, counters: Tensor, domain: int, out: Tensor):
    """Fills out (R, N, 4). `wrap` is torch.library.wrap_triton: torch.compile sees the launch.

    keys (R, 2), counters (R or 1, N) of any strides: keys made by `split` are 4 words apart.
    """
    keys, counters = keys.contiguous(), counters.contiguous()
    rows, n = out.shape[0], out.shape[1]
    row_stride = n if counters.shape[0] > 1 else 0
    blocks = triton.cdiv(n, BLOCK)
    if rows * blocks:
        wrap(words_kernel)[(rows * blocks,)](
            keys, counters, out, n, row_stride, blocks, DOMAIN=domain, BLOCK=BLOCK
        )


def bits(wrap: Callable[[Any], Any], keys: Tensor, threshold: int, out: Tensor, domain: int):
    """Fills out (R, ceil(count / 8)); keys (R, 2) of any strides."""
    keys = keys.contiguous()
    rows, n = out.shape
    blocks = triton.cdiv(n, BLOCK)
    if rows * blocks:
        wrap(bits_kernel)[(rows * blocks,)](
            keys, out, n, threshold, blocks, DOMAIN=domain, BLOCK=BLOCK
        )
