"""What a sampler is steered by: prompts, gradients, bounds, known pixels, an image to start from.

    guided_fn = classifier_free_guidance(denoise_fn, prompt, negative_prompt, 7.5)
    x, rest = image_to_image(image, grid, 0.6, noise_key, variance_exploding)
    image = heun(inpaint(guided_fn, image, mask), x, rest, key)

Each wraps a function of (x, level) in one of the same kind, so they nest in any order. B batch.
"""

import math
from collections.abc import Callable
from typing import Any

import optree
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from msfs_functional.diffusion import DenoiseFn, add_noise, per_example
from msfs_functional.noise_schedules import Coordinates
from msfs_functional.samplers import Key, draw


def classifier_free_guidance(
    predict_fn: Callable[[Tensor, Tensor, Any], Tensor],
    condition: Any,
    negative: Any,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    repeat: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """negative + scale (positive - negative), both from one call of twice the conditions.

    Around a denoise_fn that also takes a condition, or around a network inside `denoiser`: the same
    for every target, since x_0, eps, v and flow are affine in each other. Only `rescale` differs:
    published models rescale the network's own prediction.

    Args:
        predict_fn: (x, level 0-d or (B,), condition) -> prediction like x.
        condition, negative: pytrees of tensors with leading dim B; negative is the empty prompt's,
            or a negative prompt's.
        scale: 1 is the condition alone, 0 the negative alone.
        rescale: in [0, 1], share of the way to the standard deviation of the positive prediction.
        interval: levels (low, high) within which guidance acts; outside, scale is 1.
        repeat: False gives predict_fn x and level once, with the 2 B conditions, to compute only
            once what does not depend on them, as `unet` does.

    Raises:
        ValueError: scale below 0; rescale outside [0, 1]; interval that is not low <= high.

    Source: Ho and Salimans 2022; Lin et al. 2023, section 3.4; Kynkäänniemi et al. 2024.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance scale ({scale}) must be at least 0; 1 is no guidance")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale ({rescale}) must be in [0, 1]; 0 is off")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval {interval} must be (low, high): swap its ends")
    both = optree.tree_map(lambda p, n: torch.cat([p, n]), condition, negative)

    def guided_fn(x: Tensor, level: Tensor) -> Tensor:
        def twice(t: Tensor) -> Tensor:
            return torch.cat([t, t]) if repeat and t.ndim else t

        positive, other = predict_fn(twice(x), twice(level), both).chunk(2)
        w: float | Tensor = scale
        if interval is not None:
            acts = (level >= interval[0]) & (level <= interval[1])
            w = per_example(torch.where(acts, scale, 1.0), x)
        y = other + w * (positive - other)
        if rescale > 0:
            dims = tuple(range(1, y.ndim))
            ratio = positive.std(dims, keepdim=True) / y.std(dims, keepdim=True)
            y = y * (1 - rescale + rescale * ratio)
        return y

    return guided_fn


def gradient_guidance(
    denoise_fn: DenoiseFn,
    log_prob_fn: Callable[[Tensor], Tensor],
    coordinates: Coordinates,
    *,
    scale: float = 1.0,
) -> DenoiseFn:
    """Bends the samples by any function: x_0 + scale sigma ** 2 / alpha grad_x log_prob(x_0(x)).

    Tweedie's formula, x_0 = (x + sigma ** 2 score) / alpha, with the gradient added to the score.

    Args:
        log_prob_fn: x_0 (B, ...) -> (B,), each from its own example; unnormalised, in nats.
        coordinates: of x and the levels; alpha must not be 0.

    Raises:
        ValueError: scale below 0.

    Source: Dhariwal and Nichol 2021; Chung et al. 2023 (through the denoiser).
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance scale ({scale}) must be at least 0; 0 is no guidance")

    def guided_fn(x: Tensor, level: Tensor) -> Tensor:
        def with_x_0(x: Tensor) -> tuple[Tensor, Tensor]:
            x_0 = denoise_fn(x, level)
            return log_prob_fn(x_0), x_0

        log_prob, pull, x_0 = vjp(with_x_0, x, has_aux=True)  # pyright: ignore[reportAssignmentType]
        (gradient,) = pull(torch.ones_like(log_prob))
        alpha, sigma = coordinates(level)
        return x_0 + scale * per_example(sigma**2 / alpha, x) * gradient

    return guided_fn


def inpaint(
    denoise_fn: DenoiseFn, known: Float[Tensor, "B ..."], mask: Float[Tensor, "B ..."]
) -> DenoiseFn:
    """Keeps `known` where mask is 1 (or True) and lets the model fill in where it is 0.

    The known part of x_0 is put into every prediction. That part of x then follows the forward
    process of `known` exactly, by each sampler's own noise, and ends as `known` at level 0.
    """

    def inpaint_fn(x: Tensor, level: Tensor) -> Tensor:
        return torch.lerp(denoise_fn(x, level), known.to(x.dtype), mask.to(x.dtype))

    return inpaint_fn


def clip_x0(
    denoise_fn: DenoiseFn, most: float = 1.0, *, quantile: float | None = None
) -> DenoiseFn:
    """Keeps every prediction of x_0 in [-most, most]: pixels cannot be brighter than white.

    Args:
        quantile: of |x_0| in an example, in (0, 1]: where it exceeds `most`, the example is clamped
            there and scaled back to `most` (dynamic thresholding), which strong guidance needs.

    Raises:
        ValueError: most that is not positive; a quantile outside (0, 1].

    Source: Ho et al. 2020 (their code); Saharia et al. 2022, section 2.3.
    """
    if not most > 0:
        raise ValueError(f"most ({most}) must be positive: 1 for images in [-1, 1]")
    if quantile is not None and not 0 < quantile <= 1:
        raise ValueError(f"quantile ({quantile}) must be in (0, 1], or None to clamp alone")

    def clipped_fn(x: Tensor, level: Tensor) -> Tensor:
        x_0 = denoise_fn(x, level)
        if quantile is None:
            return x_0.clamp(-most, most)
        edge = torch.quantile(x_0.abs().flatten(1), quantile, dim=1).clamp(min=most)
        edge = per_example(edge, x_0)
        return torch.minimum(torch.maximum(x_0, -edge), edge) * (most / edge)

    return clipped_fn


def image_to_image(
    x_0: Float[Tensor, "B ..."],
    grid: Float[Tensor, "n+1"],
    strength: float,
    key: Key,
    coordinates: Coordinates,
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "m+1"]]:
    """x_0 with noise up to the level from which the last m = strength n steps (at least 1) start.

    Returns:
        x and the rest of the grid: sampler(denoise_fn, x, rest, other_key).

    Raises:
        ValueError: strength outside (0, 1]; a grid of no steps.

    Source: Meng et al. 2022 (SDEdit).
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength ({strength}) must be in (0, 1]; 1 forgets the image")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"grid {tuple(grid.shape)} must hold n + 1 levels for n >= 1 steps")
    steps = max(1, int((len(grid) - 1) * strength + 1e-9))
    rest = grid[len(grid) - 1 - steps :]
    return add_noise(x_0, draw(key, x_0), coordinates(rest[0])), rest
