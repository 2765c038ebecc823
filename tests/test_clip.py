"""CLIP: tokenizer and towers against transformers, random small weights, every option."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad_and_value

from msfs_functional.clip_tokenizer import END, START, ClipTokenizer
from msfs_functional.models import vision_format
from msfs_functional.models.clip import (
    CLIPConfig,
    TextConfig,
    clip,
    clip_b32,
    siglip_b16,
    text_tower,
)
from msfs_functional.models.vit import clip_vision

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "eos_token_id": 49,
    "projection_dim": 20,
}


def randomized(model: nn.Module) -> nn.Module:
    """Weights large enough to tell options apart."""
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, centre, 0.3)
    return model.eval()


def hub_of(model) -> dict:
    return json.loads(model.config.to_json_string(use_diff=False))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def sentences(eos: int = 49) -> torch.Tensor:
    ids = torch.randint(3, 49, (4, 12), generator=torch.Generator().manual_seed(0))
    for row, n in zip(ids, (11, 3, 7, 1), strict=True):
        row[n:] = eos
    return ids


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"num_hidden_layers": 1, "eos_token_id": 7}],
    ids=["quick_gelu", "gelu", "old eos", "eos in the text"],
)
@torch.no_grad()
def test_text_tower_equals_transformers(options, projection):
    torch.manual_seed(0)
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    config = transformers.CLIPTextConfig(**{**TEXT, **options})
    theirs = randomized(getattr(transformers, kind)(config))
    ids = sentences()
    ids[:2, 5] = 7
    ids[2:, 0] = 7
    expected = theirs(ids)
    config, params = vision_format.from_hub(hub_of(theirs), theirs.state_dict())
    model = text_tower(config)
    for implementation in ("flash", "reference"):
        call = {"implementation": implementation}
        states = model.apply(params, ids, method="hidden_states", **call)
        close(states, expected.last_hidden_state)
        pooled = expected.text_embeds if projection else expected.pooler_output
        close(model.apply(params, ids, **call), pooled)


@torch.no_grad()
def test_padding_that_is_masked_changes_nothing_before_it():
    config = TextConfig(24, 2, 4, 40, vocab=50, max_length=16, eos=49, is_causal=False)
    model = text_tower(config)
    params, ids = model.init(0), sentences()
    lengths = torch.tensor([12, 4, 8, 2])
    states = model.apply(params, ids, lengths=lengths, method="hidden_states")
    for row, one, n in zip(states, ids, lengths, strict=True):
        alone = model.apply(params, one[None, :n], method="hidden_states")
        torch.testing.assert_close(row[:n], alone[0])


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_text_folders_load_and_exports_load_back(projection, tmp_path):
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    theirs = randomized(getattr(transformers, kind)(transformers.CLIPTextConfig(**TEXT)))
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, _, _ = vision_format.load(tmp_path / "theirs")
    vision_format.save(tmp_path / "ours", config, params)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    close(again(sentences()).last_hidden_state, theirs(sentences()).last_hidden_state)
    loaded = vision_format.load(tmp_path / "ours")
    assert loaded.config == config
    assert all(torch.equal(value, params[name]) for name, value in loaded.params.items())


VISION = {
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
PAIRS = {
    "clip": ("CLIP", {}, {"projection_dim": 20}),
    "clip, gelu, old eos": (
        "CLIP",
        {"hidden_act": "gelu", "eos_token_id": 2},
        {"projection_dim": 12},
    ),
    "siglip": ("Siglip", {"projection_size": 32}, {}),
    "siglip, gelu": ("Siglip", {"projection_size": 32, "hidden_act": "gelu"}, {}),
}
each_pair = pytest.mark.parametrize("case", PAIRS)


def pair(case: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    family, options, whole = PAIRS[case]
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, **options},
        vision_config={**VISION, **{k: v for k, v in options.items() if k == "hidden_act"}},
        **whole,
    )
    return randomized(getattr(transformers, f"{family}Model")(config))


def photos() -> torch.Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@each_pair
@torch.no_grad()
def test_logits_of_pairs_equal_transformers(case):
    theirs, ids = pair(case), sentences()
    expected = theirs(input_ids=ids, pixel_values=photos())
    config, params = vision_format.from_hub(hub_of(theirs), theirs.state_dict())
    model = clip(config)
    for implementation in ("flash", "reference"):
        options = {"implementation": implementation}
        close(model.apply(params, photos(), ids, **options), expected.logits_per_image)
        images = model.apply(params, photos(), method="embed_image", **options)
        texts = model.apply(params, ids, method="embed_text", **options)
        close(images, expected.image_embeds)
        close(texts, expected.text_embeds)
        torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))


@each_pair
@torch.no_grad()
def test_folders_of_pairs_load_and_exports_load_back(case, tmp_path):
    theirs = pair(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, _, _ = vision_format.load(tmp_path / "theirs")
    vision_format.save(tmp_path / "ours", config, params)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)
    inputs = {"input_ids": sentences(), "pixel_values": photos()}
    close(again(**inputs).logits_per_text, theirs(**inputs).logits_per_text)
    loaded = vision_format.load(tmp_path / "ours")
    assert loaded.config.image == config.image and loaded.config.text == config.text
    assert all(torch.equal(value, params[name]) for name, value in loaded.params.items())


def test_the_published_sizes_have_their_parameters():
    for config, expected in ((clip_b32(), 151_277_313), (siglip_b16(), 203_155_970)):
        assert sum(math.prod(shape) for shape in clip(config).shapes.values()) == expected


def test_the_first_logits_have_the_scale_and_bias_of_the_configuration():
    text = TextConfig(8, 1, 2, 8, vocab=50, max_length=4, eos=49, projection=6)
    image = clip_vision(width=8, depth=1, heads=2, hidden=8, image=4, patch=2, projection=6)
    model = clip(CLIPConfig(image, text, scale=5.0, bias=-2.0))
    params, ids = model.init(0), torch.tensor([[1, 49], [2, 49]])
    u = model.apply(params, photos()[:, :, :4, :4], method="embed_image")
    v = model.apply(params, ids, method="embed_text")
    logits = model.apply(params, photos()[:, :, :4, :4], ids)
    torch.testing.assert_close(logits, 5 * u @ v.T - 2)


def test_towers_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="512 dims, the text tower in 20"):
        CLIPConfig(clip_vision(), TextConfig(projection=20))


def test_texts_beyond_the_context_are_refused():
    model = text_tower(TextConfig(8, 1, 2, 8, vocab=50, max_length=4, eos=49))
    with pytest.raises(ValueError, match=r"5 tokens exceed max_length \(4\); truncate"):
        model.apply(model.init(0), torch.ones(1, 5, dtype=torch.int64))


@pytest.fixture(scope="module")
def merges() -> Path:
    root = Path(__file__).parents[1]
    data = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data"))
    if not (data / "tokenizers" / "clip").is_dir():
        pytest.skip(f"no folder {data}/tokenizers/clip: MSFS_DATA names the one with tokenizers")
    return data / "tokenizers" / "clip"


@pytest.fixture(scope="module")
def tokenizers(merges):
    return ClipTokenizer.load(merges), transformers.CLIPTokenizer.from_pretrained(merges)


PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from([START, END, START.upper(), "</w>", "'s", " ", "\n", "é", "e\u0301", "İ", "٣"]),
    st.sampled_from(["a photo of", "DON'T", "🙂", "ß", "漢字", "\u00a0", "\u200b", "x" * 30]),
)


@settings(max_examples=100)
@given(parts=st.lists(PIECES, max_size=6))
def test_ids_equal_transformers_on_any_text(tokenizers, parts):
    ours, theirs = tokenizers
    text = "".join(parts)
    assert ours.encode([text]) == [theirs(text)["input_ids"]]
    assert (
        ours.batch([text], 9)[0].tolist()
        == (theirs(text, max_length=9, truncation=True, padding="max_length")["input_ids"])
    )


def test_known_ids_and_text_again(tokenizers):
    ours, _ = tokenizers
    assert ours.vocab_size == 49408
    ids = ours.encode(["A  photo of a CAT"])
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert ours.decode(ids) == ["a photo of a cat"]
    assert ours.batch(["a cat"], 6, pad=0).tolist() == [[49406, 320, 2368, 49407, 0, 0]]


def test_merges_in_plain_text_make_the_same_tokenizer(merges, tokenizers):
    text = "Naïve façades, 1984!"
    assert ClipTokenizer.load(merges / "merges.txt").encode([text]) == tokenizers[0].encode([text])


def test_bad_merges_and_texts_are_named(tmp_path, tokenizers):
    with pytest.raises(ValueError, match="no file of CLIP's merges in"):
        ClipTokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\ni n\nt h\n")
    with pytest.raises(ValueError, match="holds 2 merges, CLIP has 48894"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds no merges .*fetch"):
        ClipTokenizer.load(tmp_path / "none")
    with pytest.raises(ValueError, match="one str"):
        tokenizers[0].encode("a cat")
    with pytest.raises(ValueError, match=r"length \(1\)"):
        tokenizers[0].batch(["a cat"], 1)


@pytest.mark.parametrize("pooling", ["eos", "last"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_last_layer_computes_no_more_than_what_is_read(pooling, causal):
    """The pooled state, its gradient too, is that of the whole layer."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "projection": None}
    tower = text_tower(
        TextConfig(**sizes, vocab=9, max_length=6, eos=8, is_causal=causal, pooling=pooling)
    )
    params = tower.init(0, dtype=torch.float64)
    ids = torch.tensor([[1, 2, 8, 0, 0, 0], [3, 1, 4, 1, 5, 8]])
    at = {"eos": torch.tensor([2, 5]), "last": torch.tensor([5, 5])}[pooling]
    for lengths in (None, torch.tensor([4, 6])):

        def whole(params, lengths=lengths):
            states = tower.apply(params, ids, lengths=lengths, method="hidden_states")
            return states[torch.arange(2), at].sin().sum()

        def short(params, lengths=lengths):
            return tower.apply(params, ids, lengths=lengths, method="pooled").sin().sum()

        results = grad_and_value(short)(params), grad_and_value(whole)(params)
        for own, expected in zip(*results, strict=True):
            torch.testing.assert_close(own, expected)
