"""How good CIFAR-10 looks after a fixed time of training on one GPU, ours beside diffusers.

    python recipes/bench_cifar.py both --data cifar10:DIR --weights resnet56-4bfd9763.th
    python recipes/bench_cifar.py ours ...         # or diffusers: one side, on a card of its own
    python recipes/bench_cifar.py curve            # draws OUT/curve.png of what both left in OUT

DIR holds the training set's zips or its folder train/. Both sides train a class-conditional UNet of
the shape of DDPM's (widths 128, 256, 256, 256, two ResNet blocks a level, attention at 16 x 16, 36M
parameters) on flips, with batches of 256, bf16 compute, channels_last and a moving average, for
--seconds after the first step, which compiles; looks at samples on the way are not counted. `both`
runs them on one card: they compile beside one another, then train and are scored in turn.

    ours        EDM's preconditioning and noise levels; blocks compiled once, one CUDA graph a step;
                AdamW 8e-4, falling at the end, average 0.999; 18 Heun steps (35 calls)
    diffusers   UNet2DModel compiled, DDPMScheduler's linear betas, eps, the plain loop and the
                settings of their unconditional script (AdamW 1e-4, cosine, EMAModel); 50 DDIM steps

Then --samples samples, classes in turn, are compared with all training pictures: Frechet and kernel
distance, precision and recall over the 64 features of a ResNet-56 (not Inception's: the figures
compare with each other only). With --no-peer-compile diffusers' side trains eagerly, as in their
script, and before ours, which still compiles. Writes OUT/<side>.json with the curve of what 2,000
samples gave on the way, and OUT/<side>.png (samples, a column a class).
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from measuring import here, synchronize, taking_turns
from torch import Tensor

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
    side: tyro.conf.Positional[Literal["both", "ours", "diffusers", "curve"]]
    data: str = "cifar10:data/cifar10"
    """cifar10:DIR, mnist:DIR, or a folder of pictures in one folder a class"""
    weights: Path | None = None
    """of the ResNet whose features are compared; None: a classifier of the data, trained first"""
    seconds: float = 395.0
    """of training after the first step, looks at samples not counted"""
    batch: int = 256
    """pictures a step"""
    samples: int = 10_000
    curve: int = 4
    """points before the last, evenly in time"""
    graph: bool = True
    """ours: replay the training step as one CUDA graph"""
    peer_compile: bool = True
    """diffusers: compile the UNet, which takes two minutes; their script does not"""
    seed: int = 0
    small: bool = False
    """sizes that a CPU manages, eager: to see that it works"""
    turns: Path | None = None
    """a process of `both`: the folder where it waits for its turn"""
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
    params = stored_channels_last(model.init(config.seed, device=device))
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
        for name, value in state.ema.items():
            average[name].copy_(value)
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
    average: Any = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, foreach=True)
    scheduler: Any = diffusers.DDPMScheduler(1000)
    options: dict[str, Any] = {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device == "cuda", **options)
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
        rate = 1e-4 * min((count + 1) / 500, 1.0) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        average.step(model.parameters())
        return loss.detach()

    @torch.no_grad()
    def sample(first: int, classes: Tensor) -> Tensor:
        average.store(model.parameters())
        average.copy_to(model.parameters())
        ddim: Any = diffusers.DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(4 if config.small else 50)
        generator = torch.Generator(device).manual_seed(first)
        shape = (len(classes), *data.pictures.shape[1:])
        x = torch.randn(shape, device=device, generator=generator)
        with torch.autocast(device, torch.bfloat16, enabled=not config.small):
            for t in ddim.timesteps:
                y = model(x, t.to(device).expand(len(x)), classes, return_dict=False)[0]
                x = ddim.step(y.float(), t, x).prev_sample
        average.restore(model.parameters())
        return to_bytes(x)

    return step, sample


def to_bytes(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def samples_of(sample: SampleFn, count: int, classes: int, device: str) -> Tensor:
    parts = []
    for first in range(0, count, 1000):
        labels = torch.arange(first, min(first + 1000, count), device=device) % classes
        parts.append(sample(first, labels))
    return torch.cat(parts)


class Point(NamedTuple):
    """Of the curve: what training had done when the samples were drawn."""

    first_step: float  # seconds, compiling included
    seconds: float  # of training since
    steps: int
    loss: float


def training(config: Config, step: StepFn) -> Iterator[Point]:
    """Trains, and stops at each point of the curve and at the end; what is done between two of
    them is not counted as training."""
    begin = time.perf_counter()
    loss = float(step(0, 0.0))
    synchronize()
    first, spent, count, turn = time.perf_counter() - begin, 0.0, 1, nullcontext()
    if config.turns is not None:
        turn = taking_turns(config.turns, config.side, SIDES if config.peer_compile else ())
    with turn:
        for i in range(1, config.curve + 2):
            until = config.seconds * i / (config.curve + 1)
            begin = time.perf_counter()
            while spent + time.perf_counter() - begin < until:
                done = min((spent + time.perf_counter() - begin) / config.seconds, 1.0)
                losses = [step(count + j, done) for j in range(2 if config.small else 20)]
                count += len(losses)
                loss = float(torch.stack(losses).mean())  # waits for the device
            spent += time.perf_counter() - begin
            yield Point(first, spent, count, loss)


def both(config: Config) -> None:
    """Each side in a process of its own, on the same card."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for side in SIDES:
            given = [side if word == "both" else word for word in sys.argv]
            running[side] = subprocess.Popen([sys.executable, *given, "--turns", folder])
        while running:
            for side in [side for side, process in running.items() if process.poll() is not None]:
                here(Path(folder), side)  # or the other one would wait
                failed += [side] if running.pop(side).returncode else []
            time.sleep(0.1)
    if failed:
        raise ValueError(f"{failed} failed: their messages are above")
    draw_curve(config.out)


