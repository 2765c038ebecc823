"""Samplers of diffusion models: x from noise to data, as functions of a denoise_fn and a grid.

    x = grid[0] * random.normal(x_key, shape)
    image = heun(denoise_fn, x, grid, key)

    denoise_fn    (x, level 0-d) -> x_0, the mean of data given x; `diffusion.denoiser` makes it
    grid          (n + 1,) levels for n steps, most noise first; x is at grid[0], then at grid[n]

    sampler                                           grid       x
    ddpm, ddim                                        alpha_bar  sqrt(alpha_bar) x_0 +
                                                                 sqrt(1 - alpha_bar) eps
    euler, euler_ancestral, heun, dpmpp_2m, _2m_sde   sigma      x_0 + sigma eps
    flow_euler                                        t          (1 - t) x_0 + t eps

`noise_schedules` has the grids; `guidance` bends a denoise_fn and starts in the middle of a grid.

Noise of step i is drawn from fold_in(key, i). A key (2,) makes one draw for the batch; keys (B, 2)
make one for each example, which then is the same in any batch and on any rank. Levels are walked as
Python floats (float64) and handed to denoise_fn as 0-d tensors of one copy of the grid beside x: a
copy at each step would make the host wait for a GPU. x is float32 or float64.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import vmap

from msfs_functional import random
from msfs_functional.diffusion import DenoiseFn, moved

Key = Int64[Tensor, "2"] | Int64[Tensor, "B 2"]


def draw(key: Key, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """Standard normal noise of x's shape, dtype and device, by one key or one for each example."""
    key = key.to(x.device)  # the same numbers on every device
    if key.ndim == 1:
        return random.normal(key, x.shape, dtype=x.dtype)
    if key.shape != (x.shape[0], 2):
        raise ValueError(
            f"key {tuple(key.shape)} must be (2,), or ({x.shape[0]}, 2): one for each example of x"
        )
    return vmap(lambda k: random.normal(k, x.shape[1:], dtype=x.dtype))(key)


def step_noise(key: Key, i: int, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """The noise of step i."""
    folded = random.fold_in(key, i) if key.ndim == 1 else vmap(lambda k: random.fold_in(k, i))(key)
    return draw(folded, x)


def need_key(key: Key | None, why: str) -> Key:
    if key is None:
        raise ValueError(f"key (None) must be given: {why} draws noise; pass random.key(seed)")
    return key


def check_grid(
    grid: Tensor, name: str, *, rising: bool = False, most: float = math.inf
) -> list[float]:
    """The levels as floats, after checking that there is a step and that each loses noise."""
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            f"{name} {tuple(grid.shape)} must hold n + 1 levels for n >= 1 steps: take more steps"
        )
    levels = grid.detach().double().tolist()
    way = "rise" if rising else "fall"
    for i, (a, b) in enumerate(itertools.pairwise(levels)):
        if not (a < b if rising else a > b):
            raise ValueError(
                f"{name} must {way} strictly, got {a:.6g} then {b:.6g} at step {i}: "
                f"sort the levels, most noise first, without repeats"
            )
    low, high = min(levels), max(levels)
    if high == math.inf:
        raise ValueError(
            f"{name} must be finite, got inf: pure noise (zero terminal SNR) has no sigma; "
            f"use ddpm or ddim over alpha_bar, or start the grid one step later"
        )
    if low < 0 or high > most:
        raise ValueError(
            f"{name} must lie in [0, {most:g}], got {low:.6g} to {high:.6g}: check the schedule"
        )
    return levels


