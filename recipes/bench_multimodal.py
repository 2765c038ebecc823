"""How fast models of images and texts train and answer beside transformers, in one run on one GPU.

    python recipes/bench_multimodal.py clip      # CLIP ViT-B/32, batch 1024, a training step
    python recipes/bench_multimodal.py memory    # contrastive batches up to 32,768 pairs: GiB
    python recipes/bench_multimodal.py train     # 222M vision-language model: samples/s
    python recipes/bench_multimodal.py answer    # the same model, 64 tokens for 32 images: tokens/s

Random weights: the work is the same as with trained ones. fp32 parameters, bf16 compute (autocast
there), AdamW (fused there), both compiled; answers with bf16 parameters, greedy, images encoded
within the time. Caches of compiled code are off, so that the first step is a first one.

`--small` shows on a CPU that all of it works; its figures mean nothing.
"""

import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # must stand before torch

import torch
import transformers
import tyro
from measuring import fresh, measure
from torch import Tensor

from msfs_functional import errors, optim, random
from msfs_functional.compiling import graphed
from msfs_functional.contrastive import gradient_cache, softmax_loss
from msfs_functional.generation import GREEDY, Generator, Settings
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip
from msfs_functional.models.tower_options import read_clip
from msfs_functional.models.vit import clip_vision
from msfs_functional.models.vlm import (
    IGNORED,
    VLMConfig,
    answer_labels,
    language_model,
    output_weight,
    prefill_inputs,
    vlm,
    with_image_tokens,
)
from msfs_functional.models.vlm_format import read_llava
from msfs_functional.params import Params, cast
from msfs_functional.regions import Regions
from msfs_functional.train import init_state, make_step
from msfs_functional.updates import in_place


@dataclass(frozen=True)
class Config:
    """What to measure, and for how long."""

    mode: tyro.conf.Positional[Literal["clip", "memory", "train", "answer"]]
    small: bool = False
    """sizes that a CPU manages, eager: to see that it works"""
    steps: int = 20
    """timed steps"""
    warmup: int = 5
    """steps before, compiling included"""
    compile: Literal["regions", "whole"] = "whole"
    """ours: one block of each shape, or the loss, and an answer's step, as one graph"""
    graph: bool = False
    """ours: replay the training step as one CUDA graph"""
    sides: tuple[Literal["ours", "transformers"], ...] = ("ours", "transformers")
    chunk: int = 1024
    """pairs at a time, of memory"""
    batches: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """pairs, of memory"""
    debug: bool = False
    """show tracebacks"""


def compare(config: Config, builds: dict[str, Callable[[], Any]], items: int, unit: str) -> None:
    """Measures each side on its own and prints items a second."""
    rates = {}
    for name in config.sides:
        torch._dynamo.reset()
        fresh()
        figures = measure(builds[name](), config.warmup, config.steps)
        rates[name] = items / figures.seconds
        print(
            f"{name:12} {rates[name]:10.1f} {unit}/s  {figures.memory:6.2f} GiB  "
            f"first step {figures.first:6.1f} s",
            flush=True,
        )
    if len(rates) == 2:
        print(f"ours / transformers: {rates['ours'] / rates['transformers']:.3f}", flush=True)


def our_training(
    config: Config, init: Callable[..., Params], loss_fn: Any, batch: Any, device: str
) -> Callable[[], object]:
    optimizer = optim.adamw(1e-4)
    state = init_state(init(0, device=device), optimizer, random.key(1, device=device))
    how: Any = False if config.small else True if config.compile == "whole" else "regions"
    step = make_step(loss_fn, optimizer, compile=how, dynamic=False)
    step = graphed(step) if config.graph else step

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)

    return run


def their_training(
    config: Config, model: Any, inputs: dict[str, Any], device: str
) -> Callable[[], object]:
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device == "cuda")
    network = model if config.small else torch.compile(model)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=not config.small):
            loss = network(**inputs).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


# --------------------------------------------------------------------------------- two towers


