"""A vision-language model: the patches of images become tokens of a decoder.

    image -> ViT -> patches -> (pixel shuffle) -> projector -> image tokens \\
                                                                             spliced -> decoder
    ids   -> embedding ------------------------------------------------------/

In a prompt every image has a placeholder, which `with_image_tokens` repeats once for each of the
image's tokens. A causal mask makes LLaVA (Liu et al. 2023), a prompt that sees all of itself
PaliGemma (Beyer et al. 2024), pixel shuffle SmolVLM and nanoVLM.

Dimension key: B prompts, T tokens, N images of all prompts, in the order of their placeholders,
P tokens of an image, D the decoder's width, V vocabulary.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from msfs_functional.attention import Implementation
from msfs_functional.generation import LanguageModel, padded
from msfs_functional.layers import ACTIVATIONS, Activation, site_keys
from msfs_functional.models import decoder as decoders
from msfs_functional.models.decoder import AttentionFn, Decoder, DecoderConfig
from msfs_functional.models.decoder_generation import language_model as decoder_for_generation
from msfs_functional.models.vit import DECAY as VISION_DECAY
from msfs_functional.models.vit import ViT, ViTConfig, clip_vision, siglip_vision
from msfs_functional.models.vit import initializers as vision_initializers
from msfs_functional.models.vit import tiny as tiny_vision
from msfs_functional.params import Functional, Initializer, Params, Rules, functional, normal, zeros

IGNORED = -100  # label of a token that is no answer

DECAY: Rules[bool] = [(r"norm|bias|embedding", False), *VISION_DECAY]
# Which parameters train in stage 1 (Liu et al. 2023, section 4.2); stage 2 trains all.
STAGE_1: Rules[bool] = [(r"^projector\.", True), (r"", False)]


@dataclass(frozen=True)
class VLMConfig:
    """A tower, a decoder, and what lies between."""

    vision: ViTConfig
    decoder: DecoderConfig
    image_token: int  # id of the placeholder; may lie beyond the decoder's vocabulary
    projector: Literal["linear", "mlp"] = "mlp"  # mlp: down(activation(up(x)))
    activation: Activation = "gelu"  # of the mlp
    projector_bias: bool = True
    shuffle: int = 1  # patches of the side of a square that becomes one token
    vision_layers: int | None = None  # stop after so many, without the last norm; None: all, with
    class_token: bool = False  # the class token's state is an image token, too
    prefix: bool = False  # the tokens of a prompt see each other (prefix-LM)

    def __post_init__(self):
        if self.projector not in ("linear", "mlp"):
            raise ValueError(f"projector ({self.projector!r}) must be 'linear' or 'mlp'")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation ({self.activation!r}) must be in {list(ACTIVATIONS)}")
        if self.image_token < 0:
            raise ValueError(f"image_token ({self.image_token}) must be an id, 0 or more")
        if self.shuffle < 1 or any(n % self.shuffle for n in self.vision.grid):
            raise ValueError(
                f"shuffle ({self.shuffle}) must be at least 1 and divide the patches of both "
                f"sides, {self.vision.grid}"
            )
        if self.class_token and (self.shuffle > 1 or not self.vision.class_token):
            raise ValueError("class_token needs a tower that has one, and shuffle=1")
        if self.vision_layers is not None and not 0 <= self.vision_layers <= self.vision.depth:
            raise ValueError(
                f"vision_layers ({self.vision_layers}) must be at least 0 and at most the tower's "
                f"depth ({self.vision.depth})"
            )
        if self.tokens_per_image >= self.decoder.max_length:
            raise ValueError(
                f"an image takes {self.tokens_per_image} tokens, the decoder at most "
                f"{self.decoder.max_length}: enlarge shuffle, the patch or max_length"
            )

    @property
    def tokens_per_image(self) -> int:
        """P, for images of the tower's own size."""
        rows, columns = self.vision.grid
        return rows * columns // self.shuffle**2 + self.class_token


def llava(decoder: DecoderConfig, image_token: int, **options: Any) -> VLMConfig:
    """LLaVA 1.5's choices (Liu et al. 2024): CLIP L/14 at 336 pixels, its last layer but one."""
    sizes = {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096, "image": 336, "patch": 14}
    vision = clip_vision(**sizes, projection=None)
    return VLMConfig(vision, decoder, image_token, **{"vision_layers": 23, **options})


