"""Families of published models: a local Hugging Face folder <-> (configuration, Params).

    config.json + model.safetensors (or shards and their index) (+ tokenizer.json)

A `Family` says how a kind of model writes its options and names its weights. Nothing of
transformers' code is used.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msfs_functional.models.clip import CLIPConfig, TextConfig
from msfs_functional.models.hub_folders import (
    Hub,
    Published,
    check_shapes,
    load_folder,
    write_folder,
)
from msfs_functional.models.tower_options import Substitutions, substitute
from msfs_functional.models.vit import ViTConfig
from msfs_functional.params import Functional, Params

# Ends of their names and how many dims of size 1 stand before ours.
LEADING = {
    "embeddings.cls_token": 2,
    "embeddings.position_embeddings": 1,
    "head.probe": 2,
}
SIGLIP_SCALARS = ("logit_scale", "logit_bias")  # of shape (1,)


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


def family_of(config: Any, families: Families) -> str:
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


def from_hub(hub: Hub, weights: Mapping[str, Tensor], families: Families) -> tuple[Any, Params]:
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
    config: Any, params: Params, families: Families
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


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    families: Families,
) -> Published:
    """A local Hugging Face folder as configuration and parameters.

    Args:
        dtype: of the parameters; default: as stored.
        families: kinds of models to know.

    Raises:
        ValueError: a missing or broken file, a family or option that is not known here.
    """
    read = functools.partial(from_hub, families=families)
    return load_folder(folder, read, dtype=dtype, device=device)


def save(
    folder: str | Path,
    config: Any,
    params: Params,
    *,
    tokenizer: str | None = None,
    families: Families,
    **extra: Any,
) -> None:
    """Writes a folder that `load` and transformers' from_pretrained read.

    Args:
        tokenizer: text of a tokenizer.json.
        extra: more entries of config.json.

    Raises:
        ValueError: a configuration that no published family has; parameters of another one.
    """
    check_shapes(params, families[family_of(config, families)].build(config).shapes)
    hub, weights = to_hub(config, params, families)
    write_folder(folder, {**hub, **extra}, weights, tokenizer)
