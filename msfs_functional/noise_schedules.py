"""How much noise at which time: x_t = alpha x_0 + sigma eps, in the three usual coordinates.

    variance preserving   alpha = sqrt(alpha_bar)   sigma = sqrt(1 - alpha_bar)   level: alpha_bar
    variance exploding    alpha = 1                 sigma                         level: sigma
    rectified flow        alpha = 1 - t             sigma = t                     level: t in [0, 1]

A training schedule is the tensor alpha_bar (N,), float64, of steps 0 (least noise) to N - 1. What a
sampler walks down is a grid (n + 1,) of levels, most noise first, for n steps:

    alpha_bar = scaled_linear(1000)
    grid = alpha_bars_at(alpha_bar, spaced_steps(1000, 30))     # ddpm, ddim
    grid = sigmas_at(alpha_bar, spaced_steps(1000, 30))         # euler, heun, dpmpp_2m ...
    grid = karras_sigmas(30)
    grid = flow_times(30)                                       # flow_euler

Source: Ho et al. 2020 (linear); Rombach et al. 2022 (scaled linear); Nichol and Dhariwal 2021
(cosine); Xu et al. 2022, GeoDiff (sigmoid); Lin et al. 2023 (zero terminal SNR, spacings); Karras
et al. 2022 (EDM); Liu et al. 2022 (rectified flow); Esser et al. 2024 (shift, logit-normal times).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from msfs_functional import random


class Level(NamedTuple):
    """The two coefficients of x_t = alpha x_0 + sigma eps."""

    alpha: Tensor
    sigma: Tensor


Coordinates = Callable[[Tensor], Level]


def variance_preserving(alpha_bar: Float[Tensor, "..."]) -> Level:
    """alpha and sigma of an alpha_bar in [0, 1]."""
    return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def variance_exploding(sigma: Float[Tensor, "..."]) -> Level:
    """alpha = 1 and the sigma given."""
    return Level(torch.ones_like(sigma), sigma)


def rectified_flow(t: Float[Tensor, "..."]) -> Level:
    """alpha = 1 - t and sigma = t, for a time in [0, 1]: 0 is data, 1 is noise."""
    return Level(1 - t, t)


def linear(
    steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float[Tensor, "N"]:
    """alpha_bar of betas that rise linearly."""
    _check_betas(steps, beta_start, beta_end)
    return _from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))


def scaled_linear(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float[Tensor, "N"]:
    """alpha_bar of betas whose roots rise linearly: Stable Diffusion's."""
    _check_betas(steps, beta_start, beta_end)
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return _from_betas(roots**2)


def cosine(steps: int = 1000, *, s: float = 0.008, beta_max: float = 0.999) -> Float[Tensor, "N"]:
    """alpha_bar as cos((t / N + s) / (1 + s) pi / 2) ** 2, each beta at most beta_max."""
    _check_steps(steps)
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return _from_betas((1 - f[1:] / f[:-1]).clamp(max=beta_max))


