"""How fast Stable Diffusion 1.5 trains and samples beside diffusers, in one run, on one GPU.

    python recipes/bench_diffusion.py train     # batch 16 of 64 x 64 latents, bf16 compute
    python recipes/bench_diffusion.py sample    # 512 x 512, 30 steps, guided, batch 1 and 8

    python recipes/bench_diffusion.py train --graph --apart

Random weights: the work is the same as with trained ones. Training: fp32 parameters, AdamW, the
squared error of eps; diffusers' UNet runs under bf16 autocast, compiled whole, with fused AdamW.
Ours compiles one block of each shape (--compile regions) or the whole loss (--compile whole). Both
run in channels_last. With --apart each side is a process of its own: all compile at the same time,
then take turns on the GPU to be timed. Sampling: diffusers' pipeline with compiled UNet and
decoder, DPM-Solver++ 2M; ours is arranged for it (`models/unet_sampling.py`) and needs no compiler.
Caches of compiled code are new and empty folders, so that the first step is a first one.

`--small` shows on a CPU that all of it works; its figures mean nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # must stand before torch
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import diffusers
import torch
import torch.nn.functional as F
import tyro
from measuring import Figures, fresh, here, kernels, measure, taking_turns
from torch import Tensor

from msfs_functional import errors, optim, random
from msfs_functional import stable_diffusion as sd
from msfs_functional.clip_tokenizer import ClipTokenizer
from msfs_functional.compiling import graphed
from msfs_functional.models import diffusers_format
from msfs_functional.models.clip import TextConfig
from msfs_functional.models.convolutions import channels_last, stored_channels_last
from msfs_functional.models.unet import unet
from msfs_functional.params import Params, cast
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import in_dtype


@dataclass(frozen=True)
class Config:
    """What to measure, and for how long."""

    mode: tyro.conf.Positional[Literal["train", "sample"]]
    small: bool = False
    """sizes that a CPU manages, eager: to see that it works"""
    steps: int = 20
    """timed training steps"""
    warmup: int = 5
    """steps before, compiling included"""
    compile: Literal["regions", "whole"] = "regions"
    """ours: one block of each shape, or the loss as one graph"""
    attention: Literal["flash", "sdpa"] = "sdpa"
    """ours, sampling: this library's op, or torch's, whose cuDNN is 1.5% faster at heads of 40"""
    graph: bool = False
    """ours: replay the training step as one CUDA graph"""
    search: bool = False
    """training: cuDNN searches its fastest convolutions, on both sides"""
    sides: tuple[Literal["ours", "diffusers"], ...] = ("ours", "diffusers")
    batches: tuple[int, ...] = (1, 8)
    """images at once, of sampling"""
    repeats: int = 3
    """timed calls, of sampling"""
    apart: bool = False
    """each side, and each batch of sampling, in a process of its own"""
    turns: Path | None = None
    """such a process: the folder where it waits for its turn and leaves its figures"""
    others: tuple[str, ...] = ()
    """such a process: names of all of them"""
    patience: float = 600.0
    """seconds that one which has compiled waits for those that have not"""
    profile: bool = False
    """print our kernels of one step, or of one call"""
    debug: bool = False
    """show tracebacks"""


def show_kernels(run: Callable[[], object]) -> None:
    print(kernels(run, steps=1, rows=60), flush=True)


def timed(config: Config, name: str, run: Callable[[], object], warmup: int, steps: int) -> Figures:
    """What a side took, in its turn."""

    def turn() -> AbstractContextManager[None]:
        if config.turns is None:
            return nullcontext()
        return taking_turns(config.turns, name, config.others, config.patience)

    figures = measure(run, warmup, steps, blocks=1 if config.small else 3, turn=turn())
    if config.turns is not None:
        (config.turns / f"{name}.json").write_text(json.dumps(figures._asdict()))
    if config.profile and name.startswith("ours"):
        with turn():
            show_kernels(run)
    return figures


def apart(config: Config) -> None:
    """The sides in processes of their own, and the ratios of their rates."""
    batches = config.batches if config.mode == "sample" else (0,)
    names = {f"{side}{batch or ''}": (side, batch) for batch in batches for side in config.sides}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for name, (side, batch) in names.items():
            own = ["--sides", side, "--batches", str(batch or 1), "--no-apart", "--turns", folder]
            command = [sys.executable, *sys.argv, *own, "--others", *names]
            running[name] = subprocess.Popen(command)
        while running:
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                here(Path(folder), name)
                failed += [name] if running.pop(name).returncode else []
            time.sleep(0.1)
        for batch in batches:
            took = {}
            for side in ("ours", "diffusers"):
                path = Path(folder) / f"{side}{batch or ''}.json"
                if path.exists():
                    took[side] = json.loads(path.read_text())["seconds"]
            name = f"batch {batch}  " if batch else ""
            if len(took) == 2:
                print(f"{name}ours / diffusers: {took['diffusers'] / took['ours']:.3f}", flush=True)
    if failed:
        raise ValueError(f"{failed} failed: their messages are above")


def sizes(small: bool) -> dict[str, Any]:
    """Options of diffusers' UNet: Stable Diffusion 1.5's, or a small one."""
    if not small:
        return {"cross_attention_dim": 768}
    return {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 768,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }


def made_up_batch(small: bool, device: str) -> dict[str, Tensor]:
    B, size = (2, 8) if small else (16, 64)
    keys = random.split(random.key(0), 3)
    shapes = {"x": (B, 4, size, size), "eps": (B, 4, size, size), "context": (B, 77, 768)}
    batch = {
        name: random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    batch["t"] = torch.linspace(0, 999, B)
    batch = {name: value.to(device) for name, value in batch.items()}
    batch["x"] = batch["x"].to(memory_format=torch.channels_last)
    return batch


def our_training(config: Config, batch: dict[str, Tensor], device: str) -> Callable[[], object]:
    with torch.device("meta"):
        options = diffusers.UNet2DConditionModel(**sizes(config.small)).config
    model = unet(diffusers_format.read_unet(options))
    dtype = torch.float32 if config.small else torch.bfloat16

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params = channels_last(cast(params, dtype))
        x, context = batch["x"].to(dtype), batch["context"].to(dtype)
        y = model.apply(params, x, batch["t"], context)
        return F.mse_loss(y.float(), batch["eps"]), {}

    optimizer = optim.adamw(1e-5)
    params = stored_channels_last(model.init(0, device=device))
    state = init_state(params, optimizer, random.key(1, device=device))
    how: Any = False if config.small else True if config.compile == "whole" else "regions"
    gradient = None if how is True else in_dtype(dtype)  # of a single graph it is part
    step = make_step(loss_fn, optimizer, compile=how, dynamic=False, gradient=gradient)
    step = graphed(step) if config.graph else step

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)

    return run


def their_training(config: Config, batch: dict[str, Tensor], device: str) -> Callable[[], object]:
    model: Any = diffusers.UNet2DConditionModel(**sizes(config.small))
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=device == "cuda")
    network = model if config.small else torch.compile(model)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=not config.small):
            y = network(batch["x"], batch["t"], batch["context"], return_dict=False)[0]
        F.mse_loss(y.float(), batch["eps"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # kept, gradients would lie beside the activations

    return run


def train(config: Config, device: str) -> None:
    torch.backends.cudnn.benchmark = config.search
    batch = made_up_batch(config.small, device)
    builds = {"ours": our_training, "diffusers": their_training}
    rates = {}
    for name in config.sides:
        torch._dynamo.reset()
        fresh()
        run = builds[name](config, batch, device)
        figures = timed(config, name, run, config.warmup, config.steps)
        rates[name] = len(batch["x"]) / figures.seconds
        print(
            f"{name:10} {rates[name]:8.1f} latents/s  {figures.memory:6.1f} GiB  "
            f"first step {figures.first:6.1f} s",
            flush=True,
        )
        del run
    if len(rates) == 2:
        print(f"ours / diffusers: {rates['ours'] / rates['diffusers']:.3f}")


def pipeline(config: Config, device: str) -> Any:
    """diffusers' pipeline with random weights."""
    options: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    if config.small:
        options |= {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    nothing: Any = None
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    torch.manual_seed(0)
    made: Any = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**options),
        text_encoder=nothing,
        tokenizer=nothing,
        unet=diffusers.UNet2DConditionModel(**sizes(config.small)),
        scheduler=scheduler,
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )
    made = made.to(device, torch.float32 if config.small else torch.bfloat16)
    made.unet.to(memory_format=torch.channels_last)
    made.vae.to(memory_format=torch.channels_last)
    made.set_progress_bar_config(disable=True)
    return made


