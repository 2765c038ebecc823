"""Published image and text towers in and out: a local Hugging Face folder <-> (config, Params).

    config.json + model.safetensors (or shards and their index) (+ tokenizer.json)

ViT (ViTModel, ViTForImageClassification), CLIP and SigLIP, whole or one tower of them. Names,
shapes and options are mapped as in `pretrained`; nothing of transformers' code is used.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional.models.clip import CLIPConfig, TextConfig, clip, text_tower
from msfs_functional.models.encoder import EncoderConfig
from msfs_functional.models.pretrained import ACTIVATIONS, Hub, read_folder, write_folder
from msfs_functional.models.vit import ViTConfig, clip_vision, siglip_vision, vit
from msfs_functional.params import Functional, Params

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
# Ends of their names and how many dims of size 1 stand before ours.
LEADING = {
    "embeddings.cls_token": 2,
    "embeddings.position_embeddings": 1,
    "head.probe": 2,
}
SIGLIP_SCALARS = ("logit_scale", "logit_bias")  # of shape (1,)


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


@dataclass(frozen=True)
class Family:
    """How one kind of published model writes its options and names its weights."""

    config: type  # ours
    architecture: str  # transformers' class
    projected: str | None  # that of a tower with a projection, or of a classifier
    read: Callable[[Hub, Collection[str]], Any]  # config.json, names of weights -> config
    write: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], Functional]
    names: Callable[[str, Any], str]  # our name, config -> theirs
    spellings: Substitutions = ()  # other names under which they are saved -> theirs
    copies: Callable[[Any], Collection[str]] = lambda config: ()  # their names of tied weights


Families = Mapping[str, Family]


def by_names(names: Substitutions, prefix: str = "") -> Callable[[str, Any], str]:
    return lambda name, config: substitute(prefix + name, names)


FAMILIES: Families = {
    "vit": Family(
        ViTConfig,
        "ViTModel",
        "ViTForImageClassification",
        read_vit,
        write_vit,
        vit,
        by_names(VIT_NAMES),
        VIT_SPELLINGS,
    ),
    "clip_text_model": Family(
        TextConfig,
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        read_text,
        write_text,
        text_tower,
        by_names(CLIP_NAMES, "text."),
        [(r"^(?!text_)", "text_model.")],
    ),
    "clip_vision_model": Family(
        ViTConfig,
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        read_clip_vision,
        write_clip_vision,
        vit,
        by_names(CLIP_NAMES, "image."),
        [(r"^(?!vision_|visual_)", "vision_model.")],
    ),
    "siglip_text_model": Family(
        TextConfig,
        "SiglipTextModel",
        "SiglipTextModel",
        read_siglip_text,
        write_siglip_text,
        text_tower,
        by_names(SIGLIP_NAMES, "text."),
        [(r"^(?!text_)", "text_model.")],
    ),
    "siglip_vision_model": Family(
        ViTConfig,
        "SiglipVisionModel",
        None,
        read_siglip_vision,
        write_siglip_vision,
        vit,
        by_names(SIGLIP_NAMES, "image."),
        [(r"^(?!vision_)", "vision_model.")],
    ),
    "clip": Family(
        CLIPConfig,
        "CLIPModel",
        None,
        read_clip,
        write_clip,
        clip,
        by_names(CLIP_NAMES),
    ),
    "siglip": Family(
        CLIPConfig,
        "SiglipModel",
        None,
        read_siglip,
        write_siglip,
        clip,
        by_names(SIGLIP_NAMES),
    ),
}


def family_of(config: Any, families: Families = FAMILIES) -> str:
    """The family that can say all of this configuration.

    Raises:
        ValueError: none can.
    """
    names = {"text_projection.weight", "visual_projection.weight", "classifier.weight"}
    if getattr(config, "projection", 0) is None:
        names = set()
    if getattr(config, "pooler", False):
        names.add("pooler.dense.weight")
    for kind, family in families.items():
        if not isinstance(config, family.config):
            continue
        try:
            again = family.read(family.write(config), names)
        except ValueError:  # what the family cannot say makes no sense there
            continue
        if _facts(again) == _facts(config):
            return kind
    raise ValueError(f"no published family has this configuration: {config}")


def _facts(config: Any) -> Any:
    """The configuration without what makes no difference to a trained model's outputs."""
    if isinstance(config, CLIPConfig):
        image, text = _facts(config.image), _facts(config.text)
        return replace(config, image=image, text=text, scale=1.0, bias=config.bias and 0.0)
    if isinstance(config, TextConfig):
        return replace(config, dropout=0.0, eos=config.eos if config.pooling == "eos" else 0)
    return replace(config, dropout=0.0) if isinstance(config, ViTConfig) else config


