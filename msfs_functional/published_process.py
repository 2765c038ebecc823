"""How a published denoiser was trained, and the steps at which samplers walk it.

process = read_process(json)                       # of a folder's scheduler_config.json
json = write_process(process)                      # for diffusers
denoise_fn, grid, coordinates = steps_of(denoise_fn, process, "dpmpp_2m", 30, "karras")
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from msfs_functional import noise_schedules as ns
from msfs_functional.diffusion import DenoiseFn, Target, preserving_to_exploding

Sampler = Literal["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"]
OVER_ALPHA_BAR = ("ddpm", "ddim")  # the others are over sigma
Spacing = Literal["leading", "linspace", "trailing", "karras"]
TARGETS: dict[str, Target] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True)
class Process:
    """How the UNet was trained, and which steps its authors sample at."""

    alpha_bar: Float[Tensor, "N"]
    target: Target
    spacing: Spacing = "leading"
    offset: int = 1
    final: float = 1.0  # alpha_bar of what comes out of the last step
    clip: float | None = None  # bound of every prediction of x_0


def read_process(hub: dict[str, Any]) -> Process:
    """What a scheduler_config.json says.

    Raises:
        ValueError: a schedule, target or spacing that is not known here.
    """
    start, end = hub.get("beta_start", 1e-4), hub.get("beta_end", 0.02)
    steps, name = hub.get("num_train_timesteps", 1000), hub.get("beta_schedule", "linear")
    schedules = {
        "linear": lambda: ns.linear(steps, start, end),
        "scaled_linear": lambda: ns.scaled_linear(steps, start, end),
        "squaredcos_cap_v2": lambda: ns.cosine(steps),
        "sigmoid": lambda: ns.sigmoid(steps, start, end),
    }
    betas = hub.get("trained_betas")
    if betas is None and name not in schedules:
        raise ValueError(f"beta_schedule ({name!r}) must be one of {list(schedules)}")
    if betas is None:
        alpha_bar = schedules[name]()
    else:
        alpha_bar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    if hub.get("rescale_betas_zero_snr", False):
        alpha_bar = ns.zero_terminal_snr(alpha_bar)
    target = hub.get("prediction_type", "epsilon")
    if target not in TARGETS:
        raise ValueError(f"prediction_type ({target!r}) must be one of {list(TARGETS)}")
    return Process(
        alpha_bar,
        TARGETS[target],
        "karras" if hub.get("use_karras_sigmas") else hub.get("timestep_spacing", "leading"),
        hub.get("steps_offset", 0),
        1.0 if hub.get("set_alpha_to_one", True) else float(alpha_bar[0]),
        hub.get("clip_sample_range", 1.0) if hub.get("clip_sample", False) else None,
    )


def write_process(process: Process) -> dict[str, Any]:
    """A scheduler_config.json that diffusers and `read_process` read as this process.

    A schedule that is none of the usual ones is written as its betas.

    Raises:
        ValueError: a process whose last step ends elsewhere than at data or at step 0.
    """
    steps, alpha_bar, first = len(process.alpha_bar), process.alpha_bar, float(process.alpha_bar[0])
    if process.final not in (1.0, first):
        raise ValueError(f"final ({process.final}) must be 1 or alpha_bar of step 0 ({first})")
    hub: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": steps,
        "prediction_type": {target: name for name, target in TARGETS.items()}[process.target],
        "timestep_spacing": process.spacing,
        "steps_offset": process.offset,
        "set_alpha_to_one": process.final == 1.0,
        "clip_sample": process.clip is not None,
    }
    if process.spacing == "karras":
        hub["_class_name"] = "DPMSolverMultistepScheduler"
        hub |= {"timestep_spacing": "leading", "use_karras_sigmas": True}
    if process.clip is not None:
        hub["clip_sample_range"] = process.clip
    usual = {
        "linear": (ns.linear(steps), 1e-4, 0.02),
        "scaled_linear": (ns.scaled_linear(steps), 0.00085, 0.012),
        "squaredcos_cap_v2": (ns.cosine(steps), 1e-4, 0.02),
    }
    for (name, (plain, start, end)), zero in itertools.product(usual.items(), (False, True)):
        whole = ns.zero_terminal_snr(plain) if zero else plain
        if torch.equal(whole, alpha_bar):
            options = {"beta_schedule": name, "rescale_betas_zero_snr": zero}
            return hub | options | {"beta_start": start, "beta_end": end}
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return hub | {"trained_betas": (1 - alpha_bar / before).tolist()}


def steps_of(
    denoise_fn: DenoiseFn, process: Process, sampler: Sampler, steps: int, spacing: Spacing
) -> tuple[DenoiseFn, Tensor, ns.Coordinates]:
    """(denoise_fn, grid, coordinates) as a sampler wants them.

    Args:
        denoise_fn: in variance-preserving coordinates, over alpha_bar.

    Raises:
        ValueError: steps below 1; a spacing that is not of this sampler.
    """
    count = len(process.alpha_bar)
    if sampler in OVER_ALPHA_BAR:
        if spacing == "karras":
            raise ValueError(
                f"spacing ('karras') is of samplers over sigma, not of {sampler}: give another"
            )
        chosen = ns.spaced_steps(count, steps, spacing, offset=process.offset)
        grid = ns.alpha_bars_at(process.alpha_bar, chosen, final=process.final)
        return denoise_fn, grid, ns.variance_preserving
    if spacing == "karras":
        low, high = (float(ns.sigma_of(process.alpha_bar[i])) for i in (0, -1))
        grid = ns.karras_sigmas(steps, sigma_min=low, sigma_max=high)
    else:
        chosen = ns.spaced_steps(count, steps, spacing, offset=process.offset)
        grid = ns.sigmas_at(process.alpha_bar, chosen)
    return preserving_to_exploding(denoise_fn), grid, ns.variance_exploding
