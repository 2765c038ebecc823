"""Published vision-language models in and out: a local Hugging Face folder <-> (VLMConfig, Params).

PaliGemma (1 and 2) and LLaVA, with the towers of `vision_format` and the decoders of `pretrained`.
"""

import functools
from collections.abc import Collection
from typing import Any

from msfs_functional.models import families, pretrained, vision_format
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.models.families import Families, Family
from msfs_functional.models.pretrained import Hub
from msfs_functional.models.tower_options import (
    CLIP_NAMES,
    Substitutions,
    activation_of,
    substitute,
    their_activation,
)
from msfs_functional.models.vit import ViTConfig
from msfs_functional.models.vlm import VLMConfig, vlm

HEAD = "language_model.lm_head.weight"
# What a text_config leaves out because it is the default of transformers' class.
GEMMA = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32000,
        "sliding_window": 4096,
    },
    "qwen2": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
    },
    "gemma": {
        **GEMMA,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 24576,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "vocab_size": 256000,
    },
    "gemma2": {
        **GEMMA,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "rms_norm_eps": 1e-6,
        "vocab_size": 256000,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
TOWERS = ("clip_vision_model", "siglip_vision_model")
# The names of transformers 5 and of folders saved since -> those of the published folders.
SPELLINGS: Substitutions = [
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
]
PROJECTOR: Substitutions = [
    (r"^projector\.linear\.", "multi_modal_projector.linear."),
    (r"^projector\.up\.", "multi_modal_projector.linear_1."),
    (r"^projector\.down\.", "multi_modal_projector.linear_2."),
]


def read_decoder(hub: Hub | None, default: str) -> DecoderConfig:
    hub = dict(hub or {})
    kind = hub.get("model_type", default)
    if kind not in DEFAULTS:
        raise ValueError(f"text_config's model_type ({kind!r}) must be one of {list(DEFAULTS)}")
    hub.pop("use_bidirectional_attention", None)  # says that prompts have a prefix
    return pretrained.FAMILIES[kind].read({**DEFAULTS[kind], **hub})


def read_tower(hub: Hub | None, default: str) -> ViTConfig:
    hub = dict(hub or {})
    kind = hub.get("model_type", default)
    if kind not in TOWERS:
        raise ValueError(f"vision_config's model_type ({kind!r}) must be one of {list(TOWERS)}")
    return vision_format.FAMILIES[kind].read(hub, ())


@functools.lru_cache
def decoder_family(config: DecoderConfig) -> str:
    kind = pretrained.family_of(config)
    if kind not in DEFAULTS:
        raise ValueError(f"a decoder of the family {kind!r} must be one of {list(DEFAULTS)}")
    return kind


def write_parts(config: VLMConfig) -> dict[str, Any]:
    kind = decoder_family(config.decoder)
    text = {"model_type": kind, **pretrained.FAMILIES[kind].write(config.decoder)}
    kind = vision_format.family_of(config.vision)
    vision = {"model_type": kind, **vision_format.FAMILIES[kind].write(config.vision)}
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": config.image_token,
        "tie_word_embeddings": config.decoder.tied,
    }


def read_paligemma(hub: Hub, names: Collection[str]) -> VLMConfig:
    decoder = read_decoder(hub.get("text_config"), "gemma")
    vision = {"vision_use_head": False, **(hub.get("vision_config") or {})}
    tower = read_tower(vision, "siglip_vision_model")
    image_token = hub.get("image_token_index", 256000)
    return VLMConfig(tower, decoder, image_token, projector="linear", prefix=True)


def write_paligemma(config: VLMConfig) -> dict[str, Any]:
    width = config.decoder.width
    return {**write_parts(config), "projection_dim": width, "hidden_size": width}


def read_llava(hub: Hub, names: Collection[str]) -> VLMConfig:
    tower = read_tower(hub.get("vision_config"), "clip_vision_model")
    decoder = read_decoder(
        {"tie_word_embeddings": hub.get("tie_word_embeddings", False), **hub["text_config"]},
        "llama",
    )
    layer = hub.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer ({layer}) must be one layer, not several")
    full = hub.get("vision_feature_select_strategy", "default") == "full"
    if not full and not tower.class_token:
        raise ValueError(
            "vision_feature_select_strategy 'default' drops a class token, which this tower does "
            "not have: it must be 'full'"
        )
    return VLMConfig(
        tower,
        decoder,
        hub.get("image_token_index", 32000),
        projector="mlp",
        activation=activation_of({"projector_hidden_act": "gelu", **hub}, "projector_hidden_act"),
        projector_bias=hub.get("multimodal_projector_bias", True),
        vision_layers=layer if layer >= 0 else tower.depth + 1 + layer,
        class_token=full and tower.class_token,
    )


def write_llava(config: VLMConfig) -> dict[str, Any]:
    full = config.class_token or not config.vision.class_token
    return {
        **write_parts(config),
        "projector_hidden_act": their_activation(config.activation),
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": config.vision_layers,
        "vision_feature_select_strategy": "full" if full else "default",
        "image_seq_length": config.tokens_per_image,
    }


def their_name(name: str, config: VLMConfig) -> str:
    if name.startswith("vision."):
        theirs = substitute("image." + name.removeprefix("vision."), CLIP_NAMES)
        return f"vision_tower.{theirs}"
    if name.startswith("projector."):
        return substitute(name, PROJECTOR)
    family = pretrained.FAMILIES[decoder_family(config.decoder)]
    return "language_model." + pretrained.their_name(name.removeprefix("decoder."), family)


def tied(config: VLMConfig) -> Collection[str]:
    return (HEAD,) if config.decoder.tied else ()


FAMILIES: Families = {
    "paligemma": Family(
        VLMConfig,
        "PaliGemmaForConditionalGeneration",
        None,
        read_paligemma,
        write_paligemma,
        vlm,
        their_name,
        SPELLINGS,
        tied,
    ),
    "llava": Family(
        VLMConfig,
        "LlavaForConditionalGeneration",
        None,
        read_llava,
        write_llava,
        vlm,
        their_name,
        SPELLINGS,
        tied,
    ),
}

# `families.from_hub`, ... for the families of this module.
from_hub = functools.partial(families.from_hub, families=FAMILIES)
to_hub = functools.partial(families.to_hub, families=FAMILIES)
load = functools.partial(families.load, families=FAMILIES)
save = functools.partial(families.save, families=FAMILIES)
