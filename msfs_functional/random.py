"""Random numbers as pure functions of a key, the way JAX has them.

    key = random.key(0)
    for step in range(steps):
        dropout_key, noise_key = random.split(random.fold_in(key, step))

A key is an int64 tensor (2,) of two 32-bit words. It opens a stream of random words: word j is
word j % 4 of Philox-4x32-10 at counter (c, c >> 32, 0, 0), c = j // 4. Element i of a draw, i its
flat index in the shape, takes word i, or words 2 i and 2 i + 1 where it needs two. Hence a draw
that is recomputed, cut into shards (`offset`) or mapped over a batch of keys by `vmap` gives the
same numbers again. Never draw twice from one key: split it, or fold a number into it.

Everything here, `normal` included, is made of exact integer operations and one final rounding, and
so is bit-equal eager, compiled and vmapped, on CPU and on CUDA. Two exceptions may differ by one
rounding between devices and compilers: `uniform` in float64 over another interval than [0, 1), and
the logarithms that `categorical` (and so a weighted `choice`) compares.

Source: Salmon et al. 2011 (Philox); Box and Muller 1958 (normal); Gumbel 1954 (categorical).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from msfs_kernels.philox import (
    LOW32,
    NUMBERS,
    SPLIT,
    check_key,
    dropout_bits,
    fold_in,
    philox_words,
)
from torch import Tensor

__all__ = [
    "bernoulli",
    "bits",
    "categorical",
    "choice",
    "dropout",
    "exponential",
    "fold_in",
    "integers",
    "key",
    "normal",
    "permutation",
    "split",
    "uniform",
]

Key = Int64[Tensor, "2"]
Shape = Sequence[int]

PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def key(seed: int, *, device: torch.device | str | None = None) -> Key:
    """The key of a seed: its lower and its upper 32 bits.

    Raises:
        ValueError: seed outside [-2**63, 2**64).
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed ({seed}) must fit in 64 bits")
    return torch.tensor([seed & LOW32, (seed >> 32) & LOW32], dtype=torch.int64, device=device)


def split(key: Key, n: int = 2) -> Int64[Tensor, "n 2"]:
    """n independent keys."""
    check_key(key)
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1")
    return philox_words(key, torch.arange(n, device=key.device), SPLIT)[:, :2]


