"""The diffusion transformer: diffusers' numbers, and the same call as the UNet's."""

import diffusers
import pytest
import torch
from torch import nn
from torch.func import jvp

from msfs_functional import random
from msfs_functional.models.dit import PRESETS, DiTConfig, dit

TINY = DiTConfig(
    channels=3, width=16, depth=2, heads=2, hidden=24, context=6, classes=4, interval=True
)


def tiny(config: DiTConfig = TINY, dtype: torch.dtype = torch.float64):
    model = dit(config)
    keys = random.split(random.key(3), len(model.shapes) + 2)
    params = {
        name: random.normal(key, shape, dtype=dtype) * (0.3 if len(shape) == 1 else 0.2)
        for (name, shape), key in zip(model.shapes.items(), keys[2:], strict=True)
    }
    x = random.normal(keys[0], (2, config.channels, 6, 8), dtype=dtype)
    given = {
        "context": random.normal(keys[1], (2, 5, 6), dtype=dtype),
        "classes": torch.tensor([1, 3]),
        "interval": torch.tensor([20.0, 300.0], dtype=dtype),
    }
    return model, params, x, torch.tensor([5.0, 800.0], dtype=dtype), given


def from_diffusers(theirs: diffusers.DiTTransformer2DModel, config: DiTConfig) -> dict:
    """Its parameters by our names; there each block embeds time and class anew."""
    weights, first = theirs.state_dict(), "transformer_blocks.0.norm1.emb"
    stems = {
        "input": "pos_embed.proj",
        "time.up": f"{first}.timestep_embedder.linear_1",
        "time.down": f"{first}.timestep_embedder.linear_2",
        "class_embedding": f"{first}.class_embedder.embedding_table",
        "modulation": "proj_out_1",
        "output": "proj_out_2",
    }
    inside = {
        "modulation": "norm1.linear",
        "self_attention.q": "attn1.to_q",
        "self_attention.k": "attn1.to_k",
        "self_attention.v": "attn1.to_v",
        "self_attention.o": "attn1.to_out.0",
        "up": "ff.net.0.proj",
        "down": "ff.net.2",
    }
    for i in range(config.depth):
        stems |= {f"blocks.{i}.{a}": f"transformer_blocks.{i}.{b}" for a, b in inside.items()}
    return {
        name: weights[f"{stems[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"]
        for name in dit(config).shapes
    }


@torch.no_grad()
def test_predictions_equal_diffusers():
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    blocks = theirs.transformer_blocks
    blocks[1].norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    config = DiTConfig(
        channels=3, outputs=6, width=16, depth=2, heads=2, classes=6, frequency_shift=1
    )
    params = from_diffusers(theirs, config)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 981.0])
    classes = torch.tensor([4, 0])
    expected = theirs(x, t, classes).sample
    assert expected.std() > 0.3
    for implementation in ("flash", "reference"):
        ours = dit(config).apply(params, x, t, classes=classes, implementation=implementation)
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_fresh_models_predict_zero_and_their_blocks_are_the_identity():
    model = dit(TINY)
    params, (_, _, x, t, given) = model.init(0), tiny(dtype=torch.float32)
    assert model.apply(params, x, t, **given).abs().max() == 0
    params["output.weight"] = torch.ones_like(params["output.weight"])
    before = model.apply(params, x, t, **given)
    params["blocks.1.up.weight"] = params["blocks.1.up.weight"] + 1
    assert torch.equal(model.apply(params, x, t, **given), before)


def test_every_condition_moves_the_prediction():
    model, params, x, t, given = tiny()
    out = model.apply(params, x, t, **given)
    assert out.shape == x.shape
    changes = {
        "context": given["context"] + 1,
        "classes": given["classes"].flip(0),
        "interval": given["interval"] + 50,
    }
    for name, value in changes.items():
        assert not torch.allclose(model.apply(params, x, t, **{**given, name: value}), out)
    moved = x.clone()
    moved[0, 0, 0, 0] += 1
    away = (model.apply(params, moved, t, **given) - out).abs().amax(1)
    assert (away[0] > 0).all() and away[1].max() == 0


def test_tokens_know_where_they_are():
    model, params, x, t, given = tiny()
    out = model.apply(params, x, t, **given)
    for dim in (-1, -2):  # patches turned, the pixels inside of each as they were
        turned = model.apply(params, x.roll(2, dim), t, **given).roll(-2, dim)
        assert not torch.allclose(turned, out)


def test_padding_of_the_context_changes_nothing():
    model, params, x, t, given = tiny()
    lengths = torch.tensor([3, 5])
    out = model.apply(params, x, t, context_lengths=lengths, **given)
    given["context"] = given["context"].clone()
    given["context"][0, 3:] = 7.0
    assert torch.equal(model.apply(params, x, t, context_lengths=lengths, **given), out)


def test_tangents_through_flash_equal_the_reference():
    model, params, x, t, given = tiny()

    def along(implementation):
        def predict(x, t):
            return model.apply(params, x, t, implementation=implementation, **given)

        return jvp(predict, (x, t), (x.flip(0), torch.ones_like(t)))[1]

    torch.testing.assert_close(along("flash"), along("reference"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "millions"), (("tiny", 1.3), ("small", 33), ("base", 130), ("extra_large", 675))
)
def test_presets_have_the_published_sizes(name, millions):
    config = PRESETS[name](classes=1001 if name != "tiny" else None, outputs=8)
    count = sum(shape.numel() for shape in dit(config).shapes.values()) / 1e6
    assert count == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: DiTConfig(heads=7), r"heads \(7\) must divide width \(768\)"),
        (lambda: DiTConfig(width=6, heads=2), r"4 must divide width \(6\)"),
        (lambda: DiTConfig(depth=0), r"depth \(0\) must be at least 1"),
        (lambda: DiTConfig(classes=0), r"classes \(0\) must be at least 1, or None"),
        (lambda: apply(classes=None), "classes must be given"),
        (lambda: apply(x=torch.zeros(2, 3, 5, 4)), r"patch \(2\) divides"),
    ),
)
def test_bad_input_says_value_rule_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def apply(**changed):
    model, params, x, t, given = tiny()
    given = {"x": x, **given, **changed}
    return model.apply(params, given.pop("x"), t, **given)
