"""Published image and text towers in and out: a local Hugging Face folder <-> (config, Params).

ViT (ViTModel, ViTForImageClassification), CLIP and SigLIP, whole or one tower of them: the families
of module `families` with the names and options of `tower_options`.
"""

import functools

from msfs_functional.models import families
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip, text_tower
from msfs_functional.models.families import Families, Family, by_names
from msfs_functional.models.tower_options import (
    CLIP_NAMES,
    SIGLIP_NAMES,
    VIT_NAMES,
    VIT_SPELLINGS,
    read_clip,
    read_clip_vision,
    read_siglip,
    read_siglip_text,
    read_siglip_vision,
    read_text,
    read_vit,
    write_clip,
    write_clip_vision,
    write_siglip,
    write_siglip_text,
    write_siglip_vision,
    write_text,
    write_vit,
)
from msfs_functional.models.vit import ViTConfig, vit

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


# `families.from_hub`, ... for the families of this module.
family_of = functools.partial(families.family_of, families=FAMILIES)
from_hub = functools.partial(families.from_hub, families=FAMILIES)
to_hub = functools.partial(families.to_hub, families=FAMILIES)
load = functools.partial(families.load, families=FAMILIES)
save = functools.partial(families.save, families=FAMILIES)
