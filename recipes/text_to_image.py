"""Latent diffusion from scratch: pictures of coloured shapes from captions, on a laptop.

    python recipes/text_to_image.py                      # all stages, then a grid and a score

    python recipes/text_to_image.py --preset gpu         # larger, longer; minutes of one GPU
    python recipes/text_to_image.py sample --prompts "a small red circle above a large blue square"

Stages of one run, each from its own checkpoints (--resume goes on where it was stopped):

    1  an autoencoder learns pictures of 32 x 32 as latents of 4 x 8 x 8
    2  every picture is encoded once; latents are scaled to variance 1
    3  a diffusion transformer and a small text tower learn the flow from noise to latents, with
       caption dropout and a moving average of the parameters
    4  captions of the validation split and of combinations never seen are sampled with guidance,
       and a rule-based checker reads count, size, colour, kind and relation back

Measured with the defaults and seed 0, torch 2.13, on two cores of an AMD EPYC, 303 s in all: 84% of
the attributes of 64 validation captions are right (count 89, size 90, colour 82, kind 73, relation
88), 82% of 64 captions with combinations never seen. No GPU run is measured.
"""

import functools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from msfs_functional import checkpoint, errors, optim, random, samplers, schedules
from msfs_functional import config as configs
from msfs_functional import diffusion as df
from msfs_functional import noise_schedules as ns
from msfs_functional.compiling import graphed
from msfs_functional.guidance import classifier_free_guidance
from msfs_functional.models.clip import TextConfig, text_tower
from msfs_functional.models.dit import DiTConfig, dit
from msfs_functional.models.tiny_autoencoder import TinyAutoencoderConfig, tiny_autoencoder
from msfs_functional.params import Functional, Params, cast
from msfs_functional.synthetic import shapes
from msfs_functional.tracking import Tracker
from msfs_functional.train import TrainState, init_state, make_step

FACTOR, LATENT = 4, 4  # pixels along a latent, its channels
PAD, NOTHING, UNKNOWN = 0, 1, 2  # ids of the caption's words; NOTHING is the empty caption


@dataclass(frozen=True)
class Stage:
    """Training of one network."""

    steps: int
    batch: int  # pictures
    rate: float  # peak learning rate; warms up, stays, falls over the last quarter
    warmup: int = 50  # steps


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train", "sample"]] = "train"
    # settings that the other options start from: default, gpu
    preset: Literal["default", "gpu"] = "default"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoints
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    compile: bool | None = None  # None: on a GPU
    threads: int | None = None  # CPU threads; None: all cores
    debug: bool = False  # show tracebacks
    pictures: int = 12_000  # to train on
    width: int = 128  # of the transformer and the text tower
    depth: int = 4  # blocks of the transformer
    patch: int = 2  # latents along one side of its tokens
    pixels: int = 32  # channels of the autoencoder
    autoencoder: Stage = field(default_factory=lambda: Stage(500, 32, 2e-3))
    denoiser: Stage = field(default_factory=lambda: Stage(1000, 64, 2e-3))
    caption_dropout: float = 0.1  # share of captions left out, for guidance
    ema: float = 0.99  # decay of the average of the denoiser's parameters
    save_every: int = 200  # steps
    guidance: float = 3.0  # 1 is the caption alone
    sample_steps: int = 25
    samples: int = 64  # captions of each split that are checked
    prompts: tuple[str, ...] = ()  # sample: captions to draw


PRESETS = {
    "default": Config(),
    "gpu": Config(
        preset="gpu",
        pictures=50_000,
        width=256,
        depth=8,
        patch=1,
        pixels=64,
        autoencoder=Stage(3000, 128, 1e-3, warmup=200),
        denoiser=Stage(12_000, 256, 1e-3, warmup=500),
        ema=0.999,
        save_every=1000,
        sample_steps=50,
        samples=256,
    ),
}


class Models(NamedTuple):
    """The three networks of a run."""

    autoencoder: Functional
    denoiser: Functional
    text: Functional
    words: dict[str, int]


