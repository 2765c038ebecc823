"""Latent diffusion from scratch: pictures from captions or classes, on a laptop or many GPUs.

    python recipes/text_to_image.py                      # all stages, then a grid and a score
    python recipes/text_to_image.py --preset gpu         # larger, longer; minutes of one GPU
    python recipes/text_to_image.py --until latents      # stage by stage: then --resume
    python recipes/text_to_image.py sample --prompts "a small red circle above a large blue square"
    python recipes/text_to_image.py evaluate             # the newest run again
    torchrun --nproc-per-node 4 recipes/text_to_image.py     # any number, the same pictures
    python recipes/text_to_image.py --objective meanflow --sample-steps 1    # or a few
    python recipes/text_to_image.py --objective v                            # or eps, x0

    --data.source mnist:DIR | cifar10:DIR | FOLDER | HUB-NAME [--data.caption COLUMN]

Stages of one run, each from its own checkpoints (--resume goes on where it was stopped):

    1  an autoencoder learns pictures of 32 x 32 as latents of 4 x 8 x 8 (--no-latents: left out)
    2  every picture is encoded once; latents are scaled to variance 1 and kept
    3  a diffusion transformer (or UNet) and a small text tower learn the flow from noise to latents
       with caption dropout and a moving average of the parameters
    4  captions of the validation split and of combinations never seen are sampled with guidance;
       a rule-based checker reads count, size, colour, kind and relation back, and features of
       samples are compared with those of real pictures (FID, KID, precision, recall)

Every picture of a step has a random key of its own, and so has every sample: any number of ranks
trains the same model to rounding and draws the same pictures.

Measured: the README's section "Pictures from captions".
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from text_to_image_models import (
    About,
    Models,
    coder_loss,
    denoiser_loss,
    describe,
    kl_loss,
    make_models,
    predict_of,
    process_of,
    to_bytes,
    to_signed,
    told_of,
)
from text_to_image_settings import FACTOR, PRESETS, Config, Stage, checked
from torch import Tensor
from torch.distributed.tensor import Shard

from msfs_functional import (
    agreement,
    checkpoint,
    errors,
    features,
    fidelity,
    image_sets,
    images,
    launching,
    meshes,
    optim,
    perceptual,
    pictures,
    random,
    samplers,
    schedules,
    tracking,
)
from msfs_functional import config as configs
from msfs_functional import diffusion as df
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional import noise_schedules as ns
from msfs_functional.compiling import graphed
from msfs_functional.gathering import Layout, gathered, sharded
from msfs_functional.guidance import classifier_free_guidance
from msfs_functional.params import Functional, Params
from msfs_functional.published_process import steps_of
from msfs_functional.sharding import gather
from msfs_functional.stages import CHECKPOINTS, run_stage
from msfs_functional.synthetic import shapes
from msfs_functional.train import TrainState, init_state, make_step
from msfs_functional.words import Words

ABOUT, LATENTS = "about.json", "latents.safetensors"  # files of a run
WHOLE = Layout(rules=[(r"", {"dp_shard": Shard(0)})])  # gathered around the loss, whole


def say(text: str) -> None:
    if agreement.rank() == 0:
        print(text, flush=True)


def folder_of(config: Config) -> Path:
    return config.out / str(config.name)


# ------------------------------------------------------------------------------------------- data


def read_data(config: Config) -> image_sets.ImageSet:
    """The pictures to train on."""
    data = config.data
    if data.source != "shapes":
        options: dict[str, Any] = {"limit": data.pictures, "split": data.split}
        options |= {"config": data.config, "picture": data.picture, "caption": data.caption}
        return image_sets.load(data.source, data.size, **options)
    scenes = shapes.scenes(config.seed, data.pictures or 12_000)
    drawn = np.stack([shapes.render(scene) for scene in scenes])
    captions = tuple(map(shapes.caption, scenes))
    return image_sets.ImageSet(torch.from_numpy(drawn).permute(0, 3, 1, 2), captions)


class Drawn:
    """Batches of rows, each with a random key of its own; batch i is a function of key and i.

    Args:
        data: tensors with their rows in dim 0.
        batch: rows, of all processes together.
        share: (number, count): this process takes rows number, ... of each batch.
    """

    def __init__(self, data: dict[str, Tensor], batch: int, key: Tensor, share: tuple[int, int]):
        self.data, self.batch, self.key, self.done = data, batch, key, 0
        own = batch // share[1]
        self.mine = slice(share[0] * own, (share[0] + 1) * own)

    def __next__(self) -> dict[str, Tensor]:
        self.done += 1
        row_key, key = random.split(random.fold_in(self.key, self.done))
        count = len(next(iter(self.data.values())))
        rows = random.integers(row_key, (self.batch,), 0, count)[self.mine]
        keys = random.split(key, self.batch)[self.mine]
        return {"keys": keys, **{name: x[rows] for name, x in self.data.items()}}

    def state(self) -> dict[str, int]:
        return {"done": self.done}

    def restore(self, state: dict[str, int]) -> None:
        self.done = state["done"]


# --------------------------------------------------------------------------------------- training


class Trained(NamedTuple):
    """What sampling needs of a run."""

    about: About
    models: Models
    coder: Params
    denoiser: Params  # averaged
    mean: Tensor  # of the latents, (1, C, 1, 1)
    std: Tensor


def train_stage(
    config: Config,
    stage: Stage,
    name: str,
    loss_fn: Callable[..., Any],
    model: Functional,
    data: dict[str, Tensor],
    *,
    ema: float | None = None,
    draw_fn: Callable[[int, Params], dict[str, float]] | None = None,
) -> Params:
    """The parameters that a stage ends with, or their moving average; on many ranks each holds
    shards, and all get the whole."""
    device = str(config.device)
    rate = schedules.warmup_stable_decay(
        stage.rate, stage.steps, warmup=min(stage.warmup, stage.steps // 2), decay=stage.steps // 4
    )
    optimizer = optim.adamw(rate, b2=0.99, weight_decay=0.01)
    key, batch_key = random.split(random.key(config.seed, device=device))
    share = 0, 1
    if agreement.world() > 1:
        mesh = meshes.mesh(**asdict(config.mesh), device=torch.device(device).type)
        share, model = meshes.data_rank(mesh), sharded(model, WHOLE, mesh)
        loss_fn = gathered(loss_fn, model)
        params = model.init(config.seed)
    else:
        params = model.init(config.seed, device=device)
    # A block is compiled once, not once for each; under MeanFlow's jvp a region would not be one.
    how: Any = "regions" if config.compile and config.objective != "meanflow" else False
    options: dict[str, Any] = {"clip_norm": 1.0, "ema_decay": ema, "compile": how}
    step = make_step(loss_fn, optimizer, dynamic=False, **options)
    if config.compile and device.startswith("cuda") and share[1] == 1:
        step = graphed(step)  # small kernels by the hundred: launching them would take longer

    def whole(state: TrainState) -> Params:
        return gather(state.params if state.ema is None else state.ema)

    run = folder_of(config)
    state = run_stage(
        run / name,
        stage.steps,
        init_state(params, optimizer, key, ema_decay=ema),
        step,
        Drawn(data, stage.batch, batch_key, share),
        device=device,
        resume=launching.resume_command("recipes/text_to_image.py", run),
        save_every=config.save_every,
        most_skipped=config.most_skipped,
        evaluate=draw_fn and (lambda count, state: draw_fn(count, whole(state))),
        evaluate_every=config.draw_every,
    )
    return whole(state)


def train_coder(config: Config, about: About, models: Models, shown: Tensor) -> Params:
    """Stage 1; nothing where pixels are learnt."""
    if models.coder is None:
        return {}
    loss_fn = kl_loss(config, about)
    if config.coder == "tiny":
        loss_fn = functools.partial(coder_loss, models.coder, getattr(torch, str(config.dtype)))
    data = {"pictures": shown}
    return train_stage(config, config.autoencoder, "autoencoder", loss_fn, models.coder, data)


@torch.no_grad()
def encode(config: Config, models: Models, coder: Params, shown: Tensor) -> dict[str, Tensor]:
    """Stage 2: latents (or pixels) of all pictures with mean 0 and variance 1 by channel, and both;
    rank 0 writes them for runs that go on and for `load`."""
    path = folder_of(config) / LATENTS
    if agreement.from_all(path.exists())[0]:
        return load_file(path, device=str(config.device))
    parts = [
        to_signed(rows)
        if models.coder is None
        else models.coder.apply(coder, "autoencoder.latents", to_signed(rows))
        for rows in shown.split(500)
    ]
    z = torch.cat(parts)
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
    found = {"latents": ((z - mean) / std).contiguous(), "mean": mean, "std": std}
    if agreement.rank() == 0:
        hidden = path.with_name(f".{path.name}")
        save_file(found, hidden)
        hidden.replace(path)  # whole or not at all
    return found


def train(config: Config, data: image_sets.ImageSet) -> Trained | None:
    """The stages up to the one that was asked for; None before the last."""
    device, about = str(config.device), describe(config, data)
    models = make_models(config, about)
    if agreement.rank() == 0:
        text = f"{json.dumps(asdict(about))}\n"
        (folder_of(config) / ABOUT).write_text(text, encoding="utf-8")
    shown = data.pictures.to(device)
    coder = train_coder(config, about, models, shown)
    if config.until == "autoencoder":
        return None
    found = encode(config, models, coder, shown)
    latents, mean, std = (found[name] for name in ("latents", "mean", "std"))
    if config.until == "latents":
        return None
    told = told_of(data)
    given = {name: x.to(device) for name, x in about.conditions(told).items()}
    nothing = {name: x.to(device) for name, x in about.conditions([""]).items()}
    wished, scenes = examples(config, told)

    def draw_fn(count: int, denoiser: Params) -> dict[str, float]:
        now = Trained(about, models, coder, denoiser, mean, std)
        made = draw(config, now, wished, random.key(config.seed + 2))
        show(folder_of(config), f"step-{count:06d}", made)
        if not scenes:
            return {"drawn": float(len(made))}
        return {"right": shapes.shares(made.permute(0, 2, 3, 1).numpy(), scenes)["all"]}

    dtype = getattr(torch, str(config.dtype))
    told_once = models.denoiser, config, dtype, nothing, process_of(config, device)
    loss_fn = functools.partial(denoiser_loss, *told_once)
    learnt, options = {"latents": latents, **given}, {"ema": config.ema, "draw_fn": draw_fn}
    denoiser = train_stage(
        config, config.denoiser, "denoiser", loss_fn, models.denoiser, learnt, **options
    )
    return Trained(about, models, coder, denoiser, mean, std)


def load(config: Config) -> Trained:
    """The networks of a run, without its data.

    Raises:
        ValueError: a run without a denoiser yet.
    """
    run, device = folder_of(config), str(config.device)
    if not checkpoint.checkpoints(run / "denoiser" / CHECKPOINTS):
        raise ValueError(f"{run} is not finished: go on with --resume --name {config.name}")
    about = configs.from_dict(About, json.loads((run / ABOUT).read_text(encoding="utf-8")))
    models = make_models(config, about)

    def params(stage: str, kind: str, model: Functional) -> Params:
        like = {kind: dict(model.shapes)}
        found = checkpoints.load(run / stage / CHECKPOINTS, like, partial=True).state[kind]
        return {name: x.to(device) for name, x in found.items()}

    coder = params("autoencoder", "params", models.coder) if models.coder else {}
    denoiser, found = params("denoiser", "ema", models.denoiser), load_file(run / LATENTS, device)
    return Trained(about, models, coder, denoiser, found["mean"], found["std"])


# ---------------------------------------------------------------------------------------- drawing


def examples(config: Config, told: Sequence[str]) -> tuple[list[str], list[shapes.Scene]]:
    """What to draw while training: captions that training does not see with their scenes, or what
    the data's pictures are, in turn."""
    if config.data.source == "shapes":
        scenes = shapes.scenes(config.seed, 16, "valid")
        return [shapes.caption(scene) for scene in scenes], scenes
    names = sorted(set(told))
    return [names[i * len(names) // 16] for i in range(16)], []


@torch.no_grad()
def draw(config: Config, trained: Trained, told: Sequence[str], key: Tensor) -> Tensor:
    """A picture for each caption or class, uint8 (N, C, H, W) on the CPU; picture i is a function
    of fold_in(key, i), whatever batch or rank draws it."""
    keys = torch.stack([random.fold_in(key, i) for i in range(len(told))])
    rank, world = agreement.rank(), agreement.world()
    start, stop = (len(told) * i // world for i in (rank, rank + 1))
    parts = [torch.empty(0, trained.about.channels, trained.about.size, trained.about.size).byte()]
    for first in range(start, stop, 256):
        rows = slice(first, min(first + 256, stop))
        parts.append(drawn(config, trained, told[rows], keys[rows]))
    return torch.cat(agreement.from_all(torch.cat(parts)))


def drawn(config: Config, trained: Trained, told: Sequence[str], keys: Tensor) -> Tensor:
    about, models, device = trained.about, trained.models, trained.mean.device
    given, nothing = (
        {name: x.to(device) for name, x in about.conditions(texts).items()}
        for texts in (told, [""] * len(told))
    )
    side = about.size // (FACTOR if models.coder else 1)
    shape = (len(told), trained.mean.shape[1], side, side)
    x = samplers.draw(keys, torch.empty(shape, device=device))
    if config.objective == "meanflow":
        times = ns.flow_times(config.sample_steps)
        predict = predict_of(models.denoiser, trained.denoiser, given)
        z = samplers.meanflow_sample(lambda z, r, t: predict(z, t, t - r), x, times.tolist())
    else:

        def conditional(x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
            return predict_of(models.denoiser, trained.denoiser, given)(x, t)

        guided: Any = functools.partial(conditional, given=given)
        if given and config.guidance != 1:
            guided = classifier_free_guidance(conditional, given, nothing, config.guidance)
        z = walked(config, guided, x, keys)
    z = z * trained.std + trained.mean
    if models.coder is not None:
        z = models.coder.apply(trained.coder, "autoencoder.images", z)
    return to_bytes(z).cpu()


def walked(config: Config, predict: Callable[..., Tensor], x: Tensor, keys: Tensor) -> Tensor:
    """Latents from noise x by the sampler of what the network predicts of (x, time in [0, 1])."""
    process = process_of(config, x.device)
    if process is None:
        denoise_fn = df.denoiser(predict, ns.rectified_flow, "flow")
        return samplers.flow_euler(denoise_fn, x, ns.flow_times(config.sample_steps))
    count, sampler = len(process.alpha_bar), config.sampler or "ddim"
    denoise_fn = df.denoiser(
        lambda x, step: predict(x, step / count),
        *(ns.variance_preserving, process.target),
        alpha_bar=process.alpha_bar,
    )
    denoise_fn, grid, coordinates = steps_of(
        denoise_fn, process, sampler, config.sample_steps, process.spacing
    )
    start = coordinates(grid[0])
    x = float((start.alpha**2 + start.sigma**2).sqrt()) * x  # data of variance 1 and the noise
    return getattr(samplers, sampler)(denoise_fn, x, grid, keys)


def show(run: Path, name: str, made: Tensor, told: Sequence[str] = (), *, columns: int = 8) -> None:
    """Leaves a grid, and what its pictures should be."""
    if agreement.rank() == 0:
        enlarge = max(1, 128 // made.shape[-1])
        images.save_png(images.grid(made, columns, enlarge=enlarge), run / f"{name}.png")
    if told and agreement.rank() == 0:
        (run / f"{name}.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
        print(f"  {run / name}.png, first row: {'; '.join(told[:8])}")


def sample(config: Config) -> None:
    """Draws the prompts with the networks of a run."""
    if not config.prompts:
        raise ValueError('--prompts (none) must be captions: "a small red circle"')
    trained = load(config)
    known = trained.about.words
    if known and (strange := Words(known, trained.about.length).strange(config.prompts)):
        print(f"note: words that training never showed: {', '.join(strange)}", file=sys.stderr)
    made = draw(config, trained, config.prompts, random.key(config.seed + 1))
    show(folder_of(config), "sample", made, columns=min(8, len(made)))
    say(str(folder_of(config) / "sample.png"))


# ------------------------------------------------------------------------------------- evaluation


def evaluate(config: Config, trained: Trained, data: image_sets.ImageSet) -> dict[str, float]:
    """What the checker confirms of captions, by split, and how near samples are to real pictures;
    written to results.json with a grid of each."""
    run, scores = folder_of(config), {}
    splits = ("valid", "unseen") if config.data.source == "shapes" else ()
    for i, split in enumerate(splits):
        scenes = shapes.scenes(config.seed, config.samples, split)
        captions = [shapes.caption(scene) for scene in scenes]
        made = draw(config, trained, captions, random.fold_in(random.key(config.seed), i))
        shares = shapes.shares(made.permute(0, 2, 3, 1).numpy(), scenes)
        scores |= {f"{split}/{name}": share for name, share in shares.items()}
        say(f"{split}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        show(run, split, made, captions)
    scores |= compare(config, trained, data)
    if agreement.rank() == 0:
        (run / "results.json").write_text(f"{json.dumps(scores)}\n", encoding="utf-8")
    return scores


def compare(config: Config, trained: Trained, data: image_sets.ImageSet) -> dict[str, float]:
    """Distances of samples to the pictures of training."""
    if not config.measured:
        return {}
    told, about, device = told_of(data), trained.about, str(config.device)
    if about.classes:  # in turn
        wished = [about.classes[i % len(about.classes)] for i in range(config.measured)]
    elif config.data.source == "shapes":
        scenes = shapes.scenes(config.seed + 1, config.measured, "valid")
        wished = [shapes.caption(scene) for scene in scenes]
    else:
        wished = [told[i * len(told) // config.measured] for i in range(config.measured)]
    made = draw(config, trained, wished, random.fold_in(random.key(config.seed), 9))
    extractor = extractor_of(config, data)
    if extractor is None:
        say(
            "no captions or classes that differ, to train an extractor on: --features inception "
            "has its own"
        )
        show(folder_of(config), "samples", made[:64])
        return {}
    rows = fidelity.evenly(len(data), max(2000, config.measured))
    real = fidelity.features_of(data.pictures[rows].to(device), extractor.feature_fn)
    fake = fidelity.features_of(made.to(device), extractor.feature_fn)
    scores = fidelity.scores(real, fake, random.key(0), subsets=20)
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    say(f"{len(fake):,} samples, {len(real):,} real pictures, {extractor.name}: {text}")
    if config.data.source != "shapes":
        show(folder_of(config), "samples", made[:64], wished[:64])
    return scores


def extractor_of(config: Config, data: image_sets.ImageSet) -> features.Extractor | None:
    device = str(config.device)
    if config.features == "resnet":
        assert config.weights is not None
        return features.cifar_resnet(config.weights, device=device)
    if config.features == "inception":
        return features.inception(config.weights, device=device)
    if data.captions is not None and any(data.captions):
        targets, what = features.words_of(data.captions), "words of the captions"
    elif data.labels is not None:
        targets, what = F.one_hot(data.labels, len(data.classes)).float(), "classes"
    else:
        return None
    if not bool((targets != targets[:1]).any()):  # nothing tells one picture from another
        return None
    return features.trained(data.pictures.to(device), targets.to(device), what)


def check_files(config: Config, data: image_sets.ImageSet) -> None:
    """Reads the weights that training or its measure need, before hours of it."""
    if config.lpips and config.mode == "train":
        perceptual.load(*config.lpips)
    if config.measured and config.features != "trained":
        extractor = extractor_of(config, data)
        assert extractor is not None
        extractor.feature_fn(data.pictures[:2].to(str(config.device)))


def curves(config: Config) -> None:
    """Leaves the losses of both stages as a picture."""
    for stage in ("autoencoder", "denoiser"):
        path = folder_of(config) / stage / tracking.METRICS
        if agreement.rank() == 0 and path.exists():
            panels = {"loss": {"loss": "training"}, "gradient norm": {"grad_norm": "unclipped"}}
            figure = pictures.training_curves(tracking.read_metrics(path), panels)
            pictures.save_png(figure, path.parent.parent / f"{stage}.png")


# ------------------------------------------------------------------------------------- the command


def run(config: Config) -> None:
    begin = time.perf_counter()
    with agreement.together():
        config = checked(config)
    if config.mode == "sample":
        sample(config)
        return
    config = replace(config, name=agreement.from_all(config.name)[0])
    fresh = config.mode == "train" and not config.resume and agreement.rank() == 0
    with agreement.together():
        if fresh:
            configs.check_free(folder_of(config), overwrite=config.overwrite)
        data = read_data(config)
        check_files(config, data)
    with agreement.together():
        if fresh:  # not earlier: what cannot be read leaves no run behind, and deletes none
            configs.new_run(folder_of(config), config, overwrite=config.overwrite)
    trained = train(config, data) if config.mode == "train" else load(config)
    if trained is not None:
        evaluate(config, trained, data)
    else:
        go_on = launching.resume_command("recipes/text_to_image.py", folder_of(config))
        say(f"stopped after stage {config.until}; go on with: {go_on} --until denoiser")
    curves(config)
    say(f"{time.perf_counter() - begin:.0f} seconds; everything is in {folder_of(config)}")


def main(config: Config) -> None:
    with launching.joined(config.device, debug=config.debug):
        run(config)


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=("sample", "evaluate"))
    return configs.parse(start, args, description=str(__doc__), prog="text_to_image.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
