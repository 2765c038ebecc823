"""Text to images with published Stable Diffusion weights: load, then one pure function of a key.

model = load(folder)                              # diffusers' layout
model = load_file("v1-5.safetensors", tokenizer)  # one file in the original layout
save(folder, model)                               # in diffusers' layout
images = text_to_image(model, ["a cat on the moon"], random.key(0))    # uint8 (B, H, W, 3)

prompts -> token ids -> text tower -> context
noise -> sampler(UNet(x, t, context), guided) -> latents -> autoencoder -> images
image -> latents and noise -> the last steps of the same      (strength; repaint keeps the rest)
"""

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from msfs_functional import noise_schedules as ns
from msfs_functional import random, samplers
from msfs_functional.attention import Implementation
from msfs_functional.clip_tokenizer import ClipTokenizer
from msfs_functional.diffusion import DenoiseFn, Target, denoiser
from msfs_functional.guidance import (
    classifier_free_guidance,
    clip_x0,
    image_to_image,
    inpaint,
)
from msfs_functional.models import (
    decoder_sampling,
    diffusers_format,
    single_file,
    unet_sampling,
    vision_format,
)
from msfs_functional.models.autoencoder import AutoencoderConfig, autoencoder
from msfs_functional.models.clip import TextConfig, text_tower
from msfs_functional.models.convolutions import channels_last, stored_channels_last
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.models.weight_files import read_json, read_tensors
from msfs_functional.params import Params, cast
from msfs_functional.published_process import (
    OVER_ALPHA_BAR,
    Process,
    Sampler,
    Spacing,
    read_process,
    steps_of,
    write_process,
)
from msfs_functional.regions import Regions
from msfs_functional.replay import replayed

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class StableDiffusion(NamedTuple):
    """Configurations and parameters of the parts."""

    unet: tuple[UNetConfig, Params]
    autoencoder: tuple[AutoencoderConfig, Params]
    text: tuple[TextConfig, Params]
    tokenizer: ClipTokenizer
    process: Process
    pad: int  # id that fills up short prompts


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusion:
    """A local folder in diffusers' layout: unet/, vae/, text_encoder/, tokenizer/, scheduler/.

    Raises:
        ValueError: not such a folder; a part or option that is not known here; parts of different
            models.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"no {missing} in {folder} ({index.get('_class_name')}): fetch them, too")
    text = vision_format.load(folder / "text_encoder")
    tokenizer = ClipTokenizer.load(folder / "tokenizer")
    model = StableDiffusion(
        diffusers_format.load_unet(folder / "unet"),
        diffusers_format.load_autoencoder(folder / "vae"),
        (text.config, text.params),
        tokenizer,
        read_process(read_json(folder / "scheduler" / "scheduler_config.json")),
        _pad(folder / "tokenizer", tokenizer),
    )
    return place(_fitting(model), dtype, device)


def load_file(
    path: str | Path,
    tokenizer: str | Path,
    *,
    target: Target | None = None,
    heads: tuple[int, ...] | None = None,
    text_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusion:
    """A single file in the original latent-diffusion layout: .safetensors, or .ckpt as data alone.

    Args:
        tokenizer: CLIP's merges, which the file does not hold: a file or folder.
        target: what the UNet predicts, which it does not hold either; default: eps for version 1.
        heads, text_heads: of other sizes than the published, see `single_file.read_unet`.

    Raises:
        ValueError: a broken file, or another layout; version 2 without a target; a model that
            needs more than noise and a text.
    """
    weights = read_tensors(path)
    found = single_file.inside(weights, single_file.UNET)
    config = single_file.read_unet(found, heads)
    text = single_file.text_from(weights, text_heads)
    open_clip = text[0].activation == "gelu"
    if target is None and open_clip:
        raise ValueError(
            "target (None) must be given for version 2: 'v' for models of 768 x 768, 'eps' for "
            "those of 512 x 512"
        )
    words = ClipTokenizer.load(tokenizer)
    model = StableDiffusion(
        single_file.unet_from(weights, config),
        single_file.autoencoder_from(weights),
        text,
        words,
        Process(ns.scaled_linear(), target or "eps", final=float(ns.scaled_linear()[0])),
        0 if open_clip else words.end,
    )
    return place(_fitting(model), dtype, device)


def _fitting(model: StableDiffusion) -> StableDiffusion:
    """The model, if its parts are of one and make images of noise.

    Raises:
        ValueError: a UNet that takes or makes other channels than latents have, or contexts of
            another width than the text tower's.
    """
    config, latent, width = model.unet[0], model.autoencoder[0].latent, model.text[0].width
    channels = config.channels, config.outputs or config.channels
    if channels != (latent, latent):
        raise ValueError(
            f"the UNet takes {channels[0]} channels and makes {channels[1]}, latents have {latent}"
            f": models for inpainting, depth or instructions are not known here; take the plain "
            f"one, which an image and a mask steer, too"
        )
    if config.context != width:
        raise ValueError(
            f"the UNet reads contexts of width {config.context}, the text tower makes {width}: "
            f"they are of different models, fetch both from one"
        )
    return model


def save(folder: str | Path, model: StableDiffusion) -> None:
    """Writes a folder that `load` and diffusers' StableDiffusionPipeline.from_pretrained read.

    It has no safety checker, as a model that was never published with one.

    Raises:
        ValueError: the folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or an empty folder: name another")
    diffusers_format.save_unet(folder / "unet", *model.unet)
    diffusers_format.save_autoencoder(folder / "vae", *model.autoencoder)
    config, params = model.text
    vision_format.save(folder / "text_encoder", config, params)
    model.tokenizer.save(folder / "tokenizer", length=config.max_length, pad=model.pad)
    process = write_process(model.process)
    (folder / "scheduler").mkdir()
    text = json.dumps(process, indent=2) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", process["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def place(
    model: StableDiffusion, dtype: torch.dtype, device: torch.device | str
) -> StableDiffusion:
    """The same model with its parameters in this dtype and on this device; on a GPU kernels of
    convolutions lie as channels_last wants them."""

    def moved(params: Params) -> Params:
        params = {name: value.to(device) for name, value in cast(params, dtype).items()}
        if torch.device(device).type == "cuda":
            return channels_last(stored_channels_last(params))
        return params

    return model._replace(
        unet=(model.unet[0], moved(model.unet[1])),
        autoencoder=(model.autoencoder[0], moved(model.autoencoder[1])),
        text=(model.text[0], moved(model.text[1])),
    )