def compare_clip(config: Config, device: str) -> None:
    text: dict[str, Any] = {}
    vision: dict[str, Any] = {"patch_size": 32}
    B = 1024
    if config.small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text, vision, B = {**sizes}, {**sizes, "image_size": 32, "patch_size": 16}, 4
    options = transformers.CLIPConfig(text_config=text, vision_config=vision)
    projections = ("text_projection.weight", "visual_projection.weight")
    ours = read_clip(options.to_dict(), projections)
    key, size = random.key(0, device=device), ours.image.size[0]
    pixels = random.normal(key, (B, 3, size, size))
    ids = (random.uniform(key, (B, 77)) * 40000).long() + 1
    ids[:, -1] = ours.text.eos
    dtype = torch.float32 if config.small else torch.bfloat16
    model = clip(ours)

    def loss_fn(params: Params, batch: Any, key: Tensor):
        low = cast(params, dtype)
        image = model.apply(low, batch["pixel_values"].to(dtype), method="embed_image")
        text = model.apply(low, batch["input_ids"], method="embed_text")
        loss, count = softmax_loss(image, text, params["logit_scale"].exp())
        return loss / count, {}

    batch = {"pixel_values": pixels, "input_ids": ids}
    builds = {
        "ours": lambda: our_training(config, model.init, loss_fn, batch, device),
        "transformers": lambda: their_training(
            config, transformers.CLIPModel(options), {**batch, "return_loss": True}, device
        ),
    }
    print(f"CLIP B/{ours.image.patch}, batch {B}")
    compare(config, builds, B, "pairs")