def nano(**options: Any) -> VLMConfig:
    """nanoVLM's sizes, 222M parameters: SigLIP B/16 at 224 pixels and SmolLM2 135M."""
    vision, decoder = siglip_vision(pooling=None), decoders.small(49280)
    sizes = {"image_token": 49152, "projector": "linear", "shuffle": 2, "projector_bias": False}
    return VLMConfig(vision, decoder, **{**sizes, **options})


def tiny(vocab: int, image_token: int, **options: Any) -> VLMConfig:
    """Answers questions about rendered shapes on a laptop."""
    vision = tiny_vision(pooling=None)
    return VLMConfig(vision, decoders.tiny(vocab), image_token, **{"shuffle": 2, **options})


PRESETS: dict[str, Callable[..., VLMConfig]] = {"tiny": tiny, "nano": nano, "llava": llava}


def pixel_shuffle(
    x: Float[Tensor, "N Y*X D"], grid: tuple[int, int], side: int
) -> Float[Tensor, "N P D*side*side"]:
    """Squares of side x side patches as one token each: by row, column, then dim (Shi 2016)."""
    x = x.unflatten(1, (grid[0] // side, side, grid[1] // side, side))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """From the tower's states to the decoder's embeddings."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        inner, width = config.vision.width * config.shuffle**2, config.decoder.width
        self.activation = ACTIVATIONS[config.activation]
        if config.projector == "linear":
            self.linear = nn.Linear(inner, width, bias=config.projector_bias)
        else:
            self.up = nn.Linear(inner, width, bias=config.projector_bias)
            self.down = nn.Linear(width, width, bias=config.projector_bias)

    def forward(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P D"]:
        return self.linear(x) if hasattr(self, "linear") else self.down(self.activation(self.up(x)))


class VLM(nn.Module):
    """The skeleton behind `vlm`; every method is a pure function of the parameters.

    Arguments that methods share:
        ids: tokens, padded on the right; each image's placeholders stand in a row.
        pixels: (N, C, h, w), the images of all prompts, first those of the first; None: none.
        images: (N, P, D), in place of pixels, what `image_tokens` gave for them: an image that
            several prompts share passes the tower once.
        lengths: (B,), tokens that are not padding.
        prefix_lengths: (B,), tokens of the prompt, for a model with prefix=True.
        key: for dropout; None evaluates without.
        others: as in `Decoder`.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.decoder)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        pixels: Float[Tensor, "N C h w"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token that follows each token; options as in `hidden`."""
        return self.decoder.logits(self.hidden(ids, pixels, **options))

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        pixels: Float[Tensor, "N C h w"] | None = None,
        *,
        images: Float[Tensor, "N P D"] | None = None,
        lengths: Int[Tensor, "B"] | None = None,
        prefix_lengths: Int[Tensor, "B"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
        visible: Bool[Tensor, "B 1 T T"] | None = None,
        positions: Int[Tensor, "*B T"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation | AttentionFn = "flash",
        around_block: Callable[..., Any] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """States after the last norm: for `losses.linear_cross_entropy`.

        Raises:
            ValueError: placeholders and images that do not match; a prefix for a model without, or
                none for one with; a prefix in packed rows, which have several, or in sequences
                longer than the decoder's window.
        """
        if self.config.prefix != (prefix_lengths is not None):
            raise ValueError(
                f"a model with prefix={self.config.prefix} takes "
                f"{'' if self.config.prefix else 'no '}prefix_lengths"
            )
        if prefix_lengths is not None and segment_ids is not None:
            raise ValueError("packed rows (segment_ids) have no single prefix: take prefix=False")
        vision_key, decoder_key = site_keys(key, 2)
        given: dict[str, Any] = {"images": images, "key": vision_key}
        if not callable(implementation):
            given["implementation"] = implementation
        elif pixels is not None:
            raise ValueError(
                "a function for attention is the decoder's alone: give images (the tokens that "
                "image_tokens makes) in place of pixels"
            )
        x = self.embed(ids, pixels, **given)
        return self.decoder.hidden(
            None,
            embeddings=x,
            positions=positions,
            segment_ids=segment_ids,
            visible=visible,
            key_lengths=lengths,
            prefix_lengths=prefix_lengths,
            key=decoder_key,
            implementation=implementation,
            around_block=around_block,
        )

    def image_tokens(
        self,
        pixels: Float[Tensor, "N C h w"],
        *,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "N P D"]:
        """What stands for each image in the decoder's sequence."""
        config = self.config
        x = self.vision.hidden_states(
            pixels, layers=config.vision_layers, key=key, implementation=implementation
        )
        if config.vision.class_token and not config.class_token:
            x = x[:, 1:]
        if config.shuffle > 1:
            height, width = (n // config.vision.patch for n in pixels.shape[-2:])
            if height % config.shuffle or width % config.shuffle:
                raise ValueError(
                    f"patches {height, width} must be multiples of shuffle ({config.shuffle}): "
                    "resize the images"
                )
            x = pixel_shuffle(x, (height, width), config.shuffle)
        return self.projector(x)

    def embed(
        self,
        ids: Int[Tensor, "B T"],
        pixels: Float[Tensor, "N C h w"] | None = None,
        *,
        images: Float[Tensor, "N P D"] | None = None,
        key: Int64[Tensor, "2"] | None = None,
        implementation: Implementation = "flash",
    ) -> Float[Tensor, "B T D"]:
        """Embeddings of the tokens with the images' spliced in, in order.

        Raises:
            ValueError: another number of placeholders than of image tokens; pixels and images.
        """
        if pixels is not None and images is not None:
            raise ValueError("give pixels or images, the tokens made of them: not both")
        image_token = self.config.image_token
        here = ids == image_token
        if image_token >= self.config.decoder.vocab:
            ids = torch.where(here, 0, ids)
        x = self.decoder.embed(ids)
        if pixels is not None and len(pixels):
            images = self.image_tokens(pixels, key=key, implementation=implementation)
        _check_count(here, 0 if images is None else images.shape[0] * images.shape[1], images)
        return x if images is None else splice(x, here, images)


def _check_count(here: Tensor, given: int, images: Tensor | None) -> None:
    """On a GPU without waiting for it; a compiled or transformed call relies on the prompt's
    maker, `with_image_tokens`."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    shape = "no images" if images is None else f"{images.shape[0]} images of {images.shape[1]}"
    rule = f"image placeholders, for {shape} tokens: build the prompts with with_image_tokens"
    if here.is_cuda:
        torch._assert_async(here.sum() == given, f"the prompts hold another number of {rule}")
    elif int(here.sum()) != given:
        raise ValueError(f"the prompts hold {int(here.sum())} {rule}")


def splice(
    x: Float[Tensor, "B T D"], here: Bool[Tensor, "B T"], images: Float[Tensor, "N P D"]
) -> Float[Tensor, "B T D"]:
    """x with the rows of `images` in the places where `here` is true, one after another."""
    rows = images.flatten(0, 1).to(x.dtype)
    which = (here.flatten().cumsum(0) - 1).clamp(0, len(rows) - 1)
    return torch.where(here[..., None], rows[which].reshape(*here.shape, -1), x)


def with_image_tokens(
    prompt: Sequence[int], config: VLMConfig, images: int, *, tokens: int | None = None
) -> list[int]:
    """The prompt with each image's placeholder repeated once for each of its tokens.

    Args:
        prompt: ids with one placeholder for each image (each tile of a tiled one).
        images: that go with this prompt.
        tokens: of an image; default: those of an image of the tower's size.

    Raises:
        ValueError: more or fewer placeholders than images, more tokens than the decoder takes.
    """
    found = sum(token == config.image_token for token in prompt)
    if found != images:
        raise ValueError(
            f"the prompt has {found} image placeholders (id {config.image_token}) for {images} "
            "images: write one for each"
        )
    each = config.tokens_per_image if tokens is None else tokens
    repeats = (each if token == config.image_token else 1 for token in prompt)
    ids = [t for t, n in zip(prompt, repeats, strict=True) for _ in range(n)]
    if len(ids) > config.decoder.max_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens with its images, the decoder takes "
            f"{config.decoder.max_length}: fewer images, or a shorter text"
        )
    return ids


def answer_labels(
    ids: Int[Tensor, "B T"], prompt_lengths: Int[Tensor, "B"], lengths: Int[Tensor, "B"]
) -> Int[Tensor, "B T"]:
    """What each token should be followed by where that is part of the answer, else IGNORED.

        ids               i i q q a a .      prompt_lengths 4, lengths 6
        labels            - - - a a - -

    For `linear_cross_entropy(hidden, output_weight, labels, ignore_index=IGNORED)`.
    """
    following = ids.roll(-1, 1)
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    answer = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])
    return torch.where(answer, following, IGNORED)


def saliency(
    model: Functional,
    params: Params,
    ids: Int[Tensor, "B T"],
    pixels: Float[Tensor, "N C h w"],
    labels: Int[Tensor, "B T"],
    **options: Any,
) -> Float[Tensor, "N h w"]:
    """How much each pixel moves the answers: |d log p(answers) / d pixel|, of the largest channel.

    Args:
        labels: of the answers, as `answer_labels` makes them.
        options: as in `VLM.hidden`.

    Source: Simonyan et al. 2014, section 3.1.
    """

    def answers(pixels: Tensor) -> Tensor:
        logits = model.apply(params, ids, pixels, **options)
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        chosen = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels == IGNORED, 0.0, chosen).sum()

    return torch.func.grad(answers)(pixels).abs().amax(1)


def vlm(config: VLMConfig) -> Functional:
    """The model as pure functions; methods `forward`, `hidden`, `embed` and `image_tokens`."""
    inner = decoders.decoder(config.decoder).initializers
    rules: Rules[Initializer] = [
        *((f"^decoder.{re.escape(name)}$", init) for name, init in inner.items()),
        (r"^projector\..*weight$", normal(0.02)),
        (r"^projector\..*bias$", zeros),
        *((f"^vision.*{regex}", init) for regex, init in vision_initializers(config.vision)),
    ]
    return functional(lambda: VLM(config), rules, strict=False)


def part(params: Params, name: str) -> Params:
    """The parameters of one part ("vision", "projector", "decoder"), by their names there."""
    start = f"{name}."
    return {k.removeprefix(start): value for k, value in params.items() if k.startswith(start)}


def output_weight(params: Params) -> Float[Tensor, "V D"]:
    """The matrix of the output projection, wherever it is tied to."""
    return decoders.output_weight(part(params, "decoder"))


def language_model(
    config: VLMConfig,
    params: Params,
    *,
    implementation: Implementation | AttentionFn = "flash",
    fused: bool = False,
) -> LanguageModel:
    """The decoder in the form of module `generation`; what it sees comes from `prefill_inputs`.

    fused copies its matrices into fewer (`decoder.fuse`): a token takes fewer launches.

    generate = Generator(language_model(config, params))
    generate(prompts, settings, inputs=prefill_inputs(model, params, prompts, pixels))
    """
    own, settings = part(params, "decoder"), config.decoder
    if fused and not settings.fused:
        own, settings = decoders.fuse(own), replace(settings, fused=True)
    return decoder_for_generation(decoders.decoder(settings), own, implementation=implementation)


def prefill_inputs(
    model: Functional,
    params: Params,
    prompts: Sequence[Sequence[int]],
    pixels: Float[Tensor, "N C h w"] | None = None,
    *,
    images: Float[Tensor, "N P D"] | None = None,
    implementation: Implementation = "flash",
) -> Mapping[str, Tensor]:
    """What generation's prefill takes beside the prompts: their embeddings, and their prefix.

    Args:
        prompts: as `with_image_tokens` makes them; of different lengths.
        pixels: all their images, in order; or
        images: their tokens, see `VLM`.
    """
    config = cast(VLM, model.skeleton).config
    device = params["decoder.norm.weight"].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = padded(prompts, 0 if config.image_token else 1).to(device)
    with torch.no_grad():
        options = {"images": images, "implementation": implementation, "method": "embed"}
        inputs = {"embeddings": model.apply(params, ids, pixels, **options)}
    return {**inputs, "prefix_lengths": lengths} if config.prefix else inputs
