"""MarianMT checkpoints (Junczys-Dowmunt et al. 2018) as parameters of our Transformer.

A map of names and options, from dict to dict: transformers' weights, nothing of its code.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msfs_functional.models.transformer import TransformerConfig
from msfs_functional.params import Params

NAMES = [
    (r"^model\.shared\.", "embedding."),
    (r"^model\.encoder\.embed_tokens\.", "source_embedding."),
    (r"^model\.decoder\.embed_tokens\.", "target_embedding."),
    (r"^model\.(encoder|decoder)\.layers\.", r"\1."),
    (r"\.self_attn_layer_norm\.", ".self_attention_norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attention_norm."),
    (r"\.final_layer_norm\.", ".feed_forward_norm."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.out_proj\.", ".o."),
    (r"\.fc1\.", ".feed_forward.up."),
    (r"\.fc2\.", ".feed_forward.down."),
    (r"^lm_head\.", "output."),
    (r"^final_logits_bias$", "output.bias"),
]


def from_marian(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[TransformerConfig, Params]:
    """Configuration and parameters of a MarianMT checkpoint (`config.json`, its weights by name).

    Decoding starts from `config["decoder_start_token_id"]`, and ends with `config["eos_token_id"]`.

    Raises:
        ValueError: a layout this model does not have.
    """
    if config["encoder_attention_heads"] != config["decoder_attention_heads"]:
        raise ValueError("encoder and decoder must have the same number of heads")
    if config["encoder_ffn_dim"] != config["decoder_ffn_dim"]:
        raise ValueError("encoder and decoder must have feed-forward layers of the same width")
    shared = config.get("share_encoder_decoder_embeddings", True)
    tied = config.get("tie_word_embeddings", True)
    renamed: dict[str, Any] = {"silu": "swish", "gelu_new": "gelu_tanh"}
    activation = config["activation_function"]
    ours = TransformerConfig(
        vocab=config["vocab_size"],
        target_vocab=config.get("decoder_vocab_size"),
        width=config["d_model"],
        depth=config["encoder_layers"],
        decoder_depth=config["decoder_layers"],
        heads=config["encoder_attention_heads"],
        hidden=config["encoder_ffn_dim"],
        dropout=config["dropout"],
        attention_dropout=config["attention_dropout"],
        hidden_dropout=config["activation_dropout"],
        activation=renamed.get(activation, activation),
        tie="all" if shared and tied else "decoder" if tied else "none",
        scale_embedding=config["scale_embedding"],
        positions="halves",
        output_bias=True,
        max_length=config["max_position_embeddings"],
    )
    params: Params = {}
    for name, value in weights.items():
        tied_copy = ours.tie == "all" and "embed_tokens" in name
        tied_copy = tied_copy or (ours.tie != "none" and name.startswith("lm_head."))
        if tied_copy or "embed_positions" in name:
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        params[name] = value.reshape(-1) if name == "output.bias" else value
    return ours, params