def encode_prompts(
    model: StableDiffusion, prompts: Sequence[str], implementation: Implementation = "flash"
) -> Float[Tensor, "B S X"]:
    """The context of each prompt; an empty one is the unconditional context.

    Warns of every prompt that is longer than the text tower's context, and of what is cut.
    """
    config, params = model.text
    for prompt, ids in zip(prompts, model.tokenizer.encode(prompts), strict=True):
        if len(ids) > config.max_length:
            lost = model.tokenizer.decode([ids[config.max_length - 1 : -1]])[0]
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has {len(ids)} tokens, the context "
                f"{config.max_length}: cut off is {lost!r}",
                stacklevel=2,
            )
    ids = model.tokenizer.batch(prompts, config.max_length, model.pad)
    ids = ids.to(next(iter(params.values())).device)
    tower = text_tower(config)
    return tower.apply(params, ids, method="hidden_states", implementation=implementation)


def _compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn with its blocks compiled, one of each shape, and with the fastest of cuDNN's convolutions,
    which its first call searches."""
    regions = Regions(dynamic=False)

    def run(*args: Any) -> Tensor:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with regions.compiled():
                return fn(*args)
        finally:
            torch.backends.cudnn.benchmark = before

    return run


@functools.lru_cache
def _predict_fn(config: UNetConfig, implementation: Implementation, compile: bool) -> Any:
    """(params, x, t, context) -> prediction; one object for all calls, compiled once a shape, and
    on a GPU replayed as one CUDA graph."""
    network = unet(config)

    def predict(params: Params, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return network.apply(params, x, t, context, implementation=implementation)

    return replayed(_compiled(predict)) if compile else predict


@functools.lru_cache
def _images_fn(config: AutoencoderConfig, implementation: Implementation, compile: bool) -> Any:
    network = autoencoder(config)

    def images(params: Params, latents: Tensor) -> Tensor:
        return network.apply(params, latents, method="images", implementation=implementation)

    return _compiled(images) if compile else images


class Arranged(NamedTuple):
    """A model's UNet and decoder for sampling."""

    source: tuple[Params, Params]  # kept, so that no others come to lie there
    unet: Params
    decoder: Params
    images: Callable[..., Tensor]  # (decoder, latents) -> images
    steps: dict[Any, Callable[..., Tensor]]  # the last settings' (unet, x, level, memory) -> x_0


_ARRANGED: dict[Any, Arranged] = {}  # the last model's: a second copy of most of its weights