def draw_curve(folder: Path) -> None:
    """Frechet distance against seconds of both sides."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for side in SIDES:
        path = folder / f"{side}.json"
        if not path.is_file():
            raise ValueError(f"no {path}: run bench_cifar.py {side} first")
        report = json.loads(path.read_text())
        seconds, fid = ([point[name] for point in report["curve"]] for name in ("seconds", "fid"))
        how = "" if report["compiled"] else ", not compiled"
        axes.plot(seconds, fid, "o-", label=f"{side}{how}: {fid[-1]:.2f}")
    axes.set(xlabel="seconds of training", ylabel="Frechet distance", yscale="log")
    about = f"{report['pictures']:,} pictures of CIFAR-10, one {report['card']}"
    axes.set_title(f"{about}\n{report['features']}", fontsize=8)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)


def main(config: Config) -> None:
    if config.side == "curve":
        draw_curve(config.out)
        return
    if not config.small and not torch.cuda.is_available():
        raise ValueError("no GPU is here: --small shows on a CPU that it works")
    if config.side == "both":
        both(config)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    data = image_sets.load(config.data, 32, limit=1000 if config.small else None)
    if data.labels is None:
        raise ValueError(f"--data ({config.data}) must have classes: one folder for each")
    pictures = data.pictures.expand(-1, 3, -1, -1).contiguous().to(device)
    data = replace(data, pictures=pictures, labels=data.labels.to(device))
    if config.weights is not None:
        extractor = features.cifar_resnet(config.weights, device=device)
    else:
        targets = F.one_hot(data.labels, len(data.classes)).float()  # pyright: ignore
        extractor = features.trained(pictures, targets, "classes")
    real = fidelity.features_of(pictures, extractor.feature_fn)
    print(f"{config.side} on one {card}, torch {torch.__version__}, {len(data):,} pictures")
    print(f"features: {extractor.name}", flush=True)
    build = our_side if config.side == "ours" else their_side
    step, sample = build(config, data, device)
    curve: list[dict[str, float]] = []
    for point in training(config, step):
        last = len(curve) == config.curve
        many = config.samples if last else min(2000, config.samples)
        begin = time.perf_counter()
        made = samples_of(sample, many, len(data.classes), device)
        fake = fidelity.features_of(made, extractor.feature_fn)
        row: dict[str, float] = {
            **point._asdict(),
            "pictures": point.steps * config.batch,
            "samples": many,
        }
        row |= {"fid": fidelity.frechet_distance(real, fake)}
        if last:
            row |= fidelity.scores(real, fake, random.key(0))
        row["evaluation_seconds"] = time.perf_counter() - begin
        curve.append(row)
        figures = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
        print(f"{config.side}  {figures}", flush=True)
        config.out.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {"side": config.side, "card": card, "pictures": len(data)}
        report |= {"compiled": config.side == "ours" or config.peer_compile}
        report |= {"features": extractor.name, "curve": curve}
        (config.out / f"{config.side}.json").write_text(json.dumps(report, indent=1))
        columns = len(data.classes)
        images.save_png(
            images.grid(made[: 8 * columns], columns), config.out / f"{config.side}.png"
        )


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
