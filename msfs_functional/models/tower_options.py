"""Names and options of published image and text towers: ViT, CLIP and SigLIP.

A table of substitutions gives their name of each of our weights; `read_...` makes a configuration
of their options, `write_...` the options of a configuration.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from msfs_functional.models.clip import CLIPConfig, TextConfig
from msfs_functional.models.encoder import EncoderConfig
from msfs_functional.models.pretrained import ACTIVATIONS, Hub
from msfs_functional.models.vit import ViTConfig, clip_vision, siglip_vision

Substitutions = Sequence[
    tuple[str, str | Callable[[re.Match], str]]
]  # regexes and what they are replaced by, in this order

# Ours to theirs, for CLIP and SigLIP.
TOWERS: Substitutions = [
    (r"^text\.", "text_model."),
    (r"^image\.", "vision_model."),
    (r"^vision_model\.pool\.", "vision_model.head."),
    (r"\.head\.attention\.[qkv]\.", ".head.attention.in_proj_"),
    (r"\.head\.attention\.o\.", ".head.attention.out_proj."),
    (r"\.head\.norm\.", ".head.layernorm."),
    (r"\.blocks\.", ".encoder.layers."),
    (r"^text_model\.embedding\.", "text_model.embeddings.token_embedding."),
    (r"_model\.positions\.", "_model.embeddings.position_embedding."),
    (r"^text_model\.norm\.", "text_model.final_layer_norm."),
    (r"^vision_model\.patches\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.class_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.pre_norm\.", "vision_model.pre_layrnorm."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"\.attention_norm\.", ".layer_norm1."),
    (r"\.feed_forward_norm\.", ".layer_norm2."),
    (r"\.attention\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attention\.o\.", ".self_attn.out_proj."),
    (r"\.feed_forward\.up\.", ".mlp.fc1."),
    (r"\.feed_forward\.down\.", ".mlp.fc2."),
]
CLIP_NAMES: Substitutions = [
    (r"^text\.projection\.", "text_projection."),
    (r"^image\.projection\.", "visual_projection."),
    *TOWERS,
]
SIGLIP_NAMES: Substitutions = [(r"^text\.projection\.", "text_model.head."), *TOWERS]
VIT_NAMES: Substitutions = [
    (r"^projection\.", "classifier."),
    (r"^pooler\.", "pooler.dense."),
    (r"^patches\.", "embeddings.patch_embeddings.projection."),
    (r"^class_token$", "embeddings.cls_token"),
    (r"^positions\.weight$", "embeddings.position_embeddings"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attention_norm\.", ".layernorm_before."),
    (r"\.feed_forward_norm\.", ".layernorm_after."),
    (r"\.attention\.q\.", ".attention.attention.query."),
    (r"\.attention\.k\.", ".attention.attention.key."),
    (r"\.attention\.v\.", ".attention.attention.value."),
    (r"\.attention\.o\.", ".attention.output.dense."),
    (r"\.feed_forward\.up\.", ".intermediate.dense."),
    (r"\.feed_forward\.down\.", ".output.dense."),
]
# The names that transformers 5 gives to a ViT's layers, and the prefix of a classifier's.
VIT_SPELLINGS: Substitutions = [
    (r"^vit\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{WORDS[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
WORDS = {"q": "query", "k": "key", "v": "value"}


VISION = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "projection_dim": 512,
}
# What a config.json leaves out because it is the default of transformers' class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_text_model": {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
        "projection_dim": 512,
    },
    "siglip_text_model": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    },
    "clip_vision_model": {**VISION, "patch_size": 32, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {
        **VISION,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    "vit": {
        **VISION,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    },
}


def substitute(name: str, substitutions: Substitutions) -> str:
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


def activation_of(hub: Hub, key: str = "hidden_act") -> Any:
    if hub[key] not in ACTIVATIONS:
        raise ValueError(f"{key} ({hub[key]!r}) must be one of {list(ACTIVATIONS)}")
    return ACTIVATIONS[hub[key]]


def their_activation(name: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def read_sizes(hub: Hub) -> dict[str, Any]:
    return {
        "width": hub["hidden_size"],
        "depth": hub["num_hidden_layers"],
        "heads": hub["num_attention_heads"],
        "hidden": hub["intermediate_size"],
        "activation": activation_of(hub),
        "norm_eps": hub["layer_norm_eps"],
        "attention_dropout": hub["attention_dropout"],
    }


def write_sizes(config: EncoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": their_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_dropout,
    }


def read_text(hub: Hub, names: Collection[str]) -> TextConfig:
    """CLIP's text tower. eos_token_id 2 is that of configurations which predate its use."""
    hub = {**DEFAULTS["clip_text_model"], **hub}
    eos = hub["eos_token_id"]
    return TextConfig(
        **read_sizes(hub),
        vocab=hub["vocab_size"],
        max_length=hub["max_position_embeddings"],
        pooling="largest" if eos == 2 else "eos",
        eos=eos,
        projection=hub["projection_dim"] if "text_projection.weight" in names else None,
    )