def _arranges(model: StableDiffusion, compile: bool) -> bool:
    """Whether many images are to be made on a GPU, by a UNet that `unet_sampling` knows, of
    parameters that count how often they were written into."""
    (config, params), (_, decoder_params) = model.unet, model.autoencoder
    every = (*params.values(), *decoder_params.values())
    counted = not any(x.is_inference() for x in every)
    return compile and every[0].is_cuda and unet_sampling.suits(config) and counted


def arrangement(model: StableDiffusion, implementation: Implementation) -> Arranged:
    """The model as `unet_sampling` and `decoder_sampling` arrange it; made again when a parameter
    has been written into."""
    (config, params), (decoder_config, decoder_params) = model.unet, model.autoencoder
    every = (*params.values(), *decoder_params.values())
    key = config, decoder_config, implementation, *((x.data_ptr(), x._version) for x in every)
    if key not in _ARRANGED:

        def images(params: Params, latents: Tensor) -> Tensor:
            return decoder_sampling.images(decoder_config, params, latents, implementation)

        _ARRANGED.clear()
        _ARRANGED[key] = Arranged(
            (params, decoder_params),
            unet_sampling.prepare(config, params, implementation),
            decoder_sampling.prepare(decoder_params),
            _compiled(images),
            {},
        )
    return _ARRANGED[key]


def _recorded(
    arranged: Arranged, memory: Any, denoise_fn: DenoiseFn, read: dict[str, Any], settings: Any
) -> DenoiseFn:
    """denoise_fn as one CUDA graph, guidance and all, kept for later calls of the same settings.

    Args:
        read: where denoise_fn finds "params" and "memory": in a graph, memory of its own.
    """

    def step(params: Params, x: Tensor, level: Tensor, memory: Any) -> Tensor:
        read.update(params=params, memory=memory)
        return denoise_fn(x, level)

    if settings not in arranged.steps:
        arranged.steps.clear()  # and its memory
        arranged.steps[settings] = replayed(_compiled(step))
    step_fn = arranged.steps[settings]
    return lambda x, level: step_fn(arranged.unet, x, level, memory)


def _check_image(
    image: Tensor | None, repaint: Tensor | None, size: tuple[int, int], count: int
) -> None:
    if image is None and repaint is not None:
        raise ValueError("repaint must come with the image whose other pixels are kept")
    if image is None:
        return
    if image.dtype != torch.uint8 or image.shape[1:] != (*size, 3) or len(image) not in (1, count):
        raise ValueError(
            f"image {tuple(image.shape)} {image.dtype} must be ({count} or 1, {size[0]}, "
            f"{size[1]}, 3) in uint8: resize it to height and width"
        )
    if repaint is None:
        return
    if repaint.dtype != torch.bool or repaint.shape[1:] != size or len(repaint) not in (1, count):
        raise ValueError(
            f"repaint {tuple(repaint.shape)} {repaint.dtype} must be ({count} or 1, {size[0]}, "
            f"{size[1]}) in bool: True where to paint anew"
        )


