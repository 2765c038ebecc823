"""Image towers: against transformers on random small weights; positions, pooling, resolutions."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.func import grad, grad_and_value, vmap

from msfs_functional import random
from msfs_functional.models import timm_format, vision_format
from msfs_functional.models.vit import (
    DECAY,
    PRESETS,
    ViTConfig,
    patches,
    resized_positions,
    rotary_positions,
    sincos_positions,
    vit,
)
from msfs_functional.params import by_rules, count
from msfs_functional.rotary import rotate

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
SMALL = ViTConfig(width=16, depth=2, heads=2, hidden=24, image=12, patch=4, channels=1)
CASES = {
    "vit": ("ViTModel", {}),
    "vit, relu, one channel": ("ViTModel", {"hidden_act": "relu", "num_channels": 1}),
    "classifier": ("ViTForImageClassification", {"num_labels": 5}),
    "clip": ("CLIPVisionModel", {}),
    "clip, gelu": ("CLIPVisionModel", {"hidden_act": "gelu"}),
    "clip, projected": ("CLIPVisionModelWithProjection", {"projection_dim": 20}),
    "siglip": ("SiglipVisionModel", {}),
    "siglip, states only": ("SiglipVisionModel", {"vision_use_head": False}),
}
each_case = pytest.mark.parametrize("case", CASES)


def published(case: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind, options = CASES[case]
    family = kind.split("Model")[0].split("For")[0]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, kind)(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, centre, 0.3)
    return model.eval()


def images(model, height: int = 12, width: int = 12, n: int = 3) -> torch.Tensor:
    shape = (n, model.config.num_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def hub_of(model) -> dict:
    return json.loads(model.config.to_json_string(use_diff=False))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def vector(out) -> torch.Tensor | None:
    """What a tower of transformers makes of an image."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return None


@each_case
@pytest.mark.parametrize("size", [(12, 12), (20, 8)], ids=["own size", "another size"])
@torch.no_grad()
def test_towers_equal_transformers(case, size):
    theirs = published(case)
    config, params = vision_format.from_hub(hub_of(theirs), theirs.state_dict())
    model, pixels = vit(config), images(theirs, *size)
    expected = theirs(pixels, output_hidden_states=True, interpolate_pos_encoding=size != (12, 12))
    for implementation in ("flash", "reference"):
        options = {"implementation": implementation}
        if vector(expected) is not None:
            close(model.apply(params, pixels, **options), vector(expected))
        if getattr(expected, "last_hidden_state", None) is not None:
            states = model.apply(params, pixels, method="hidden_states", **options)
            close(states, expected.last_hidden_state)
    for layers in (0, 2, 3):
        states = model.apply(params, pixels, layers=layers, method="hidden_states")
        close(states, expected.hidden_states[layers])


@each_case
@torch.no_grad()
def test_folders_load_and_exports_load_back(case, tmp_path):
    theirs = published(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, _, _ = vision_format.load(tmp_path / "theirs")
    vision_format.save(tmp_path / "ours", config, params)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)
    pixels = images(theirs)
    if vector(theirs(pixels)) is not None:
        close(vector(again(pixels)), vector(theirs(pixels)))
    loaded = vision_format.load(tmp_path / "ours", dtype=torch.float64)
    assert loaded.config == config
    assert all(torch.equal(value.float(), params[name]) for name, value in loaded.params.items())


def in_timms_names(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """A ViTForImageClassification's weights as timm names and packs them."""
    base, layer = (
        "vit.embeddings.",
        "vit.layers.{}."
        if "vit.layers.0.layernorm_before.bias" in state
        else "vit.encoder.layer.{}.",
    )
    found = {
        "cls_token": state[f"{base}cls_token"],
        "pos_embed": state[f"{base}position_embeddings"],
    }
    for end in ("weight", "bias"):
        found[f"patch_embed.proj.{end}"] = state[f"{base}patch_embeddings.projection.{end}"]
        found[f"norm.{end}"], found[f"head.{end}"] = (
            state[f"vit.layernorm.{end}"],
            state[f"classifier.{end}"],
        )
        for i in range(depth):
            one = {
                name.removeprefix(layer.format(i)).removesuffix(f".{end}"): value
                for name, value in state.items()
                if name.startswith(layer.format(i)) and name.endswith(f".{end}")
            }
            ours, (q, k, v, o, up, down) = (
                f"blocks.{i}.",
                (
                    next(one[name] for name in names if name in one)
                    for names in (
                        ("attention.q_proj", "attention.attention.query"),
                        ("attention.k_proj", "attention.attention.key"),
                        ("attention.v_proj", "attention.attention.value"),
                        ("attention.o_proj", "attention.output.dense"),
                        ("mlp.fc1", "intermediate.dense"),
                        ("mlp.fc2", "output.dense"),
                    )
                ),
            )
            found[f"{ours}attn.qkv.{end}"] = torch.cat([q, k, v])
            found[f"{ours}attn.proj.{end}"] = o
            found[f"{ours}mlp.fc1.{end}"], found[f"{ours}mlp.fc2.{end}"] = up, down
            found[f"{ours}norm1.{end}"] = one["layernorm_before"]
            found[f"{ours}norm2.{end}"] = one["layernorm_after"]
    return found


@torch.no_grad()
def test_timms_folders_load_and_give_the_same_logits(tmp_path):
    options = {**SIZES, "num_attention_heads": 3, "layer_norm_eps": 1e-6, "num_labels": 5}
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**options)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    weights = in_timms_names(theirs.state_dict(), 3)
    hub = {"architecture": "vit_tiny_patch4_12", "num_classes": 5, "global_pool": "token"}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        tmp_path / "model.safetensors",
    )
    config, params, *_ = timm_format.load(tmp_path)
    assert (config.heads, config.image, config.projection) == (3, 12, 5)
    close(vit(config).apply(params, images(theirs)), theirs(images(theirs)).logits)
    bare = {name: value for name, value in weights.items() if not name.startswith("head")}
    assert timm_format.from_timm(hub, bare)[0].projection is None
    for bad, message in (
        ({**hub, "architecture": "swin_tiny_patch4"}, "must be vit_<size>_patch"),
        ({**hub, "global_pool": "avg"}, "'avg'"),
    ):
        with pytest.raises(ValueError, match=message):
            timm_format.from_timm(bad, weights)
    with pytest.raises(ValueError, match="lack 'pos_embed'"):
        timm_format.from_timm(hub, {k: v for k, v in weights.items() if k != "pos_embed"})
    with pytest.raises(ValueError, match="unexpected"):
        timm_format.from_timm(hub, {**weights, "blocks.0.ls1.gamma": weights["norm.bias"]})


