"""The exact log-likelihood of data under a diffusion model, by its probability-flow ODE."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap

from msfs_functional.diffusion import DenoiseFn
from msfs_functional.samplers import Key, check_grid, draw, need_key


def log_likelihood(
    denoise_fn: DenoiseFn,
    x: Float[Tensor, "B ..."],
    sigmas: Float[Tensor, "n+1"],
    key: Key | None = None,
    *,
    probes: int = 0,
    chunk: int = 64,
) -> Float[Tensor, "B"]:
    """log p of x at the last (least) sigma, in nats, by the probability-flow ODE; order 2.

    log p(x) = log N(x_T; 0, sigma_max ** 2) + integral of div f dsigma, f = (x - x_0) / sigma,
    taken upwards in Heun steps. Divide by (dims ln 2) for bits per dim.

    Args:
        sigmas: the grid of a sampler, but its last level positive: its density is what comes out.
        key, probes: 0 takes the exact divergence, one `jvp` a dim; else Hutchinson's estimate from
            that many random signs, the same at each level, unbiased.
        chunk: directions pushed through the network at once, which is what bounds the memory.

    Raises:
        ValueError: a grid of no steps, not falling, or ending at 0; probes below 0, or without key.

    Source: Song et al. 2021 (score SDE), equation 39; Grathwohl et al. 2019.
    """
    levels, sigmas = check_grid(sigmas, "sigmas"), sigmas.to(x.device)
    if levels[-1] == 0:
        raise ValueError("sigmas must end above 0, where a density exists: drop the last level")
    if probes < 0:
        raise ValueError(f"probes ({probes}) must not be negative; 0 is exact")
    if chunk < 1:
        raise ValueError(f"chunk ({chunk}) must be at least 1 direction")
    size = x[0].numel()
    if probes:
        spread = x.expand(probes, *x.shape).transpose(0, 1)
        noise = draw(need_key(key, "probes"), spread).transpose(0, 1)
        signs = torch.where(noise < 0, -torch.ones_like(noise), 1.0)
    else:
        eye = torch.eye(size, dtype=x.dtype, device=x.device)
        signs = eye.view(size, 1, *x.shape[1:]).expand(size, *x.shape)

    def slope(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        def f(x: Tensor) -> Tensor:
            return (x - denoise_fn(x, sigmas[i])) / levels[i]

        def along(sign: Tensor) -> tuple[Tensor, Tensor]:
            value, tangent = jvp(f, (x,), (sign,))[:2]
            return value, (tangent * sign).flatten(1).sum(1)

        values, traces = vmap(along, chunk_size=chunk)(signs)
        return values[0], traces.mean(0) if probes else traces.sum(0)

    integral = x.new_zeros(x.shape[0])
    d, trace = slope(x, len(levels) - 1)
    for i in range(len(levels) - 2, -1, -1):
        step = levels[i] - levels[i + 1]
        d_next, trace_next = slope(x + step * d, i)
        x = x + step * (d + d_next) / 2
        integral = integral + step * (trace + trace_next) / 2
        d, trace = slope(x, i) if i else (d_next, trace_next)
    top = levels[0]
    prior = -0.5 * (x / top).square().flatten(1).sum(1)
    return prior - size * (math.log(top) + 0.5 * math.log(2 * math.pi)) + integral