@torch.no_grad()
def images_of(
    model: StableDiffusion,
    context: Float[Tensor, "B S X"],
    negative: Float[Tensor, "B S X"],
    key: Int64[Tensor, "2"],
    *,
    steps: int = 30,
    guidance: float = 7.5,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    height: int = 512,
    width: int = 512,
    image: UInt8[Tensor, "_ H W 3"] | None = None,
    strength: float = 0.75,
    repaint: Bool[Tensor, "_ H W"] | None = None,
    sampler: Sampler = "dpmpp_2m",
    spacing: Spacing | None = None,
    implementation: Implementation = "flash",
    compile: bool = False,
) -> UInt8[Tensor, "B H W 3"]:
    """An image for each context; image i depends on fold_in(key, i), not on the batch it is in.

    Args:
        negative: the contexts to keep away from, as of an empty prompt.
        guidance: 1 is the context alone; see `classifier_free_guidance`, for rescale, too.
        interval: training steps (low, high), of [0, N), within which guidance acts.
        image: to start from in place of noise, one for all contexts or one for each.
        strength: share of the steps taken from there, in (0, 1]; 1 forgets the image.
        repaint: True where the image is painted anew; all other pixels come out as they are.
        spacing: of the steps; default: the published scheduler's. "karras" falls as EDM's sigmas
            between the schedule's ends, for samplers over sigma.
        compile: for many images. On a GPU UNet and decoder are arranged for sampling, a
            prediction of x_0 is one CUDA graph, and the fastest convolutions are searched, which
            takes some seconds and may round otherwise from run to run. On a CPU blocks are
            compiled.

    Raises:
        ValueError: a size that the autoencoder cannot make; steps, guidance, rescale, interval or
            strength out of range; an image or mask of another size or dtype; an unknown sampler.
    """
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler ({sampler!r}) must be one of {list(get_args(Sampler))}")
    (unet_config, unet_params), (config, params) = model.unet, model.autoencoder
    if height % config.factor or width % config.factor or min(height, width) < 1:
        raise ValueError(
            f"height ({height}) and width ({width}) must be multiples of {config.factor}"
        )
    _check_image(image, repaint, (height, width), len(context))
    some, process = next(iter(unet_params.values())), model.process
    found = arrangement(model, implementation) if _arranges(model, compile) else None
    read: dict[str, Any] = {}

    def predict(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        if found is None:
            predict_fn = _predict_fn(unet_config, implementation, compile)
            return predict_fn(unet_params, x.to(some.dtype), t, condition).float()
        given = (read["params"], x.to(some.dtype), t, read["memory"], implementation)
        return unet_sampling.predict(unet_config, *given).float()

    options: dict[str, Any] = {"rescale": rescale, "interval": interval, "repeat": False}
    conditions = (context, negative) if found is None else (None, None)
    guided_fn = classifier_free_guidance(predict, *conditions, guidance, **options)
    denoise_fn = denoiser(
        *(guided_fn, ns.variance_preserving, process.target),
        alpha_bar=process.alpha_bar,
        device=some.device,
    )
    if process.clip is not None:
        denoise_fn = clip_x0(denoise_fn, process.clip)
    denoise_fn, grid, coordinates = steps_of(
        denoise_fn, process, sampler, steps, spacing or process.spacing
    )
    images_fn, decoder_params = _images_fn(config, implementation, compile), params
    if found is not None:
        images_fn, decoder_params = found.images, found.decoder
        memory = unet_sampling.memory_of(unet_config, found.unet, torch.cat([context, negative]))
        settings = process, sampler in OVER_ALPHA_BAR, guidance, rescale, interval
        denoise_fn = _recorded(found, memory, denoise_fn, read, settings)
    numbers = torch.arange(len(context), device=key.device)
    keys = random.fold_in(key, numbers).to(some.device, non_blocking=some.is_cuda)
    noise_keys, step_keys = torch.func.vmap(random.split)(keys).unbind(1)
    shape = (len(context), config.latent, height // config.factor, width // config.factor)
    noise = torch.empty(shape, device=some.device)
    start = coordinates(grid[0])
    if image is None:
        scale = (start.alpha**2 + start.sigma**2).sqrt()  # data of variance 1 and the noise
        x = float(scale) * samplers.draw(noise_keys, noise)
    else:
        signed = image.to(some.device, some.dtype).permute(0, 3, 1, 2) / 127.5 - 1
        how: dict[str, Any] = {"method": "latents", "implementation": implementation}
        known = autoencoder(config).apply(params, signed, **how).float().expand(shape)
        x, grid = image_to_image(known, grid, strength, noise_keys, coordinates)
        if repaint is not None:
            cells = F.max_pool2d(repaint[:, None].float(), config.factor)  # a pixel opens its cell
            denoise_fn = inpaint(denoise_fn, known, 1 - cells.to(some.device))
    latents = getattr(samplers, sampler)(denoise_fn, x, grid, step_keys)
    images = images_fn(decoder_params, latents.to(some.dtype))
    images = ((images.float() + 1) / 2).clamp(0, 1)
    images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    if image is None or repaint is None:
        return images
    return torch.where(repaint[..., None].to(some.device), images, image.to(some.device))


def text_to_image(
    model: StableDiffusion,
    prompts: Sequence[str],
    key: Int64[Tensor, "2"],
    *,
    negative: str = "",
    **options: Any,
) -> UInt8[Tensor, "B H W 3"]:
    """An image for each prompt, kept away from what `negative` says; options as in `images_of`.

    Raises:
        ValueError: no prompts; an option out of range.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts ({prompts!r}) must be a list of at least one text")
    with torch.no_grad():
        states = encode_prompts(model, [*prompts, *[negative] * len(prompts)])
    context, other = states.chunk(2)
    return images_of(model, context, other, key, **options)


def _pad(folder: Path, tokenizer: ClipTokenizer) -> int:
    """The id of the padding token that the folder names; the end mark where it names none."""
    path = folder / "special_tokens_map.json"
    if not path.exists():
        path = folder / "tokenizer_config.json"
    token = read_json(path).get("pad_token") if path.exists() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None or not (folder / "vocab.json").exists():
        return tokenizer.end
    vocab = read_json(folder / "vocab.json")
    if token not in vocab:
        raise ValueError(f"pad_token ({token!r}) of {path} must be in vocab.json")
    return vocab[token]
