"""Autoencoders: diffusers' numbers both ways, published photographs, and bad input."""

import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from msfs_functional import random
from msfs_functional.models import autoencoder as kl
from msfs_functional.models import diffusers_format as hf
from msfs_functional.models import tiny_autoencoder as tiny
from msfs_functional.models.autoencoder import AutoencoderConfig, Posterior, autoencoder
from msfs_functional.models.tiny_autoencoder import TinyAutoencoderConfig, tiny_autoencoder

KEY = random.key(5)
CASES = {
    "stable diffusion": {},
    "two blocks, three levels": {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "latent_channels": 6,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "no attention, nothing mixed": {
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "in_channels": 1,
        "out_channels": 1,
    },
}


def randomize(model: nn.Module, gain: float = 1.5) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
        else:
            nn.init.normal_(parameter, std=gain / parameter[0].numel() ** 0.5)
    return model.eval()


def published(case: str) -> diffusers.AutoencoderKL:
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, **CASES[case]}
    levels = len(options["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    model = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **options)
    return randomize(model)  # pyright: ignore[reportReturnType]


def pictures(channels: int = 3) -> torch.Tensor:
    return random.uniform(KEY, (2, channels, 8, 12), low=-1.0)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_both_halves_equal_diffusers(case):
    theirs = published(case)
    config, params = hf.autoencoder_from(theirs.config, theirs.state_dict())
    model, image = autoencoder(config), pictures(config.channels)
    expected = theirs.encode(image).latent_dist
    assert expected.mean.std() > 0.1
    for implementation in ("flash", "reference"):
        options = {"implementation": implementation}
        posterior = model.apply(params, image, method="encode", **options)
        close(posterior.mean, expected.mean)
        close(posterior.logvar, expected.logvar)
        out = model.apply(params, expected.mean, method="decode", **options)
        close(out, theirs.decode(expected.mean).sample)
    torch.testing.assert_close(kl.kl(posterior), expected.kl(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_saved_models_load_into_diffusers(case, tmp_path):
    theirs = published(case)
    config, params = hf.autoencoder_from(theirs.config, theirs.state_dict())
    hf.save_autoencoder(tmp_path, config, params)
    again, image = diffusers.AutoencoderKL.from_pretrained(tmp_path), pictures(config.channels)
    torch.testing.assert_close(again(image).sample, theirs(image).sample)
    loaded, values = hf.load_autoencoder(tmp_path)
    assert loaded == config and values.keys() == params.keys()
    assert all(torch.equal(value, params[name]) for name, value in values.items())


def test_the_preset_has_stable_diffusion_s_names_and_sizes():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    config = kl.stable_diffusion()
    shapes = {hf.autoencoder_name(n): s for n, s in autoencoder(config).shapes.items()}
    assert shapes == {name: value.shape for name, value in theirs.named_parameters()}
    assert hf.read_autoencoder(theirs.config) == config
    assert sum(shape.numel() for shape in shapes.values()) == 83653863


@torch.no_grad()
def test_folders_with_the_old_names_of_attention_load():
    theirs = published("stable diffusion")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in theirs.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        weights[name] = value
    config, params = hf.autoencoder_from(theirs.config, weights)
    image = pictures()
    close(autoencoder(config).apply(params, image)[0], theirs(image).sample)


@torch.no_grad()
def test_latents_are_scaled_samples_by_key_and_images_their_inverse():
    theirs = published("two blocks, three levels")
    config, params = hf.autoencoder_from(theirs.config, theirs.state_dict())
    model, image = autoencoder(config), pictures()
    mean, logvar = model.apply(params, image, method="encode")
    latents = model.apply(params, image, KEY, method="latents")
    noise = random.normal(KEY, mean.shape)
    z = mean + (0.5 * logvar).exp() * noise
    torch.testing.assert_close(latents, (z - 0.1159) * 0.3611)
    torch.testing.assert_close(
        model.apply(params, latents, method="images"),
        model.apply(params, z, method="decode"),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        model.apply(params, image, method="latents"), (mean - 0.1159) * 0.3611
    )
    out, posterior = model.apply(params, image, KEY)
    torch.testing.assert_close(out, model.apply(params, z, method="decode"))
    assert torch.equal(posterior.mean, mean)


def test_kl_by_hand_and_zero_at_the_prior():
    zero = torch.zeros(2, 1, 1, 2)
    assert kl.kl(Posterior(zero, zero)).tolist() == [0, 0]
    shifted = Posterior(zero + 2.0, zero)  # 2 latents, each 2 ** 2 / 2 nats
    assert kl.kl(shifted).tolist() == [4, 4]


def test_an_autoencoder_learns_one_picture():
    model = autoencoder(AutoencoderConfig(channels=1, widths=(8, 8), depth=1, groups=4))
    params, image = model.init(0), pictures(1)
    params = {name: value.requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.Adam(params.values(), 3e-3)
    losses = []
    for i in range(40):
        out, posterior = model.apply(params, image, random.key(i))
        loss = (out - image).square().mean() + 1e-6 * kl.kl(posterior).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# The tiny one


def published_tiny() -> tuple[diffusers.AutoencoderTiny, TinyAutoencoderConfig]:
    sizes = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    theirs = diffusers.AutoencoderTiny(
        **sizes, num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(2, 1, 1)
    )
    config = TinyAutoencoderConfig(width=8, encoder_depths=(1, 2, 1), decoder_depths=(2, 1, 1))
    return randomize(theirs, 0.8), config  # pyright: ignore[reportReturnType]


@torch.no_grad()
def test_the_tiny_autoencoder_equals_diffusers():
    theirs, config = published_tiny()
    names, weights = tiny.published_names(config, diffusers=True), theirs.state_dict()
    assert set(names.values()) == set(weights)
    params = {ours: weights[name] for ours, name in names.items()}
    model, image = tiny_autoencoder(config), pictures()
    z = theirs.encode(image).latents
    close(model.apply(params, image, method="encode"), z)
    close(model.apply(params, z, method="decode"), theirs.decode(z).sample)
    close(model.apply(params, image), theirs.decode(z).sample)


@pytest.fixture(scope="module")
def data() -> Path:
    root = Path(__file__).parents[1]
    data = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data"))
    if not (data / "weights" / "taesd").is_dir():
        pytest.skip(f"no folder {data}/weights/taesd: MSFS_DATA names the one with weights")
    return data


@pytest.mark.parametrize(
    ("photograph", "expected"), (("astronaut", 31.19), ("chelsea", 32.70), ("coffee", 29.62))
)
@torch.no_grad()
def test_published_weights_give_their_psnr_on_photographs(photograph, expected, data):
    folder = data / "weights" / "taesd"
    config, params = tiny.load(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth")
    image = Image.open(data / "natural_images" / f"{photograph}.png").convert("RGB")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    x = x[..., : x.shape[-2] // 16 * 16, : x.shape[-1] // 16 * 16]
    out = (tiny_autoencoder(config).apply(params, 2 * x - 1) + 1) / 2
    psnr = -10 * (out.clamp(0, 1) - x).square().mean().log10()  # dB
    assert psnr.item() == pytest.approx(expected, abs=0.005)


# Bad input


def apply(model, x, method):
    return model.apply(model.init(0), x, method=method)


SMALL = autoencoder(AutoencoderConfig(widths=(8, 8, 8), depth=1, groups=4))
TINY = tiny_autoencoder(TinyAutoencoderConfig(width=4))
HUB = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: apply(SMALL, torch.zeros(1, 3, 8, 6), "encode"), "that 4 divides: crop or resize"),
        (lambda: apply(SMALL, torch.zeros(1, 1, 8, 8), "encode"), r"\(1, 1, 8, 8\) must be"),
        (lambda: apply(SMALL, torch.zeros(1, 3, 2, 2), "decode"), r"must be \(B, 4, h, w\)"),
        (lambda: apply(TINY, torch.zeros(1, 3, 8, 12), "encode"), "that 8 divides: crop or resize"),
        (lambda: apply(TINY, torch.zeros(1, 3, 2, 2), "decode"), r"must be \(B, 4, h, w\)"),
        (lambda: AutoencoderConfig(groups=48), r"groups \(48\) must divide each width, got 128"),
        (lambda: AutoencoderConfig(scaling_factor=0.0), r"scaling_factor \(0.0\) must be positive"),
        (lambda: TinyAutoencoderConfig(encoder_depths=(1,)), "one element for each level"),
        (lambda: hf.read_autoencoder({**HUB, "act_fn": "mish"}), "'mish'.*must be 'silu'"),
        (
            lambda: hf.read_autoencoder({**HUB, "up_block_types": ["AttnUpDecoderBlock2D"] * 2}),
            "must all be 'UpDecoderBlock2D'",
        ),
        (lambda: hf.autoencoder_from({}, {}), "lacks 'down_block_types'"),
        (lambda: tiny.load("/nowhere/encoder.pth", "/nowhere/decoder.pth"), "no file"),
    ),
)
def test_bad_input_says_value_rule_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("content", (b"no weights", b""))
def test_files_that_hold_no_tensors_are_refused(content, tmp_path, capsys):
    path = tmp_path / "encoder.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        tiny.load(path, path)
    torch.save({"0.weight": Harmful()}, path)
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        tiny.load(path, path)
    torch.save({"count": 3}, path)
    with pytest.raises(ValueError, match="holds no tensors"):
        tiny.load(path, path)
    torch.save({"0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must hold the decoder of a TAESD"):
        tiny.load(path, path)
    assert "unpickled" not in capsys.readouterr().out
