"""The KL autoencoder of latent diffusion: images to a small grid of latents and back.

    image (B, 3, H, W) in [-1, 1]  ->  encode  ->  mean, logvar (B, C, H / f, W / f)
    sample by a key                ->  latents, scaled to a variance of about 1
    latents                        ->  decode  ->  image

f = 2 ** (levels - 1), 8 for Stable Diffusion. Both halves are levels of ResNet blocks, the size
halved or doubled in between, and attention over the pixels of the smallest one.

`autoencoder(config)` gives pure functions; `apply(params, x, method=...)` with encode, decode,
latents, images, forward.

Dimension key: B batch, C latent channels, D width, H height, W width of the image.

Source: Rombach et al. 2022, section 3.1; Esser et al. 2021 (the layers).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from msfs_functional.attention import Implementation, attention
from msfs_functional.models.convolutions import (
    INITIALIZERS,
    Convolution,
    Enlarging,
    Norm,
    Resnet,
    for_kernels,
    group_norm,
    linear,
)
from msfs_functional.params import Functional, Params, functional
from msfs_functional.regions import region_of
from msfs_functional.samplers import draw


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes and options; the defaults are Stable Diffusion's, 84M parameters, factor 8."""

    channels: int = 3  # of the image
    latent: int = 4  # channels C of the latents
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of each level, largest image first
    depth: int = 2  # ResNet blocks of a level in the encoder; one more in the decoder
    middle_attention: bool = True
    mixed: bool = True  # a 1 x 1 convolution after the encoder and before the decoder
    groups: int = 32  # of every GroupNorm
    norm_eps: float = 1e-6
    scaling_factor: float = 0.18215  # latents = (z - shift) * scaling_factor have variance 1
    shift: float = 0.0

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths {self.widths} must hold at least one level, each at least 1")
        for name in ("channels", "latent", "depth", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"groups ({self.groups}) must divide each width, got {width}")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor ({self.scaling_factor}) must be positive")

    @property
    def factor(self) -> int:
        """Pixels of the image along one side of a latent."""
        return 2 ** (len(self.widths) - 1)


def stable_diffusion(**options: Any) -> AutoencoderConfig:
    """Stable Diffusion 1 and 2: images of 512 x 512 to latents of 4 x 64 x 64."""
    return AutoencoderConfig(**options)


def pixels_32(**options: Any) -> AutoencoderConfig:
    """For images of 32 x 32 on a laptop: latents of 4 x 8 x 8, 0.5M parameters."""
    sizes = {"widths": (32, 48, 64), "depth": 1, "groups": 8, "scaling_factor": 1.0}
    return AutoencoderConfig(**{**sizes, **options})


PRESETS = {"stable_diffusion": stable_diffusion, "pixels_32": pixels_32}


class Posterior(NamedTuple):
    """The normal distribution of an image's latents, each with its own mean and variance."""

    mean: Float[Tensor, "B C h w"]
    logvar: Float[Tensor, "B C h w"]


def sample(
    posterior: Posterior, key: Int64[Tensor, "2"] | Int64[Tensor, "B 2"]
) -> Float[Tensor, "B C h w"]:
    """mean + sqrt(exp(logvar)) noise, by one key or one for each image."""
    mean, logvar = posterior
    return mean + torch.exp(0.5 * logvar) * draw(key, mean)


def kl(posterior: Posterior) -> Float[Tensor, "B"]:
    """KL(posterior || N(0, 1)) of each image, summed over its latents, in nats.

    Source: Kingma and Welling 2014, appendix B.
    """
    mean, logvar = posterior
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def pixel_attention(
    params: Params,
    x: Float[Tensor, "B D H W"],
    *,
    groups: int,
    eps: float,
    implementation: Implementation = "flash",
) -> Float[Tensor, "B D H W"]:
    """x plus attention of each pixel to all, one head of the full width."""
    y = group_norm(params, "norm", x, groups, eps).flatten(2).transpose(1, 2)
    q, k, v = (linear(params, name, y).unsqueeze(1) for name in "qkv")
    y = linear(params, "o", attention(q, k, v, implementation=implementation).squeeze(1))
    return x + y.transpose(1, 2).unflatten(-1, x.shape[-2:])


_pixel_attention = region_of(pixel_attention)


class PixelAttention(nn.Module):
    """Holds the parameters of `pixel_attention`."""

    def __init__(self, width: int, config: AutoencoderConfig):
        super().__init__()
        self.options = {"groups": config.groups, "eps": config.norm_eps}
        self.norm = Norm(width)
        for name in "qkvo":
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor, implementation: Implementation) -> Tensor:
        params = dict(self.named_parameters())
        return _pixel_attention(params, x, implementation=implementation, **self.options)


class Level(nn.Module):
    """Holds the ResNet blocks of a level and the convolution that leaves it."""

    def __init__(
        self, inputs: int, width: int, depth: int, config: AutoencoderConfig, leave: str | None
    ):
        super().__init__()
        options = {"groups": config.groups, "eps": config.norm_eps}
        sizes = [inputs] + [width] * (depth - 1)
        self.resnets = nn.ModuleList(Resnet(n, width, **options) for n in sizes)
        if leave == "shrink":  # padded on the right and at the bottom alone
            self.shrink = nn.Conv2d(width, width, 3, stride=2)
        elif leave == "enlarge":
            self.enlarge = Enlarging(width)