def ddpm(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    alpha_bars: Float[Tensor, "n+1"],
    key: Key,
    *,
    variance: Literal["small", "large"] = "small",
) -> Float[Tensor, "B ..."]:
    """Ancestral sampling from q(x_s | x_t, x_0), Ho et al. 2020 (equation 7), over any grid.

    Args:
        alpha_bars: strictly rising in [0, 1]; 0 at the start is zero terminal SNR.
        variance: of the step, "small": the posterior's, (1 - alpha_bar_s) / (1 - alpha_bar_t) beta;
            "large": beta = 1 - alpha_bar_t / alpha_bar_s. Clean data (alpha_bar 1) gets no noise.

    Raises:
        ValueError: a grid of no steps, or not rising in [0, 1]; an unknown variance.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance ({variance!r}) must be 'small' or 'large'")
    levels = check_grid(alpha_bars, "alpha_bars", rising=True, most=1.0)
    alpha_bars = moved(alpha_bars, x.device)
    for i, (bar_t, bar_s) in enumerate(itertools.pairwise(levels)):
        x_0 = denoise_fn(x, alpha_bars[i])
        alpha = bar_t / bar_s
        beta = 1 - alpha
        small = (1 - bar_s) / (1 - bar_t) * beta
        x = (
            math.sqrt(bar_s) * beta / (1 - bar_t) * x_0
            + math.sqrt(alpha) * (1 - bar_s) / (1 - bar_t) * x
        )
        if bar_s < 1:
            x = x + math.sqrt(small if variance == "small" else beta) * step_noise(key, i, x)
    return x


def ddim(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    alpha_bars: Float[Tensor, "n+1"],
    key: Key | None = None,
    *,
    eta: float = 0.0,
) -> Float[Tensor, "B ..."]:
    """DDIM, Song et al. 2021 (equations 12 and 16): eta 0 draws nothing, eta 1 is `ddpm`.

    Raises:
        ValueError: a grid of no steps, or not rising in [0, 1]; eta outside [0, 1]; eta and no key.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta ({eta}) must be in [0, 1]: 0 is deterministic, 1 is ddpm")
    levels = check_grid(alpha_bars, "alpha_bars", rising=True, most=1.0)
    alpha_bars = moved(alpha_bars, x.device)
    for i, (bar_t, bar_s) in enumerate(itertools.pairwise(levels)):
        x_0 = denoise_fn(x, alpha_bars[i])
        eps = (x - math.sqrt(bar_t) * x_0) / math.sqrt(1 - bar_t)
        noise = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        x = math.sqrt(bar_s) * x_0 + math.sqrt(max(1 - bar_s - noise**2, 0.0)) * eps
        if noise > 0:
            x = x + noise * step_noise(need_key(key, "eta above 0"), i, x)
    return x


class Churn(NamedTuple):
    """Noise that EDM's stochastic sampler adds before each step, and takes away by it.

    Before step i of n the level rises from sigma to (1 + gamma) sigma, with
    gamma = min(amount / n, sqrt(2) - 1) for low <= sigma <= high, else 0.
    """

    amount: float  # S_churn: 0 is the ODE; published settings are 5 to 80
    low: float = 0.0  # S_tmin
    high: float = math.inf  # S_tmax
    noise: float = 1.0  # S_noise: std of what is added; slightly above 1 keeps detail


def _edm(
    denoise_fn: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    key: Key | None,
    churn: Churn | None,
    *,
    correct: bool,
) -> Tensor:
    levels, sigmas = check_grid(sigmas, "sigmas"), moved(sigmas, x.device)
    if churn is not None and (churn.amount < 0 or churn.noise < 0):
        raise ValueError(f"amount and noise of {churn} must not be negative: 0 adds nothing")
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        level = sigmas[i]
        if churn is not None and churn.amount > 0 and churn.low <= sigma <= churn.high:
            rise = 1 + min(churn.amount / (len(levels) - 1), math.sqrt(2) - 1)
            noise = churn.noise * sigma * math.sqrt(rise**2 - 1)
            x = x + noise * step_noise(need_key(key, "churn"), i, x)
            sigma, level = rise * sigma, rise * level
        d = (x - denoise_fn(x, level)) / sigma
        ahead = x + (sigma_next - sigma) * d
        if correct and sigma_next > 0:
            d_next = (ahead - denoise_fn(ahead, sigmas[i + 1])) / sigma_next
            ahead = x + (sigma_next - sigma) * (d + d_next) / 2
        x = ahead
    return x


def euler(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "n+1"],
    key: Key | None = None,
    *,
    churn: Churn | None = None,
) -> Float[Tensor, "B ..."]:
    """Euler steps of the probability-flow ODE dx/dsigma = (x - x_0) / sigma; order 1.

    key is for churn. Source: Karras et al. 2022, equation 1.

    Raises:
        ValueError: a grid of no steps, or not falling to at least 0; churn and no key.
    """
    return _edm(denoise_fn, x, sigmas, key, churn, correct=False)