def vocabulary() -> dict[str, int]:
    """All words that captions are made of, in a fixed order."""
    parts = (*shapes.SIZES, *shapes.COLOURS, *shapes.KINDS, *shapes.RELATIONS)
    words = dict.fromkeys(["a", *" ".join(parts).split()])
    return {word: i for i, word in enumerate(words, start=UNKNOWN + 1)}


def make_models(config: Config) -> Models:
    words = vocabulary()
    text = TextConfig(
        width=config.width,
        depth=1,
        heads=4,
        hidden=2 * config.width,
        vocab=UNKNOWN + 1 + len(words),
        max_length=12,
        is_causal=False,
        pooling="last",
        projection=None,
    )
    network = DiTConfig(
        channels=LATENT,
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=4,
        hidden=3 * config.width,
        context=config.width,
    )
    coder = TinyAutoencoderConfig(
        width=config.pixels, encoder_depths=(0, 1, 1), decoder_depths=(1, 1, 0)
    )
    return Models(tiny_autoencoder(coder), dit(network), text_tower(text), words)


def tokens(captions: Sequence[str], words: dict[str, int], length: int = 12) -> dict[str, Tensor]:
    """Ids and lengths of captions, the ids padded; no word is the word NOTHING.

    Raises:
        ValueError: a caption longer than the context.
    """
    rows = [[words.get(w, UNKNOWN) for w in text.lower().split()] or [NOTHING] for text in captions]
    for text, row in zip(captions, rows, strict=True):
        if len(row) > length:
            raise ValueError(f"{text!r} has {len(row)} words, the context {length}: shorten it")
    ids = [row + [PAD] * (length - len(row)) for row in rows]
    return {"ids": torch.tensor(ids), "lengths": torch.tensor([len(row) for row in rows])}


def pictures_of(scenes: Sequence[shapes.Scene]) -> Tensor:
    """Rendered scenes, uint8 (N, 3, 32, 32)."""
    return torch.from_numpy(np.stack([shapes.render(scene) for scene in scenes])).permute(
        0, 3, 1, 2
    )


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_pictures(image: Tensor) -> np.ndarray:
    """[-1, 1] to uint8 (N, 32, 32, 3)."""
    values = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).cpu().numpy()


def part(params: Params, name: str) -> Params:
    return {n.removeprefix(f"{name}."): x for n, x in params.items() if n.startswith(f"{name}.")}


def coder_loss(models: Models, dtype: torch.dtype, params: Params, batch: Any, key: Tensor):
    """Squared and absolute error of the picture that comes back from its latents, which are kept
    small and disturbed a little, so that near latents are near pictures."""
    params, x = cast(params, dtype), to_signed(batch["pictures"]).to(dtype)
    z = models.autoencoder.apply(params, x, method="encode")
    disturbed = z + 0.05 * random.normal(key, z.shape).to(dtype)
    error = (models.autoencoder.apply(params, disturbed, method="decode") - x).float()
    squared = error.square().mean()
    return squared + error.abs().mean() + 1e-3 * z.float().square().mean(), {"squared": squared}


def flow_loss(
    models: Models, config: Config, dtype: torch.dtype, params: Params, batch: Any, key: Tensor
):
    """Squared error of the velocity eps - x_0 at logit-normal times, some captions left out."""
    noise_key, time_key, drop_key = random.split(key, 3)
    params, x_0 = cast(params, dtype), batch["latents"]
    n = x_0.shape[0]
    dropped = random.bernoulli(drop_key, config.caption_dropout, (n,))
    nothing = torch.zeros_like(batch["ids"]).index_fill(1, dropped.new_zeros(1).long(), NOTHING)
    ids = torch.where(dropped[:, None], nothing, batch["ids"])
    lengths = torch.where(dropped, 1, batch["lengths"])
    context = models.text.apply(part(params, "text"), ids, lengths=lengths, method="hidden_states")
    eps, t = random.normal(noise_key, x_0.shape), ns.logit_normal_times(time_key, (n,))
    x_t = df.add_noise(x_0, eps, ns.rectified_flow(t)).to(dtype)
    network = part(params, "denoiser")
    y = models.denoiser.apply(network, x_t, 1000 * t, context, context_lengths=lengths)
    return df.weighted_mse(y, eps - x_0), {}