def show_memory(config: Config, device: str) -> None:
    """A small pair of towers, eager; embeds chunk by chunk, with everybody as negatives."""
    sizes: dict[str, Any] = {"width": 384, "depth": 6, "heads": 6, "hidden": 1536}
    sizes["projection"] = 256
    if config.small:
        sizes = {"width": 16, "depth": 1, "heads": 2, "hidden": 16, "projection": 8}
    image = clip_vision(**sizes, image=64, patch=8)
    model = clip(CLIPConfig(image, TextConfig(**sizes, max_length=32)))
    dtype = torch.float32 if config.small else torch.bfloat16

    def embed(params: Params, batch: Any, key: Tensor | None) -> tuple[Tensor, Tensor]:
        params = cast(params, dtype)
        pixels = batch["pixels"].to(dtype) / 127.5 - 1
        u = model.apply(params, pixels, method="embed_image")
        return u, model.apply(params, batch["ids"], method="embed_text")

    def loss_fn(params: Params, vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        loss, count = softmax_loss(*vectors, params["logit_scale"].exp())
        return loss / count, ()

    chunk, batches = (4, (8, 16)) if config.small else (config.chunk, config.batches)
    # Eager: memory is what is shown, and compiling took longer than all batches together.
    gradient = gradient_cache(embed, loss_fn, chunk)
    optimizer = optim.adamw(1e-4)
    update = in_place(optimizer)
    params = model.init(0, device=device)
    opt_state = optimizer.init(params)
    key = random.key(0, device=device)
    print(f"chunks of {chunk} pairs")
    for B in batches:
        batch = {
            "pixels": (random.uniform(key, (B, 3, 64, 64)) * 256).to(torch.uint8),
            "ids": (random.uniform(key, (B, 32)) * 40000).long() + 1,
        }
        held = sum(x.nbytes for x in batch.values()) / 2**30
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def run(batch: Any = batch) -> None:
            _, grads = gradient(params, batch)
            update(grads, opt_state, params)

        figures = measure(run, 1, 2 if config.small else 3)
        print(
            f"{B:7,} pairs  {B / figures.seconds:9.0f} pairs/s  {figures.memory:6.2f} GiB at the "
            f"peak, {held:.2f} GiB of them the batch",
            flush=True,
        )


# ----------------------------------------------------------------------- vision and language


def llava_options(small: bool) -> transformers.LlavaConfig:
    """SigLIP B/16 at 224 pixels and SmolLM2 135M, 196 tokens an image; or a small one."""
    vision: dict[str, Any] = {"image_size": 224, "patch_size": 16}
    text: dict[str, Any] = {
        "vocab_size": 49280,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
        vision |= {**sizes, "num_attention_heads": 2, "image_size": 32}
        text |= {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        text_config={"model_type": "llama", **text},
        image_token_index=49152,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def prompts_and_images(
    config: Config, ours: VLMConfig, device: str
) -> tuple[list[list[int]], Tensor]:
    """32 images, each with 30 tokens of text behind it."""
    B, size = 2 if config.small else 32, ours.vision.size[0]
    prompt = with_image_tokens([1, ours.image_token, *range(100, 130)], ours, 1)
    return [prompt] * B, random.normal(random.key(0, device=device), (B, 3, size, size))


def compare_training(config: Config, device: str) -> None:
    options = llava_options(config.small)
    ours = read_llava(options.to_dict(), ())
    prompts, pixels = prompts_and_images(config, ours, device)
    ids = torch.tensor([prompt + list(range(200, 230)) for prompt in prompts], device=device)
    B, T = ids.shape
    lengths = torch.full((B,), T, device=device)
    labels = answer_labels(ids, lengths - 30, lengths)
    dtype = torch.float32 if config.small else torch.bfloat16
    model = vlm(ours)

    def loss_fn(params: Params, batch: Any, key: Tensor):
        params = cast(params, dtype)
        states = model.apply(params, batch["ids"], batch["pixels"].to(dtype), method="hidden")
        states = states.flatten(0, 1)[batch["learned"]]  # logits of answers alone
        loss, count = linear_cross_entropy(states, output_weight(params), batch["labels"])
        return loss / count, {}

    learned = (labels != IGNORED).flatten().nonzero()[:, 0]
    batch = {"ids": ids, "pixels": pixels, "learned": learned, "labels": labels.flatten()[learned]}
    place = torch.arange(T, device=device)
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels,
        "labels": torch.where(place >= T - 30, ids, -100),
        "attention_mask": torch.ones_like(ids),
    }
    builds = {
        "ours": lambda: our_training(config, model.init, loss_fn, batch, device),
        "transformers": lambda: their_training(
            config, transformers.LlavaForConditionalGeneration(options), inputs, device
        ),
    }
    print(f"batch {B} of {T} tokens, {ours.tokens_per_image} of them an image")
    compare(config, builds, B, "samples")


def compare_answers(config: Config, device: str) -> None:
    options = llava_options(config.small)
    ours = read_llava(options.to_dict(), ())
    prompts, pixels = prompts_and_images(config, ours, device)
    dtype = torch.float32 if config.small else torch.bfloat16
    pixels, new = pixels.to(dtype), 4 if config.small else 64

    def our_answers() -> Callable[[], object]:
        model = vlm(ours)
        params = cast(model.init(0, device=device), dtype)
        regions = Regions(dynamic=False) if config.compile == "regions" else None
        how: Any = None if config.small else "regions" if regions else True
        generate = Generator(language_model(ours, params, fused=True), compile=how)
        settings = Settings(new, sampling=GREEDY)

        def encode(params: Params, pixels: Tensor) -> Tensor:
            return model.apply(params, pixels, method="image_tokens")

        def in_regions(params: Params, pixels: Tensor) -> Tensor:
            with regions.compiled() if regions and not config.small else nullcontext():
                return encode(params, pixels)

        whole = not (config.small or regions)
        encoder: Any = torch.compile(encode, dynamic=False) if whole else in_regions

        @torch.no_grad()
        def run() -> object:
            inputs = prefill_inputs(model, params, prompts, images=encoder(params, pixels))
            return generate(prompts, settings, inputs=inputs)

        return run

    def their_answers() -> Callable[[], object]:
        model: Any = transformers.LlavaForConditionalGeneration(options)
        model = model.to(device, dtype).eval()
        ids = torch.tensor(prompts, device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        if not config.small:  # generate compiles the forward of a static cache by itself
            length["cache_implementation"] = "static"
        return lambda: model.generate(**inputs, **length)

    print(f"{len(prompts)} prompts of {len(prompts[0])} tokens, {new} new ones each")
    builds = {"ours": our_answers, "transformers": their_answers}
    compare(config, builds, len(prompts) * new, "tokens")


def main(config: Config) -> None:
    if not (config.small or torch.cuda.is_available()):
        raise ValueError("no GPU here, where these figures mean something: --small runs on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    modes = {
        "clip": compare_clip,
        "memory": show_memory,
        "train": compare_training,
        "answer": compare_answers,
    }
    modes[config.mode](config, device)


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
