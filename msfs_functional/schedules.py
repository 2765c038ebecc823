"""Learning-rate schedules: pure functions of the number of updates made so far.

    rate_fn = cosine(3e-4, steps=10_000, warmup=500)
    rate_fn(count)          # count: int64 tensor, 0-d (in an optimizer) or any shape (for a plot)

All return float32 on the device of the count. The first update has count 0. A warm-up of n updates
rises in a line, rate = peak (count + 1) / n, so that the first update is not wasted on a rate of 0
and update n has the peak; a schedule that ends has reached `end` at count `steps` and stays there.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]


def constant(rate: float, *, warmup: int = 0) -> Schedule:
    """`rate`, after a linear warm-up of `warmup` updates."""
    check(peak=rate, warmup=warmup)
    return lambda count: rate * rise(count, warmup)


def linear(peak: float, steps: int, *, warmup: int = 0, end: float = 0.0) -> Schedule:
    """Warm-up to `peak`, then a line down to `end` at `steps` updates."""
    check(peak=peak, end=end, warmup=warmup, steps=steps)

    def schedule(count: Tensor) -> Tensor:
        fall = 1 - progress(count, warmup, steps)
        return (end + (peak - end) * fall) * rise(count, warmup)

    return schedule


def cosine(peak: float, steps: int, *, warmup: int = 0, end: float = 0.0) -> Schedule:
    """Warm-up to `peak`, then half a cosine down to `end` (Loshchilov and Hutter 2017, eq. 5)."""
    check(peak=peak, end=end, warmup=warmup, steps=steps)

    def schedule(count: Tensor) -> Tensor:
        fall = (1 + torch.cos(math.pi * progress(count, warmup, steps))) / 2
        return (end + (peak - end) * fall) * rise(count, warmup)

    return schedule


def warmup_stable_decay(
    peak: float,
    steps: int,
    *,
    warmup: int,
    decay: int,
    end: float = 0.0,
    shape: Literal["linear", "sqrt"] = "linear",
) -> Schedule:
    """Warm-up, `peak` held, and only in the last `decay` of `steps` updates a fall to `end`.

    The fall is a line, or 1 - sqrt(progress), steep first (Hu et al. 2024; Hägele et al. 2024,
    eq. 1 and section 3). The run up to it can be prolonged without knowing its length beforehand.
    """
    check(peak=peak, end=end, warmup=warmup, steps=steps)
    if not 0 < decay <= steps - warmup:
        raise ValueError(
            f"decay ({decay}) must be in [1, steps - warmup], steps {steps}, warmup {warmup}"
        )
    if shape not in ("linear", "sqrt"):
        raise ValueError(f'shape ({shape!r}) must be "linear" or "sqrt"')

    def schedule(count: Tensor) -> Tensor:
        fallen = progress(count, steps - decay, steps)
        fall = 1 - (torch.sqrt(fallen) if shape == "sqrt" else fallen)
        return (end + (peak - end) * fall) * rise(count, warmup)

    return schedule


def inverse_square_root(peak: float, *, warmup: int) -> Schedule:
    """Warm-up to `peak`, then peak sqrt(warmup / t), t = count + 1 (Vaswani et al. 2017, eq. 3)."""
    check(peak=peak, warmup=warmup)
    if warmup < 1:
        raise ValueError(f"warmup ({warmup}) must be at least 1: the fall is measured in it")

    def schedule(count: Tensor) -> Tensor:
        t = as_float(count) + 1
        return peak * torch.minimum(t / warmup, torch.sqrt(warmup / t))

    return schedule


def noam(width: int, *, warmup: int = 4000, factor: float = 1.0) -> Schedule:
    """factor width**-0.5 min(t**-0.5, t warmup**-1.5), t = count + 1 (Vaswani et al. 2017, eq. 3).

    This is inverse_square_root with peak = factor / sqrt(width warmup).
    """
    if width < 1:
        raise ValueError(f"width ({width}) must be at least 1")
    return inverse_square_root(factor / math.sqrt(width * max(warmup, 1)), warmup=warmup)


Name = Literal["inverse_square_root", "cosine", "linear", "wsd", "constant"]


def named(name: Name, peak: float, steps: int, *, warmup: int = 0) -> Schedule:
    """The schedule that a command line calls so; "wsd" falls over the last fifth of the steps."""
    if name == "inverse_square_root":
        return inverse_square_root(peak, warmup=warmup)
    if name == "constant":
        return constant(peak, warmup=warmup)
    if name == "wsd":
        return warmup_stable_decay(peak, steps, warmup=warmup, decay=max(1, steps // 5))
    return {"cosine": cosine, "linear": linear}[name](peak, steps, warmup=warmup)


def as_float(count: Tensor) -> Tensor:
    return torch.as_tensor(count).to(torch.float32)


def rise(count: Tensor, warmup: int) -> Tensor:
    """From 1 / warmup at count 0 to 1 at count warmup - 1, and 1 from there on."""
    return torch.clamp((as_float(count) + 1) / max(warmup, 1), max=1.0)


def progress(count: Tensor, start: int, stop: int) -> Tensor:
    """0 up to `start`, 1 from `stop` on, a line between."""
    return torch.clamp((as_float(count) - start) / max(stop - start, 1), 0.0, 1.0)


def check(peak: float, warmup: int, end: float = 0.0, steps: int | None = None) -> None:
    if not (peak >= 0 and math.isfinite(peak)):
        raise ValueError(f"peak rate ({peak}) must be finite and not negative")
    if not (end >= 0 and math.isfinite(end)):
        raise ValueError(f"end rate ({end}) must be finite and not negative")
    if warmup < 0:
        raise ValueError(f"warmup ({warmup}) must not be negative, in updates")
    if steps is not None and not (steps >= 1 and warmup < steps):
        raise ValueError(
            f"steps ({steps}) must be at least 1 and exceed warmup ({warmup}): train for more, or "
            "warm up for less"
        )
