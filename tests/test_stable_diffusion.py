"""Published folders and single files of Stable Diffusion: the same images as diffusers makes."""

import json
import runpy
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from msfs_functional import noise_schedules as ns
from msfs_functional import random, samplers, stable_diffusion
from msfs_functional.clip_tokenizer import END, MERGES, START, byte_letters
from msfs_functional.models import diffusers_format, single_file
from msfs_functional.models.autoencoder import autoencoder
from msfs_functional.models.clip import text_tower
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.published_process import Process, read_process, write_process

KEY = random.key(11)
PROMPTS = ["a red cat", "two dogs"]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def randomize(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
        else:
            nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5)
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of CLIP's size whose merges are pairs of bytes."""
    letters = byte_letters()
    pairs = [(a, b) for a in letters for b in letters][:MERGES]
    words = [*letters, *(f"{a}</w>" for a in letters), *map("".join, pairs), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    lines = ["#version", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_folder(root: Path, version: int) -> Path:
    """A Stable Diffusion folder of random weights, as diffusers saves it.

    Version 2 has OpenCLIP's text tower, heads of 64, linear projections, and predicts v.
    """
    torch.manual_seed(0)
    second = version == 2
    text = transformers.CLIPTextConfig(
        hidden_size=64 if second else 16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=1 if second else 2,
        max_position_embeddings=12,
        eos_token_id=2,
        hidden_act="gelu" if second else "quick_gelu",
    )
    network = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(64, 128) if second else (8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64 if second else 16,
        attention_head_dim=[1, 2] if second else 4,
        norm_num_groups=32 if second else 8,
        use_linear_projection=second,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if second else "epsilon",
    )
    write_tokenizer(root / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=randomize(vae),
        text_encoder=randomize(transformers.CLIPTextModel(text)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(root / "tokenizer"),
        unet=randomize(network),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "model")
    for file in (root / "tokenizer").iterdir():  # newer versions save other files than published
        (root / "model" / "tokenizer" / file.name).write_bytes(file.read_bytes())
    return root / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("diffusers"), version=1)


@pytest.fixture(scope="module")
def folder_2(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("version_2"), version=2)


@pytest.fixture(scope="module")
def model(folder):
    return stable_diffusion.load(folder)


def start(count: int) -> torch.Tensor:
    keys = torch.stack([random.fold_in(KEY, i) for i in range(count)])
    noise = [random.split(key)[0] for key in keys]
    return samplers.draw(torch.stack(noise), torch.empty(count, 4, 8, 8))


def test_compiled_blocks_draw_the_same_images(model, compile_with):
    compile_with("eager")  # traced block by block, but no code generated
    options = {"steps": 2, "height": 16, "width": 16}
    plain, compiled = (
        stable_diffusion.text_to_image(model, ["a cat"], KEY, compile=how, **options)
        for how in (False, True)
    )
    assert (plain.int() - compiled.int()).abs().max() <= 1


SIZE = {"height": 16, "width": 16}
IMAGE = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("sampler", "version"), (("ddim", 1), ("dpmpp_2m", 1), ("ddim", 2), ("dpmpp_2m", 2))
)
@torch.no_grad()
def test_folders_sample_what_diffusers_samples(sampler, version, request):
    folder = request.getfixturevalue("folder_2" if version == 2 else "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    rescale = 0.7 if version == 2 else 0.0
    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "guidance_rescale": rescale, **SIZE}
    steps = {"sampler": sampler, "spacing": "leading", "rescale": rescale}
    if sampler == "dpmpp_2m":
        prediction = pipeline.scheduler.config.prediction_type
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(
            **SCHEDULE, timestep_spacing="trailing", prediction_type=prediction
        )
        steps["spacing"] = "trailing"
    expected = pipeline(
        PROMPTS, negative_prompt=["a"] * 2, latents=start(2), output_type="np", **options
    ).images
    model = stable_diffusion.load(folder)
    ours = stable_diffusion.text_to_image(
        model, PROMPTS, KEY, negative="a", steps=5, guidance=4.0, **steps, **SIZE
    )
    assert ours.shape == (2, 16, 16, 3) and ours.dtype == torch.uint8
    difference = ours.float() / 255 - torch.from_numpy(expected)
    assert difference.abs().max() < 0.51 / 255 + 1e-3
    assert expected.std() > 0.05


@torch.no_grad()
def test_images_to_images_are_diffusers(folder, model, monkeypatch):
    """Of one image for both prompts, mean latents and the same noise."""
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    pipeline = module.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(module, "retrieve_latents", lambda out, **_: out.latent_dist.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: start(2))
    image = random.integers(KEY, (1, 16, 16, 3), 0, 256).byte()
    options = {"num_inference_steps": 5, "strength": 0.6, "guidance_scale": 4.0}
    signed = (image.permute(0, 3, 1, 2) / 127.5 - 1).expand(2, -1, -1, -1)
    expected = pipeline(PROMPTS, signed, output_type="np", **options).images
    ours = stable_diffusion.text_to_image(
        model,
        PROMPTS,
        KEY,
        image=image,
        strength=0.6,
        steps=5,
        guidance=4.0,
        sampler="ddim",
        **SIZE,
    )
    assert (ours.float() / 255 - torch.from_numpy(expected)).abs().max() < 0.51 / 255 + 1e-3


@pytest.mark.parametrize("sampler", ("ddim", "dpmpp_2m", "euler_ancestral"))
def test_only_what_the_mask_opens_is_painted_anew(sampler, model):
    image = random.integers(KEY, (1, 16, 16, 3), 0, 256).byte()
    repaint = torch.zeros(1, 16, 16, dtype=torch.bool)
    repaint[:, 3:9, :8] = True
    options = {"repaint": repaint, "strength": 1.0, "steps": 2, "sampler": sampler, **SIZE}
    made, other = (
        stable_diffusion.text_to_image(model, ["a cat"], key, image=image, **options)
        for key in (KEY, random.key(12))
    )
    assert torch.equal(made[~repaint], image[~repaint])
    assert not torch.equal(made[repaint], image[repaint])
    assert not torch.equal(made[repaint], other[repaint])


def test_guidance_acts_within_its_interval_only(model):
    options = {"steps": 3, "guidance": 4.0, **SIZE}
    never, always, plain, usual = (
        stable_diffusion.text_to_image(model, ["a cat"], KEY, **{**options, **how})
        for how in ({"interval": (-2, -1)}, {"interval": (0, 999)}, {"guidance": 1.0}, {})
    )
    assert torch.equal(always, usual) and torch.equal(never, plain)
    assert not torch.equal(never, always)


def test_karras_spacing_takes_edm_s_sigmas_between_the_schedule_s_ends(model, monkeypatch):
    seen = []
    monkeypatch.setattr(samplers, "euler", lambda fn, x, grid, key: seen.append((x, grid)) or x)
    options = {"steps": 4, "spacing": "karras", "sampler": "euler", **SIZE}
    stable_diffusion.text_to_image(model, ["a"], KEY, **options)
    ((x, grid),) = seen
    ends = ns.sigma_of(model.process.alpha_bar)
    expected = ns.karras_sigmas(4, sigma_min=float(ends[0]), sigma_max=float(ends[-1]))
    assert torch.equal(grid, expected)
    torch.testing.assert_close(x, float((1 + ends[-1] ** 2).sqrt()) * start(1))
    with pytest.raises(ValueError, match=r"spacing \('karras'\) is of samplers over sigma"):
        stable_diffusion.text_to_image(model, ["a"], KEY, **{**options, "sampler": "ddim"})


def test_prompts_are_padded_and_encoded_as_diffusers_does(folder, model):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(
        stable_diffusion.encode_prompts(model, PROMPTS), expected, rtol=1e-4, atol=1e-5
    )


def test_an_image_does_not_depend_on_its_batch_and_the_key_changes_it(model):
    options = {"steps": 2, **SIZE}
    both = stable_diffusion.text_to_image(model, PROMPTS, KEY, **options)
    alone = stable_diffusion.text_to_image(model, PROMPTS[:1], KEY, **options)
    assert (both[:1].int() - alone.int()).abs().max() <= 1
    other = stable_diffusion.text_to_image(model, PROMPTS[:1], random.key(12), **options)
    assert not torch.equal(alone, other)


def test_prompts_beyond_the_context_are_cut_with_a_note(model):
    long = "a " * 30
    with pytest.warns(UserWarning, match=r"has 32 tokens, the context 12: cut off is 'a a"):
        states = stable_diffusion.encode_prompts(model, [long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(states, stable_diffusion.encode_prompts(model, ["a " * 10]))
        empty = stable_diffusion.encode_prompts(model, [""])
    assert empty.shape == states.shape


# The original layout


def original(model) -> dict[str, torch.Tensor]:
    """The model's weights as the original code would save them, and what lies beside them."""
    (unet_config, unet_params), (config, params), (config_of_text, text) = model[:3]
    names = single_file.unet_names(unet_config)
    weights = {f"{single_file.UNET}{names[n]}": value for n, value in unet_params.items()}
    for name, value in params.items():
        theirs = single_file.autoencoder_name(name, len(config.widths))
        square = value.ndim == 2  # attention is made of 1 x 1 convolutions there
        weights[f"{single_file.AUTOENCODER}{theirs}"] = value[:, :, None, None] if square else value
    if config_of_text.activation == "gelu":
        weights |= open_clip(text, config_of_text)
    else:
        for name, value in text.items():
            theirs = single_file.clip_name(name)
            weights[f"{single_file.TEXT}{single_file.CLIP}{theirs}"] = value
        ids = f"{single_file.TEXT}{single_file.CLIP}embeddings.position_ids"
        weights[ids] = torch.arange(12)
    weights["first_stage_model.loss.logvar"] = torch.zeros(())
    weights["model_ema.decay"] = torch.ones(())
    return {name: value.contiguous() for name, value in weights.items()}


def open_clip(text, config) -> dict[str, torch.Tensor]:
    """A text tower as version 2 has it: q, k and v in one, and what comes after the tower."""
    prefix = f"{single_file.TEXT}{single_file.OPEN_CLIP}"
    weights = {f"{prefix}{single_file.open_clip_name(name)}": x for name, x in text.items()}
    for name in [name for name in weights if name.endswith(".q")]:
        packed = [weights.pop(f"{name.removesuffix('q')}{part}") for part in "qkv"]
        weights[name.removesuffix(".q")] = torch.cat(packed)
    last = f"resblocks.{config.depth - 1}."
    for name in [name for name in weights if last in name]:  # not read by the UNet
        weights[name.replace(last, f"resblocks.{config.depth}.")] = torch.ones_like(weights[name])
    ones = torch.ones(config.width, config.width)
    return weights | {f"{prefix}text_projection": ones, f"{prefix}logit_scale": torch.ones(())}


def test_single_files_of_version_2_load_as_the_folder_does(folder_2, tmp_path):
    model = stable_diffusion.load(folder_2)
    save_file(original(model), tmp_path / "model.safetensors")
    files = tmp_path / "model.safetensors", folder_2 / "tokenizer"
    with pytest.raises(ValueError, match="must be given for version 2"):
        stable_diffusion.load_file(*files)
    again = stable_diffusion.load_file(*files, target="v")
    assert again.unet[0] == model.unet[0] and again.pad == model.pad == 0
    made, expected = (
        stable_diffusion.text_to_image(each, PROMPTS, KEY, steps=2, **SIZE)
        for each in (again, model)
    )
    assert torch.equal(made, expected)


def lightning_class(patch) -> type:
    """Named beside the weights of checkpoints of 2022, by a package that may be missing."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    kind = type("ModelCheckpoint", (), {"__module__": name})
    parts = name.split(".")
    for i in range(len(parts)):
        patch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(name))
    sys.modules[name].ModelCheckpoint = kind  # pyright: ignore[reportAttributeAccessIssue]
    return kind


@pytest.mark.parametrize("kind", ("safetensors", "ckpt"))
def test_single_files_load_as_the_folder_does(kind, folder, model, tmp_path, monkeypatch):
    path = tmp_path / f"model.{kind}"
    weights = original(model)
    if kind == "safetensors":
        save_file(weights, path)
    else:
        with monkeypatch.context() as patch:  # a class that is not there when the file is read
            kept = {"state_dict": weights, "callbacks": {lightning_class(patch): {"step": 5}}}
            torch.save(kept, path)
    heads = model.unet[0].heads
    again = stable_diffusion.load_file(path, folder / "tokenizer", heads=heads, text_heads=2)
    assert again.unet[0] == model.unet[0]
    for ours, theirs in zip(again[:3], model[:3], strict=True):
        assert ours[1].keys() == theirs[1].keys()
        assert all(torch.equal(value, theirs[1][name]) for name, value in ours[1].items())
    assert again.process.target == model.process.target
    assert torch.equal(again.process.alpha_bar, model.process.alpha_bar)
    assert again.process.final == model.process.final


def test_the_original_layout_is_the_one_that_diffusers_converts(folder, model):
    weights = original(model)
    network = json.loads((folder / "unet" / "config.json").read_text())
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(weights), network)
    expected = diffusers_format.unet_to(*model.unet)[1]
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in theirs.items())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(weights), vae)
    expected = diffusers_format.autoencoder_to(*model.autoencoder)[1]
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[n].squeeze(), x.squeeze()) for n, x in expected.items())


@pytest.mark.parametrize("linear", (False, True))
def test_shapes_of_the_original_layout_show_the_configuration(linear):
    config = UNetConfig(
        widths=(64, 128, 128),
        attention=(True, True, False),
        heads=(1, 2, 2) if linear else (8, 8, 8),
        context=1024 if linear else 768,
        depth=2,
        outputs=8,
        linear_projection=linear,
        classes=3,
    )
    names = single_file.unet_names(config)
    weights = {names[n]: torch.empty(s, device="meta") for n, s in unet(config).shapes.items()}
    assert single_file.read_unet(weights) == config


@torch.no_grad()
def test_a_saved_model_is_one_of_diffusers_again(folder, model, tmp_path):
    stable_diffusion.save(tmp_path / "saved", model)
    again = stable_diffusion.load(tmp_path / "saved")
    for part in ("unet", "autoencoder", "text"):
        (config, params), (config_again, params_again) = getattr(model, part), getattr(again, part)
        assert config == config_again and params.keys() == params_again.keys()
        assert all(torch.equal(params[name], params_again[name]) for name in params)
    assert again.tokenizer.encode(PROMPTS) == model.tokenizer.encode(PROMPTS)
    assert again.pad == model.pad and torch.equal(again.process.alpha_bar, model.process.alpha_bar)
    blank = {"alpha_bar": torch.zeros(0)}
    assert repr(replace(again.process, **blank)) == repr(replace(model.process, **blank))
    first, second = (
        diffusers.StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        for path in (folder, tmp_path / "saved")
    )
    for part in ("unet", "vae", "text_encoder"):
        weights, found = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert all(torch.equal(weights[name], found[name]) for name in weights)
    ids, found = (
        pipe.tokenizer(PROMPTS, padding="max_length").input_ids for pipe in (first, second)
    )
    assert ids == found
    assert torch.equal(first.scheduler.alphas_cumprod, second.scheduler.alphas_cumprod)
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        stable_diffusion.save(tmp_path / "saved", model)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_processes_are_written_as_they_are_read(target):
    odd = ns.sigmoid(50, 0.001, 0.3)
    for process in (
        Process(ns.scaled_linear(), target, final=float(ns.scaled_linear()[0])),
        Process(ns.zero_terminal_snr(ns.scaled_linear()), "v", "trailing", 0),
        Process(ns.cosine(100), target, "karras", clip=1.5),
        Process(odd, target),
    ):
        hub = write_process(process)
        again = read_process(hub)
        torch.testing.assert_close(again.alpha_bar, process.alpha_bar, rtol=1e-12, atol=1e-15)
        blank = {"alpha_bar": torch.zeros(0), "final": 1.0}
        assert repr(replace(again, **blank)) == repr(replace(process, **blank))
        assert again.final == pytest.approx(process.final, rel=1e-12)
        theirs = getattr(diffusers, hub["_class_name"]).from_config(hub)
        expected = process.alpha_bar.float().clamp(min=1e-7 if process.spacing == "karras" else 0)
        torch.testing.assert_close(theirs.alphas_cumprod, expected, rtol=2e-4, atol=1e-6)


def test_version_2_s_text_tower_is_openclip_s_without_its_last_block():
    """Written out from transformers' CLIP by diffusers' own naming, backwards."""
    torch.manual_seed(0)
    theirs = randomize(
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                hidden_act="gelu",
            )
        )
    )
    states = {
        name if name.startswith("text_model.") else f"text_model.{name}": value
        for name, value in theirs.state_dict().items()
    }
    renamed = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    weights = {name: states[source] for name, source in renamed.items()}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1"}
    parts |= {"mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}
    for i in range(2):
        block, layer = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for last in ("weight", "bias"):
            for part, source in parts.items():
                weights[f"{block}.{part}.{last}"] = states[f"{layer}.{source}.{last}"]
            packed = [states[f"{layer}.self_attn.{part}_proj.{last}"] for part in "qkv"]
            weights[f"{block}.attn.in_proj_{last}"] = torch.cat(packed)
    for name in [name for name in weights if "resblocks.1" in name]:
        weights[name.replace("resblocks.1", "resblocks.2")] = torch.ones_like(weights[name])
    weights |= {"text_projection": torch.ones(16, 16), "logit_scale": torch.ones(())}
    file = {f"cond_stage_model.model.{name}": value for name, value in weights.items()}
    config, params = single_file.text_from(file, heads=2)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    ours = text_tower(config).apply(params, ids, method="hidden_states")
    expected = theirs(ids).last_hidden_state
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


# Bad input


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def retake(folder: Path, **options) -> None:
    """Another UNet of the same sizes but for these."""
    config = replace(diffusers_format.load_unet(folder / "unet")[0], outputs=4, **options)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    diffusers_format.save_unet(folder / "unet", config, unet(config).init(0))


def copied(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(folder)).symlink_to(path)
    for name in ("scheduler/scheduler_config.json", "unet/config.json"):
        text = (to / name).read_text()
        (to / name).unlink()
        (to / name).write_text(text)
    return to


@pytest.mark.parametrize(
    ("damage", "message"),
    (
        (lambda p: (p / "model_index.json").unlink(), "no model_index.json"),
        (lambda p: (p / "vae").rename(p / "elsewhere"), r"no \['vae'\] in"),
        (
            lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            "none of .*fetch the weights",
        ),
        (lambda p: change(p / "unet" / "config.json", cross_attention_dim=8), "do not belong"),
        (lambda p: retake(p, channels=9), "takes 9 channels and makes 4, latents have 4: .* plain"),
        (lambda p: retake(p, context=8), "contexts of width 8, the text tower makes 16: .* from"),
        (
            lambda p: change(p / "scheduler" / "scheduler_config.json", beta_schedule="new"),
            r"beta_schedule \('new'\)",
        ),
        (
            lambda p: change(p / "scheduler" / "scheduler_config.json", prediction_type="flow"),
            r"prediction_type \('flow'\)",
        ),
    ),
)
def test_bad_folders_are_named(damage, message, folder, tmp_path):
    damage(copied(folder, tmp_path))
    with pytest.raises(ValueError, match=message):
        stable_diffusion.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"steps": 0}, r"steps \(0\)"),
        ({"guidance": -1.0}, r"guidance scale \(-1.0\)"),
        ({"height": 15}, r"height \(15\) and width \(16\) must be multiples of 2"),
        ({"sampler": "plms"}, r"sampler \('plms'\) must be one of"),
        ({"interval": (9, 1)}, r"interval \(9, 1\) must be \(low, high\)"),
        ({"image": IMAGE[:, :8]}, r"image \(1, 8, 16, 3\) torch.uint8 must be \(1 or 1, 16, 16"),
        ({"image": IMAGE, "strength": 0}, r"strength \(0\) must be in \(0, 1\]"),
        ({"image": IMAGE, "repaint": IMAGE[..., 0]}, r"repaint .*uint8 must be .* in bool"),
        ({"repaint": IMAGE[..., 0] > 0}, "must come with the image"),
        ({"prompts": []}, "at least one text"),
        ({"prompts": "a cat"}, "must be a list"),
    ),
)
def test_bad_requests_are_named(options, message, model):
    given = {"prompts": ["a"], **SIZE, **options}
    with pytest.raises(ValueError, match=message):
        stable_diffusion.text_to_image(model, given.pop("prompts"), KEY, **given)


def test_bad_single_files_are_named(folder, model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"conv_in.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no weights named model.diffusion_model"):
        stable_diffusion.load_file(path, folder / "tokenizer")
    weights = original(model)
    del weights["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"lacks input_blocks.0.0.weight.*not complete"):
        stable_diffusion.load_file(path, folder / "tokenizer", heads=(4, 4))


def test_schedules_of_published_folders_are_read():
    process = stable_diffusion.read_process(
        {**SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        | {"timestep_spacing": "trailing"}
    )
    assert process.target == "v" and process.spacing == "trailing" and process.final == 1.0
    torch.testing.assert_close(process.alpha_bar, ns.zero_terminal_snr(ns.scaled_linear()))
    process = stable_diffusion.read_process(
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    )
    assert torch.equal(process.alpha_bar, ns.cosine()) and process.spacing == "karras"


def test_autoencoders_of_either_layout_are_one_model(model):
    config, params = model.autoencoder
    image = random.uniform(KEY, (1, 3, 8, 8), low=-1.0)
    weights = original(model)
    again, values = single_file.autoencoder_from(weights, config)
    torch.testing.assert_close(
        autoencoder(again).apply(values, image)[0], autoencoder(config).apply(params, image)[0]
    )


# The command


def test_one_command_samples_a_folder(folder, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "recipes" / "stable_diffusion.py"
    size = ("--height", "16", "--width", "16", "--steps", "2", "--device", "cpu")
    where = ("--folder", str(folder), "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(path), *where, "--prompts", *PROMPTS, *size])
    runpy.run_path(str(path), run_name="__main__")
    images = [Image.open(tmp_path / f"{i:03d}.png") for i in range(2)]
    assert [image.size for image in images] == [(16, 16)] * 2
    Image.new("L", (16, 16)).save(tmp_path / "nothing.png")  # black: all is kept
    kept = ("--image", str(tmp_path / "000.png"), "--mask", str(tmp_path / "nothing.png"))
    monkeypatch.setattr(sys, "argv", [str(path), *where, *kept, "--prompts", "a", *size])
    runpy.run_path(str(path), run_name="__main__")
    assert list(Image.open(tmp_path / "000.png").getdata()) == list(images[0].getdata())
    for bad in (
        (),
        (*where, "--target", "v"),
        (*where, "--strength", "0.5"),
        (*where, "--mask", "m"),
    ):
        monkeypatch.setattr(sys, "argv", [str(path), *bad])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
        assert stopped.value.code == 2
    said = capsys.readouterr().err
    for words in ("give --folder or --file", "has its own", "(0.5) needs --image", "(m) needs"):
        assert words in said
