"""What a diffusion model learns: targets, their conversions, loss weights, MeanFlow.

    x_t = alpha x_0 + sigma eps          (alpha, sigma) = coordinates(level): noise_schedules.py

Four targets, each y = a x_0 + b eps:

    target    a        b        Source
    eps       0        1        Ho et al. 2020
    x0        1        0
    v        -sigma    alpha    Salimans and Ho 2022
    flow     -1        1        Liu et al. 2022 (the velocity dx/dt of x_t = (1 - t) x_0 + t eps)

With D = alpha b - sigma a, a prediction y gives x_0 = (b x_t - sigma y) / D and
eps = (alpha y - a x_t) / D. An error in y is one of sigma / D in x_0 and of alpha / D in eps: that
alone makes a loss weight, stated for one target, right for all four.

    t = random.integers(t_key, (B,), 0, len(alpha_bar))
    level = variance_preserving(alpha_bar[t])
    x_t = add_noise(x_0, eps, level)
    y = model(x_t, t)
    weighted_mse(y, target_of(x_0, eps, level, "v"), min_snr_weight(level, "v"))

B batch. Levels are 0-d or (B,), and count as (B, 1, ...) beside an x of (B, ...).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import jvp

from msfs_functional import random
from msfs_functional.noise_schedules import Coordinates, Level, logit_normal_times, step_of

Target = Literal["eps", "x0", "v", "flow"]
DenoiseFn = Callable[[Tensor, Tensor], Tensor]  # (x, level 0-d) -> x_0, the mean of data given x


def moved(levels: Tensor, device: torch.device) -> Tensor:
    """Levels on this device. A copy to a GPU that waits would wait for all that it has to do."""
    return levels.to(device, non_blocking=device.type == "cuda")


def per_example(level: Tensor, x: Tensor) -> Tensor:
    """A level 0-d or (B,) in x's dtype and device, shaped to broadcast over x (B, ...)."""
    level = level.to(x.device, x.dtype)
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim)) if level.ndim else level


def add_noise(
    x_0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], level: Level
) -> Float[Tensor, "B ..."]:
    """The forward process, x_t = alpha x_0 + sigma eps."""
    return per_example(level.alpha, x_0) * x_0 + per_example(level.sigma, x_0) * eps


def target_of(
    x_0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], level: Level, target: Target
) -> Float[Tensor, "B ..."]:
    """What a network trained for `target` should say: a x_0 + b eps."""
    a, b = _coefficients(_over(level, x_0), target)
    return a * x_0 + b * eps


