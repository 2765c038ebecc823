"""Latent diffusion from scratch: pictures from captions or classes, on a laptop or many GPUs.

    python recipes/text_to_image.py                      # all stages, then a grid and a score
    python recipes/text_to_image.py --preset gpu         # larger, longer; minutes of one GPU
    python recipes/text_to_image.py sample --prompts "a small red circle above a large blue square"
    python recipes/text_to_image.py evaluate             # the newest run again
    torchrun --nproc-per-node 4 recipes/text_to_image.py --mesh.dp-shard 4
    python recipes/text_to_image.py --objective meanflow # pictures in one step

    --data.source mnist:DIR | cifar10:DIR | FOLDER | HUB-NAME [--data.caption COLUMN]

Stages of one run, each from its own checkpoints (--resume goes on where it was stopped):

    1  an autoencoder learns pictures of 32 x 32 as latents of 4 x 8 x 8 (--no-latents: left out)
    2  every picture is encoded once; latents are scaled to variance 1
    3  a diffusion transformer (or UNet) and a small text tower learn the flow from noise to latents
       with caption dropout and a moving average of the parameters
    4  captions of the validation split and of combinations never seen are sampled with guidance;
       a rule-based checker reads count, size, colour, kind and relation back, and features of
       samples are compared with those of real pictures (FID, KID, precision, recall)

Every picture of a step has a random key of its own, and so has every sample: any number of ranks
trains the same model to rounding and draws the same pictures.

Measured with the defaults and seed 0, torch 2.13, on two cores of an AMD EPYC, 303 s in all: 84% of
the attributes of 64 validation captions are right (count 89, size 90, colour 82, kind 73, relation
88), 82% of 64 captions with combinations never seen. No GPU run is measured.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import numpy as np
import optree
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from text_to_image_settings import (
    FACTOR,
    HEADS,
    LATENT,
    PRESETS,
    Config,
    Stage,
    checked,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import vmap

from msfs_functional import (
    adversarial,
    agreement,
    checkpoint,
    errors,
    features,
    fidelity,
    image_sets,
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
from msfs_functional import noise_schedules as ns
from msfs_functional.compiling import graphed
from msfs_functional.gathering import Layout, gathered, sharded
from msfs_functional.guidance import classifier_free_guidance
from msfs_functional.models import autoencoder as kl
from msfs_functional.models.clip import TextConfig, text_tower
from msfs_functional.models.discriminator import DiscriminatorConfig, discriminator
from msfs_functional.models.dit import DiTConfig, dit
from msfs_functional.models.joined import joined
from msfs_functional.models.tiny_autoencoder import TinyAutoencoderConfig, tiny_autoencoder
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.params import Functional, Params, cast
from msfs_functional.synthetic import shapes
from msfs_functional.tracking import Tracker
from msfs_functional.train import TrainState, init_state, make_step
from msfs_functional.transforms import NAMESPACE
from msfs_functional.words import Words

ABOUT = "about.json"  # what a run knows of its data


@dataclass(frozen=True)
class About:
    """What a run knows of its data, so that it can be used without them."""

    channels: int
    size: int
    words: tuple[str, ...] = ()  # of captions, if there are any
    classes: tuple[str, ...] = ()  # or of these
    length: int = 1

    def conditions(self, told: Sequence[str]) -> dict[str, Tensor]:
        """What the networks get of captions or names of classes; "" means nothing in particular.

        Raises:
            ValueError: a name that is no class.
        """
        if self.words:
            return Words(self.words, self.length).encode(told)
        if not self.classes:
            return {}
        number = {name: i for i, name in enumerate((*self.classes, ""))}
        if strange := [name for name in told if name not in number]:
            raise ValueError(f"{strange[0]!r} must be one of the classes {list(self.classes)}")
        return {"classes": torch.tensor([number[name] for name in told])}


class Models(NamedTuple):
    coder: Functional | None  # "autoencoder", and of kl its "discriminator"
    denoiser: Functional  # "denoiser", and its "text" tower if there are captions


def coder_parts(config: Config, about: About) -> dict[str, Functional]:
    if not config.latents:
        return {}
    n, channels = config.pixels, about.channels
    if config.coder == "tiny":
        sizes: dict[str, Any] = {"encoder_depths": (0, 1, 1), "decoder_depths": (1, 1, 0)}
        tiny = TinyAutoencoderConfig(channels=channels, width=n, **sizes)
        return {"autoencoder": tiny_autoencoder(tiny)}
    groups = max(n // 4, 1)
    large = kl.pixels_32(widths=(n, 2 * n, 2 * n), groups=groups, channels=channels)
    critic = DiscriminatorConfig(channels=channels, width=n, depth=2, groups=groups)
    parts = {"autoencoder": kl.autoencoder(large)}
    return parts | ({"discriminator": discriminator(critic)} if config.gan else {})


def make_models(config: Config, about: About) -> Models:
    """The networks of a run."""
    width, text = config.width, {}
    if about.words:
        vocab = Words(about.words, about.length).vocab
        options = {"is_causal": False, "pooling": "last", "projection": None}
        sizes = {"width": width, "depth": 1, "heads": HEADS, "hidden": 2 * width}
        tower = TextConfig(vocab=vocab, max_length=about.length, **sizes, **options)
        text = {"text": text_tower(tower)}
    common: dict[str, Any] = {
        "channels": LATENT if config.latents else about.channels,
        "context": width if about.words else None,
        "classes": len(about.classes) + 1 if about.classes else None,
        "interval": config.objective == "meanflow",
    }
    if config.backbone == "dit":
        sizes = {"width": width, "depth": config.depth, "heads": HEADS}
        network = dit(DiTConfig(patch=config.patch, hidden=3 * width, **sizes, **common))
    else:
        network = unet(
            UNetConfig(
                widths=(width, 2 * width, 2 * width),
                depth=config.depth,
                attention=(False, True, True),
                heads=(HEADS,) * 3,
                groups=min(32, width // 4),
                transformer_depth=1 if about.words else 0,
                **common,
            )
        )
    coder = coder_parts(config, about)
    return Models(joined(**coder) if coder else None, joined(denoiser=network, **text))


def read_data(config: Config) -> image_sets.ImageSet:
    """The pictures to train on."""
    data = config.data
    if data.source != "shapes":
        options: dict[str, Any] = {"limit": data.pictures, "split": data.split}
        options |= {"picture": data.picture, "caption": data.caption}
        return image_sets.load(data.source, data.size, **options)
    scenes = shapes.scenes(config.seed, data.pictures or 12_000)
    return image_sets.ImageSet(rendered(scenes), tuple(map(shapes.caption, scenes)))


def rendered(scenes: Sequence[shapes.Scene]) -> Tensor:
    """uint8 (N, 3, 32, 32)"""
    return torch.from_numpy(np.stack([shapes.render(scene) for scene in scenes])).permute(
        0, 3, 1, 2
    )


def told_of(data: image_sets.ImageSet) -> list[str]:
    """The caption, or the name of the class, of each picture."""
    if data.captions is not None:
        return list(data.captions)
    if data.labels is None:
        return [""] * len(data)
    return [data.classes[i] for i in data.labels.tolist()]


def describe(config: Config, data: image_sets.ImageSet) -> About:
    channels, size = data.pictures.shape[1:3]
    if data.captions is None or not any(data.captions):
        return About(channels, size, classes=data.classes)
    words = Words.of(data.captions, most=config.data.words, length=config.data.length)
    return About(channels, size, words=words.words, length=words.length)


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(image: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def coder_loss(model: Functional, dtype: torch.dtype, params: Params, batch: Any, key: Tensor):
    """Squared and absolute error of the picture that comes back from its latents, which are kept
    small and disturbed a little, so that near latents are near pictures."""
    params, x = cast(params, dtype), to_signed(batch["pictures"]).to(dtype)
    z = model.apply(params, "autoencoder.encode", x)
    disturbed = z + 0.05 * samplers.draw(batch["keys"], z.float()).to(dtype)
    error = (model.apply(params, "autoencoder.decode", disturbed) - x).float()
    squared = error.square().mean()
    return squared + error.abs().mean() + 1e-3 * z.float().square().mean(), {"squared": squared}


def kl_loss(config: Config, about: About) -> Callable[..., Any]:
    """`adversarial.autoencoder_loss` of the two networks of a "kl" coder."""
    parts = coder_parts(config, about)
    options: dict[str, Any] = {"kl_weight": 1e-4, "gan_weight": config.gan}
    if config.lpips:
        weights = perceptual.load(*config.lpips, device=str(config.device))
        options["perceptual_fn"] = lambda x, y: perceptual.distance(
            weights, x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)
        )
    model, critic = parts["autoencoder"], parts.get("discriminator")

    def loss_fn(params: Params, batch: Any, key: Tensor):
        batch = {"image": to_signed(batch["pictures"]), "keys": batch["keys"]}
        return adversarial.autoencoder_loss(
            model, critic or model, params, batch, batch["keys"], **options
        )

    return loss_fn


def flow_loss(
    model: Functional, config: Config, dtype: torch.dtype, params: Params, batch: Any, key: Tensor
):
    """Squared error of the velocity eps - x_0 at logit-normal times, some captions left out; or
    MeanFlow's, guided in training, so that sampling needs one call a step."""
    noise_keys, time_keys, drop_keys = vmap(lambda k: random.split(k, 3))(batch["keys"]).unbind(1)
    params, x_0 = cast(params, dtype), batch["latents"]
    drop = vmap(lambda k: random.bernoulli(k, config.caption_dropout, ()))(drop_keys)
    given, nothing = batch["conditions"], batch["nothing"]
    given = {
        name: torch.where(drop.view(-1, *[1] * (x.ndim - 1)), nothing[name], x)
        for name, x in given.items()
    }
    eps = samplers.draw(noise_keys, x_0)
    if config.objective == "flow":
        t = vmap(lambda k: ns.logit_normal_times(k, ()))(time_keys)
        x_t = df.add_noise(x_0, eps, ns.rectified_flow(t)).to(dtype)
        y = predict_of(model, params, given)(x_t, t)
        return df.weighted_mse(y.float(), eps - x_0), {}
    r, t = (x[:, 0] for x in vmap(lambda k: df.meanflow_times(k, 1))(time_keys))
    velocity, w = eps - x_0, config.guidance
    if w != 1 and given:
        z = df.add_noise(x_0, eps, ns.rectified_flow(t)).to(dtype)
        with torch.no_grad():
            u = predict_of(model, params, nothing)(z, t, 0 * t).float()
        guided = w * velocity + (1 - w) * u
        velocity = torch.where(df.per_example(drop, x_0).bool(), velocity, guided)
    predict = predict_of(model, params, given)

    def u_fn(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return predict(z.to(dtype), t, t - r).float()

    return df.meanflow_loss(u_fn, x_0, eps, r, t, velocity=velocity), {}


def predict_of(model: Functional, params: Params, given: dict[str, Tensor]) -> Callable[..., Any]:
    """(x, t, interval or None) -> prediction, under conditions whose captions are read once."""
    options: dict[str, Any] = {}
    if "ids" in given:
        lengths = given["lengths"]
        tower = "text.hidden_states"
        options["context"] = model.apply(params, tower, given["ids"], lengths=lengths)
        options["context_lengths"] = lengths
    elif given:
        options["classes"] = given["classes"]

    def predict(x: Tensor, t: Tensor, interval: Tensor | None = None) -> Tensor:
        far = None if interval is None else 1000 * interval
        return model.apply(params, "denoiser", x, 1000 * t, interval=far, **options)

    return predict


WHOLE = Layout(rules=[(r"", {"dp_shard": Shard(0)})])  # gathered around the loss, whole


def placed_like(like: Any, tree: Any) -> Any:
    """Whole leaves as the shards of this rank, where `like` has shards."""

    def place(like: Any, x: Any) -> Any:
        if not isinstance(like, DTensor):
            return x
        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)

    return optree.tree_map(place, like, tree, namespace=NAMESPACE)


