"""How good CIFAR-10 looks after eight minutes of one GPU, ours beside diffusers.

    python recipes/bench_cifar.py ours --data cifar10:DIR --weights resnet56-4bfd9763.th
    python recipes/bench_cifar.py diffusers ...    # the other side, with the same options
    python recipes/bench_cifar.py both ...         # on two GPUs at once, on one in turn
    python recipes/bench_cifar.py draw             # OUT/curve.png and samples.png of what they left

DIR holds the training set's zips or its folder train/. Both sides train a class-conditional UNet of
the shape of DDPM's (widths 128, 256, 256, 256, two ResNet blocks a level, attention at 16 x 16, 36M
parameters) on flips, with batches of 256, bf16 compute, channels_last and a moving average, for
--seconds in all: the first step, which compiles, is part of them. Imports, reading the data and
looks at samples on the way are not.

    ours        EDM's preconditioning and noise levels; blocks compiled once, one CUDA graph a step;
                AdamW 8e-4, falling over the last third, average 0.999; 18 Heun steps (35 calls)
    diffusers   UNet2DModel compiled whole by torch.compile (--no-peer-compile: eager, as in their
                script), DDPMScheduler's linear betas, eps, a plain loop; AdamW 4e-4 (DDPM's 2e-4
                for 128 pictures, twice for 256), all else of their unconditional script: its
                betas, cosine, EMAModel with a warm-up; 50 DDIM steps

--held-out pictures, evenly taken, are kept from training. --samples samples, classes in turn, are
compared with them: Frechet and kernel distance, precision and recall over the 64 features of a
ResNet-56 (not Inception's: the figures compare with each other only). fid_train is the distance to
the pictures of training, real_fid that of the pictures held out to those of training.

Writes OUT/<side>.json with the curve of what --look samples gave on the way, and OUT/<side>.png
(samples, a column a class), after each look anew.
"""

import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from measuring import synchronize
from torch import Tensor

from msfs_functional import config as configs
from msfs_functional import diffusion as df
from msfs_functional import errors, features, fidelity, image_sets, images, optim, random, samplers
from msfs_functional import noise_schedules as ns
from msfs_functional.compiling import graphed
from msfs_functional.models.convolutions import channels_last, stored_channels_last
from msfs_functional.models.unet import UNetConfig, pixels_32, unet
from msfs_functional.params import Params, cast
from msfs_functional.replay import replayed
from msfs_functional.train import init_state, make_step

StepFn = Callable[[int, float], Tensor]  # (steps before, share of the time that is over) -> loss
SampleFn = Callable[[int, Tensor], Tensor]  # (first index, classes (B,)) -> uint8 (B, 3, 32, 32)
SIDES = ("ours", "diffusers")


@dataclass(frozen=True)
class Config:
    side: tyro.conf.Positional[Literal["both", "ours", "diffusers", "draw"]]
    data: str = "cifar10:data/cifar10"
    """cifar10:DIR, mnist:DIR, or a folder of pictures in one folder a class"""
    weights: Path | None = None
    """of the ResNet whose features are compared; None: a classifier of the data, trained first"""
    seconds: float = 480.0
    """of training and the compiling before it; looks at samples are not counted"""
    batch: int = 256
    """pictures a step"""
    held_out: int = 5000
    """pictures that training does not see, with which samples are compared"""
    samples: int = 10_000
    """at the end"""
    look: int = 1000
    """samples at each point of the curve"""
    curve: int = 4
    """points before the last, evenly in time"""
    graph: bool = True
    """ours: replay the training step as one CUDA graph"""
    peer_compile: bool = True
    """diffusers: compile the UNet; their script does not"""
    peer_rate: float = 4e-4
    """diffusers: peak learning rate; their script has 1e-4 for batches of 16"""
    seed: int = 0
    small: bool = False
    """sizes that a CPU manages, eager: to see that it works"""
    out: Path = Path("runs/bench_cifar")
    debug: bool = False
    """show tracebacks"""


def network(config: Config, classes: int) -> UNetConfig:
    sizes: dict[str, Any] = {"classes": classes}
    if config.small:
        sizes |= {"widths": (16, 32, 32, 32), "depth": 1, "groups": 8}
    return pixels_32(**sizes)