def words(
    key: Key, shape: Shape, each: int, offset: int | Int64[Tensor, "..."] = 0
) -> tuple[Tensor, ...]:
    """The next `each` (1 or 2) words of the key's stream for every element of a shape."""
    check_key(key)
    if isinstance(offset, Tensor):
        if offset.shape != tuple(shape):
            raise ValueError(
                f"offset {tuple(offset.shape)} must be of the shape drawn, {tuple(shape)}: "
                f"one flat index for each element"
            )
        first = each * offset.to(key.device)
        stream = philox_words(key, first.flatten() >> 2, NUMBERS).view(*shape, 4)
        lanes = (first & 3)[..., None] + torch.arange(each, device=key.device)
        return stream.gather(-1, lanes).unbind(-1)
    if offset < 0:
        raise ValueError(f"offset ({offset}) must not be negative")
    start, stop = each * offset, each * (offset + math.prod(shape))
    counters = torch.arange(start // 4, (stop + 3) // 4, device=key.device)
    stream = philox_words(key, counters, NUMBERS).flatten()
    skip = start // 4 * 4
    return stream[start - skip : stop - skip].view(*shape, each).unbind(-1)


def bits(key: Key, shape: Shape, *, offset: int | Int64[Tensor, "..."] = 0) -> Int64[Tensor, "..."]:
    """Uniform integers in [0, 2**32).

    Args:
        offset: flat index of the first element, to draw one shard of a larger array:
            bits(key, (6,)) == cat([bits(key, (4,)), bits(key, (2,), offset=4)]).
            Or a tensor of the shape drawn: the flat index of each element, for shards that are
            not contiguous. `uniform` and `normal` take both too.
    """
    return words(key, shape, 1, offset)[0]


def integers(key: Key, shape: Shape, low: int, high: int) -> Int64[Tensor, "..."]:
    """Integers in [low, high), high - low <= 2**31; the bias is below (high - low) / 2**32."""
    if not 0 < high - low <= 2**31:
        raise ValueError(f"high - low must be in [1, 2**31], got low {low}, high {high}")
    return low + (bits(key, shape) * (high - low) >> 32)


def uniform(
    key: Key,
    shape: Shape,
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    offset: int | Int64[Tensor, "..."] = 0,
) -> Float[Tensor, "..."]:
    """Uniform floats in [low, high), as fine as the dtype: multiples of 2**-24 in float32.

    1 is never returned from [0, 1); over another interval rounding may give `high` itself.
    """
    precision = check_float(dtype)
    if not low <= high:
        raise ValueError(f"low ({low}) must not exceed high ({high})")
    if dtype == torch.float64:
        first, second = words(key, shape, 2, offset)
        unit = (first << 21) + (second >> 11)
    else:
        unit = bits(key, shape, offset=offset) >> (32 - precision)
    if (low, high) == (0.0, 1.0):
        return unit.to(dtype) * 2.0**-precision
    # The width cut to 24 bits makes the product exact in float64: fused multiply-add or not.
    mantissa, exponent = math.frexp(high - low)
    width = math.ldexp(round(mantissa * 2**24), exponent - 24) if precision <= 24 else high - low
    return (unit.to(torch.float64) * 2.0**-precision * width + low).to(dtype)


def check_float(dtype: torch.dtype) -> int:
    if dtype not in PRECISION:
        raise ValueError(f"dtype ({dtype}) must be one of {', '.join(map(str, PRECISION))}")
    return PRECISION[dtype]


# Logarithm, sine and even square root differ in their last bit from library to library. These
# work on integers in units of 2**-31, Horner's rule with a shift after each product, and are the
# same everywhere. Chebyshev fits of -ln(1 - g/2) / g over g in [0, 1] (relative error 3e-8) and of
# sin(pi x / 2) / x in x**2 (7e-9).
LOG_FIT = (
    1073741845,
    268432099,
    89566709,
    32673620,
    17753488,
    -6092533,
    20216778,
    -13675207,
    5905398,
)
SINE_FIT = (3373259412, -1387196611, 171132797, -10037647, 325713)
LN2 = 1488522236


def horner(x: Tensor, coefficients: Sequence[int]) -> Tensor:
    result = x * coefficients[-1] >> 31
    for coefficient in coefficients[-2:0:-1]:
        result = (result + coefficient) * x >> 31
    return result + coefficients[0]


def minus_log(word: Tensor) -> Tensor:
    """-ln u in units of 2**-31, u = (word + 1/2) / 2**32; never negative.

    2 word + 1 = (1 + f) 2**e; with g = 1 - f, -ln u = (32 - e) ln 2 - ln(1 - g/2), both terms
    positive. The exponent that a logarithm suggests is corrected in integers, so it is exact.
    """
    odd = 2 * word + 1
    exponent = torch.log2(odd.to(torch.float64)).to(torch.int64)
    leading = odd >> exponent
    exponent = exponent + (leading > 1).to(torch.int64) - (leading < 1).to(torch.int64)
    fraction = (odd - (torch.ones_like(odd) << exponent)) << 31 >> exponent
    g = 2**31 - fraction
    return (32 - exponent) * LN2 + (g * horner(g, LOG_FIT) >> 31)


def integer_sqrt(square: Tensor) -> Tensor:
    """Floor of the root of an integer below 2**62, whatever the rounding of torch.sqrt."""
    root = torch.sqrt(square.to(torch.float64)).to(torch.int64) + 1
    for _ in range(2):
        root = torch.where(root * root > square, root - 1, root)
    return root


def exponential(
    key: Key, shape: Shape, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """Exponential floats of mean 1, -ln u, up to 22.9."""
    check_float(dtype)
    return (minus_log(bits(key, shape)).to(torch.float64) * 2.0**-31).to(dtype)


def normal(
    key: Key,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    offset: int | Int64[Tensor, "..."] = 0,
) -> Float[Tensor, "..."]:
    """Standard normal floats, up to 6.77 in size (Box and Muller 1958).

    z = sqrt(-2 ln u) sin(a), u uniform in (0, 1), a uniform over the circle: two words each.
    The steps are of 2**-31 in every dtype.
    """
    check_float(dtype)
    first, second = words(key, shape, 2, offset)
    x = second & (2**31 - 1)
    sine = x * horner(x * x >> 31, SINE_FIT) >> 31
    sign = 1 - 2 * (second >> 31)
    radius = integer_sqrt(minus_log(first) << 26)  # in units of 2**-28
    return ((radius * (sign * sine) >> 28).to(torch.float64) * 2.0**-31).to(dtype)


def bernoulli(key: Key, p: float | Tensor, shape: Shape) -> Bool[Tensor, "..."]:
    """True with probability p, exact to 2**-32; a tensor p is broadcast to the shape."""
    if isinstance(p, Tensor):
        threshold = torch.round(p.to(torch.float64) * 2.0**32).to(torch.int64)
    else:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p ({p}) must be a probability, in [0, 1]")
        threshold = round(p * 2**32)
    return bits(key, shape) < threshold


def dropout(key: Key | None, x: Float[Tensor, "..."], rate: float) -> Float[Tensor, "..."]:
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate).

    The rate is rounded to a multiple of 2**-16 and the scale belongs to the rounded one: the mean
    is exact. Element i of x is kept where bit i of `philox.dropout_bits` is 1, and that bit is what
    a compiled backward pass keeps, an eighth of a byte an element. Under vmap, a batch of keys
    drops each example by its own key; one key for all drops the same elements of each.

    Args:
        key: None for evaluation, x comes back unchanged; so it does when rate is 0.
        x: any floating dtype, on the device of the key.
        rate: in [0, 1).

    Source: Srivastava et al. 2014.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate ({rate}) must be in [0, 1)")
    if key is None or rate == 0.0:
        return x
    check_key(key)
    if not x.is_floating_point():
        raise ValueError(f"dropout scales floating-point numbers, x is {x.dtype}: cast it first")
    if key.device != x.device:
        raise ValueError(f"key is on {key.device}, x on {x.device}: move the key, key.to(x.device)")
    threshold = min(round(rate * 2**16), 2**16 - 1)
    packed = dropout_bits(key, x.numel(), threshold)
    place = torch.arange(8, dtype=torch.uint8, device=x.device)
    bit = torch.bitwise_right_shift(packed.unsqueeze(-1), place) & 1
    keep = bit.flatten().narrow(0, 0, x.numel()).view(x.shape) != 0
    return torch.where(keep, x * (2**16 / (2**16 - threshold)), 0.0)


def permutation(key: Key, n: int) -> Int64[Tensor, "n"]:
    """The numbers 0 to n - 1 in random order."""
    first, second = words(key, (n,), 2)
    return torch.argsort((first << 31) + (second >> 1), stable=True)


def categorical(key: Key, logits: Float[Tensor, "... V"]) -> Int64[Tensor, "..."]:
    """An index drawn from softmax(logits) along the last dim: argmax(logits + Gumbel noise).

    -inf marks an index that is never drawn; a row of nothing else gives 0.
    """
    noise = exponential(key, logits.shape).clamp_min(2.0**-32)
    return torch.argmax(logits.float() - torch.log(noise), dim=-1)


def choice(
    key: Key, n: int, shape: Shape = (), *, replace: bool = True, p: Tensor | None = None
) -> Int64[Tensor, "..."]:
    """Indices in [0, n), with or without replacement, by weights p (n,) if given."""
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1")
    if p is not None and p.shape != (n,):
        raise ValueError(f"p must hold one weight for each of n ({n}), got {tuple(p.shape)}")
    if replace:
        if p is None:
            return integers(key, shape, 0, n)
        return categorical(key, torch.log(p.float()).expand(*shape, n))
    count = math.prod(shape)
    if count > n:
        raise ValueError(f"{count} draws without replacement need n >= {count}, got n = {n}")
    if p is None:
        return permutation(key, n)[:count].view(*shape)
    scores = torch.log(p.float()) - torch.log(exponential(key, (n,)).clamp_min(2.0**-32))
    return torch.topk(scores, count).indices.view(*shape)
