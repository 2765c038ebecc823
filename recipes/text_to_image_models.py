"""The networks of text_to_image.py, what they learn, and how captions or classes reach them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from text_to_image_settings import HEADS, LATENT, Config
from torch import Tensor
from torch.func import vmap

from msfs_functional import adversarial, image_sets, perceptual, random, samplers
from msfs_functional import diffusion as df
from msfs_functional import noise_schedules as ns
from msfs_functional.models import autoencoder as kl
from msfs_functional.models.clip import TextConfig, text_tower
from msfs_functional.models.discriminator import DiscriminatorConfig, discriminator
from msfs_functional.models.dit import DiTConfig, dit
from msfs_functional.models.joined import joined
from msfs_functional.models.tiny_autoencoder import TinyAutoencoderConfig, tiny_autoencoder
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.params import Functional, Params, cast
from msfs_functional.published_process import Process
from msfs_functional.words import Words


@dataclass(frozen=True)
class About:
    """What a run knows of its data, so that it can be used without them."""

    channels: int
    size: int
    words: tuple[str, ...] = ()  # of captions, if there are any
    classes: tuple[str, ...] = ()  # or of these
    length: int = 1

    def conditions(self, told: Sequence[str]) -> dict[str, Tensor]:
        """What the networks get of captions or names of classes; "" means nothing in particular.

        Raises:
            ValueError: a name that is no class.
        """
        if self.words:
            return Words(self.words, self.length).encode(told)
        if not self.classes:
            return {}
        number = {name: i for i, name in enumerate((*self.classes, ""))}
        if strange := [name for name in told if name not in number]:
            raise ValueError(f"{strange[0]!r} must be one of the classes {list(self.classes)}")
        return {"classes": torch.tensor([number[name] for name in told])}


class Models(NamedTuple):
    coder: Functional | None  # "autoencoder", and of kl its "discriminator"
    denoiser: Functional  # "denoiser", and its "text" tower if there are captions


def coder_parts(config: Config, about: About) -> dict[str, Functional]:
    if not config.latents:
        return {}
    n, channels = config.pixels, about.channels
    if config.coder == "tiny":
        sizes: dict[str, Any] = {"encoder_depths": (0, 1, 1), "decoder_depths": (1, 1, 0)}
        tiny = TinyAutoencoderConfig(channels=channels, width=n, **sizes)
        return {"autoencoder": tiny_autoencoder(tiny)}
    groups = max(n // 4, 1)
    large = kl.pixels_32(widths=(n, 2 * n, 2 * n), groups=groups, channels=channels)
    critic = DiscriminatorConfig(channels=channels, width=n, depth=2, groups=groups)
    parts = {"autoencoder": kl.autoencoder(large)}
    return parts | ({"discriminator": discriminator(critic)} if config.gan else {})


def make_models(config: Config, about: About) -> Models:
    """The networks of a run."""
    width, text = config.width, {}
    if about.words:
        vocab = Words(about.words, about.length).vocab
        options = {"is_causal": False, "pooling": "last", "projection": None}
        sizes = {"width": width, "depth": 1, "heads": HEADS, "hidden": 2 * width}
        tower = TextConfig(vocab=vocab, max_length=about.length, **sizes, **options)
        text = {"text": text_tower(tower)}
    common: dict[str, Any] = {
        "channels": LATENT if config.latents else about.channels,
        "context": width if about.words else None,
        "classes": len(about.classes) + 1 if about.classes else None,
        "interval": config.objective == "meanflow",
    }
    if config.backbone == "dit":
        sizes = {"width": width, "depth": config.depth, "heads": HEADS}
        network = dit(DiTConfig(patch=config.patch, hidden=3 * width, **sizes, **common))
    else:
        network = unet(
            UNetConfig(
                widths=(width, 2 * width, 2 * width),
                depth=config.depth,
                attention=(False, True, True),
                heads=(HEADS,) * 3,
                groups=min(32, width // 4),
                transformer_depth=1 if about.words else 0,
                **common,
            )
        )
    coder = coder_parts(config, about)
    return Models(joined(**coder) if coder else None, joined(denoiser=network, **text))


def told_of(data: image_sets.ImageSet) -> list[str]:
    """The caption, or the name of the class, of each picture."""
    if data.captions is not None:
        return list(data.captions)
    if data.labels is None:
        return [""] * len(data)
    return [data.classes[i] for i in data.labels.tolist()]


def describe(config: Config, data: image_sets.ImageSet) -> About:
    channels, size = data.pictures.shape[1:3]
    if data.captions is None or not any(data.captions):
        return About(channels, size, classes=data.classes)
    words = Words.of(data.captions, most=config.data.words, length=config.data.length)
    return About(channels, size, words=words.words, length=words.length)


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(image: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def coder_loss(model: Functional, dtype: torch.dtype, params: Params, batch: Any, key: Tensor):
    """Squared and absolute error of the picture that comes back from its latents, which are kept
    small and disturbed a little, so that near latents are near pictures."""
    params, x = cast(params, dtype), to_signed(batch["pictures"]).to(dtype)
    z = model.apply(params, "autoencoder.encode", x)
    disturbed = z + 0.05 * samplers.draw(batch["keys"], z.float()).to(dtype)
    error = (model.apply(params, "autoencoder.decode", disturbed) - x).float()
    squared = error.square().mean()
    return squared + error.abs().mean() + 1e-3 * z.float().square().mean(), {"squared": squared}


def kl_loss(config: Config, about: About) -> Callable[..., Any]:
    """`adversarial.autoencoder_loss` of the two networks of a "kl" coder."""
    parts = coder_parts(config, about)
    options: dict[str, Any] = {"kl_weight": 1e-4, "gan_weight": config.gan}
    if config.lpips:
        weights = perceptual.load(*config.lpips, device=str(config.device))
        options["perceptual_fn"] = lambda x, y: perceptual.distance(
            weights, x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)
        )
    model, critic = parts["autoencoder"], parts.get("discriminator")

    def loss_fn(params: Params, batch: Any, key: Tensor):
        batch = {"image": to_signed(batch["pictures"]), "keys": batch["keys"]}
        return adversarial.autoencoder_loss(
            model, critic or model, params, batch, batch["keys"], **options
        )

    return loss_fn


def process_of(config: Config, device: torch.device | str) -> Process | None:
    """The schedule that eps, x0 or v is learnt on: Stable Diffusion's, down to pure noise where
    the target tells something there; None for flows."""
    if config.objective in ("flow", "meanflow"):
        return None
    alpha_bar = ns.scaled_linear()
    if config.objective != "eps":
        alpha_bar = ns.zero_terminal_snr(alpha_bar)
    return Process(alpha_bar.to(device), config.objective, spacing="trailing", offset=0)


def denoiser_loss(
    model: Functional,
    config: Config,
    dtype: torch.dtype,
    nothing: dict[str, Tensor],
    process: Process | None,
    params: Params,
    batch: dict[str, Tensor],
    key: Tensor,
):
    """Squared error of the velocity eps - x_0 at logit-normal times, some captions left out; or of
    eps, x0 or v at even steps, weighted by min-SNR; or MeanFlow's, guided in training, so that
    sampling needs one call a step.

    Args:
        nothing: conditions of the empty caption, one row.
        process: of `process_of`.
        batch: keys, latents, and what else it holds are conditions.
    """
    noise_keys, time_keys, drop_keys = vmap(lambda k: random.split(k, 3))(batch["keys"]).unbind(1)
    params, x_0 = cast(params, dtype), batch["latents"]
    drop = vmap(lambda k: random.bernoulli(k, config.caption_dropout, ()))(drop_keys)
    nothing = {name: x.expand(len(x_0), *x.shape[1:]) for name, x in nothing.items()}
    given = {
        name: torch.where(drop.view(-1, *[1] * (x.ndim - 1)), x, batch[name])
        for name, x in nothing.items()
    }
    eps = samplers.draw(noise_keys, x_0)
    if config.objective == "flow":
        t = vmap(lambda k: ns.logit_normal_times(k, ()))(time_keys)
        x_t = df.add_noise(x_0, eps, ns.rectified_flow(t)).to(dtype)
        y = predict_of(model, params, given)(x_t, t)
        return df.weighted_mse(y.float(), eps - x_0), {}
    if process is not None:
        count = len(process.alpha_bar)
        step = vmap(lambda k: random.integers(k, (), 0, count))(time_keys)
        level = ns.variance_preserving(process.alpha_bar[step].float())
        x_t = df.add_noise(x_0, eps, level).to(dtype)
        y = predict_of(model, params, given)(x_t, step / count)
        target = df.target_of(x_0, eps, level, process.target)
        return df.weighted_mse(y.float(), target, df.min_snr_weight(level, process.target)), {}
    r, t = (x[:, 0] for x in vmap(lambda k: df.meanflow_times(k, 1))(time_keys))
    velocity, w = eps - x_0, config.guidance
    if w != 1 and given:
        z = df.add_noise(x_0, eps, ns.rectified_flow(t)).to(dtype)
        with torch.no_grad():
            u = predict_of(model, params, nothing)(z, t, 0 * t).float()
        guided = w * velocity + (1 - w) * u
        velocity = torch.where(df.per_example(drop, x_0).bool(), velocity, guided)
    predict = predict_of(model, params, given)

    def u_fn(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return predict(z.to(dtype), t, t - r).float()

    found = df.meanflow_errors(u_fn, x_0, eps, r, t, velocity=velocity)
    return df.meanflow_loss(found), {"squared": found.detach().mean() / x_0[0].numel()}


def predict_of(model: Functional, params: Params, given: dict[str, Tensor]) -> Callable[..., Any]:
    """(x, t, interval or None) -> prediction, under conditions whose captions are read once."""
    options: dict[str, Any] = {}
    if "ids" in given:
        lengths = given["lengths"]
        tower = "text.hidden_states"
        options["context"] = model.apply(params, tower, given["ids"], lengths=lengths)
        options["context_lengths"] = lengths
    elif given:
        options["classes"] = given["classes"]

    def predict(x: Tensor, t: Tensor, interval: Tensor | None = None) -> Tensor:
        if interval is None:
            return model.apply(params, "denoiser", x, 1000 * t, **options)
        # MeanFlow learns by the derivative by t, in which waves of 1000 t would drown all else.
        return model.apply(params, "denoiser", x, t, interval=interval, **options)

    return predict