def test_the_published_sizes_have_their_parameters():
    counts = {"vit_b16": 85_798_656, "clip": 87_849_216, "siglip": 92_884_224}
    for name, expected in counts.items():
        shapes = vit(PRESETS[name]()).shapes
        assert sum(math.prod(shape) for shape in shapes.values()) == expected
    config = PRESETS["tiny"]()
    assert count(vit(config).init(0)) < 0.8e6
    decayed = by_rules(DECAY, vit(config).shapes)
    assert decayed["blocks.0.attention.q.weight"] and not decayed["positions.weight"]


def test_patches_are_read_row_by_row():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    rows = patches(image, 2)[0].tolist()
    assert rows[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert rows[3] == [12, 13, 18, 19]


def test_positions_of_a_finer_grid_lie_around_the_old_ones():
    """The four new patches in an old one's place have its position on average, for a plane."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = 3 * y + x
    flat = plane.reshape(-1, 1)
    assert resized_positions(flat, (8, 8), (8, 8)) is flat
    finer = resized_positions(flat, (8, 8), (16, 16)).reshape(16, 16)
    means = finer.reshape(8, 2, 8, 2).mean((1, 3))
    torch.testing.assert_close(means[2:-2, 2:-2], plane[2:-2, 2:-2])
    assert (finer.diff(dim=0)[4:-4] > finer.diff(dim=1).max()).all()  # three times as steep


def test_sinusoids_tell_column_and_row():
    grid = sincos_positions((3, 5), 16).reshape(3, 5, 16)
    assert (grid[:, :, :8] == grid[:1, :, :8]).all()  # by column
    assert (grid[:, :, 8:] == grid[:, :1, 8:]).all()  # by row
    torch.testing.assert_close(grid[1, 2, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(grid[1, 2, 12], torch.tensor(1.0).cos())


def test_rotations_leave_products_to_differences_of_places():
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rotary_positions((4, 5), 8, 100.0, extra=1, dtype=torch.float64)
    assert table[0].shape == (21, 4)
    keys, queries = rotate(k.expand(21, 8), *table), rotate(q.expand(21, 8), *table)
    torch.testing.assert_close(keys[0], k)  # the class token
    products = (queries[1:] @ keys[1:].T).reshape(4, 5, 4, 5)
    for one, other in (((0, 0, 2, 1), (1, 3, 3, 4)), ((3, 1, 0, 0), (3, 2, 0, 1))):
        torch.testing.assert_close(products[one], products[other])
    assert not torch.isclose(products[0, 0, 0, 1], products[0, 0, 1, 0])


OPTIONS = {
    "class, learned": {},
    "mean, sincos": {"class_token": False, "pooling": "mean", "positions": "sincos"},
    "mean past a class token": {"pooling": "mean"},
    "attention, rotary": {"pooling": "attention", "positions": "rotary"},
    "clip": {"pre_norm": True, "norm": "pooled", "patch_bias": False, "projection": 6},
    "pooler": {"pooler": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_flash_equals_the_formula_and_transforms_compose(name):
    """On an image of another shape, too; per-example gradients are those of each example alone."""
    model = vit(replace(SMALL, **OPTIONS[name]))
    params = model.init(0, dtype=torch.float64)
    params = {
        k: v + 0.2 * random.normal(random.key(i), v.shape, dtype=v.dtype)
        for i, (k, v) in enumerate(params.items())
    }
    generator = torch.Generator().manual_seed(0)
    for size in ((12, 12), (8, 16)):
        pixels = torch.randn(2, 1, *size, dtype=torch.float64, generator=generator)
        reference = model.apply(params, pixels, implementation="reference")
        torch.testing.assert_close(model.apply(params, pixels), reference)

    def loss(params, image):
        return model.apply(params, image[None]).square().sum()

    both = vmap(grad(loss), in_dims=(None, 0))(params, pixels)
    alone = grad(loss)(params, pixels[1])
    for key, value in alone.items():
        torch.testing.assert_close(both[key][1], value)


def test_dropout_follows_its_key():
    model = vit(replace(SMALL, dropout=0.2, attention_dropout=0.2))
    params, pixels = model.init(0), torch.ones(2, 1, 12, 12)
    run = [model.apply(params, pixels, key=k) for k in (None, random.key(1), random.key(2))]
    again = model.apply(params, pixels, key=random.key(1), implementation="reference")
    torch.testing.assert_close(run[1], again)
    assert not torch.allclose(run[0], run[1]) and not torch.allclose(run[1], run[2])


def test_attention_maps_have_a_row_for_every_patch():
    maps: list[torch.Tensor] = []
    model = vit(SMALL)
    model.apply(model.init(0), torch.ones(2, 1, 12, 12), maps=maps)
    assert [m.shape for m in maps] == [(2, 2, 10, 10)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"heads \(3\) must divide width \(16\)"),
        ({"patch": 5}, r"patch \(5\) must divide image \(12, 12\)"),
        ({"class_token": False}, "pooling='class' needs class_token"),
        ({"positions": "rotary", "heads": 8}, r"head dim \(2\)"),
        ({"activation": "mish"}, "mish"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"depth": 0}, r"depth \(0\)"),
    ],
)
def test_impossible_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 12, 12), r"must be \(batch, 1 channels"),
        ((1, 12, 12), r"must be \(batch, 1 channels"),
        ((2, 1, 12, 14), r"multiples of patch \(4\): resize"),
    ],
)
def test_images_that_do_not_fit_are_named(shape, message):
    model = vit(SMALL)
    with pytest.raises(ValueError, match=message):
        model.apply(model.init(0), torch.ones(shape))


def test_a_tower_of_states_has_no_vector():
    model = vit(replace(SMALL, pooling=None))
    with pytest.raises(ValueError, match="states only"):
        model.apply(model.init(0), torch.ones(2, 1, 12, 12))


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({"model_type": "dinov2"}, "model_type .*dinov2"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"hidden_size": 32}, "config.json says"),
        ({"num_hidden_layers": 4}, r"missing .*encoder\.layer\.3"),
        ({"num_hidden_layers": 2}, r"unexpected .*encoder\.layer\.2"),
    ],
)
def test_folders_that_do_not_fit_are_named(hub, message):
    theirs = published("vit")
    with pytest.raises(ValueError, match=message):
        vision_format.from_hub({**hub_of(theirs), **hub}, theirs.state_dict())


def test_exports_that_no_family_has_are_refused(tmp_path):
    config = replace(SMALL, positions="sincos")
    with pytest.raises(ValueError, match="no published family"):
        vision_format.save(tmp_path, config, vit(config).init(0))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_last_layer_computes_no_more_than_the_class_token(positions):
    sizes = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "image": 8, "patch": 4}
    tower = vit(ViTConfig(**sizes, positions=positions))
    params = tower.init(0, dtype=torch.float64)
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    def whole(params):
        return tower.apply(params, pixels, method="hidden_states")[:, 0].sin().sum()

    def short(params):
        return tower.apply(params, pixels, method="pooled").sin().sum()

    results = grad_and_value(short)(params), grad_and_value(whole)(params)
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)


def test_a_stem_of_convolutions_makes_the_same_grid_and_sees_over_the_patchs_edge():
    sizes = {"width": 16, "depth": 1, "heads": 2, "hidden": 24, "image": 16, "patch": 8}
    config = ViTConfig(**sizes, stem="convolutions", class_token=False, pooling="mean")
    assert config.stem_channels == [3, 4, 8, 16]
    tower = vit(config)
    params = tower.init(0, dtype=torch.float64)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def last(pixels):  # of the patch in the lower right, before the layers
        return tower.apply(params, pixels, layers=0, method="hidden_states")[:, 3].square().sum()

    reach = grad(last)(pixels)[0].abs().sum(0) > 0
    assert tower.apply(params, pixels, method="hidden_states").shape == (2, 4, 16)
    assert reach[1:, 1:].all() and not reach[0].any() and not reach[:, 0].any()
    spread = [params[f"stem.{i}.weight"].std().item() * (n * 9) ** 0.5 for i, n in ((1, 4), (2, 8))]
    assert spread == pytest.approx([2**0.5] * 2, rel=0.15)
    with pytest.raises(ValueError, match=r"patch \(6\) must be a power of 2"):
        ViTConfig(**{**sizes, "image": 12, "patch": 6}, stem="convolutions")
