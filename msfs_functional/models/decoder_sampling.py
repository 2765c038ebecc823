"""The autoencoder's decoder for sampling: latents to images by the blocks of `arranged`.

    prepared = prepare(params)                    # of the weights alone, once
    image = images(config, prepared, latents)     # autoencoder(config).apply(.., method="images")

`autoencoder` is the definition; tests hold the two equal. Without gradients.

Dimension key: B batch, C channels of latents, h height, w width of latents, H, W of the image.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from msfs_kernels import image_passes as passes
from torch import Tensor

from msfs_functional.attention import Implementation, attention
from msfs_functional.models import arranged
from msfs_functional.models.arranged import Image, convolve, enlarge, normalized
from msfs_functional.models.autoencoder import AutoencoderConfig
from msfs_functional.models.convolutions import linear
from msfs_functional.params import Params

MOST = 256  # head dim of the op's kernels; torch's take more


@torch.no_grad()
def prepare(params: Params) -> Params:
    """What `images` reads, of the parameters of `autoencoder(config)`."""
    return params | arranged.merged(params)


def pixel_attention(
    params: Params, name: str, image: Image, options: tuple[int, float], how: Implementation
) -> Image:
    """`autoencoder.pixel_attention`."""
    y = normalized(params, f"{name}.norm", [image], *options, silu=False)
    q, k, v = (linear(params, f"{name}.{part}", y.flatten(1, 2)).unsqueeze(1) for part in "qkv")
    how = "sdpa" if how == "flash" and q.shape[-1] > MOST else how
    y = attention(q, k, v, implementation=how).squeeze(1)
    y = F.linear(y, params[f"{name}.o.weight"]).view_as(image.x)
    return Image(*passes.add(y, params[f"{name}.o.bias"], image.x))


@torch.no_grad()
def images(
    config: AutoencoderConfig,
    params: Params,
    latents: Float[Tensor, "B C h w"],
    implementation: Implementation = "flash",
) -> Float[Tensor, "B _ H W"]:
    """The images of scaled latents, in about [-1, 1].

    Args:
        params: of `prepare`.
    """
    z = latents / config.scaling_factor + config.shift
    if config.mixed:
        z = F.conv2d(z, params["mix_latents.weight"], params["mix_latents.bias"])
    options = config.groups, config.norm_eps

    def resnet(name: str, image: Image) -> Image:
        shift = params[f"{name}.conv_in.bias"][None]
        return arranged.resnet(params, name, [image], shift, *options)

    y = convolve(params["decoder.input.weight"], z.permute(0, 2, 3, 1).contiguous())
    image = Image(*passes.add(y, params["decoder.input.bias"]))
    image = resnet("decoder.middle.resnets.0", image)
    if config.middle_attention:
        given = ("decoder.middle.attention", image, options, implementation)
        image = pixel_attention(params, *given)
    image = resnet("decoder.middle.resnets.1", image)
    for i in range(len(config.widths)):
        for j in range(config.depth + 1):
            image = resnet(f"decoder.up.{i}.resnets.{j}", image)
        if i + 1 < len(config.widths):
            size = tuple(2 * side for side in image.x.shape[1:3])
            image = enlarge(params, f"decoder.up.{i}.enlarge", image.x, size)
    y = normalized(params, "decoder.output_norm", [image], *options)
    y = convolve(params["decoder.output.weight"], y) + params["decoder.output.bias"]
    return y.permute(0, 3, 1, 2)