def heun(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "n+1"],
    key: Key | None = None,
    *,
    churn: Churn | None = None,
) -> Float[Tensor, "B ..."]:
    """Heun steps of the probability-flow ODE; order 2, two calls a step, one for a step to 0.

    key is for churn. Source: Karras et al. 2022, algorithms 1 and (with churn) 2.

    Raises:
        ValueError: a grid of no steps, or not falling to at least 0; churn and no key.
    """
    return _edm(denoise_fn, x, sigmas, key, churn, correct=True)


def euler_ancestral(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "n+1"],
    key: Key,
    *,
    eta: float = 1.0,
) -> Float[Tensor, "B ..."]:
    """Euler steps down to sigma_down and noise back up to the next sigma; eta 0 is `euler`.

    sigma_up ** 2 = eta ** 2 sigma_next ** 2 (1 - sigma_next ** 2 / sigma ** 2), and
    sigma_down ** 2 + sigma_up ** 2 = sigma_next ** 2.

    Raises:
        ValueError: a grid of no steps, or not falling to at least 0; eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta ({eta}) must be in [0, 1]: 0 is euler")
    levels, sigmas = check_grid(sigmas, "sigmas"), moved(sigmas, x.device)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        down = math.sqrt(sigma_next**2 - up**2)
        d = (x - denoise_fn(x, sigmas[i])) / sigma
        x = x + (down - sigma) * d
        if up > 0:
            x = x + up * step_noise(key, i, x)
    return x


def _multistep(
    denoise_fn: DenoiseFn, x: Tensor, sigmas: Tensor, key: Key | None, eta: float
) -> Tensor:
    levels, sigmas = check_grid(sigmas, "sigmas"), moved(sigmas, x.device)
    x_0_before, h_before = None, 0.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x_0 = denoise_fn(x, sigmas[i])
        if sigma_next == 0:
            return x_0
        h = math.log(sigma / sigma_next)
        middle = x_0 if x_0_before is None else x_0 + (x_0 - x_0_before) * (h / (2 * h_before))
        x = math.exp(-(1 + eta) * h) * (x - middle) + middle
        if eta > 0:
            noise = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
            x = x + noise * step_noise(need_key(key, "eta above 0"), i, x)
        x_0_before, h_before = x_0, h
    return x


def dpmpp_2m(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "n+1"],
    key: Key | None = None,
) -> Float[Tensor, "B ..."]:
    """DPM-Solver++ (2M): order 2 in log sigma, one call a step; a step to 0 gives x_0 itself.

    key is not used. Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.

    Raises:
        ValueError: a grid of no steps, or not falling to at least 0.
    """
    return _multistep(denoise_fn, x, sigmas, key, 0.0)


def dpmpp_2m_sde(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "n+1"],
    key: Key,
    *,
    eta: float = 1.0,
) -> Float[Tensor, "B ..."]:
    """SDE-DPM-Solver++ (2M), midpoint form; eta 0 is `dpmpp_2m`.

    Source: Lu et al. 2022 (DPM-Solver++).

    Raises:
        ValueError: a grid of no steps, or not falling to at least 0; eta below 0.
    """
    if eta < 0:
        raise ValueError(f"eta ({eta}) must not be negative: 0 is dpmpp_2m")
    return _multistep(denoise_fn, x, sigmas, key, eta)


def flow_euler(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    times: Float[Tensor, "n+1"],
    key: Key | None = None,
) -> Float[Tensor, "B ..."]:
    """Euler steps of the rectified flow dx/dt = (x - x_0) / t; order 1.

    key is not used. Source: Liu et al. 2022.

    Raises:
        ValueError: a grid of no steps, or not falling in [0, 1].
    """
    levels, times = check_grid(times, "times", most=1.0), moved(times, x.device)
    for i, (t, t_next) in enumerate(itertools.pairwise(levels)):
        u = (x - denoise_fn(x, times[i])) / t
        x = x + (t_next - t) * u
    return x


def meanflow_sample(
    model_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "B ..."],
    times: Sequence[float] = (1.0, 0.0),
) -> Float[Tensor, "B ..."]:
    """Samples of a `diffusion.meanflow_loss` network, in one step or by any falling times.

    z_r = z_t - (t - r) u(z_t, r, t). Source: Geng et al. 2025, algorithm 2.
    """
    grid = torch.as_tensor(times, dtype=torch.float64)
    levels = check_grid(grid, "times", most=1.0)
    for t, r in itertools.pairwise(levels):
        ends = x.new_tensor([r, t])[:, None].expand(2, x.shape[0])
        x = x - (t - r) * model_fn(x, ends[0], ends[1])
    return x
