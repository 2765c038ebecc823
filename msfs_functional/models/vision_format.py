"""Published image and text towers in and out: a local Hugging Face folder <-> (config, Params).

CLIP's text tower. Names, shapes and options are mapped as in `pretrained`; nothing of transformers'
code is used.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional.models.clip import TextConfig, text_tower
from msfs_functional.models.encoder import EncoderConfig
from msfs_functional.models.pretrained import ACTIVATIONS, Hub, read_folder, write_folder
from msfs_functional.params import Functional, Params

Substitutions = list[tuple[str, str]]  # regexes and what they are replaced by, in this order

# Ours to theirs, for CLIP and SigLIP.
TOWERS: Substitutions = [
    (r"^text\.projection\.", "text_projection."),
    (r"^text\.", "text_model."),
    (r"\.blocks\.", ".encoder.layers."),
    (r"^text_model\.embedding\.", "text_model.embeddings.token_embedding."),
    (r"_model\.positions\.", "_model.embeddings.position_embedding."),
    (r"^text_model\.norm\.", "text_model.final_layer_norm."),
    (r"\.attention_norm\.", ".layer_norm1."),
    (r"\.feed_forward_norm\.", ".layer_norm2."),
    (r"\.attention\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attention\.o\.", ".self_attn.out_proj."),
    (r"\.feed_forward\.up\.", ".mlp.fc1."),
    (r"\.feed_forward\.down\.", ".mlp.fc2."),
]


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
}
LEADING: dict[str, int] = {}  # ends of their names -> dims of size 1 before ours
TEXT_WITH_PROJECTION = "CLIPTextModelWithProjection"


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


@dataclass(frozen=True)
class Family:
    """How one kind of published model writes its options and names its weights."""

    architecture: Callable[[Any], str]  # transformers' class for a config
    read: Callable[[Hub, Collection[str]], Any]  # config.json, names of weights -> config
    write: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], Functional]
    names: Callable[[str], str]  # ours -> theirs
    spellings: Substitutions  # other names under which they are saved -> theirs


FAMILIES = {
    "clip_text_model": Family(
        lambda config: "CLIPTextModel" if config.projection is None else TEXT_WITH_PROJECTION,
        read_text,
        write_text,
        text_tower,
        lambda name: substitute(f"text.{name}", TOWERS),
        [(r"^(?=embeddings|encoder|final_layer_norm)", "text_model.")],
    ),
}


def family_of(config: Any) -> str:
    """The family of a configuration."""
    if isinstance(config, TextConfig):
        return "clip_text_model"
    raise ValueError(f"no published family for a {type(config).__name__}")


def packed_part(name: str) -> int:
    """0, 1, 2 for the q, k, v of attention pooling, which others keep in one tensor; else -1."""
    found = re.search(r"pool\.attention\.([qkv])\.", name)
    return "qkv".index(found[1]) if found else -1


def from_hub(hub: Hub, weights: Mapping[str, Tensor]) -> tuple[Any, Params]:
    """Configuration and parameters of a published model, from config.json and its weights by name.

    Raises:
        ValueError: a family or option that is not known here; weights that are missing, extra or
            misshapen.
    """
    kind = hub.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type ({kind!r}) must be one of {list(FAMILIES)}")
    family = FAMILIES[kind]
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
    missing, used = [], set()
    for name, shape in family.build(config).shapes.items():
        source, part = family.names(name), packed_part(name)
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


def to_hub(config: Any, params: Params) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `from_hub`: what goes into config.json, and the weights by their names."""
    kind = family_of(config)
    family = FAMILIES[kind]
    weights: dict[str, Tensor] = {}
    for name, value in params.items():
        theirs = family.names(name)
        if packed_part(name) == 0:
            value = torch.cat([params[name.replace(".q.", f".{part}.")] for part in "qkv"])
        if theirs not in weights:
            leading = next((n for end, n in LEADING.items() if theirs.endswith(end)), 0)
            weights[theirs] = value.detach()[(None,) * leading].contiguous()
    dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
    hub = {"model_type": kind, "architectures": [family.architecture(config)], "dtype": dtype}
    return {**hub, **family.write(config)}, weights


class Published(NamedTuple):
    """A folder's contents."""

    config: Any  # TextConfig, ...
    params: Params
    hub: dict[str, Any]  # config.json as it is
    tokenizer: str | None  # tokenizer.json as text


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Published:
    """A local Hugging Face folder as configuration and parameters.

    Args:
        dtype: of the parameters; default: as stored.

    Raises:
        ValueError: a missing or broken file, a family or option that is not known here.
    """
    hub, weights, tokenizer = read_folder(folder, device)
    config, params = from_hub(hub, weights)
    if dtype is not None:
        params = {name: value.to(dtype) for name, value in params.items()}
    return Published(config, params, hub, tokenizer)


def save(
    folder: str | Path,
    config: Any,
    params: Params,
    *,
    tokenizer: str | None = None,
    **extra: Any,
) -> None:
    """Writes a folder that `load` and transformers' from_pretrained read.

    Args:
        tokenizer: text of a tokenizer.json.
        extra: more entries of config.json.

    Raises:
        ValueError: a configuration that no published family has; parameters of another one.
    """
    expected = FAMILIES[family_of(config)].build(config).shapes
    if {name: value.shape for name, value in params.items()} != expected:
        raise ValueError("params are not of this configuration")
    hub, weights = to_hub(config, params)
    write_folder(folder, {**hub, **extra}, weights, tokenizer)