class Half(nn.Module):
    """The encoder or the decoder; forward stops before the last convolution, `output`."""

    def __init__(self, config: AutoencoderConfig, *, encodes: bool):
        super().__init__()
        self.config = config
        widths = config.widths if encodes else config.widths[::-1]
        inputs = config.channels if encodes else config.latent
        outputs = 2 * config.latent if encodes else config.channels
        self.input = Convolution(inputs, widths[0])
        levels, width = nn.ModuleList(), widths[0]
        for i, size in enumerate(widths):
            leave = None if i == len(widths) - 1 else "shrink" if encodes else "enlarge"
            depth = config.depth if encodes else config.depth + 1
            levels.append(Level(width, size, depth, config, leave))
            width = size
        wide = config.widths[-1]
        self.middle = Level(wide, wide, 2, config, None)
        if config.middle_attention:
            self.middle.attention = PixelAttention(wide, config)
        if encodes:
            self.down = levels
        else:
            self.up = levels
        self.output_norm = Norm(widths[-1])
        self.output = Convolution(widths[-1], outputs)

    def forward(self, x: Tensor, implementation: Implementation) -> Tensor:
        config, middle = self.config, cast(Any, self.middle)
        x = self.input(x)
        for level in cast(Any, getattr(self, "down", ())):
            for layer in level.resnets:
                x = layer(x)
            if hasattr(level, "shrink"):
                x = level.shrink(F.pad(x, (0, 1, 0, 1)))
        x = middle.resnets[0](x)
        if config.middle_attention:
            x = middle.attention(x, implementation)
        x = middle.resnets[1](x)
        for level in cast(Any, getattr(self, "up", ())):
            for layer in level.resnets:
                x = layer(x)
            if hasattr(level, "enlarge"):
                x = level.enlarge(x, [2 * side for side in x.shape[-2:]])
        norm: Params = dict(self.output_norm.named_parameters("norm"))
        return group_norm(norm, "norm", x, config.groups, config.norm_eps, silu=True)


class Autoencoder(nn.Module):
    """The skeleton behind `autoencoder`; every method is a pure function of the parameters."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Half(config, encodes=True)
        self.decoder = Half(config, encodes=False)
        if config.mixed:
            self.mix_moments = nn.Conv2d(2 * config.latent, 2 * config.latent, 1)
            self.mix_latents = nn.Conv2d(config.latent, config.latent, 1)

    def encode(
        self, image: Float[Tensor, "B _ H W"], *, implementation: Implementation = "flash"
    ) -> Posterior:
        """The distribution of an image's unscaled latents.

        Args:
            image: in [-1, 1].

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
        x = self.encoder.output(self.encoder(for_kernels(image), implementation))
        if config.mixed:
            x = self.mix_moments(x)
        mean, logvar = x.chunk(2, 1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(
        self, z: Float[Tensor, "B C h w"], *, implementation: Implementation = "flash"
    ) -> Float[Tensor, "B _ H W"]:
        """The image of unscaled latents, in about [-1, 1].

        Raises:
            ValueError: another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent:
            raise ValueError(f"latents {tuple(z.shape)} must be (B, {self.config.latent}, h, w)")
        return self.paint(self.features(z, implementation=implementation))

    def features(
        self, z: Float[Tensor, "B C h w"], *, implementation: Implementation = "flash"
    ) -> Float[Tensor, "B D H W"]:
        """What `decode` gives to its last convolution; `paint` is that convolution."""
        z = for_kernels(z)
        return self.decoder(self.mix_latents(z) if self.config.mixed else z, implementation)

    def paint(self, features: Float[Tensor, "B D H W"]) -> Float[Tensor, "B _ H W"]:
        """The image of `features`: paint(features(z)) is decode(z)."""
        return self.decoder.output(features)

    def latents(
        self,
        image: Float[Tensor, "B _ H W"],
        key: Int64[Tensor, "2"] | Int64[Tensor, "B 2"] | None = None,
        *,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B C h w"]:
        """What a diffusion model learns: a sample by the key (None: the mean), scaled."""
        posterior = self.encode(image, implementation=implementation)
        z = posterior.mean if key is None else sample(posterior, key)
        return (z - self.config.shift) * self.config.scaling_factor

    def images(
        self, latents: Float[Tensor, "B C h w"], *, implementation: Implementation = "flash"
    ) -> Float[Tensor, "B _ H W"]:
        """The inverse of `latents`: the image of scaled latents."""
        config = self.config
        return self.decode(
            latents / config.scaling_factor + config.shift, implementation=implementation
        )

    def forward(
        self,
        image: Float[Tensor, "B _ H W"],
        key: Int64[Tensor, "2"] | Int64[Tensor, "B 2"] | None = None,
        *,
        implementation: Implementation = "flash",
    ) -> tuple[Float[Tensor, "B _ H W"], Posterior]:
        """The image again, from a sample by the key (None: from the mean), and the posterior.

        Both are what training needs: reconstruction + weight * kl(posterior).
        """
        posterior = self.encode(image, implementation=implementation)
        z = posterior.mean if key is None else sample(posterior, key)
        return self.decode(z, implementation=implementation), posterior


def autoencoder(config: AutoencoderConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, image, key, method="forward")`."""
    return functional(lambda: Autoencoder(config), INITIALIZERS, strict=False)
