"""Vision-language models: against transformers on random small weights; splicing, masks, loss."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.func import grad, vmap

from msfs_functional import random
from msfs_functional.generation import GREEDY, Generator, Settings
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models import vlm_format
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.models.vit import ViTConfig
from msfs_functional.models.vlm import (
    DECAY,
    IGNORED,
    PRESETS,
    STAGE_1,
    VLMConfig,
    answer_labels,
    language_model,
    output_weight,
    pixel_shuffle,
    prefill_inputs,
    saliency,
    vlm,
    with_image_tokens,
)
from msfs_functional.params import by_rules, merge, split
from msfs_functional.transforms import value_and_grad

IMAGE = 49  # the placeholder
VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GEMMA2 = {"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 40}
CLIP, SIGLIP = ({"model_type": f"{name}_vision_model", **VISION} for name in ("clip", "siglip"))
CASES = {
    "paligemma": ("PaliGemma", SIGLIP, {"model_type": "gemma"}, {"projection_dim": 32}),
    "paligemma 2": ("PaliGemma", SIGLIP, GEMMA2, {"projection_dim": 32}),
    "paligemma, placeholder beyond the vocabulary": (
        "PaliGemma",
        SIGLIP,
        {"model_type": "gemma"},
        {"projection_dim": 32, "image_token_index": 53},
    ),
    "llava": ("Llava", CLIP, {"model_type": "llama"}, {}),
    "llava, all layers, class token, tied": (
        "Llava",
        CLIP,
        {"model_type": "llama", "tie_word_embeddings": True},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        | {"projector_hidden_act": "relu", "multimodal_projector_bias": False},
    ),
    "llava, siglip, mistral": (
        "Llava",
        SIGLIP,
        {"model_type": "mistral", "sliding_window": None},
        {"vision_feature_layer": 1, "vision_feature_select_strategy": "full"},
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def published(case: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind, vision, text, options = CASES[case]
    vision = {**vision, "vision_use_head": False} if kind == "PaliGemma" else vision
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config={**TEXT, **text},
        **{"image_token_index": IMAGE, **options},
    )
    config.text_config._attn_implementation = "eager"  # the one that knows soft-caps
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    for name, parameter in model.named_parameters():
        offset = "language" in name and "gemma" in config.text_config.model_type
        centre = 1.0 if "norm" in name and name.endswith("weight") and not offset else 0.0
        # Small embeddings and large matrices: or a tied model says its last token for ever.
        nn.init.normal_(parameter, centre, 0.05 if "embed_tokens" in name else 0.4)
    return model.eval()


def loaded(theirs):
    hub = json.loads(theirs.config.to_json_string(use_diff=False))
    return vlm_format.from_hub(hub, theirs.state_dict())


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def prompts_of(config: VLMConfig) -> list[list[int]]:
    """Texts of different lengths with two, one and one images."""
    image = config.image_token
    texts = ([1, image, 5, 6, image, 7], [1, image, 9], [1, 3, image, 4, 11, 12, 13])
    counts = (2, 1, 1)
    return [with_image_tokens(p, config, n) for p, n in zip(texts, counts, strict=True)]


def padded(prompts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and their mask, padded on one side."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, own, prompt in zip(ids, mask, prompts, strict=True):
        here = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[here], own[here] = torch.tensor(prompt), 1
    return ids, mask


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@each_case
@torch.no_grad()
def test_logits_of_padded_prompts_with_several_images_equal_transformers(case):
    theirs = published(case)
    config, params = loaded(theirs)
    prompts = prompts_of(config)
    ids, mask = padded(prompts, "right")
    lengths, extra = mask.sum(1), {}
    prefix = lengths - torch.tensor([1, 2, 3])  # the last tokens are an answer
    if config.prefix:
        extra = {"token_type_ids": (torch.arange(ids.shape[1]) >= prefix[:, None]).long()}
    expected = theirs(input_ids=ids, pixel_values=images(), attention_mask=mask, **extra).logits
    model = vlm(config)
    options = {"prefix_lengths": prefix} if config.prefix else {}
    for implementation in ("flash", "reference"):
        options["implementation"] = implementation
        logits = model.apply(params, ids, images(), lengths=lengths, **options)
        close(logits[mask.bool()], expected[mask.bool()])


@each_case
@torch.no_grad()
def test_generated_tokens_equal_transformers(case):
    theirs = published(case)
    config, params = loaded(theirs)
    prompts, model = prompts_of(config), vlm(config)
    ids, mask = padded(prompts, "left")
    extra = {"token_type_ids": torch.zeros_like(ids)} if config.prefix else {}
    given = {"pixel_values": images(), "attention_mask": mask, **extra}
    expected = theirs.generate(
        input_ids=ids, **given, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )[:, ids.shape[1] :]
    generate = Generator(language_model(config, params))
    inputs = prefill_inputs(model, params, prompts, images())
    made = generate(prompts, Settings(8, sampling=GREEDY), inputs=inputs)
    assert made.tokens.tolist() == expected.tolist()
    assert len(set(made.tokens.flatten().tolist())) > 3


@each_case
@torch.no_grad()
def test_folders_load_and_exports_load_back(case, tmp_path):
    theirs = published(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, _, _ = vlm_format.load(tmp_path / "theirs")
    vlm_format.save(tmp_path / "ours", config, params)
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)
    ids, mask = padded(prompts_of(config), "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images()}
    close(again(**inputs).logits, theirs(**inputs).logits)
    restored = vlm_format.load(tmp_path / "ours")
    assert restored.config == config
    assert all(torch.equal(value, params[name]) for name, value in restored.params.items())


def test_short_configurations_take_the_defaults_of_their_classes():
    """As in the published folders of llava-1.5-7b and paligemma-3b."""
    hub = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "patch_size": 14}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "projection_dim": 768}
    config = vlm_format.read_llava(hub | {"vision_config": vision}, ())
    assert (config.decoder.width, config.decoder.depth, config.vision_layers) == (4096, 32, 23)
    assert config.tokens_per_image == 576 and not config.decoder.tied
    text = {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma"}
    text |= {"num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
    hub = {"text_config": {**text, "vocab_size": 257216}, "vision_config": vision}
    config = vlm_format.read_paligemma({**hub, "image_token_index": 257152}, ())
    assert config.tokens_per_image == 256 and config.decoder.tied and config.prefix
    assert config.decoder.size_of_head == 256 and config.decoder.activation == "gelu_tanh"


VIT = ViTConfig(16, 2, 2, 24, image=8, patch=2, class_token=False, pooling=None)
DECODER = DecoderConfig(50, width=16, depth=2, heads=2, hidden=24, max_length=40)
SMALL = VLMConfig(VIT, DECODER, IMAGE, shuffle=2)


def batch(n: int = 2, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    prompts = [with_image_tokens([1, IMAGE, 5, 8], SMALL, 1) for _ in range(n)]
    pixels = torch.randn(n, 3, 8, 8, dtype=dtype, generator=generator)
    return torch.tensor(prompts), pixels


def test_pixel_shuffle_joins_squares():
    image = torch.arange(16).reshape(1, 16, 1).float()
    joined = pixel_shuffle(image, (4, 4), 2)[0].tolist()
    assert joined == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pixel_shuffle_is_that_of_idefics():
    from transformers.models.idefics3 import modeling_idefics3

    states = torch.randn(2, 36, 5)
    theirs = modeling_idefics3.Idefics3Connector.pixel_shuffle(None, states, 3)
    torch.testing.assert_close(pixel_shuffle(states, (6, 6), 3), theirs)


@pytest.mark.parametrize("prefix", [False, True])
def test_an_answer_sees_every_pixel_and_a_causal_image_nothing_after_it(prefix):
    config = replace(SMALL, prefix=prefix)
    model = vlm(config)
    params, (ids, pixels) = model.init(0, dtype=torch.float64), batch()
    options = {"prefix_lengths": torch.tensor([6, 6])} if prefix else {}
    before = model.apply(params, ids, pixels, **options)
    changed = pixels.clone()
    changed[0, :, 7, 7] += 1
    after = model.apply(params, ids, changed, **options)
    assert torch.equal(after[1], before[1])  # another prompt's image
    assert (after[0, 5:] != before[0, 5:]).any(-1).all()
    if not prefix:
        torch.testing.assert_close(after[0, 0], before[0, 0])
    other = ids.clone()
    other[:, 5] = 9  # the first word after the image, inside the prefix
    after = model.apply(params, other, pixels, **options)
    assert torch.allclose(after[:, :5], before[:, :5]) != prefix


def test_labels_are_the_answers_tokens_alone():
    ids = torch.tensor([[IMAGE, IMAGE, 3, 4, 5, 6, 0], [IMAGE, IMAGE, 3, 7, 0, 0, 0]])
    labels = answer_labels(ids, torch.tensor([4, 3]), torch.tensor([6, 4]))
    i = IGNORED
    assert labels.tolist() == [[i, i, i, 5, 6, i, i], [i, i, 7, i, i, i, i]]


def answer_loss(params, model, ids, pixels, labels, **options):
    states = model.apply(params, ids, pixels, method="hidden", **options)
    weight = output_weight(params)
    loss, count = linear_cross_entropy(states, weight, labels, ignore_index=IGNORED)
    return loss / count


def test_gradients_reach_every_part_equal_the_formula_and_those_of_examples():
    model = vlm(SMALL)
    params, (ids, pixels) = model.init(0, dtype=torch.float64), batch()
    labels = answer_labels(ids, torch.tensor([6, 6]), torch.tensor([7, 7]))
    grads = {
        name: grad(answer_loss)(params, model, ids, pixels, labels, implementation=name)
        for name in ("flash", "reference")
    }
    torch.testing.assert_close(grads["flash"], grads["reference"])
    _, engine = value_and_grad(answer_loss)(params, model, ids, pixels, labels)
    torch.testing.assert_close(engine, grads["flash"])
    examples = vmap(grad(answer_loss), in_dims=(None, None, 0, 0, 0))(
        params, model, ids[:, None], pixels[:, None], labels[:, None]
    )
    torch.testing.assert_close({k: v.mean(0) for k, v in examples.items()}, engine)
    still = {name for name, value in engine.items() if not value.any()}
    assert still <= {name for name in params if name.endswith("attention.k.bias")}


def test_saliency_is_the_slope_of_the_answer_and_stays_in_its_prompt():
    model = vlm(SMALL)
    params, (ids, pixels) = model.init(0, dtype=torch.float64), batch()
    labels = answer_labels(ids, torch.tensor([6, 7]), torch.tensor([7, 7]))  # the first's alone
    found = saliency(model, params, ids, pixels, labels)
    assert found.shape == (2, 8, 8) and found[0].all() and not found[1].any()
    steps = torch.zeros(3, *pixels.shape, dtype=torch.float64)
    for channel in range(3):
        steps[channel, 0, channel, 2, 5] = 1e-5

    def answer(pixels):
        return model.apply(params, ids, pixels)[0, 5].log_softmax(-1)[8]

    slopes = [(answer(pixels + step) - answer(pixels - step)).abs() / 2e-5 for step in steps]
    torch.testing.assert_close(found[0, 2, 5], max(slopes), rtol=1e-5, atol=0)


def test_stage_one_has_gradients_for_the_projector_alone():
    model = vlm(SMALL)
    params, (ids, pixels) = model.init(0, dtype=torch.float64), batch()
    labels = answer_labels(ids, torch.tensor([6, 6]), torch.tensor([7, 7]))
    trained, frozen = split(params, STAGE_1)
    assert {name.split(".")[0] for name in trained} == {"projector"}
    _, grads = value_and_grad(
        lambda trained: answer_loss(merge(trained, frozen), model, ids, pixels, labels)
    )(trained)
    _, whole = value_and_grad(answer_loss)(params, model, ids, pixels, labels)
    assert grads.keys() == trained.keys()
    torch.testing.assert_close(grads, {name: whole[name] for name in trained})


def test_packed_samples_equal_samples_alone():
    model = vlm(SMALL)
    params, (ids, pixels) = model.init(0, dtype=torch.float64), batch()
    alone = model.apply(params, ids, pixels)
    T = ids.shape[1]
    packed = model.apply(
        params,
        ids.reshape(1, -1),
        pixels,
        segment_ids=torch.arange(2).repeat_interleave(T)[None],
        positions=torch.arange(T).repeat(2)[None],
    )
    torch.testing.assert_close(packed.reshape(alone.shape), alone)


def test_generation_equals_the_full_forward_without_a_cache():
    for prefix, windows in ((False, (None,)), (True, (None,)), (True, (None, 5))):
        config = replace(SMALL, prefix=prefix, decoder=replace(DECODER, windows=windows))
        model = vlm(config)
        params, (ids, pixels) = model.init(1), batch(dtype=torch.float32)
        prompts = [ids[0].tolist(), ids[1, :6].tolist()]
        generate = Generator(language_model(config, params, fused=prefix))
        inputs = prefill_inputs(model, params, prompts, pixels)
        made = generate(prompts, Settings(5, sampling=GREEDY), inputs=inputs).tokens
        for prompt, image, tokens in zip(prompts, pixels, made.tolist(), strict=True):
            for i, token in enumerate(tokens):
                row = torch.tensor([prompt + tokens[:i]])
                options = {"prefix_lengths": torch.tensor([len(prompt)])} if prefix else {}
                logits = model.apply(params, row, image[None], **options)
                assert logits[0, -1].argmax() == token


def test_texts_without_images_are_texts():
    model = vlm(SMALL)
    params, ids = model.init(0), torch.tensor([[1, 2, 3]])
    expected = model.apply(params, ids)
    assert expected.shape == (1, 3, 50)
    torch.testing.assert_close(model.apply(params, ids, torch.ones(0, 3, 8, 8)), expected)


def test_dropout_follows_its_key():
    vision, decoder = replace(VIT, dropout=0.2), replace(DECODER, dropout=0.2)
    model = vlm(replace(SMALL, vision=vision, decoder=decoder))
    params, (ids, pixels) = model.init(0, dtype=torch.float64), batch()
    keys = (None, random.key(1), random.key(2))
    run = [model.apply(params, ids, pixels, key=key) for key in keys]
    torch.testing.assert_close(model.apply(params, ids, pixels, key=keys[1]), run[1])
    assert not torch.allclose(run[0], run[1]) and not torch.allclose(run[1], run[2])


def test_presets_and_weight_decay():
    counted = {name: build() for name, build in PRESETS.items() if name == "nano"}
    shapes = vlm(counted["nano"]).shapes
    assert 220e6 < sum(shape.numel() for shape in shapes.values()) < 225e6
    assert counted["nano"].tokens_per_image == 49
    tiny = vlm(PRESETS["tiny"](50, IMAGE)).shapes
    decayed = by_rules(DECAY, tiny, strict=False)
    assert decayed["projector.up.weight"] and not decayed["decoder.embedding.weight"]


def refused(**change):
    return lambda: replace(SMALL, **change)


def misfit(ids, pixels):
    model = vlm(SMALL)
    return lambda: model.apply(model.init(0), torch.tensor([ids]), pixels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (refused(projector="conv"), "'conv'"),
        (refused(activation="mish"), "'mish'"),
        (refused(shuffle=3), r"shuffle \(3\) .* divide"),
        (refused(class_token=True), "class_token needs"),
        (refused(vision_layers=3), r"vision_layers \(3\)"),
        (refused(image_token=-1), r"image_token \(-1\)"),
        (refused(decoder=replace(DECODER, max_length=4)), "an image takes 4 tokens"),
        (lambda: with_image_tokens([1, 2], SMALL, 1), "0 image placeholders .* for 1 images"),
        (lambda: with_image_tokens([IMAGE] * 3, SMALL, 2), "3 image placeholders .* for 2"),
        (lambda: with_image_tokens([1] * 41, SMALL, 0), "41 tokens .* takes 40"),
        (misfit([1, 2], torch.ones(1, 3, 8, 8)), "hold 0 image placeholders, for 1 images of 4"),
        (misfit([1, *[IMAGE] * 5], torch.ones(1, 3, 8, 8)), "hold 5 .* for 1 images of 4"),
        (misfit([1, IMAGE], None), "hold 1 image placeholders, for no images"),
        (misfit([1, *[IMAGE] * 4], torch.ones(1, 1, 8, 8)), "3 channels"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_prefix_goes_with_a_model_that_has_one():
    ids, pixels = batch()
    model, lengths = vlm(SMALL), torch.tensor([6, 6])
    params = model.init(0, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes no prefix_lengths"):
        model.apply(params, ids, pixels, prefix_lengths=lengths)
    model = vlm(replace(SMALL, prefix=True))
    with pytest.raises(ValueError, match="takes prefix_lengths"):
        model.apply(params, ids, pixels)
    with pytest.raises(ValueError, match="packed rows"):
        model.apply(params, ids, pixels, prefix_lengths=lengths, segment_ids=ids)


def test_a_compiled_loss_equals_the_eager_one():
    """As one graph; the tower, the projector and the decoder with one layer each."""
    config = replace(SMALL, vision=replace(VIT, depth=1), decoder=replace(DECODER, depth=1))
    model = vlm(config)
    params, (ids, pixels) = model.init(0), batch(dtype=torch.float32)
    labels = answer_labels(ids, torch.tensor([6, 6]), torch.tensor([7, 7]))
    compiled = torch.compile(
        lambda params: answer_loss(params, model, ids, pixels, labels),
        fullgraph=True,
        dynamic=False,
        backend="aot_eager",
    )
    expected = value_and_grad(answer_loss)(params, model, ids, pixels, labels)
    torch.testing.assert_close(value_and_grad(compiled)(params), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \(\[-2, -1\]\) must be one"),
        ({"text_config": {"model_type": "gpt2"}}, "gpt2"),
        ({"vision_config": {"model_type": "dinov2"}}, "dinov2"),
        ({"model_type": "idefics3"}, "idefics3"),
    ],
)
def test_folders_that_are_not_known_are_named(change, message):
    theirs = published("llava")
    hub = json.loads(theirs.config.to_json_string(use_diff=False))
    with pytest.raises(ValueError, match=message):
        vlm_format.from_hub({**hub, **change}, theirs.state_dict())
