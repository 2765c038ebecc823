"""A discriminator of patches: for every patch of an image one logit, above 0 for a real one.

Convolutions of stride 2, then two of stride 1, so that a logit of the default sees 70 x 70 pixels.
Group norms stand where the paper has batch norms, whose running means a pure function cannot keep.

Source: Isola et al. 2017, section 3.2; Lim and Ye 2017 (the hinge).
"""

import itertools
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msfs_functional.models.convolutions import Norm, group_norm
from msfs_functional.params import Functional, Params, functional, normal, ones, zeros


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes; the defaults are those of latent diffusion's autoencoders, 2.8M parameters."""

    channels: int = 3  # of the image
    width: int = 64  # of the first layer; doubled by each, up to 8 times
    depth: int = 3  # layers of stride 2
    groups: int = 32  # of every GroupNorm

    def __post_init__(self):
        for name in ("channels", "width", "depth", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if 2 * self.width % self.groups:
            raise ValueError(
                f"groups ({self.groups}) must divide twice the width ({2 * self.width})"
            )


class Discriminator(nn.Module):
    """The skeleton behind `discriminator`."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.depth + 1)]
        self.input = nn.Conv2d(config.channels, widths[0], 4, stride=2, padding=1)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < config.depth else 1
            self.convolutions.append(nn.Conv2d(before, width, 4, stride, padding=1, bias=False))
            self.norms.append(Norm(width))
        self.output = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
        """Logits of the image's patches.

        Raises:
            ValueError: an image too small for one logit.
        """
        least = 3 * 2**self.config.depth  # what the last two convolutions need
        if min(image.shape[-2:]) < least:
            raise ValueError(
                f"image {tuple(image.shape)} must be at least {least} x {least}: take a "
                f"discriminator of less depth"
            )
        x = F.leaky_relu(self.input(image), 0.2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            params: Params = dict(norm.named_parameters("norm"))
            x = group_norm(params, "norm", convolution(x), self.config.groups, 1e-5)
            x = F.leaky_relu(x, 0.2)
        return self.output(x).squeeze(1)


def discriminator(config: DiscriminatorConfig) -> Functional:
    """The model as pure functions: `init(seed)`, `apply(params, image)`."""
    rules = [(r"norms\..*weight$", ones), (r"bias$", zeros), (r"weight$", normal(0.02))]
    return functional(lambda: Discriminator(config), rules, strict=False)