def sample(config: Config, device: str) -> None:
    theirs = pipeline(config, device)
    nothing: Any = (TextConfig(), {})
    words: Any = ClipTokenizer([])
    process = sd.read_process(dict(theirs.scheduler.config))
    ours = sd.StableDiffusion(
        diffusers_format.unet_from(theirs.unet.config, theirs.unet.state_dict()),
        diffusers_format.autoencoder_from(theirs.vae.config, theirs.vae.state_dict()),
        nothing,
        words,
        process,
        0,
    )
    ours = sd.place(ours, theirs.dtype, device)
    if not config.small:
        theirs.unet = torch.compile(theirs.unet, dynamic=False)
        theirs.vae.decode = torch.compile(theirs.vae.decode, dynamic=False)
    torch.backends.cudnn.benchmark = True  # both sides search the fastest convolutions
    size, steps = (16, 3) if config.small else (512, 30)
    options: dict[str, Any] = {"height": size, "width": size}
    for batch in config.batches:
        context = random.normal(random.key(2), (2 * batch, 77, 768)).to(device, theirs.dtype)
        prompts, negative = context.chunk(2)
        key = random.key(3, device=device)
        common: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 7.5, **options}
        embeds = {"prompt_embeds": prompts, "negative_prompt_embeds": negative}
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: sd.images_of(
                ours,
                prompts,  # noqa: B023
                negative,  # noqa: B023
                key,  # noqa: B023
                steps=steps,
                compile=not config.small,
                implementation=config.attention,
                **options,
            ),
            "diffusers": lambda: theirs(**embeds, **common, output_type="pt").images,  # noqa: B023
        }
        rates = {}
        for name in config.sides:
            figures = timed(config, f"{name}{batch}", runs[name], 1, config.repeats)
            rates[name] = batch / figures.seconds
            print(
                f"batch {batch}  {name:10} {rates[name]:8.3f} images/s  "
                f"first call {figures.first:6.1f} s",
                flush=True,
            )
        if len(rates) == 2:
            print(f"batch {batch}  ours / diffusers: {rates['ours'] / rates['diffusers']:.3f}")


def main(config: Config) -> None:
    if not config.small and not torch.cuda.is_available():
        raise ValueError("no GPU is here: --small shows on a CPU that it works")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if config.turns is None:
        print(f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    if config.apart:
        apart(config)
        return
    {"train": train, "sample": sample}[config.mode](config, device)


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