def packed_part(name: str) -> int:
    """0, 1, 2 for the q, k, v of attention pooling, which others keep in one tensor; else -1."""
    found = re.search(r"pool\.attention\.([qkv])\.", name)
    return "qkv".index(found[1]) if found else -1


def from_hub(
    hub: Hub, weights: Mapping[str, Tensor], families: Families = FAMILIES
) -> tuple[Any, Params]:
    """Configuration and parameters of a published model, from config.json and its weights by name.

    Raises:
        ValueError: a family or option that is not known here; weights that are missing, extra or
            misshapen.
    """
    kind = hub.get("model_type", "")
    if kind not in families:
        raise ValueError(f"model_type ({kind!r}) must be one of {list(families)}")
    if "quantization_config" in hub:
        raise ValueError("the weights are quantized (quantization_config): use the original ones")
    family = families[kind]
    theirs = {
        substitute(name, family.spellings): value
        for name, value in weights.items()
        if not name.endswith(("position_ids", "rotary_emb.inv_freq"))
    }
    try:
        config = family.read(hub, theirs)
    except KeyError as error:
        raise ValueError(f"config.json of a {kind} lacks {error}: it may be truncated") from None
    params: Params = {}
    missing, used = [], set(family.copies(config))
    for name, shape in family.build(config).shapes.items():
        source, part = family.names(name, config), packed_part(name)
        if source not in theirs:
            missing.append(source)
            continue
        used.add(source)
        value = theirs[source] if part < 0 else theirs[source].chunk(3)[part]
        if [n for n in value.shape if n > 1] != [n for n in shape if n > 1]:
            raise ValueError(
                f"{source} gives {tuple(value.shape)} for {name!r}, config.json says {tuple(shape)}"
            )
        params[name] = value.reshape(shape).contiguous()
    extra = [name for name in theirs if name not in used]
    if missing or extra:
        raise ValueError(
            f"weights do not fit config.json ({kind}): missing {missing[:4]}, unexpected "
            f"{extra[:4]} ({len(missing)} and {len(extra)} in all)"
        )
    return config, params


def to_hub(
    config: Any, params: Params, families: Families = FAMILIES
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `from_hub`: what goes into config.json, and the weights by their names."""
    kind = family_of(config, families)
    family = families[kind]
    weights: dict[str, Tensor] = {}
    for name, value in params.items():
        theirs = family.names(name, config)
        if packed_part(name) == 0:
            value = torch.cat([params[name.replace(".q.", f".{part}.")] for part in "qkv"])
        if theirs not in weights:
            leading = next((n for end, n in LEADING.items() if theirs.endswith(end)), 0)
            leading = 1 if kind == "siglip" and theirs in SIGLIP_SCALARS else leading
            weights[theirs] = value.detach()[(None,) * leading].contiguous()
    dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
    projected = getattr(config, "projection", None) is not None
    architecture = (projected and family.projected) or family.architecture
    hub = {"model_type": kind, "architectures": [architecture], "dtype": dtype}
    return {**hub, **family.write(config)}, weights


class Published(NamedTuple):
    """A folder's contents."""

    config: Any  # ViTConfig, TextConfig, CLIPConfig; VLMConfig
    params: Params
    hub: dict[str, Any]  # config.json as it is
    tokenizer: str | None  # tokenizer.json as text


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    families: Families = FAMILIES,
) -> Published:
    """A local Hugging Face folder as configuration and parameters.

    Args:
        dtype: of the parameters; default: as stored.
        families: kinds of models to know.

    Raises:
        ValueError: a missing or broken file, a family or option that is not known here.
    """
    hub, weights, tokenizer = read_folder(folder, device)
    config, params = from_hub(hub, weights, families)
    if dtype is not None:
        params = {name: value.to(dtype) for name, value in params.items()}
    return Published(config, params, hub, tokenizer)


def save(
    folder: str | Path,
    config: Any,
    params: Params,
    *,
    tokenizer: str | None = None,
    families: Families = FAMILIES,
    **extra: Any,
) -> None:
    """Writes a folder that `load` and transformers' from_pretrained read.

    Args:
        tokenizer: text of a tokenizer.json.
        extra: more entries of config.json.

    Raises:
        ValueError: a configuration that no published family has; parameters of another one.
    """
    expected = families[family_of(config, families)].build(config).shapes
    if {name: value.shape for name, value in params.items()} != expected:
        raise ValueError("params are not of this configuration")
    hub, weights = to_hub(config, params, families)
    write_folder(folder, {**hub, **extra}, weights, tokenizer)
