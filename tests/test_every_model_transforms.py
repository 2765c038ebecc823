"""Every model under torch.func: grad, vmap(grad), jvp and jvp(grad), in float64 on the flash op.

References are differences along a direction, (f(p + h t) - f(p - h t)) / 2h of the loss and of its
gradient, with the textbook formula of attention, and examples one by one. `test_model_transforms`
and `test_decoder` look closer at the Transformer and the decoder.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch.func import grad, jvp, vmap

import msfs_functional.models
from msfs_functional import random
from msfs_functional.models.autoencoder import AutoencoderConfig, autoencoder, kl
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip, text_tower
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.models.discriminator import DiscriminatorConfig, discriminator
from msfs_functional.models.dit import DiTConfig, dit
from msfs_functional.models.joined import joined
from msfs_functional.models.tiny_autoencoder import TinyAutoencoderConfig, tiny_autoencoder
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.models.vit import ViTConfig, clip_vision, vit
from msfs_functional.models.vlm import VLMConfig, vlm, with_image_tokens

H = 1e-6  # of the differences
IMAGE = 19  # the placeholder's id

TEXT = TextConfig(8, 1, 2, 8, vocab=20, max_length=4, eos=18, projection=6)
VISION = clip_vision(width=8, depth=1, heads=2, hidden=8, image=4, patch=2, projection=6)
PATCHES = ViTConfig(8, 1, 2, 8, image=4, patch=2, class_token=False, pooling=None)
WORDS = DecoderConfig(20, width=8, depth=1, heads=2, hidden=12, max_length=12)
PICTURES = VLMConfig(PATCHES, WORDS, IMAGE, shuffle=1)
UNET = UNetConfig(
    channels=2, widths=(8, 8), depth=1, attention=(True, False), heads=(2, 2), context=6, groups=4
)
DIT = DiTConfig(channels=2, width=8, depth=1, heads=2, hidden=12, context=6, classes=3)
TINY = TinyAutoencoderConfig(width=4, encoder_depths=(1, 1), decoder_depths=(1, 1))
IDS = torch.tensor([[3, 5, 18, 18], [1, 2, 4, 18]])
PROMPTS = torch.tensor([with_image_tokens([1, IMAGE, ids, 8], PICTURES, 1) for ids in (5, 6)])
IMAGES, BIG, LATENTS, CONTEXT = (
    random.normal(random.key(i), shape, dtype=torch.float64)
    for i, shape in enumerate([(2, 3, 4, 4), (2, 3, 12, 12), (2, 2, 4, 4), (2, 3, 6)])
)
TIMES = torch.tensor([20.0, 700.0], dtype=torch.float64)
CLASSES = torch.tensor([0, 2])


def reconstruction(model, params, image, **options):
    again, posterior = model.apply(params, image, **options)
    return (again - image).square().sum() + 0.1 * kl(posterior).sum()


def squares(model, params, *args, **options):
    return model.apply(params, *args, **options).square().sum()


def with_classes(model, params, x, t, context, classes, **options):
    return squares(model, params, x, t, context, classes=classes, **options)


def both(model, params, ids, x, t, **options):
    context = model.apply(params, "text.hidden_states", ids, **options)
    return squares(model, params, "denoiser", x, t, context, **options)


HIDDEN = DiTConfig(channels=2, width=8, depth=1, heads=2, hidden=12, context=8)
TOGETHER = joined(denoiser=dit(HIDDEN), text=text_tower(TEXT))
KL = autoencoder(AutoencoderConfig(widths=(8, 8), depth=1, groups=4))
CRITIC = discriminator(DiscriminatorConfig(width=4, depth=2, groups=4))
CASES = {  # model, loss, the tensors of a batch of two, whether it has attention
    "vit": (vit(VISION), squares, (IMAGES,), True),
    "text_tower": (text_tower(TEXT), squares, (IDS,), True),
    "clip": (clip(CLIPConfig(VISION, TEXT)), squares, (IMAGES, IDS), True),
    "vlm": (vlm(PICTURES), squares, (PROMPTS, IMAGES), True),
    "unet": (unet(UNET), squares, (LATENTS, TIMES, CONTEXT), True),
    "dit": (dit(DIT), with_classes, (LATENTS, TIMES, CONTEXT, CLASSES), True),
    "autoencoder": (KL, reconstruction, (IMAGES,), True),
    "tiny_autoencoder": (tiny_autoencoder(TINY), squares, (IMAGES,), False),
    "discriminator": (CRITIC, squares, (BIG,), False),
    "joined": (TOGETHER, both, (IDS, LATENTS, TIMES), True),
}


def build(model, seed: int) -> dict[str, torch.Tensor]:
    keys = random.split(random.key(seed), len(model.shapes))
    return {
        name: value + 0.1 * random.normal(key, value.shape, dtype=value.dtype)
        for key, (name, value) in zip(
            keys, model.init(seed, dtype=torch.float64).items(), strict=True
        )
    }


def slope(fn, params, tangent):
    """(fn(p + h t) - fn(p - h t)) / 2h of a tensor or a dict of them."""
    ahead, behind = (fn({n: params[n] + s * H * tangent[n] for n in params}) for s in (1, -1))
    if isinstance(ahead, dict):
        return {name: (ahead[name] - behind[name]) / (2 * H) for name in ahead}
    return (ahead - behind) / (2 * H)


def close(ours, expected, error=1e-5):
    """To `error` of the largest number in all of `expected`."""
    if not isinstance(expected, dict):
        ours, expected = {"": ours}, {"": expected}
    scale = max(float(x.abs().max()) for x in expected.values())
    assert ours.keys() == expected.keys() and 0 < scale < float("inf")
    for name, value in expected.items():
        assert float((ours[name] - value).abs().max()) <= error * scale, name


@pytest.mark.parametrize("name", CASES)
def test_all_four_compositions_equal_differences_and_examples_one_by_one(name):
    model, loss, batch, attends = CASES[name]
    params, tangent = build(model, 0), build(model, 1)
    trusted = {"implementation": "reference"} if attends else {}

    def ours(p):
        return loss(model, p, *batch)

    def theirs(p):
        return loss(model, p, *batch, **trusted)

    gradient = grad(ours)(params)
    value, pushed = jvp(ours, (params,), (tangent,))
    close(value, theirs(params), 1e-12)
    close(pushed, slope(theirs, params, tangent))
    close(sum((gradient[n] * tangent[n]).sum() for n in params), pushed, 1e-9)
    again, curved = jvp(lambda p: grad(ours)(p), (params,), (tangent,))
    close(again, gradient, 1e-12)
    close(curved, slope(grad(theirs), params, tangent))

    def of_one(p, *example):
        return loss(model, p, *(x[None] for x in example))

    each = vmap(grad(of_one), in_dims=(None, *(0 for _ in batch)))(params, *batch)
    for i in range(2):
        alone = grad(lambda p, i=i: loss(model, p, *(x[i : i + 1] for x in batch), **trusted))
        close({n: x[i] for n, x in each.items()}, alone(params), 1e-9)


def test_no_model_of_the_library_is_left_out():
    found = set()
    for path in Path(msfs_functional.models.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                found |= {node.name} if ast.unparse(node.returns) == "Functional" else set()
    assert found == {*CASES, "transformer", "decoder"}