def train_stage(
    config: Config,
    stage: Stage,
    name: str,
    loss_fn: Callable[..., Any],
    params: Params,
    data: dict[str, Tensor],
    ema: float | None = None,
) -> TrainState:
    """The loop of a stage; batch i is a function of seed and i, so runs resume bit-exactly."""
    run, device = config.out / str(config.name) / name, str(config.device)
    rate = schedules.warmup_stable_decay(
        stage.rate, stage.steps, warmup=min(stage.warmup, stage.steps // 2), decay=stage.steps // 4
    )
    optimizer = optim.adamw(rate, b2=0.99, weight_decay=0.01)
    key, batch_key = random.split(random.key(config.seed, device=device))
    state = init_state(params, optimizer, key, ema_decay=ema)
    if checkpoint.checkpoints(run / "checkpoints"):
        state = checkpoint.load(run / "checkpoints", state).state
    first = int(state.step)
    if first >= stage.steps:
        return state
    how = "regions" if config.compile else False  # a block is compiled once, not once for each
    step = make_step(loss_fn, optimizer, clip_norm=1.0, ema_decay=ema, compile=how, dynamic=False)
    if config.compile and device.startswith("cuda"):
        step = graphed(
            step
        )  # hundreds of small kernels: launching them one by one would take longer
    size = len(next(iter(data.values())))
    with (
        Tracker(run, stage.steps, name=name, step=first) as tracker,
        errors.interruptible() as stop,
    ):
        for count in range(first + 1, stage.steps + 1):
            chosen = random.integers(random.fold_in(batch_key, count), (stage.batch,), 0, size)
            state, metrics = step(state, {k: value[chosen] for k, value in data.items()})
            tracker.log(count, metrics)
            halt = stop.received is not None and count < stage.steps
            if halt or count % config.save_every == 0 or count == stage.steps:
                tracker.flush()
                checkpoint.save(run / "checkpoints", count, state, keep_last=1)
            if halt:
                again = f"--resume --out {config.out} --name {config.name}"
                tracker.note(f"saved; go on with: python recipes/text_to_image.py {again}")
                raise SystemExit(128 + (stop.received or 0))
    return state


class Trained(NamedTuple):
    """What sampling needs of a run."""

    models: Models
    autoencoder: Params
    denoiser: Params  # and the text tower, averaged
    mean: Tensor  # of the latents, (1, C, 1, 1)
    std: Tensor


@torch.no_grad()
def encode(models: Models, params: Params, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of all pictures with mean 0 and variance 1 by channel, and what was taken away."""
    parts = [
        models.autoencoder.apply(params, to_signed(rows), method="encode")
        for rows in pictures.split(500)
    ]
    z = torch.cat(parts)
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    return (z - mean) / std, mean, std


def train(config: Config) -> Trained:
    """Autoencoder, latents, denoiser."""
    models, device = make_models(config), str(config.device)
    dtype = getattr(torch, str(config.dtype))
    scenes = shapes.scenes(config.seed, config.pictures)
    pictures = pictures_of(scenes).to(device)
    coder = train_stage(
        config,
        config.autoencoder,
        "autoencoder",
        functools.partial(coder_loss, models, dtype),
        models.autoencoder.init(config.seed, device=device),
        {"pictures": pictures},
    ).params
    latents, mean, std = encode(models, coder, pictures)
    captions = tokens([shapes.caption(scene) for scene in scenes], models.words)
    parts = {"denoiser": models.denoiser, "text": models.text}
    params = {
        f"{name}.{n}": value
        for name, model in parts.items()
        for n, value in model.init(config.seed, device=device).items()
    }
    state = train_stage(
        config,
        config.denoiser,
        "denoiser",
        functools.partial(flow_loss, models, config, dtype),
        params,
        {"latents": latents, **{name: value.to(device) for name, value in captions.items()}},
        ema=config.ema,
    )
    return Trained(models, coder, state.ema or state.params, mean, std)


@torch.no_grad()
def draw(config: Config, trained: Trained, captions: Sequence[str], key: Tensor) -> np.ndarray:
    """A picture for each caption, uint8 (N, 32, 32, 3)."""
    models, device = trained.models, trained.mean.device
    text, network = part(trained.denoiser, "text"), part(trained.denoiser, "denoiser")

    def condition(captions: Sequence[str]) -> dict[str, Tensor]:
        given = {name: x.to(device) for name, x in tokens(captions, models.words).items()}
        ids, lengths = given["ids"], given["lengths"]
        states = models.text.apply(text, ids, lengths=lengths, method="hidden_states")
        return {"states": states, "lengths": lengths}

    def predict(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        lengths = condition["lengths"]
        return models.denoiser.apply(
            network, x, 1000 * t, condition["states"], context_lengths=lengths
        )

    nothing = condition([""] * len(captions))
    guided = classifier_free_guidance(predict, condition(captions), nothing, config.guidance)
    denoise_fn = df.denoiser(guided, ns.rectified_flow, "flow")
    side = shapes.SIDE // FACTOR
    x = random.normal(key.to(device), (len(captions), LATENT, side, side))
    z = samplers.flow_euler(denoise_fn, x, ns.flow_times(config.sample_steps))
    z = z * trained.std + trained.mean
    return to_pictures(models.autoencoder.apply(trained.autoencoder, z, method="decode"))


def grid(pictures: np.ndarray, columns: int = 8, scale: int = 4) -> Image.Image:
    """Pictures side by side, enlarged, rows filled up with black."""
    missing = -len(pictures) % columns
    pictures = np.concatenate([pictures, np.zeros_like(pictures[:1]).repeat(missing, 0)])
    rows = pictures.reshape(-1, columns, *pictures.shape[1:]).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(rows.reshape(-1, columns * shapes.SIDE, 3))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def evaluate(config: Config, trained: Trained) -> dict[str, float]:
    """Shares of attributes that the checker confirms, by split; writes a grid of each."""
    run, scores = config.out / str(config.name), {}
    for i, split in enumerate(("valid", "unseen")):
        scenes = shapes.scenes(config.seed, config.samples, split)
        captions = [shapes.caption(scene) for scene in scenes]
        key = random.fold_in(random.key(config.seed), i)
        pictures = draw(config, trained, captions, key)
        marks: dict[str, list[bool]] = defaultdict(list)
        for picture, scene in zip(pictures, scenes, strict=True):
            for name, right in shapes.check(picture, scene).items():
                marks[name.split()[0]].append(right)
                marks["all"].append(right)
        scores |= {f"{split}/{name}": float(np.mean(rights)) for name, rights in marks.items()}
        shares = ", ".join(f"{name} {np.mean(rights):.0%}" for name, rights in marks.items())
        print(f"{split}: {shares}")
        path = run / f"{split}.png"
        grid(pictures).save(path)
        (run / f"{split}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        print(f"  {path}, first row: {'; '.join(captions[:8])}")
    return scores


def sample(config: Config) -> None:
    """Draws the prompts with the networks of a run."""
    if not config.prompts:
        raise ValueError('--prompts (none) must be captions: "a small red circle"')
    trained = train(config)  # all steps are done, so this loads
    pictures = draw(config, trained, config.prompts, random.key(config.seed + 1))
    path = config.out / str(config.name) / "sample.png"
    grid(pictures, columns=min(8, len(pictures))).save(path)
    print(path)


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range; a run that exists, or none to go on with.
    """
    configs.check_numbers(config, ("seed", "warmup"))
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    for name in ("caption_dropout", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} ({getattr(config, name)}) must be in [0, 1)")
    if config.autoencoder.steps < 8 or config.denoiser.steps < 8:
        raise ValueError("steps of a stage must be at least 8: it warms up and cools down")
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


def main(config: Config) -> None:
    begin, config = time.perf_counter(), checked(config)
    if config.mode == "sample":
        sample(config)
        return
    if not config.resume:
        configs.new_run(config.out / str(config.name), config, overwrite=config.overwrite)
    evaluate(config, train(config))
    run = config.out / str(config.name)
    print(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=("sample",))
    return configs.parse(start, args, description=str(__doc__), prog="text_to_image.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
