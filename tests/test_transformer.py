"""The Transformer against torch.nn.Transformer and MarianMT, its masks, caches and options."""

import math

import pytest
import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel

from msfs_functional import random
from msfs_functional.models import transformer as tf
from msfs_functional.models.marian import from_marian
from msfs_functional.models.transformer import TransformerConfig, transformer

SMALL = {"vocab": 23, "width": 16, "depth": 2, "heads": 4, "hidden": 24, "max_length": 32}


def tokens(seed: int, *shape: int, vocab: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, shape, generator=generator)


def randomized(params: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """Parameters whose biases and norms are not at their neutral initial values."""
    keys = random.split(random.key(seed), len(params))
    return {
        name: value + 0.3 * random.normal(key, value.shape, dtype=value.dtype)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }


def torch_layer_names(name: str) -> str:
    """Our name of a parameter of torch.nn.Transformer, less what in_proj holds."""
    pairs = [
        ("encoder.layers.", "encoder."),
        ("decoder.layers.", "decoder."),
        ("encoder.norm.", "encoder_norm."),
        ("decoder.norm.", "decoder_norm."),
        ("self_attn.out_proj", "self_attention.o"),
        ("multihead_attn.out_proj", "cross_attention.o"),
        ("self_attn", "self_attention"),
        ("multihead_attn", "cross_attention"),
        ("linear1", "feed_forward.up"),
        ("linear2", "feed_forward.down"),
        ("norm1", "self_attention_norm"),
    ]
    for old, new in pairs:
        name = name.replace(old, new)
    last = (name.startswith("encoder") and ".norm2" in name) or ".norm3" in name
    name = name.replace(".norm3", ".norm2")
    return name.replace(".norm2", ".feed_forward_norm" if last else ".cross_attention_norm")


def from_torch(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    params = {}
    for name, value in weights.items():
        ours = torch_layer_names(name)
        if "in_proj" in ours:
            stem, kind = ours.rsplit(".in_proj_", 1)
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                params[f"{stem}.{part}.{kind}"] = chunk
        else:
            params[ours] = value
    return params


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_states_equal_torch_nn_transformer(norm, bias):
    theirs = nn.Transformer(
        16, 4, 2, 3, 24, 0.0, norm_first=norm == "pre", bias=bias, batch_first=True
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    options = {"decoder_depth": 3, "final_norm": True, "norm": norm, "bias": bias}
    model = transformer(TransformerConfig(**{**SMALL, **options}))
    params = model.init(0) | from_torch(dict(theirs.state_dict()))
    source, target = tokens(0, 3, 7), tokens(1, 3, 5)
    lengths = torch.tensor([7, 4, 1])
    padding = torch.arange(7) >= lengths[:, None]
    x, y = (
        params["embedding.weight"][ids] * math.sqrt(16)
        + tf.sinusoidal_positions(torch.arange(ids.shape[1]), 16)
        for ids in (source, target)
    )
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(
        x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding
    )
    for implementation in ("reference", "sdpa"):
        states = model.apply(
            params,
            source,
            target,
            source_lengths=lengths,
            method="hidden",
            implementation=implementation,
        )
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def marian(**options) -> MarianMTModel:
    defaults = {
        "vocab_size": 23,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 64,
        "scale_embedding": True,
        "activation_function": "swish",
        "pad_token_id": 0,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    model = MarianMTModel(MarianConfig(**{**defaults, **options})).eval()
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
        elif "embed_positions" not in name:
            nn.init.normal_(parameter, std=0.1 if "bias" in name else 0.4)
    nn.init.normal_(model.final_logits_bias, std=0.1)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "relu", "scale_embedding": False},
        {"activation_function": "gelu", "encoder_layers": 1, "d_model": 24},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 31},
        {"tie_word_embeddings": False, "share_encoder_decoder_embeddings": False},
    ],
)
@torch.no_grad()
def test_logits_equal_marian(options):
    theirs = marian(**options)
    config, params = from_marian(theirs.config.to_dict(), theirs.state_dict())
    model = transformer(config)
    assert set(params) == set(model.shapes)
    source, target = tokens(0, 4, 9), tokens(1, 4, 6)
    lengths = torch.tensor([9, 5, 1, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    expected = theirs(source, attention_mask=mask, decoder_input_ids=target).logits
    for implementation in ("reference", "sdpa"):
        logits = model.apply(
            params, source, target, source_lengths=lengths, implementation=implementation
        )
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