def our_side(config: Config, data: image_sets.ImageSet, device: str):
    """(step(picked rows) -> loss, sample function)."""
    model = unet(network(config, len(data.classes)))
    dtype = torch.float32 if config.small else torch.bfloat16

    def denoise_fn_of(predict: Callable[..., Tensor], classes: Tensor) -> df.DenoiseFn:
        # ln(sigma) / 4 lies in about [-1.5, 1.1]; the waves of the time want hundreds.
        return df.edm_denoiser(lambda x, time: predict(x, 250 * time, classes))

    def predict_fn(params: Params, x: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        x = x.to(dtype, memory_format=torch.channels_last)
        return model.apply(params, x, time, classes=classes).float()

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params = channels_last(cast(params, dtype))
        flip_key, noise_key, sigma_key = random.split(key, 3)
        x_0 = batch["pictures"].float() / 127.5 - 1
        flips = random.bernoulli(flip_key, 0.5, (len(x_0),))
        x_0 = torch.where(flips[:, None, None, None], x_0.flip(-1), x_0)
        sigma = ns.log_normal_sigmas(sigma_key, (len(x_0),))
        x = df.add_noise(x_0, random.normal(noise_key, x_0.shape), ns.variance_exploding(sigma))

        def predict(x: Tensor, time: Tensor, classes: Tensor) -> Tensor:
            return predict_fn(params, x, time, classes)

        y = denoise_fn_of(predict, batch["classes"])(x, sigma)
        return df.weighted_mse(y, x_0, df.edm_weight(sigma)), {}

    left = torch.ones((), device=device)  # of the rate, which falls over the last third of the time
    optimizer = optim.adamw(lambda count: 8e-4 * left * ((count + 1) / 200).clamp(max=1), b2=0.99)
    start = stored_channels_last(model.init(config.seed, device=device))
    params = {name: x.clone() for name, x in start.items()}
    key, batch_key = random.split(random.key(config.seed, device=device))
    state = init_state(params, optimizer, key, ema_decay=0.999)
    how: Any = False if config.small else "regions"
    one = make_step(loss_fn, optimizer, clip_norm=1.0, ema_decay=0.999, compile=how, dynamic=False)
    one = graphed(one) if config.graph and device == "cuda" else one
    assert data.labels is not None
    labels = data.labels

    def step(count: int, done: float) -> Tensor:
        nonlocal state
        left.fill_(min(3 * (1 - done), 1.0))
        rows = random.integers(random.fold_in(batch_key, count), (config.batch,), 0, len(data))
        state, metrics = one(state, {"pictures": data.pictures[rows], "classes": labels[rows]})
        return metrics["loss"]

    graph = replayed(predict_fn) if config.graph else predict_fn
    average = {n: x.to(dtype, copy=True) for n, x in params.items()}  # where the graph reads

    @torch.no_grad()
    def sample(first: int, classes: Tensor) -> Tensor:
        assert state.ema is not None
        # Without what is left in it of the parameters before the first step.
        left_of_start = 0.999 ** int(state.step - state.skipped)
        for name, value in state.ema.items():
            average[name].copy_(torch.lerp(value, start[name], left_of_start / (left_of_start - 1)))
        ours = channels_last(average)
        denoise_fn = denoise_fn_of(lambda *given: graph(ours, *given), classes)
        grid = ns.karras_sigmas(4 if config.small else 18)
        key, numbers = random.key(config.seed + 1), first + torch.arange(len(classes))
        keys = torch.func.vmap(lambda i: random.fold_in(key, i))(numbers)
        shape = (len(classes), *data.pictures.shape[1:])
        x = float(grid[0]) * samplers.draw(keys, torch.empty(shape, device=device))
        return to_bytes(samplers.heun(denoise_fn, x, grid))

    return step, sample


def their_side(config: Config, data: image_sets.ImageSet, device: str):
    """The same of diffusers: its model, its scheduler, its moving average, a plain loop."""
    import diffusers
    from diffusers.training_utils import EMAModel

    sizes = network(config, len(data.classes))
    torch.manual_seed(config.seed)
    model: Any = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=sizes.depth,
        block_out_channels=sizes.widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=sizes.widths[1] // sizes.heads[1],
        norm_num_groups=sizes.groups,
        num_class_embeds=len(data.classes),
    )
    model = model.to(device, memory_format=torch.channels_last)
    average: Any = EMAModel(
        model.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        foreach=True,
    )
    scheduler: Any = diffusers.DDPMScheduler(1000)
    options: dict[str, Any] = {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    optimizer = torch.optim.AdamW(
        model.parameters(), config.peer_rate, fused=device == "cuda", **options
    )
    net = torch.compile(model) if config.peer_compile and not config.small else model
    assert data.labels is not None
    labels = data.labels

    def step(count: int, done: float) -> Tensor:
        rows = torch.randint(len(data), (config.batch,), device=device)
        x_0 = data.pictures[rows].float() / 127.5 - 1
        x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(-1), x_0)
        eps = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),), device=device)
        x = scheduler.add_noise(x_0, eps, t).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=not config.small):
            y = net(x, t, labels[rows], return_dict=False)[0]
        loss = F.mse_loss(y.float(), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = config.peer_rate * min((count + 1) / 500, 1.0)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        average.step(model.parameters())
        return loss.detach()

    dtype = torch.float32 if config.small else torch.bfloat16
    drawer = copy.deepcopy(model).to(dtype)  # holds the average; autocast would take twice as long

    @torch.no_grad()
    def sample(first: int, classes: Tensor) -> Tensor:
        for own, mean in zip(drawer.parameters(), average.shadow_params, strict=True):
            own.copy_(mean)
        ddim: Any = diffusers.DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(4 if config.small else 50)
        generator = torch.Generator(device).manual_seed(first)
        shape = (len(classes), *data.pictures.shape[1:])
        x = torch.randn(shape, device=device, generator=generator)
        for t in ddim.timesteps:
            given = x.to(dtype, memory_format=torch.channels_last)
            y = drawer(given, t.to(device).expand(len(x)), classes, return_dict=False)[0]
            x = ddim.step(y.float(), t, x).prev_sample
        return to_bytes(x)

    return step, sample


def to_bytes(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def samples_of(sample: SampleFn, start: int, stop: int, classes: int, device: str) -> Tensor:
    """Samples number start to stop."""
    parts = []
    for first in range(start, stop, 1000):
        labels = torch.arange(first, min(first + 1000, stop), device=device) % classes
        parts.append(sample(first, labels))
    return torch.cat(parts)


class Point(NamedTuple):
    """Of the curve: what training had done when the samples were drawn."""

    first_step: float  # seconds, compiling included
    seconds: float  # of training, the first step included
    steps: int
    loss: float


def training(config: Config, step: StepFn) -> Iterator[Point]:
    """Trains, and stops at each point of the curve and at the end; what is done between two of
    them is not counted as training.

    Raises:
        ValueError: the first step took all of the time.
    """
    begin = time.perf_counter()
    loss = float(step(0, 0.0))
    synchronize()
    first = spent = time.perf_counter() - begin
    if first >= config.seconds:
        raise ValueError(f"--seconds ({config.seconds:g}) must exceed the first step's {first:.0f}")
    print(f"{config.side}  first step after {first:.1f} s", flush=True)
    count = 1
    for i in range(1, config.curve + 2):
        until = config.seconds * i / (config.curve + 1)
        begin, before = time.perf_counter() - spent, count
        while (spent := time.perf_counter() - begin) < until:
            done = (spent - first) / (config.seconds - first)
            losses = [step(count + j, done) for j in range(2 if config.small else 10)]
            count += len(losses)
            loss = float(torch.stack(losses).mean())  # waits for the device
        if count > before:
            yield Point(first, spent, count, loss)


def both(config: Config) -> None:
    """Each side in a process of its own: on a card of its own, where there are two."""
    cards = torch.cuda.device_count()
    running: dict[str, subprocess.Popen[bytes]] = {}
    for i, side in enumerate(SIDES):
        given = [side if word == "both" else word for word in sys.argv]
        # A number counts those that this process sees, whose names may be others.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own = {"CUDA_VISIBLE_DEVICES": seen[i] if len(seen) > i and seen[i] else str(i)}
        env = os.environ | (own if cards >= len(SIDES) else {})
        running[side] = subprocess.Popen([sys.executable, *given], env=env)
        if cards < len(SIDES):
            running[side].wait()
    if failed := [side for side, process in running.items() if process.wait()]:
        raise ValueError(f"{failed} failed: their messages are above")
    draw(config.out)


def draw(folder: Path) -> None:
    """curve.png: Frechet distance against seconds of both sides; samples.png: rows of ours above
    rows of diffusers'."""
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    grids = []
    for side in SIDES:
        path = folder / f"{side}.json"
        if not path.is_file():
            raise ValueError(f"no {path}: run bench_cifar.py {side} first")
        report = json.loads(path.read_text())
        seconds, fid = ([point[name] for point in report["curve"]] for name in ("seconds", "fid"))
        how = ", compiled" if report["compiled"] else ", eager"
        axes.plot(seconds, fid, "o-", label=f"{side}{how}: {fid[-1]:.2f}")
        grids.append(Image.open(folder / f"{side}.png").convert("RGB"))
    axes.set(xlabel="seconds of training, compiling included", yscale="log")
    axes.set_yticks([1, 2, 5, 10, 20, 50], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel(f"Frechet distance, {report['curve'][-1]['samples']:,} samples")
    about = f"{report['pictures']:,} pictures, {report['held_out']:,} others to compare with"
    axes.set_title(f"{about}, one {report['card']} each\n{report['features']}", fontsize=8)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=90)
    width, height = grids[0].size[0], min(128, grids[0].size[1])
    whole = Image.new("RGB", (width, 2 * height + 8), "white")
    for i, grid in enumerate(grids):
        whole.paste(grid.crop((0, 0, width, height)), (0, i * (height + 8)))
    whole.quantize(256).save(folder / "samples.png", optimize=True)


def main(config: Config) -> None:
    if config.side == "draw":
        draw(config.out)
        return
    configs.check_numbers(config, ("seed", "curve"))
    if not config.small and not torch.cuda.is_available():
        raise ValueError("no GPU is here: --small shows on a CPU that it works")
    if config.look > config.samples:
        raise ValueError(f"--look ({config.look}) must not exceed --samples ({config.samples})")
    if config.held_out < 100:
        raise ValueError(f"--held-out ({config.held_out}) must be at least 100: 64 features differ")
    if config.side == "both":
        both(config)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    data = image_sets.load(config.data, 32, limit=1000 if config.small else None)
    if data.labels is None:
        raise ValueError(f"--data ({config.data}) must have classes: one folder for each")
    pictures = data.pictures.expand(-1, 3, -1, -1).contiguous().to(device)
    labels, names = data.labels.to(device), data.classes
    kept = torch.ones(len(pictures), dtype=torch.bool, device=device)
    kept[fidelity.evenly(len(pictures), min(config.held_out, len(pictures) // 5)).to(device)] = (
        False
    )
    data = image_sets.ImageSet(pictures[kept], labels=labels[kept], classes=names)
    if config.weights is not None:
        extractor = features.cifar_resnet(config.weights, device=device)
    else:
        targets = F.one_hot(labels[kept], len(names)).float()
        extractor = features.trained(data.pictures, targets, "classes")
    real = fidelity.features_of(pictures[~kept], extractor.feature_fn)
    learnt = fidelity.features_of(data.pictures, extractor.feature_fn)
    report: dict[str, Any] = {"side": config.side, "card": card, "torch": torch.__version__}
    report |= {"pictures": len(data), "held_out": len(real), "features": extractor.name}
    report |= {"compiled": config.side == "ours" or config.peer_compile}
    report |= {"real_fid": fidelity.frechet_distance(learnt, real)}
    print("  ".join(f"{name} {value}" for name, value in report.items()), flush=True)
    build = our_side if config.side == "ours" else their_side
    step, sample = build(config, data, device)
    config.out.mkdir(parents=True, exist_ok=True)

    curve: list[dict[str, float]] = []
    for point in training(config, step):
        made = pictures[:0]
        last = point.seconds >= config.seconds
        # The curve's last point is written before the samples that take longer are drawn.
        for stop in sorted({config.look, config.samples}) if last else [config.look]:
            begin = time.perf_counter()
            more = samples_of(sample, len(made), stop, len(names), device)
            made = torch.cat([made, more])
            fake = fidelity.features_of(made, extractor.feature_fn)
            row: dict[str, float] = {**point._asdict(), "pictures": point.steps * config.batch}
            row |= {"samples": len(made), "fid": fidelity.frechet_distance(real, fake)}
            row |= {"fid_train": fidelity.frechet_distance(learnt, fake)}
            if stop == config.look:
                curve.append(row)
                report["curve"] = curve
            if stop == config.samples:
                row |= fidelity.scores(real, fake, random.key(0))
                report["final"] = row
            row["evaluation_seconds"] = time.perf_counter() - begin
            told = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
            print(f"{config.side}  {told}", flush=True)
            (config.out / f"{config.side}.json").write_text(json.dumps(report, indent=1))
            grid = images.grid(made[: 8 * len(names)], len(names))
            images.save_png(grid, config.out / f"{config.side}.png")


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