def sigmoid(
    steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float[Tensor, "N"]:
    """alpha_bar of betas that rise as a sigmoid over [-6, 6]."""
    _check_betas(steps, beta_start, beta_end)
    ramp = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
    return _from_betas(ramp * (beta_end - beta_start) + beta_start)


def zero_terminal_snr(alpha_bar: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The schedule shifted and scaled so that its last step is pure noise, alpha_bar = 0.

    The first step is kept. eps says nothing about x_0 there: train on v, x0 or flow.

    Source: Lin et al. 2023, algorithm 1.
    """
    _check_alpha_bar(alpha_bar)
    alpha = alpha_bar.sqrt()
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2


def spaced_steps(
    train_steps: int,
    steps: int,
    spacing: Literal["leading", "linspace", "trailing"] = "trailing",
    *,
    offset: int = 0,
) -> Int64[Tensor, "n"]:
    """`steps` of the steps 0 to train_steps - 1, most noise first.

    For 10 and 5: leading 8 6 4 2 0; linspace 9 7 4 2 0; trailing 9 7 5 3 1. Only the last two
    start at the last step, which zero terminal SNR needs. Stable Diffusion 1.5 takes leading with
    offset 1.

    Raises:
        ValueError: steps outside [1, train_steps]; a step pushed out of the schedule by offset.

    Source: Lin et al. 2023, table 2.
    """
    _check_steps(steps)
    if steps > train_steps:
        raise ValueError(
            f"steps ({steps}) must not exceed the {train_steps} steps of training: take fewer"
        )
    if spacing == "leading":
        chosen = torch.arange(steps).flip(0) * (train_steps // steps) + offset
    elif spacing == "linspace":
        even = torch.linspace(0, train_steps - 1, steps, dtype=torch.float64)
        chosen = even.round().to(torch.int64).flip(0)
    elif spacing == "trailing":
        even = train_steps - torch.arange(steps, dtype=torch.float64) * (train_steps / steps)
        chosen = even.round().to(torch.int64) - 1
    else:
        raise ValueError(f"spacing ({spacing!r}) must be 'leading', 'linspace' or 'trailing'")
    if int(chosen[0]) >= train_steps or int(chosen[-1]) < 0:
        raise ValueError(
            f"steps {int(chosen[0])} to {int(chosen[-1])} (offset {offset}) must lie in "
            f"[0, {train_steps}): use a smaller offset"
        )
    return chosen


def alpha_bars_at(
    alpha_bar: Float[Tensor, "N"], steps: Int64[Tensor, "n"], *, final: float = 1.0
) -> Float[Tensor, "n+1"]:
    """The grid of `ddpm` and `ddim`: alpha_bar at the steps, then `final` (1 is clean data)."""
    _check_alpha_bar(alpha_bar)
    return torch.cat([alpha_bar[steps], alpha_bar.new_tensor([final])])


def sigmas_at(alpha_bar: Float[Tensor, "N"], steps: Int64[Tensor, "n"]) -> Float[Tensor, "n+1"]:
    """The grid of the samplers over sigma: `sigma_of` alpha_bar at the steps, then 0."""
    _check_alpha_bar(alpha_bar)
    return torch.cat([sigma_of(alpha_bar)[steps], alpha_bar.new_zeros(1)])


def sigma_of(alpha_bar: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The noise for data of scale 1, sigma / alpha = sqrt((1 - alpha_bar) / alpha_bar)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def step_of(alpha_bar: Float[Tensor, "N"], level: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The real-valued training step whose alpha_bar is `level`, to tell a network the time.

    Linear in log(sigma / alpha) between steps, clamped to [0, N - 1]; within 1e-3 of a whole step
    it is that step.
    """
    noise = sigma_of(alpha_bar.to(level.device, torch.float64)).log()
    here = sigma_of(level.to(torch.float64)).log()
    upper = torch.searchsorted(noise, here).clamp(1, len(noise) - 1)
    # A level on a GPU stays there: noise[upper] would bring upper to the host, and make it wait.
    low, high = noise.take(upper - 1), noise.take(upper)
    # Where the last step is pure noise its logarithm is infinite, and only that level reaches it.
    part = torch.where(high.isinf(), high == here, (here - low) / (high - low)).clamp(0, 1)
    step = (upper - 1) + part
    whole = step.round()
    return torch.where((step - whole).abs() < 1e-3, whole, step)


def karras_sigmas(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, "n+1"]:
    """EDM's grid: sigma ** (1 / rho) falls linearly from sigma_max to sigma_min, then 0.

    Source: Karras et al. 2022, equation 5.
    """
    _check_steps(steps)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min ({sigma_min}) and sigma_max ({sigma_max}) must be positive, rising, finite"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)])


def flow_times(steps: int, *, shift: float = 1.0) -> Float[Tensor, "n+1"]:
    """The grid of `flow_euler`: times from 1 (noise) to 0 (data), shifted by `shift_times`."""
    _check_steps(steps)
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def shift_times(t: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """Times moved to more noise for larger images: shift t / (1 + (shift - 1) t).

    Source: Esser et al. 2024, equation 23 (shift = sqrt(m / n) for m pixels after n).
    """
    if shift <= 0:
        raise ValueError(f"shift ({shift}) must be positive; 1 leaves the times alone")
    return shift * t / (1 + (shift - 1) * t)


def logit_normal_times(
    key: Int64[Tensor, "2"],
    shape: tuple[int, ...],
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Training times in (0, 1) that dwell in the middle: sigmoid(mean + std z), z normal.

    Source: Esser et al. 2024, equation 19.
    """
    if std <= 0:
        raise ValueError(f"std ({std}) must be positive")
    return torch.sigmoid(mean + std * random.normal(key, shape, dtype=dtype))


def log_normal_sigmas(
    key: Int64[Tensor, "2"],
    shape: tuple[int, ...],
    *,
    mean: float = -1.2,
    std: float = 1.2,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Training noise levels of EDM: ln sigma is normal.

    Source: Karras et al. 2022, table 1.
    """
    if std <= 0:
        raise ValueError(f"std ({std}) must be positive")
    return torch.exp(mean + std * random.normal(key, shape, dtype=dtype))


def _from_betas(betas: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    return torch.cumprod(1 - betas, 0)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps ({steps}) must be at least 1")


def _check_betas(steps: int, start: float, end: float) -> None:
    _check_steps(steps)
    if not 0 < start <= end < 1:
        raise ValueError(
            f"beta_start ({start}) and beta_end ({end}) must satisfy 0 < beta_start <= beta_end < 1"
        )


def _check_alpha_bar(alpha_bar: Tensor) -> None:
    if alpha_bar.ndim != 1 or len(alpha_bar) < 2:
        raise ValueError(
            f"alpha_bar {tuple(alpha_bar.shape)} must be one tensor (N,) of at least 2 steps"
        )
    falls = bool((alpha_bar[1:] < alpha_bar[:-1]).all())
    if not falls or float(alpha_bar[0]) > 1 or float(alpha_bar[-1]) < 0:
        raise ValueError("alpha_bar must fall from at most 1 to at least 0, strictly: sort it")
