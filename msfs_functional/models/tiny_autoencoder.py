"""A tiny autoencoder in the manner of TAESD: the latents of a large one, at a fraction of its cost.

    image (B, 3, H, W) in [-1, 1]  ->  latents (B, C, H / 8, W / 8)  ->  image

Convolutions and ReLU only; at the smallest level blocks may also pass a group norm over the whole
picture. The calls are those of `autoencoder`: encode (here one value, no distribution), decode,
latents, images.

    config, params = load("taesd_encoder.pth", "taesd_decoder.pth")

Dimension key: B batch, C latent channels, D width, H height, W width of the image.

Source: Ollin Boer Bohan, TAESD (2023); the wide latents and pooled blocks are its TAEF2's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from msfs_kernels.group_norm import double
from torch import Tensor, nn

from msfs_functional.models.convolutions import Norm, convolve, group_norm
from msfs_functional.models.weight_files import read_tensors, take
from msfs_functional.params import Functional, Params, functional, kaiming_uniform, ones, zeros
from msfs_functional.regions import region_of

POOL_GROUPS = 4  # of the pooled blocks' group norm
POOL_WIDTH = 4  # channels in it, times the width


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Sizes; the defaults are TAESD's for Stable Diffusion 1 and 2, 2.4M parameters."""

    channels: int = 3  # of the image
    latent: int = 4  # channels C of the latents
    width: int = 64  # channels of every block
    encoder_depths: tuple[int, ...] = (1, 3, 3, 3)  # blocks of each level, largest image first
    decoder_depths: tuple[int, ...] = (3, 3, 3, 1)  # the same, smallest first
    pooled: bool = False  # blocks of the smallest level also see the whole picture
    scaling_factor: float = 1.0

    def __post_init__(self):
        for name in ("channels", "latent", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.encoder_depths or len(self.encoder_depths) != len(self.decoder_depths):
            raise ValueError(
                f"encoder_depths {self.encoder_depths} and decoder_depths {self.decoder_depths} "
                f"must have one element for each level"
            )

    @property
    def factor(self) -> int:
        """Pixels of the image along one side of a latent."""
        return 2 ** (len(self.encoder_depths) - 1)


def block(params: Params, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    """relu(x + three convolutions of x), after the pooled branch if it has one."""
    if "pool_up.weight" in params:
        y = group_norm(params, "pool_norm", convolve(params, "pool_up", x), POOL_GROUPS, 1e-5)
        x = x + convolve(params, "pool_down", F.relu(y))
    y = F.relu(convolve(params, "conv_1", x))
    y = F.relu(convolve(params, "conv_2", y))
    return F.relu(convolve(params, "conv_3", y) + x)


_block = region_of(block)


class Block(nn.Module):
    """Holds a block's parameters; its forward is `block`."""

    def __init__(self, width: int, pooled: bool):
        super().__init__()
        for i in (1, 2, 3):
            setattr(self, f"conv_{i}", nn.Conv2d(width, width, 3, padding=1))
        if pooled:
            self.pool_up = nn.Conv2d(width, POOL_WIDTH * width, 1, bias=False)
            self.pool_norm = Norm(POOL_WIDTH * width)
            self.pool_down = nn.Conv2d(POOL_WIDTH * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _block(dict(self.named_parameters()), x)


class Half(nn.Module):
    """The encoder or the decoder: levels of blocks, each entered or left by a convolution."""

    def __init__(self, config: TinyAutoencoderConfig, *, encodes: bool):
        super().__init__()
        self.encodes, width = encodes, config.width
        depths = config.encoder_depths if encodes else config.decoder_depths
        ends = (config.channels, config.latent) if encodes else (config.latent, config.channels)
        smallest = len(depths) - 1 if encodes else 0
        self.input = nn.Conv2d(ends[0], width, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, depth in enumerate(depths):
            level = nn.Module()
            if encodes and i > 0:
                level.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            level.blocks = nn.ModuleList(
                Block(width, config.pooled and i == smallest) for _ in range(depth)
            )
            if not encodes and i < len(depths) - 1:
                level.enlarge = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.levels.append(level)
        self.output = nn.Conv2d(width, ends[1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x) if self.encodes else F.relu(self.input(x))
        for level in cast(Any, self.levels):
            if hasattr(level, "shrink"):
                x = level.shrink(x)
            for layer in level.blocks:
                x = layer(x)
            if hasattr(level, "enlarge"):
                x = level.enlarge(double(x))
        return self.output(x)


class TinyAutoencoder(nn.Module):
    """The skeleton behind `tiny_autoencoder`; every method is a pure function of the parameters."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Half(config, encodes=True)
        self.decoder = Half(config, encodes=False)

    def encode(self, image: Float[Tensor, "B _ H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of an image in [-1, 1].

        Raises:
            ValueError: an image whose height or width the factor does not divide.
        """
        config, factor = self.config, self.config.factor
        if image.ndim != 4 or image.shape[1] != config.channels:
            raise ValueError(f"image {tuple(image.shape)} must be (B, {config.channels}, H, W)")
        if image.shape[-2] % factor or image.shape[-1] % factor or 0 in image.shape:
            raise ValueError(
                f"image {tuple(image.shape)} must have a height and width that {factor} divides: "
                f"crop or resize it"
            )
        return self.encoder((image + 1) / 2)

    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B _ H W"]:
        """The image of latents, in about [-1, 1]; latents beyond +-3 are bent back softly."""
        if z.ndim != 4 or z.shape[1] != self.config.latent:
            raise ValueError(f"latents {tuple(z.shape)} must be (B, {self.config.latent}, h, w)")
        return self.decoder(torch.tanh(z / 3) * 3) * 2 - 1

    def latents(self, image: Float[Tensor, "B _ H W"]) -> Float[Tensor, "B C h w"]:
        """What a diffusion model learns: the latents, scaled."""
        return self.encode(image) * self.config.scaling_factor

    def images(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B _ H W"]:
        """The inverse of `latents`."""
        return self.decode(latents / self.config.scaling_factor)

    def forward(self, image: Float[Tensor, "B _ H W"]) -> Float[Tensor, "B _ H W"]:
        """The image again, after the way through its latents."""
        return self.decode(self.encode(image))


def tiny_autoencoder(config: TinyAutoencoderConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, image, method="forward")`.

    What a block adds starts at zero: activations of a fresh model do not grow with its depth.
    """
    rules = [
        (r"norm\.weight$", ones),
        (r"bias$|conv_3\.weight$|pool_down\.weight$", zeros),
        (r"weight$", kaiming_uniform()),
    ]
    return functional(lambda: TinyAutoencoder(config), rules, strict=False)


def published_names(config: TinyAutoencoderConfig, *, diffusers: bool = False) -> dict[str, str]:
    """{our name of a parameter: "encoder.7.conv.2.weight"}; layers count as in one nn.Sequential.

    Args:
        diffusers: the names of AutoencoderTiny, "encoder.layers.7.conv.2.weight", in which the
            bending of the latents is no layer and does not count.
    """
    places: dict[str, str] = {}
    inside = {f"conv_{i}": f"conv.{2 * i - 2}" for i in (1, 2, 3)}
    inside |= {"pool_up": "pool.0", "pool_norm": "pool.1", "pool_down": "pool.3"}
    for half, depths in (("encoder", config.encoder_depths), ("decoder", config.decoder_depths)):
        prefix = f"{half}.layers" if diffusers else half
        n = 0 if half == "encoder" or diffusers else 1
        places[f"{half}.input"] = f"{prefix}.{n}"
        n += 1 if half == "encoder" else 2  # a ReLU follows
        for i, depth in enumerate(depths):
            if half == "encoder" and i > 0:
                places[f"{half}.levels.{i}.shrink"] = f"{prefix}.{n}"
                n += 1
            for j in range(depth):
                for ours, theirs in inside.items():
                    places[f"{half}.levels.{i}.blocks.{j}.{ours}"] = f"{prefix}.{n}.{theirs}"
                n += 1
            if half == "decoder" and i < len(depths) - 1:
                places[f"{half}.levels.{i}.enlarge"] = f"{prefix}.{n + 1}"  # after the doubling
                n += 2
        places[f"{half}.output"] = f"{prefix}.{n}"
    names = {}
    for name in tiny_autoencoder(config).shapes:
        stem, _, last = name.rpartition(".")
        names[name] = f"{places[stem]}.{last}"
    return names


def load(
    encoder: str | Path, decoder: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[TinyAutoencoderConfig, Params]:
    """Configuration and parameters from the two published files, .pth or .safetensors.

    Raises:
        ValueError: a missing or broken file; weights of another architecture.
    """
    files = {"encoder": read_tensors(encoder), "decoder": read_tensors(decoder)}
    weights = {f"{half}.{name}": x for half, file in files.items() for name, x in file.items()}
    first = weights.get("decoder.1.weight")
    if first is None or first.ndim != 4:
        raise ValueError(f"{decoder} must hold the decoder of a TAESD: no convolution at layer 1")
    config = TinyAutoencoderConfig(
        latent=first.shape[1],
        width=first.shape[0],
        pooled=any(".pool." in name for name in weights),
    )
    names = published_names(config)
    params = take(tiny_autoencoder(config).shapes, weights, names.__getitem__, kind="TAESD")
    return config, {name: value.to(dtype) for name, value in params.items()}
