"""Training an autoencoder against a discriminator, both in one step of one pure loss.

    loss = |x - y| + perceptual(x, y) + kl_weight KL          moves the autoencoder
         + gan weight * adaptive * -mean(logits of y)         moves the autoencoder
         + gan weight * hinge(logits of x, logits of y)       moves the discriminator

The parameters of both lie in one dict, "autoencoder.*" and "discriminator.*". Where a term must not
move a part, that part enters it detached, so one gradient of the sum is right for both and any
optimizer trains them (`optim.by_group` gives each its own rate):

    step = train.make_step(functools.partial(autoencoder_loss, model, critic), optimizer)

Source: Esser et al. 2021, equations 4 to 7; Rombach et al. 2022, appendix G.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import grad
from torch.nn.grad import conv2d_weight

from msfs_functional.models.autoencoder import Posterior, kl, sample
from msfs_functional.params import Functional, Params

LAST = "decoder.output.weight"  # the layer at whose gradients the adaptive weight looks


def hinge(real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The discriminator's loss: real logits shall be above 1, fake ones below -1.

    Source: Lim and Ye 2017.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    reconstruction_fn: Callable[[Tensor], Tensor],
    adversarial_fn: Callable[[Tensor], Tensor],
    features: Float[Tensor, "B D H W"],
    image: Float[Tensor, "B C H W"],
    shape: torch.Size,
    *,
    most: float = 1e4,
) -> Float[Tensor, ""]:
    """|gradient of the reconstruction| / |gradient of the adversarial loss| at the last layer.

    With it both pull equally at the decoder. A constant: nothing is differentiated through it.

    Args:
        reconstruction_fn, adversarial_fn: losses of the image.
        features: what goes into the last layer, a convolution of stride 1; image: what comes out.
        shape: of its kernel.

    Source: Esser et al. 2021, equation 7.
    """
    image, features = image.detach(), features.detach()

    def length(loss_fn: Callable[[Tensor], Tensor]) -> Tensor:
        pull = grad(loss_fn)(image)
        padding = shape[-1] // 2
        return conv2d_weight(features, shape, pull, padding=padding).norm()

    ratio = length(reconstruction_fn) / (length(adversarial_fn) + 1e-4)
    return ratio.clamp(0, most).detach()


def autoencoder_loss(
    model: Functional,
    critic: Functional,
    params: Params,
    batch: dict[str, Tensor],
    key: Int64[Tensor, "2"],
    *,
    kl_weight: float = 1e-6,
    gan_weight: float = 0.5,
    perceptual_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of both networks for a batch of images, batch["image"] (B, C, H, W) in [-1, 1].

    Args:
        model: `models.autoencoder.autoencoder`; its parameters are params "autoencoder.*".
        critic: `models.discriminator.discriminator`; its are "discriminator.*".
        kl_weight: of the KL divergence in nats an image, over its number of pixels.
        gan_weight: 0 leaves the discriminator out, as at the start of a training.
        perceptual_fn: (image, reconstruction) -> (B,), added to the mean absolute error.

    Raises:
        ValueError: a negative weight.
    """
    if kl_weight < 0 or gan_weight < 0:
        raise ValueError(
            f"kl_weight ({kl_weight}) and gan_weight ({gan_weight}) must not be negative"
        )
    ours, theirs = part(params, "autoencoder"), part(params, "discriminator")
    image = batch["image"]
    posterior: Posterior = model.apply(ours, image, method="encode")
    features = model.apply(ours, sample(posterior, key), method="features")
    out = model.apply(ours, features, method="paint")

    def reconstruction_fn(out: Tensor) -> Tensor:
        error = (out - image).abs().mean()
        return error if perceptual_fn is None else error + perceptual_fn(image, out).mean()

    def adversarial_fn(out: Tensor) -> Tensor:
        return -critic.apply(detached(theirs), out).mean()

    reconstruction = reconstruction_fn(out)
    divergence = kl(posterior).mean() / image[0].numel()
    metrics: dict[str, Any] = {"reconstruction": reconstruction, "kl": divergence}
    loss = reconstruction + kl_weight * divergence
    if gan_weight > 0:
        weight = adaptive_weight(
            reconstruction_fn, adversarial_fn, features, out, model.shapes[LAST]
        )
        real, fake = critic.apply(theirs, torch.cat([image, out.detach()])).chunk(2)
        told = hinge(real, fake)
        loss = loss + gan_weight * (weight * adversarial_fn(out) + told)
        metrics |= {"discriminator": told, "real": real.mean(), "fake": fake.mean()}
    return loss, {name: value.detach() for name, value in metrics.items()}


def part(params: Params, name: str) -> Params:
    """The parameters under a name, without it."""
    start = f"{name}."
    return {n.removeprefix(start): x for n, x in params.items() if n.startswith(start)}


def detached(params: Params) -> Params:
    return {name: value.detach() for name, value in params.items()}
