"""Settings of text_to_image.py: what can be asked for, its presets, and what is refused."""

import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from msfs_functional import config as configs
from msfs_functional import meshes
from msfs_functional.published_process import OVER_ALPHA_BAR, Sampler
from msfs_functional.synthetic import shapes

FACTOR, LATENT = 4, 4  # pixels along a latent, its channels
HEADS = 4  # of every attention


@dataclass(frozen=True)
class Data:
    """Pictures, with captions, classes or neither."""

    # shapes: rendered here; mnist:DIR or cifar10:DIR: their files; a folder of pictures with
    # metadata.jsonl, with a text beside each, or in one folder a class; else a name on the Hub
    source: str = "shapes"
    config: str | None = None  # configuration of a Hub data set
    # columns of a Hub data set; None: the first one with a usual name. Classes may be captions
    picture: str | None = None
    caption: str | None = None
    split: str = "train"
    size: int = 32  # pixels along a side
    pictures: int | None = None  # to train on; None: 12,000 scenes, or all there are
    words: int = 4000  # the commonest are known
    length: int = 24  # words of a caption that are read


@dataclass(frozen=True)
class Stage:
    """Training of one network."""

    steps: int
    batch: int  # pictures, of all ranks together
    rate: float  # peak learning rate; warms up, stays, falls over the last quarter
    warmup: int = 50  # steps


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis, under torchrun; one may be -1 and takes the rest."""

    dp_replicate: int = 1  # equal parameters, other pictures
    dp_shard: int = -1  # shards of the parameters, other pictures


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train", "sample", "evaluate"]] = "train"
    # settings that the other options start from: default, gpu
    preset: Literal["default", "gpu"] = "default"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoints
    # train: the last stage for now; --resume goes on
    until: Literal["autoencoder", "latents", "denoiser"] = "denoiser"
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None  # None: on a GPU
    threads: int | None = None  # CPU threads; None: all cores
    debug: bool = False  # show tracebacks
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    latents: bool = True  # learn latents of an autoencoder; False: the pixels themselves
    # convolutions and squared error; or Stable Diffusion's with KL, LPIPS and a discriminator
    coder: Literal["tiny", "kl"] = "tiny"
    gan: float = 0.1  # weight of the discriminator, of kl
    lpips: tuple[Path, ...] = ()  # of kl: files of a VGG-16 and its calibration; else left out
    backbone: Literal["dit", "unet"] = "dit"
    # meanflow draws in few steps, or one; eps, x0 and v are learnt on Stable Diffusion's schedule
    objective: Literal["flow", "meanflow", "eps", "x0", "v"] = "flow"
    # of eps, x0 and v, see samplers; None: ddim. Others than it and ddpm start at eps's last step
    sampler: Sampler | None = None
    width: int = 128  # of the denoiser (its first level's, of a UNet) and the text tower
    depth: int = 4  # blocks of the transformer; of a UNet's level
    patch: int = 2  # latents along one side of the transformer's tokens
    pixels: int = 32  # channels of the autoencoder
    autoencoder: Stage = field(default_factory=lambda: Stage(400, 32, 2e-3))
    denoiser: Stage = field(default_factory=lambda: Stage(800, 64, 2e-3))
    caption_dropout: float = 0.1  # share of captions left out, for guidance
    ema: float = 0.99  # decay of the average of the denoiser's parameters
    save_every: int = 200  # steps
    draw_every: int = 400  # steps of the denoiser from one grid to the next
    most_skipped: int = 100  # steps whose loss was not finite, after which a run stops
    guidance: float = 3.0  # 1 is the caption alone
    sample_steps: int = 25
    samples: int = 64  # captions of each split that are checked
    measured: int = 256  # samples whose features are compared with real ones; 0: none
    # whose features: trained is a small classifier of the data's words or classes; resnet, of
    # CIFAR-10, has --weights; inception needs torch-fidelity or torchvision
    features: Literal["trained", "resnet", "inception"] = "trained"
    weights: Path | None = None  # file of the extractor
    prompts: tuple[str, ...] = ()  # sample: captions to draw, or names of classes


PRESETS = {
    "default": Config(),
    "gpu": Config(
        preset="gpu",
        data=Data(pictures=50_000),
        width=256,
        depth=8,
        patch=1,
        pixels=64,
        autoencoder=Stage(2000, 128, 1e-3, warmup=200),
        denoiser=Stage(5000, 256, 1e-3, warmup=500),
        ema=0.999,
        save_every=1000,
        draw_every=2500,
        sample_steps=50,
        samples=256,
        measured=2048,
    ),
}


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range; a run that exists, or none to go on with.
    """
    if config.width % (4 * HEADS):
        raise ValueError(f"--width ({config.width}) must be a multiple of {4 * HEADS}")
    numbers = replace(config, mesh=Mesh(dp_shard=1))  # whose -1 is a number, too
    configs.check_numbers(numbers, ("seed", "warmup", "measured", "gan"))
    configs.check_run(config)
    for name in ("caption_dropout", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be in [0, 1)")
    if config.autoencoder.steps < 8 or config.denoiser.steps < 8:
        raise ValueError("steps of a stage must be at least 8: it warms up and cools down")
    step = (FACTOR if config.latents else 1) * (config.patch if config.backbone == "dit" else 1)
    if config.data.size % step:
        raise ValueError(
            f"--data.size ({config.data.size}) must be a multiple of {step}: "
            f"{'the autoencoder halves it twice' if config.latents else 'pixels'}, and tokens are "
            f"{config.patch} x {config.patch}"
        )
    if config.data.source == "shapes" and config.data.size != shapes.SIDE:
        raise ValueError(f"--data.size ({config.data.size}) must be {shapes.SIDE} for shapes")
    if config.coder == "kl" and not config.latents:
        raise ValueError(
            "--coder kl makes latents, which --no-latents leaves out: give one of them"
        )
    if config.lpips and config.coder != "kl":
        raise ValueError("--lpips is a loss of --coder kl: add it, or leave --lpips out")
    if config.coder == "kl" and config.pixels % 4:
        raise ValueError(f"--pixels ({config.pixels}) must be a multiple of 4: groups of a norm")
    if config.gan != Config.gan and config.coder != "kl":
        raise ValueError("--gan is a loss of --coder kl: add it, or leave --gan out")
    if config.prompts and config.mode != "sample":
        raise ValueError("--prompts is of sample: text_to_image.py sample --prompts ...")
    if config.weights is not None and config.features == "trained":
        raise ValueError("--weights is of --features resnet or inception: add one of them")
    choices = {name: getattr(config.data, name) for name in ("config", "picture", "caption")}
    flows = config.objective in ("flow", "meanflow")
    if config.sampler and flows:
        raise ValueError(
            f"--sampler is of --objective eps, x0 or v: {config.objective} has its own"
        )
    if config.sampler not in (None, *OVER_ALPHA_BAR) and config.objective != "eps":
        raise ValueError(
            f"--sampler ({config.sampler}) must be one of {', '.join(OVER_ALPHA_BAR)}: the "
            f"schedule of {config.objective} starts in pure noise, which has no sigma"
        )
    if not flows and config.sample_steps > 1000:
        raise ValueError(
            f"--sample-steps ({config.sample_steps}) must be at most 1000, all there are"
        )
    given = [f"--data.{name}" for name, value in choices.items() if value]
    given += ["--data.split"] if config.data.split != Data.split else []
    if config.data.source == "shapes" and given:
        raise ValueError(f"{', '.join(given)}: shapes are rendered, name a --data.source, too")
    if config.features == "resnet" and config.weights is None:
        raise ValueError("--features resnet needs --weights, the file of a ResNet for CIFAR-10")
    world = int(os.environ.get("WORLD_SIZE", 1))
    meshes.degrees(world, **asdict(config.mesh))
    for stage in ("autoencoder", "denoiser"):
        if getattr(config, stage).batch % world:
            raise ValueError(f"{world} processes must divide --{stage}.batch: change one of them")
    machine = configs.machine(config.device, config.dtype, config.compile)
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(
        config,
        name=config.name or configs.free_name(config.out, "text_to_image"),
        device=machine.device,
        dtype=machine.dtype,
        compile=machine.compile,
    )
