"""Rotary positions (Su et al. 2021, "RoFormer"): queries and keys turn by an angle of their place.

Pair c of a head, the elements c and c + K/2, turns by position * frequency_c, so that a query's
product with a key depends on their distance alone. `Scaling` stretches the frequencies for contexts
longer than those trained on.

Dimension key: ... batch dims and heads, T tokens, K head dim.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """How frequencies change when a model reads `factor` times what it was trained on.

    linear   f / factor                                          (Chen et al. 2023)
    llama3   f / factor for wavelengths beyond original_length / low_factor, f for those within
             original_length / high_factor, a blend between      (Llama 3.1)
    yarn     f / factor for pairs that turn less than `slow` times in original_length tokens, f
             for those that turn more than `fast` times, a ramp between; cosines and sines grow
             by `magnitude`                                      (Peng et al. 2023, section 3)
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int = 8192  # tokens of the training context (llama3, yarn)
    low_factor: float = 1.0  # llama3
    high_factor: float = 4.0  # llama3
    fast: float = 32.0  # yarn, turns
    slow: float = 1.0  # yarn, turns
    magnitude: float | None = None  # yarn; default 0.1 ln(factor) + 1

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"scaling kind ({self.kind!r}) must be 'linear', 'llama3' or 'yarn'")
        if self.factor <= 0 or self.original_length < 1:
            raise ValueError(
                f"scaling factor ({self.factor}) and original_length ({self.original_length}) must "
                "be positive"
            )
        if self.kind == "llama3" and self.high_factor <= self.low_factor:
            raise ValueError(
                f"high_factor ({self.high_factor}) must exceed low_factor ({self.low_factor})"
            )


def frequencies(
    head_dim: int,
    base: float,
    scaling: Scaling | None = None,
    *,
    device: torch.device | str | None = None,
) -> Float[Tensor, "K/2"]:
    """Radians a token of every pair, base^(-2c / K), scaled; float64."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
    plain = torch.exp(pairs * (-math.log(base) / head_dim))
    if scaling is None:
        return plain
    slowed = plain / scaling.factor
    if scaling.kind == "linear":
        return slowed
    if scaling.kind == "llama3":
        turns = plain * (scaling.original_length / (2 * math.pi))
        span = scaling.high_factor - scaling.low_factor
        kept = ((turns - scaling.low_factor) / span).clamp(0, 1)
    else:

        def pair_that_turns(times: float) -> float:
            wavelength = scaling.original_length / (2 * math.pi * times)
            return head_dim * math.log(wavelength) / (2 * math.log(base))

        low = max(math.floor(pair_that_turns(scaling.fast)), 0)
        high = min(math.ceil(pair_that_turns(scaling.slow)), head_dim - 1)
        kept = 1 - ((pairs / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
    return kept * plain + (1 - kept) * slowed


def rotary_table(
    positions: Int[Tensor, "... T"],
    head_dim: int,
    base: float,
    scaling: Scaling | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "... T K/2"], Float[Tensor, "... T K/2"]]:
    """Cosines and sines for `rotate`.

    Angles are taken in float64: in float32 that of position 100,000 is already 4e-3 off.
    """
    angles = positions[..., None].to(torch.float64) * frequencies(
        head_dim, base, scaling, device=positions.device
    )
    magnitude = 1.0
    if scaling is not None and scaling.kind == "yarn":
        longer = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
        magnitude = longer if scaling.magnitude is None else scaling.magnitude
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(
    x: Float[Tensor, "... T K"],
    cosines: Float[Tensor, "... T K/2"],
    sines: Float[Tensor, "... T K/2"],
) -> Float[Tensor, "... T K"]:
    """Every pair (x_c, x_{c + K/2}) turned by its angle; computed in the table's dtype."""
    first, second = x.to(cosines.dtype).chunk(2, -1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, -1).to(x.dtype)
