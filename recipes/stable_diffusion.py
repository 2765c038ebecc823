"""Images from text with published Stable Diffusion weights (1.x and 2.x) from this disk.

What it shows: a folder in diffusers' layout, or a single file in the original one, as parameters of
this project's UNet, autoencoder and text tower; image i is a pure function of the seed and i.

    python recipes/stable_diffusion.py --folder ~/models/stable-diffusion-v1-5 \\
        --prompts "a lighthouse in a storm, oil on canvas"
    python recipes/stable_diffusion.py --file v1-5-pruned-emaonly.safetensors \\
        --tokenizer ~/models/clip --prompts "a cat" "a dog" --seed 7
    python recipes/stable_diffusion.py --folder F --dtype bfloat16 --compile   # one GPU
    python recipes/stable_diffusion.py --folder F --image street.jpg --strength 0.6 --prompts "snow"
    python recipes/stable_diffusion.py --folder F --image cat.png --mask white-on-black.png \\
        --strength 1 --prompts "a cat with a hat"

    python recipes/stable_diffusion.py --file F.ckpt --tokenizer T --save FOLDER # for diffusers

Writes OUT/000.png, OUT/001.png, ... in the order of the prompts.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from PIL import Image

from msfs_functional import errors, images, random
from msfs_functional import stable_diffusion as sd
from msfs_functional.config import device
from msfs_functional.diffusion import Target


@dataclass(frozen=True)
class Config:
    folder: Path | None = None
    """In diffusers' layout: unet/, vae/, text_encoder/, tokenizer/, scheduler/."""
    file: Path | None = None
    """In the original layout, .safetensors or .ckpt; instead of a folder."""
    tokenizer: Path | None = None
    """CLIP's merges, for a file."""
    target: Target | None = None
    """What a file's UNet predicts: version 1 eps, version 2 v (768 x 768) or eps (512 x 512)."""
    prompts: tuple[str, ...] = ("a photograph of an astronaut riding a horse",)
    negative: str = ""
    """What to keep away from."""
    steps: int = 30
    guidance: float = 7.5
    """1 is the prompt alone."""
    rescale: float = 0.0
    """Of guided predictions to the spread of the others, in [0, 1]; 0.7 for zero terminal SNR."""
    interval: tuple[float, float] | None = None
    """Training steps, of 0 to 999, between which guidance acts; default: always."""
    image: Path | None = None
    """To start from, cut to height and width."""
    strength: float | None = None
    """Share of the steps taken from the image on, in (0, 1]; 1 forgets it; default: 0.75."""
    mask: Path | None = None
    """Of the image: what is white is painted anew, what is black stays as it is."""
    height: int = 512
    width: int = 512
    sampler: sd.Sampler = "dpmpp_2m"
    spacing: sd.Spacing | None = None
    """Of the steps; default: the folder's."""
    seed: int = 0
    device: str | None = None
    """Default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["flash", "sdpa"] = "flash"
    """This library's op, or torch's, whose kernels have heads of 40 as they are."""
    compile: bool = False
    """Minutes at the start, for many images on a GPU."""
    out: Path = Path("runs/stable_diffusion")
    save: Path | None = None
    """Also write the model there, in diffusers' layout."""
    debug: bool = False
    """Show where an error came from."""


def load(config: Config) -> sd.StableDiffusion:
    """The model that the configuration names.

    Raises:
        ValueError: neither or both of folder and file; a file without a tokenizer; what a file
            needs beside a folder, which has its own.
    """
    if (config.folder is None) == (config.file is None):
        raise ValueError("give --folder or --file, one of them: where the weights lie on this disk")
    where = {"dtype": getattr(torch, config.dtype), "device": device(config.device)}
    of_file = {"--tokenizer": config.tokenizer, "--target": config.target}
    if config.folder is not None and (given := [name for name, x in of_file.items() if x]):
        raise ValueError(f"{' and '.join(given)}: a folder has its own, leave it out")
    if config.folder is not None:
        return sd.load(config.folder, **where)
    if config.tokenizer is None:
        raise ValueError("--file needs --tokenizer: a folder with CLIP's merges.txt")
    assert config.file is not None
    return sd.load_file(config.file, config.tokenizer, target=config.target, **where)


def given(config: Config) -> dict[str, Any]:
    """The image and the mask to start from, at height and width.

    Raises:
        ValueError: a mask or strength without an image; files that cannot be read.
    """
    if config.image is None:
        if config.mask is not None:
            raise ValueError(f"--mask ({config.mask}) needs --image, whose black parts it keeps")
        if config.strength is not None:
            raise ValueError(f"--strength ({config.strength}) needs --image, which it changes")
        return {}
    size = config.height, config.width
    image = images.resize(images.read(config.image), size)
    found: dict[str, Any] = {"image": image.permute(1, 2, 0)[None]}
    if config.strength is not None:
        found["strength"] = config.strength
    if config.mask is not None:
        mask = images.resize(images.read(config.mask, channels=1), size)
        found["repaint"] = mask >= 128
    return found


def note(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning, as a user of the command reads it."""
    print(f"note: {message}", file=sys.stderr)


def main(config: Config) -> None:
    warnings.showwarning = note
    start_from = given(config)
    model = load(config)
    if config.save is not None:
        sd.save(config.save, model)
        print(f"{config.save}  the model, for diffusers")
    start = time.perf_counter()
    made = sd.text_to_image(
        model,
        config.prompts,
        random.key(config.seed),
        negative=config.negative,
        steps=config.steps,
        guidance=config.guidance,
        rescale=config.rescale,
        interval=config.interval,
        height=config.height,
        width=config.width,
        sampler=config.sampler,
        spacing=config.spacing,
        implementation=config.attention,
        compile=config.compile,
        **start_from,
    ).cpu()
    seconds = time.perf_counter() - start
    config.out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(config.prompts, made, strict=True)):
        path = config.out / f"{i:03d}.png"
        Image.fromarray(image.numpy()).save(path)
        print(f"{path}  {prompt}")
    print(f"{len(made)} images in {seconds:.1f} s, {config.steps} steps each")


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
