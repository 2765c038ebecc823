"""Published layouts against transformers: random small weights, every option, both directions."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from msfs_functional.models import llama2c, pretrained
from msfs_functional.models.decoder import DecoderConfig, decoder, fuse, gpt2
from msfs_functional.rotary import Scaling

SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
}
SLIDING = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied, narrow": ("gpt2", {"tie_word_embeddings": False, "n_inner": 20}),
    "llama": ("llama", {"head_dim": None}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn, own magnitude": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "mistral without window": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {**SLIDING}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3 biases, windows, tied": (
        "qwen3",
        {**SLIDING, "layer_types": LAYERS, "head_dim": 6, "attention_bias": True}
        | {"tie_word_embeddings": True},
    ),
    "gemma": ("gemma", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 12}),
    "gemma2 without caps": (
        "gemma2",
        {"sliding_window": 4, "head_dim": 6, "query_pre_attn_scalar": 6}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}


def published(case: str) -> transformers.PreTrainedModel:
    """A random model of transformers with weights large enough to tell options apart."""
    kind, options = CASES[case]
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 41, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
        config = transformers.GPT2Config(**{**sizes, **options})
    else:
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, "head_dim": 6, **options})
    config._attn_implementation = "eager"  # the one that knows soft-caps
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            nn.init.normal_(parameter, 0.0 if "gemma" in kind else 1.0, 0.3)
        else:
            nn.init.normal_(parameter, std=0.3)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 41, shape, generator=torch.Generator().manual_seed(1))


def hub_of(model: transformers.PreTrainedModel) -> dict:
    return json.loads(model.config.to_json_string())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers_with_and_without_cache(case):
    theirs = published(case)
    config, params = pretrained.from_hub(hub_of(theirs), theirs.state_dict())
    model, ids = decoder(config), tokens(3, 19)
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # not so flat that everything is close
    for implementation in ("flash", "reference"):
        close(model.apply(params, ids, implementation=implementation), expected)
    cache = model.apply(params, 3, 24, method="init_cache")
    first, cache = model.apply(params, ids[:, :9], cache, method="decode")
    part, cache = model.apply(params, ids[:, 9:12], cache, 9, method="decode")
    logits = [first, part]
    for i in range(12, 19):
        step, cache = model.apply(params, ids[:, i : i + 1], cache, i, method="decode")
        logits.append(step)
    close(torch.cat(logits, 1), expected)
    fused = decoder(replace(config, fused=True))
    close(fused.apply(fuse(params), ids), expected)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_export_loads_into_transformers(case, tmp_path):
    theirs = published(case)
    config, params = pretrained.from_hub(hub_of(theirs), theirs.state_dict())
    own = (replace(config, fused=True), fuse(params)) if "llama" in case else (config, params)
    pretrained.save(tmp_path, *own, bos_token_id=1, eos_token_id=2)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    expected = transformers.LlamaForCausalLM if case == "mistral without window" else type(theirs)
    assert type(again) is expected  # that one is a Llama in all but name
    torch.testing.assert_close(again(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    loaded = pretrained.load(tmp_path)
    assert loaded.hub["eos_token_id"] == 2
    assert loaded.params.keys() == params.keys()
    assert all(torch.equal(value, params[name]) for name, value in loaded.params.items())


@pytest.mark.parametrize("shards", ["1GB", "10KB"])
@torch.no_grad()
def test_folders_of_save_pretrained_load(shards, tmp_path):
    theirs = published("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    config, params, _, tokenizer = pretrained.load(tmp_path, dtype=torch.float64)
    assert tokenizer is None
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "10KB")
    expected = theirs.double()(tokens(2, 9)).logits
    close(decoder(config).apply(params, tokens(2, 9)), expected)


def test_gpt2_weights_without_prefix_and_with_old_buffers_load():
    """The names in the published gpt2 folder: no "transformer.", masks saved with the weights."""
    theirs = published("gpt2")
    weights = {
        name.removeprefix("transformer."): value
        for name, value in theirs.state_dict().items()
        if name != "lm_head.weight"
    }
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    config, params = pretrained.from_hub(hub_of(theirs), weights)
    assert set(params) == set(decoder(config).shapes)


def test_tokenizer_text_goes_along(tmp_path):
    config = DecoderConfig(11, width=8, depth=1, heads=2, hidden=12)
    text = '{"any": "text"}'
    pretrained.save(tmp_path, config, decoder(config).init(0), tokenizer=text)
    assert pretrained.load(tmp_path).tokenizer == text


def folder(path: Path) -> Path:
    config = DecoderConfig(11, width=8, depth=1, heads=2, hidden=12)
    pretrained.save(path, config, decoder(config).init(0))
    return path


def change(path: Path, **entries) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "no JSON"),
        (lambda p: (p / "config.json").write_text('{"model_type": "llama"}'), "lacks"),
        (lambda p: change(p, model_type="mamba"), "model_type .*mamba"),
        (lambda p: change(p, num_hidden_layers=2), "missing .*layers.1"),
        (lambda p: change(p, num_hidden_layers=0), "depth"),
        (lambda p: change(p, hidden_size=16, head_dim=4), "config.json says"),
        (lambda p: change(p, quantization_config={}), "quantized"),
        (lambda p: change(p, hidden_act="mish"), "mish"),
        (lambda p: change(p, rope_parameters={"rope_type": "dynamic"}), "dynamic"),
        (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"no weights"), "no safetensors file"),
        (
            lambda p: save_file(
                load_file(p / "model.safetensors") | {"model.extra": torch.ones(1)},
                p / "model.safetensors",
            ),
            "unexpected .*model.extra",
        ),
    ],
)
def test_bad_folders_are_named(damage, message, tmp_path):
    damage(folder(tmp_path))
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path)


def test_exports_that_no_family_has_are_refused(tmp_path):
    config = gpt2(11, width=8, depth=1, heads=2, hidden=12, qk_norm=True)
    with pytest.raises(ValueError, match=r"'gpt2' comes nearest but differs in \['qk_norm'\]"):
        pretrained.save(tmp_path, config, decoder(config).init(0))
    fused = replace(DecoderConfig(11, width=8, depth=1, heads=2, hidden=12), fused=True)
    with pytest.raises(ValueError, match="params are not of this configuration"):
        pretrained.save(tmp_path, fused, decoder(replace(fused, fused=False)).init(0))


def test_scalings_survive_the_way_out_and_back():
    for scaling in (
        Scaling("linear", 2.0),
        Scaling("llama3", 8.0, original_length=32, low_factor=1.0, high_factor=5.0),
        Scaling("yarn", 4.0, original_length=32, fast=30.0, slow=2.0, magnitude=1.5),
    ):
        assert pretrained.read_scaling(pretrained.write_scaling(scaling), 64) == scaling


@pytest.fixture
def stories() -> Path:
    root = Path(__file__).parents[1]
    data = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data"))
    if not (data / "weights" / "stories260K").is_dir():
        pytest.skip(f"no folder {data}/weights/stories260K: MSFS_DATA names the one with weights")
    return data / "weights" / "stories260K"


@torch.no_grad()
def test_stories260k_gives_its_published_logits(stories):
    config, params = llama2c.read_model(stories / "stories260K.bin")
    logits = decoder(config).apply(params, torch.tensor([[1]]))[0, 0]
    expected = torch.tensor([-6.222914, 8.404342, -6.223739, -6.222544, -6.221954])
    torch.testing.assert_close(logits[:5], expected, atol=1e-5, rtol=0)
    assert logits.argmax() == 403


@torch.no_grad()
def test_stories260k_exports_to_transformers(stories, tmp_path):
    config, params = llama2c.read_model(stories / "stories260K.bin")
    pretrained.save(tmp_path, config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    close(decoder(config).apply(params, ids), theirs(ids).logits)


def test_a_truncated_llama2c_file_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="header"):
        llama2c.read_model(path)
    path.write_bytes(torch.tensor([8, 12, 1, 2, 2, 11, 16, 0], dtype=torch.int32).numpy().tobytes())
    with pytest.raises(ValueError, match="1 numbers"):
        llama2c.read_model(path)
