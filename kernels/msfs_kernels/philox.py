"""Philox-4x32-10: four random 32-bit words out of a 128-bit counter and a 64-bit key.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
One round takes words (c0, c1, c2, c3), key (k0, k1) and two odd constants M0, M1:

    c0 <- hi(M1 c2) ^ c1 ^ k0        hi, lo: upper and lower 32 bits of the 64-bit product
    c1 <- lo(M1 c2)
    c2 <- hi(M0 c0) ^ c3 ^ k1        then k0 += W0, k1 += W1 (mod 2**32)
    c3 <- lo(M0 c0)

Words are int64 tensors or Python integers in [0, 2**32): torch has no arithmetic on uint32. All of
it is exact integer arithmetic, so the numbers are the same on every device, eager or compiled.
"""

from typing import Any

import torch
from torch import Tensor

Word = Any  # Tensor (int64) or int; words broadcast against one another

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, in units of 2**-32
LOW32 = 0xFFFFFFFF


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


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key out of a key and an integer, or one key for each integer of a tensor.

    Words 0 and 1 of philox_4x32(counter=(data, data >> 32, 0, 1), key). Random numbers have 0 as
    their last counter word (`msfs_functional.random`): a folded key is none of them.

    Args:
        key: int64 (2,), words in [0, 2**32).
        data: any 64-bit integer, or an int64 tensor (...) of them.

    Returns:
        int64 (..., 2); (2,) for an int.
    """
    low, high = data & LOW32, (data >> 32) & LOW32
    words = philox_4x32(low, high, 0, 1, key[0], key[1])
    return torch.stack(torch.broadcast_tensors(words[0], words[1]), dim=-1)