def whole(tree: Any) -> Any:
    """The state with every shard gathered; all ranks call it together."""
    full = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    return optree.tree_map(full, tree, namespace=NAMESPACE)


def train_stage(
    config: Config,
    stage: Stage,
    name: str,
    loss_fn: Callable[..., Any],
    model: Functional,
    data: Any,
    *,
    ema: float | None = None,
    constant: dict[str, Any] | None = None,
    draw_fn: Callable[[int, TrainState], None] = lambda count, state: None,
) -> TrainState:
    """The loop of a stage; batch i is a function of seed and i, so runs resume bit-exactly.

    Checkpoints hold whole tensors: a run goes on with any number of ranks.
    """
    run, device = config.out / str(config.name) / name, str(config.device)
    rate = schedules.warmup_stable_decay(
        stage.rate, stage.steps, warmup=min(stage.warmup, stage.steps // 2), decay=stage.steps // 4
    )
    optimizer = optim.adamw(rate, b2=0.99, weight_decay=0.01)
    key, batch_key = random.split(random.key(config.seed, device=device))
    state = init_state(model.init(config.seed, device=device), optimizer, key, ema_decay=ema)
    if checkpoint.checkpoints(run / "checkpoints"):
        state = checkpoint.load(run / "checkpoints", state).state
    first = int(state.step)
    if first >= stage.steps:
        return state
    # A block is compiled once, not once for each; under MeanFlow's jvp a region would not be one.
    how: Any = "regions" if config.compile and config.objective == "flow" else False
    share, shares = 0, 1
    if agreement.world() > 1:
        mesh = meshes.mesh(**asdict(config.mesh), device=torch.device(device).type)
        share, shares = meshes.data_rank(mesh)
        shards = sharded(model, WHOLE, mesh)
        loss_fn = gathered(loss_fn, shards)
        like = init_state(shards.init(config.seed), optimizer, key, ema_decay=ema)
        state = placed_like(like, state)
    options: dict[str, Any] = {"clip_norm": 1.0, "ema_decay": ema, "compile": how}
    step = make_step(loss_fn, optimizer, dynamic=False, **options)
    if config.compile and device.startswith("cuda") and shares == 1:
        step = graphed(step)  # small kernels by the hundred: launching them would take longer
    size, own = len(optree.tree_leaves(data)[0]), stage.batch // shares
    mine = slice(share * own, (share + 1) * own)

    def save(count: int) -> None:
        full = whole(state)
        if agreement.rank() == 0:
            checkpoint.save(run / "checkpoints", count, full, keep_last=1)

    with (
        Tracker(run, stage.steps, name=name, step=first, rank=agreement.rank()) as tracker,
        errors.interruptible() as stop,
    ):
        for count in range(first + 1, stage.steps + 1):
            chosen, keys = picked(batch_key, count, stage.batch, size)
            batch = optree.tree_map(lambda x: x[chosen[mine]], data)  # noqa: B023
            state, metrics = step(state, {**batch, "keys": keys[mine], **(constant or {})})
            tracker.log(count, metrics)
            last = count == stage.steps
            halt = agreement.highest(stop.received or 0) if not last else 0
            if halt or last or count % config.save_every == 0:
                tracker.flush()
                if int(state.skipped) > config.most_skipped:
                    raise ValueError(
                        f"{int(state.skipped)} steps of the {name} had a loss that is not finite, "
                        f"more than --most-skipped ({config.most_skipped}): lower "
                        f"--{name}.rate ({stage.rate})"
                    )
                save(count)
            if halt:
                again = f"--resume --out {config.out} --name {config.name}"
                tracker.note(f"saved; go on with: python recipes/text_to_image.py {again}")
                raise SystemExit(128 + halt)
            if ema is not None and not last and count % config.draw_every == 0:
                with tracker.paused():
                    draw_fn(count, whole(state))
    return whole(state)


def picked(key: Tensor, count: int, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """The rows of step `count`, and a key for each."""
    row_key, key = random.split(random.fold_in(key, count))
    return random.integers(row_key, (batch,), 0, size), random.split(key, batch)


class Trained(NamedTuple):
    """What sampling needs of a run."""

    about: About
    models: Models
    coder: Params
    denoiser: Params  # averaged
    mean: Tensor  # of the latents, (1, C, 1, 1)
    std: Tensor


@torch.no_grad()
def encode(
    models: Models, params: Params, pictures: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Latents (or pixels) of all pictures with mean 0 and variance 1 by channel, and both."""
    parts = [
        to_signed(rows)
        if models.coder is None
        else models.coder.apply(params, "autoencoder.latents", to_signed(rows))
        for rows in pictures.split(500)
    ]
    z = torch.cat(parts)
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
    return (z - mean) / std, (mean, std)


def train(config: Config, data: image_sets.ImageSet) -> Trained:
    """Autoencoder, latents, denoiser."""
    device, dtype = str(config.device), getattr(torch, str(config.dtype))
    about = describe(config, data)
    models, run = make_models(config, about), config.out / str(config.name)
    if agreement.rank() == 0:
        (run / ABOUT).write_text(f"{json.dumps(asdict(about))}\n", encoding="utf-8")
    shown = data.pictures.to(device)
    coder: Params = {}
    if models.coder is not None:
        loss_fn = functools.partial(coder_loss, models.coder, dtype)
        coder = train_stage(
            config,
            config.autoencoder,
            "autoencoder",
            loss_fn if config.coder == "tiny" else kl_loss(config, about),
            models.coder,
            {"pictures": shown},
        ).params
    latents, (mean, std) = encode(models, coder, shown)
    told = told_of(data)
    conditions = {name: x.to(device) for name, x in about.conditions(told).items()}
    batch = config.denoiser.batch // max(1, agreement.world())
    nothing = {name: x.to(device) for name, x in about.conditions([""] * batch).items()}
    wished = examples(config, told)[:16]

    def draw_fn(count: int, state: TrainState) -> None:
        now = Trained(about, models, coder, state.ema or state.params, mean, std)
        made = draw(config, now, wished, random.key(config.seed + 2))
        if agreement.rank() == 0:
            grid(made).save(run / f"step-{count:06d}.png")

    state = train_stage(
        config,
        config.denoiser,
        "denoiser",
        functools.partial(flow_loss, models.denoiser, config, dtype),
        models.denoiser,
        {"latents": latents, "conditions": conditions},
        ema=config.ema,
        constant={"nothing": nothing},
        draw_fn=draw_fn,
    )
    if agreement.rank() == 0:
        stats = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
        (run / "latents.json").write_text(f"{json.dumps(stats)}\n", encoding="utf-8")
    return Trained(about, models, coder, state.ema or state.params, mean, std)


def load(config: Config) -> Trained:
    """The networks of a finished run, without its data.

    Raises:
        ValueError: a run that is not finished.
    """
    run = config.out / str(config.name)
    if not (run / "latents.json").exists():
        raise ValueError(f"{run} is not finished: go on with --resume --name {config.name}")
    found = json.loads((run / ABOUT).read_text(encoding="utf-8"))
    about = configs.from_dict(About, found)
    models, device = make_models(config, about), config.device
    shapes_of = {"params": dict(models.denoiser.shapes), "ema": dict(models.denoiser.shapes)}
    place = run / "denoiser" / "checkpoints"
    denoiser = checkpoint.load(place, shapes_of, partial=True, device=device).state["ema"]
    coder: Params = {}
    if models.coder is not None:
        place, like = run / "autoencoder" / "checkpoints", dict(models.coder.shapes)
        coder = checkpoint.load(place, {"params": like}, partial=True, device=device).state[
            "params"
        ]
    stats = json.loads((run / "latents.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(stats[name], device=device)[None, :, None, None] for name in stats)
    return Trained(about, models, coder, denoiser, mean, std)


def examples(config: Config, told: Sequence[str]) -> list[str]:
    """What to draw while training: captions that training does not see, or classes in turn."""
    if config.data.source == "shapes":
        return [shapes.caption(scene) for scene in shapes.scenes(config.seed, 16, "valid")]
    names = sorted(set(told))
    return [names[i * len(names) // 16] for i in range(16)]


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
    times = ns.flow_times(config.sample_steps)
    if config.objective == "meanflow":
        predict = predict_of(models.denoiser, trained.denoiser, given)
        z = samplers.meanflow_sample(lambda z, r, t: predict(z, t, t - r), x, times.tolist())
    else:

        def conditional(x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
            return predict_of(models.denoiser, trained.denoiser, given)(x, t)

        guided: Any = functools.partial(conditional, given=given)
        if given and config.guidance != 1:
            guided = classifier_free_guidance(conditional, given, nothing, config.guidance)
        z = samplers.flow_euler(df.denoiser(guided, ns.rectified_flow, "flow"), x, times)
    z = z * trained.std + trained.mean
    if models.coder is not None:
        z = models.coder.apply(trained.coder, "autoencoder.images", z)
    return to_bytes(z).cpu()


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """Pictures side by side, small ones enlarged, rows filled up with black."""
    side = images.shape[-1]
    scale, missing = max(1, 128 // side), -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]).expand(-1, 3, -1, -1)
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray(rows.contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def evaluate(config: Config, trained: Trained, data: image_sets.ImageSet) -> dict[str, float]:
    """What the checker confirms of captions, by split, and how near samples are to real pictures;
    written to results.json with a grid of each."""
    run, scores = config.out / str(config.name), {}
    splits = ("valid", "unseen") if config.data.source == "shapes" else ()
    for i, split in enumerate(splits):
        scenes = shapes.scenes(config.seed, config.samples, split)
        captions = [shapes.caption(scene) for scene in scenes]
        made = draw(config, trained, captions, random.fold_in(random.key(config.seed), i))
        marks: dict[str, list[bool]] = defaultdict(list)
        for picture, scene in zip(made.permute(0, 2, 3, 1).numpy(), scenes, strict=True):
            for name, right in shapes.check(np.ascontiguousarray(picture), scene).items():
                marks[name.split()[0]].append(right)
                marks["all"].append(right)
        scores |= {f"{split}/{name}": float(np.mean(rights)) for name, rights in marks.items()}
        shares = ", ".join(f"{name} {np.mean(rights):.0%}" for name, rights in marks.items())
        say(f"{split}: {shares}")
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
        say("no captions or classes to train an extractor on: --features inception has its own")
        return {}
    most = max(2000, config.measured)
    real = fidelity.features_of(data.pictures[:most].to(device), extractor.feature_fn)
    fake = fidelity.features_of(made.to(device), extractor.feature_fn)
    kid = fidelity.kernel_distance(real, fake, random.key(0), subsets=20)
    near = fidelity.precision_recall(real[: len(fake)], fake)
    scores = {"fid": fidelity.frechet_distance(real, fake), "kid": kid.mean, "kid_std": kid.std}
    scores |= near._asdict()
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    say(f"{len(fake):,} samples, {len(real):,} real pictures, {extractor.name}: {text}")
    if config.data.source != "shapes":
        show(config.out / str(config.name), "samples", made[:64], wished[:64])
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
    return features.trained(data.pictures.to(device), targets.to(device), what)


def say(text: str) -> None:
    if agreement.rank() == 0:
        print(text, flush=True)


def show(run: Path, name: str, images: Tensor, told: Sequence[str]) -> None:
    """Leaves a grid, and what its pictures should be."""
    if agreement.rank() == 0:
        grid(images).save(run / f"{name}.png")
        (run / f"{name}.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
        print(f"  {run / name}.png, first row: {'; '.join(told[:8])}")


def curves(config: Config) -> None:
    """Leaves the losses of both stages as a picture."""
    for stage in ("autoencoder", "denoiser"):
        path = config.out / str(config.name) / stage / tracking.METRICS
        if agreement.rank() == 0 and path.exists():
            panels = {"loss": {"loss": "training"}, "gradient norm": {"grad_norm": "unclipped"}}
            figure = pictures.training_curves(tracking.read_metrics(path), panels)
            pictures.save_png(figure, path.parent.parent / f"{stage}.png")


def sample(config: Config) -> None:
    """Draws the prompts with the networks of a run."""
    if not config.prompts:
        raise ValueError('--prompts (none) must be captions: "a small red circle"')
    made = draw(config, load(config), config.prompts, random.key(config.seed + 1))
    path = config.out / str(config.name) / "sample.png"
    grid(made, columns=min(8, len(made))).save(path)
    print(path)


@contextlib.contextmanager
def processes(config: Config) -> Iterator[None]:
    """Joins the others, if torchrun started any."""
    joined = dist.is_initialized()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    meshes.join(torch.device(config.device).type if config.device else None)
    with agreement.said_once() if not config.debug else contextlib.nullcontext():
        yield
    if not joined:
        dist.destroy_process_group()


def run(config: Config) -> None:
    begin = time.perf_counter()
    with agreement.together():
        config = checked(config)
    if config.mode == "sample":
        sample(config)
        return
    config = replace(config, name=agreement.from_all(config.name)[0])
    with agreement.together():
        if config.mode == "train" and not config.resume and agreement.rank() == 0:
            where = config.out / str(config.name)
            configs.new_run(where, config, overwrite=config.overwrite)
    with agreement.together():
        data = read_data(config)
    evaluate(config, train(config, data) if config.mode == "train" else load(config), data)
    curves(config)
    where = config.out / str(config.name)
    say(f"{time.perf_counter() - begin:.0f} seconds; everything is in {where}")


def main(config: Config) -> None:
    with processes(config):
        run(config)


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=("sample", "evaluate"))
    return configs.parse(start, args, description=str(__doc__), prog="text_to_image.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
