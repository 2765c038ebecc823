"""timm's Vision Transformers: a local folder as its Hub has them -> (config, Params).

    config.json with "architecture": "vit_base_patch16_224", ... + model.safetensors

They differ from Hugging Face's ViT by the names of their weights, q, k and v in one matrix, and
1e-6 in place of 1e-12 in the norms. Sizes are read off the weights.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from msfs_functional.models import vision_format
from msfs_functional.models.hub_folders import Hub, Published, load_folder
from msfs_functional.models.tower_options import Substitutions, substitute
from msfs_functional.models.vit import ViTConfig
from msfs_functional.params import Params

HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}  # the weights do not tell
NAMES: Substitutions = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def from_timm(hub: Hub, weights: Mapping[str, Tensor]) -> tuple[ViTConfig, Params]:
    """Configuration and parameters of a plain ViT with a class token.

    Args:
        hub: config.json.
        weights: by timm's names; without "head." it gives states and their class token.

    Raises:
        ValueError: another architecture; weights that are missing, extra or misshapen.
    """
    name, pooling = str(hub.get("architecture", "")), hub.get("global_pool", "token")
    size = [*name.split("_"), ""][1]
    if not name.startswith("vit_") or size not in HEADS or pooling != "token":
        raise ValueError(
            f"architecture ({name!r} with global_pool {pooling!r}) must be vit_<size>_patch... "
            f"with 'token', and its size one of {list(HEADS)}"
        )
    theirs: dict[str, Tensor] = {}
    for key, value in weights.items():
        if ".attn.qkv." in key:
            for word, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[
                    substitute(key.replace("attn.qkv", f"attention.attention.{word}"), NAMES)
                ] = part
        else:
            theirs[substitute(key, NAMES)] = value
    try:
        patch, positions = weights["patch_embed.proj.weight"].shape, weights["pos_embed"].shape[1]
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the weights lack {error}: no vision transformer of timm's") from None
    side = round((positions - 1) ** 0.5) * patch[-1]
    sizes = {
        "hidden_size": patch[0],
        "num_hidden_layers": sum(key.endswith(".norm1.weight") for key in weights),
        "num_attention_heads": HEADS[size],
        "intermediate_size": hidden,
        "num_channels": patch[1],
        "patch_size": patch[-1],
        "image_size": side,
        "layer_norm_eps": 1e-6,
        "num_labels": len(weights.get("head.bias", ())),
    }
    return vision_format.from_hub({"model_type": "vit", **sizes}, theirs)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Published[ViTConfig]:
    """A local folder of timm's as configuration and parameters.

    Args:
        dtype: of the parameters; default: as stored.

    Raises:
        ValueError: a missing or broken file, and what `from_timm` raises.
    """
    return load_folder(folder, from_timm, dtype=dtype, device=device)