def to_x0_eps(
    y: Float[Tensor, "B ..."], x_t: Float[Tensor, "B ..."], level: Level, source: Target
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """The x_0 and eps that a prediction y of `source` means; x_t = alpha x_0 + sigma eps holds.

    eps says nothing of x_0 at alpha = 0, nor x_0 of eps at sigma = 0: those come out not finite.
    """
    over = _over(level, x_t)
    a, b = _coefficients(over, source)
    D = over.alpha * b - over.sigma * a
    # A target that is x_0 or eps is that prediction itself, to the last bit and where D is 0.
    x_0 = y if source == "x0" else (b * x_t - over.sigma * y) / D
    eps = y if source == "eps" else (over.alpha * y - a * x_t) / D
    return x_0, eps


def convert(
    y: Float[Tensor, "B ..."],
    x_t: Float[Tensor, "B ..."],
    level: Level,
    source: Target,
    target: Target,
) -> Float[Tensor, "B ..."]:
    """A prediction of `source` as one of `target`."""
    if source == target:
        return y
    x_0, eps = to_x0_eps(y, x_t, level, source)
    return target_of(x_0, eps, level, target)


def snr(level: Level) -> Tensor:
    """The signal-to-noise ratio (alpha / sigma) ** 2; inf at sigma = 0."""
    return (level.alpha / level.sigma) ** 2


def min_snr_weight(level: Level, target: Target, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the squared error of x_0, said as a weight for `target`'s own error.

    eps: min(SNR, gamma) / SNR. v, variance preserving: min(SNR, gamma) / (SNR + 1). Finite at zero
    terminal SNR (eps: 1) and at sigma = 0 (x0: gamma).

    Source: Hang et al. 2023.
    """
    if gamma <= 0:
        raise ValueError(f"gamma ({gamma}) must be positive; 5 is the paper's")
    to_eps, to_x0 = _error_ratios(level, target)
    return torch.minimum(to_eps**2, gamma * to_x0**2)


def p2_weight(level: Level, target: Target, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 / (k + SNR) ** gamma on the squared error of eps, said as a weight for `target`'s own.

    Finite for sigma > 0. Source: Choi et al. 2022.
    """
    if k <= 0 or gamma < 0:
        raise ValueError(f"k ({k}) must be positive and gamma ({gamma}) not negative")
    return _error_ratios(level, target)[0] ** 2 / (k + snr(level)) ** gamma


def weighted_mse(
    y: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."], weight: Tensor | float = 1.0
) -> Float[Tensor, ""]:
    """The mean over examples of weight times the mean squared error, in float32 at least.

    weight is a number (1 is the uniform weighting), 0-d or (B,).
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    each = (y.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
    return (each * weight).mean().to(dtype)


def denoiser(
    model_fn: Callable[[Tensor, Tensor], Tensor],
    coordinates: Coordinates,
    target: Target,
    *,
    alpha_bar: Float[Tensor, "N"] | None = None,
    device: torch.device | None = None,
) -> DenoiseFn:
    """The denoise_fn of a network: its prediction of `target`, turned into x_0.

    Args:
        model_fn: (x (B, ...), time (B,) in x's dtype) -> prediction (B, ...).
        coordinates: of the x and of the levels, as the network was trained.
        alpha_bar: the training schedule of a network that is told the step: its time is then the
            step whose alpha_bar is the level; without it, the time is the level itself.
        device: of the levels, where alpha_bar is copied once; default: where it lies.

    Raises:
        ValueError: an unknown target; eps with a schedule that ends in pure noise.
    """
    _check_target(target)
    if target == "eps" and alpha_bar is not None and float(alpha_bar[-1]) == 0:
        raise ValueError(
            "target ('eps') says nothing of x_0 where alpha_bar is 0, the last step of this "
            "schedule (zero terminal SNR): train on v, x0 or flow"
        )
    if alpha_bar is not None and device is not None:
        alpha_bar = moved(alpha_bar, device)

    def denoise_fn(x: Tensor, level: Tensor) -> Tensor:
        time = level if alpha_bar is None else step_of(alpha_bar, level)
        y = model_fn(x, time.to(x.device, x.dtype).expand(x.shape[0]))
        return to_x0_eps(y, x, coordinates(level), target)[0]

    return denoise_fn


def edm_denoiser(
    model_fn: Callable[[Tensor, Tensor], Tensor], *, sigma_data: float = 0.5
) -> DenoiseFn:
    """EDM's denoise_fn over sigma: c_skip x + c_out F(c_in x, c_noise), F's input and target of
    variance 1 at every sigma.

        c_skip = sigma_data ** 2 / (sigma ** 2 + sigma_data ** 2)     c_noise = ln(sigma) / 4
        c_out = sigma sigma_data / sqrt(sigma ** 2 + sigma_data ** 2)
        c_in = 1 / sqrt(sigma ** 2 + sigma_data ** 2)

    Train it on x_0 itself: weighted_mse(denoise_fn(x, sigma), x_0, edm_weight(sigma)).

    Args:
        model_fn: (x (B, ...), c_noise (B,) in x's dtype) -> F (B, ...).
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: sigma_data that is not positive.

    Source: Karras et al. 2022, table 1.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data ({sigma_data}) must be positive: the data's std")

    def denoise_fn(x: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + sigma_data**2).sqrt()
        time = (sigma.log() / 4).to(x.device, x.dtype).expand(x.shape[0])
        y = model_fn(x * per_example(1 / total, x), time)
        skip, out = sigma_data**2 / total**2, sigma * sigma_data / total
        return per_example(skip, x) * x + per_example(out, x) * y

    return denoise_fn


def edm_weight(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """(sigma ** 2 + sigma_data ** 2) / (sigma sigma_data) ** 2, on the squared error of x_0: each
    sigma then counts the same for F, as 1 / c_out ** 2. Source: Karras et al. 2022, table 1."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def preserving_to_exploding(denoise_fn: DenoiseFn) -> DenoiseFn:
    """A denoise_fn over alpha_bar, for samplers over sigma: it sees x / sqrt(1 + sigma ** 2)."""

    def exploding_fn(x: Tensor, sigma: Tensor) -> Tensor:
        alpha_bar = 1 / (1 + sigma**2)
        return denoise_fn(x * per_example(alpha_bar.sqrt(), x), alpha_bar)

    return exploding_fn


def flow_to_exploding(denoise_fn: DenoiseFn) -> DenoiseFn:
    """A denoise_fn over flow times, for the samplers over sigma: t = sigma / (1 + sigma)."""

    def exploding_fn(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise_fn(x / per_example(1 + sigma, x), sigma / (1 + sigma))

    return exploding_fn


def meanflow_times(
    key: Int64[Tensor, "2"],
    batch: int,
    *,
    mean: float = -0.4,
    std: float = 1.0,
    share: float = 0.25,
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Pairs r <= t of logit-normal times for `meanflow_loss`; a `share` of them has r < t."""
    if not 0 <= share <= 1:
        raise ValueError(f"share ({share}) must be in [0, 1]")
    times_key, share_key = random.split(key)
    pair = logit_normal_times(times_key, (2, batch), mean=mean, std=std)
    t, r = pair.amax(0), pair.amin(0)
    return torch.where(random.bernoulli(share_key, share, (batch,)), r, t), t


def meanflow_errors(
    model_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_0: Float[Tensor, "B ..."],
    eps: Float[Tensor, "B ..."],
    r: Float[Tensor, "B"],
    t: Float[Tensor, "B"],
    *,
    velocity: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B"]:
    """MeanFlow: the network's u is the mean velocity from t to r, so one step makes a sample; the
    squared error of each example's u, summed over its numbers.

    u (z, r, t) = v - (t - r) d/dt u (z, r, t) along the flow, dz/dt = v = eps - x_0: one `jvp`
    with tangents (v, 0, 1). The right-hand side is held fixed. With r = t it is flow matching.

    Args:
        model_fn: (z (B, ...), r (B,), t (B,)) -> u (B, ...); its operations need forward rules.
        velocity: v; default: eps - x_0. With w (eps - x_0) + (1 - w) u(z, t, t) of the network
            without a condition, the samples come out guided by w in one call a step.

    Source: Geng et al. 2025, algorithm 1; equation 19 (velocity).
    """
    z = add_noise(x_0, eps, Level(1 - t, t))
    v = eps - x_0 if velocity is None else velocity
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))
    u, du_dt = jvp(model_fn, (z, r, t), tangents)[:2]
    fixed = v - per_example(t - r, v) * du_dt.detach()
    return (u - fixed).square().flatten(1).sum(1)


def meanflow_loss(
    errors: Float[Tensor, "B"], *, power: float = 1.0, c: float = 1e-3
) -> Float[Tensor, ""]:
    """`meanflow_errors`, each divided by (itself + c) ** power, held fixed; power 0 is plain.

    With power 1 the loss is about 1 however well the network does: look at the errors.

    Source: Geng et al. 2025, equation 22.
    """
    return (errors / (errors.detach() + c) ** power).mean()


def _check_target(target: str) -> None:
    if target not in get_args(Target):
        raise ValueError(f"target ({target!r}) must be one of {', '.join(get_args(Target))}")


def _over(level: Level, x: Tensor) -> Level:
    return Level(per_example(level.alpha, x), per_example(level.sigma, x))


def _coefficients(level: Level, target: Target) -> tuple[Tensor | float, Tensor | float]:
    """a and b of y = a x_0 + b eps."""
    _check_target(target)
    return {
        "eps": (0.0, 1.0),
        "x0": (1.0, 0.0),
        "v": (-level.sigma, level.alpha),
        "flow": (-1.0, 1.0),
    }[target]


def _error_ratios(level: Level, target: Target) -> tuple[Tensor, Tensor]:
    """Sizes of the errors in eps and in x_0 that an error of 1 in the target makes."""
    alpha, sigma = level
    _check_target(target)
    one = torch.ones_like(alpha)
    if target == "eps":
        return one, sigma / alpha
    if target == "x0":
        return alpha / sigma, one
    D = alpha**2 + sigma**2 if target == "v" else alpha + sigma
    return alpha / D, sigma / D