def write_text(config: TextConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_length,
        "eos_token_id": 2 if config.pooling == "largest" else config.eos,
        "projection_dim": config.projection or config.width,
    }


def read_siglip_text(hub: Hub, names: Collection[str]) -> TextConfig:
    hub = {**DEFAULTS["siglip_text_model"], **hub}
    return TextConfig(
        **read_sizes(hub),
        vocab=hub["vocab_size"],
        max_length=hub["max_position_embeddings"],
        is_causal=False,
        pooling="last",
        projection=hub.get("projection_size", hub["hidden_size"]),
        projection_bias=True,
    )


def write_siglip_text(config: TextConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_length,
        "projection_size": config.projection,
    }


def read_image(hub: Hub) -> dict[str, Any]:
    image = hub["image_size"]
    return {
        **read_sizes(hub),
        "image": image if isinstance(image, int) else tuple(image),
        "patch": hub["patch_size"],
        "channels": hub["num_channels"],
    }


def write_image(config: ViTConfig) -> dict[str, Any]:
    image = config.image if isinstance(config.image, int) else list(config.image)
    sizes = {"image_size": image, "patch_size": config.patch, "num_channels": config.channels}
    return {**write_sizes(config), **sizes}


def read_clip_vision(hub: Hub, names: Collection[str]) -> ViTConfig:
    hub = {**DEFAULTS["clip_vision_model"], **hub}
    width = hub["projection_dim"] if "visual_projection.weight" in names else None
    return clip_vision(**read_image(hub), projection=width)


def write_clip_vision(config: ViTConfig) -> dict[str, Any]:
    return {**write_image(config), "projection_dim": config.projection or config.width}


def read_siglip_vision(hub: Hub, names: Collection[str]) -> ViTConfig:
    hub = {**DEFAULTS["siglip_vision_model"], **hub}
    pooling = "attention" if hub["vision_use_head"] else None
    return siglip_vision(**read_image(hub), pooling=pooling)


def write_siglip_vision(config: ViTConfig) -> dict[str, Any]:
    return {**write_image(config), "vision_use_head": config.pooling == "attention"}


def read_vit(hub: Hub, names: Collection[str]) -> ViTConfig:
    hub = {**DEFAULTS["vit"], **hub}
    if not hub.get("qkv_bias", True):
        raise ValueError("qkv_bias (False) must be True: a tower without these biases is not known")
    if hub.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act ({hub['pooler_act']!r}) must be 'tanh'")
    classes = "classifier.weight" in names
    labels = len(hub.get("id2label") or ()) or hub.get("num_labels", 2)
    return ViTConfig(
        **{**read_image(hub), "attention_dropout": hub["attention_probs_dropout_prob"]},
        dropout=hub["hidden_dropout_prob"],
        pooler="pooler.dense.weight" in names,
        projection=labels if classes else None,
    )


def write_vit(config: ViTConfig) -> dict[str, Any]:
    hub = write_image(config)
    hub["attention_probs_dropout_prob"] = hub.pop("attention_dropout")
    hub["hidden_dropout_prob"] = config.dropout
    if config.projection is not None:
        hub["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.projection)}
        hub["label2id"] = {name: int(i) for i, name in hub["id2label"].items()}
    return hub


def read_clip(hub: Hub, names: Collection[str]) -> CLIPConfig:
    width = {"projection_dim": hub.get("projection_dim", 512)}
    image = read_clip_vision({**(hub.get("vision_config") or {}), **width}, names)
    return CLIPConfig(image, read_text({**(hub.get("text_config") or {}), **width}, names))


def write_clip(config: CLIPConfig) -> dict[str, Any]:
    vision, text = write_clip_vision(config.image), write_text(config.text)
    return {
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "clip_text_model", **text},
        "projection_dim": config.text.projection,
        "logit_scale_init_value": math.log(config.scale),
    }


def read_siglip(hub: Hub, names: Collection[str]) -> CLIPConfig:
    image = read_siglip_vision(hub.get("vision_config") or {}, names)
    text = read_siglip_text(hub.get("text_config") or {}, names)
    return CLIPConfig(image, text, scale=10.0, bias=-10.0)


def write_siglip(config: CLIPConfig) -> dict[str, Any]:
    vision, text = write_siglip_vision(config.image), write_siglip_text(config.text)
    return {
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "text_config": {"model_type": "siglip_text_model", **text},
    }
