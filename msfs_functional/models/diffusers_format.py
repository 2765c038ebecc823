"""Diffusion models in the folders that Hugging Face diffusers reads and writes, both ways.

    config, params = unet_from(hub, weights)      # config.json and the weights by their names
    hub, weights = unet_to(config, params)
    config, params = load_unet(folder)            # unet/ of a Stable Diffusion folder
    save_unet(folder, config, params)

and the same for `autoencoder`, which lies in vae/.

Options that this project's models lack are refused, each by name, where diffusers' value is not the
one that the model computes. Nothing here needs diffusers.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from msfs_functional.models.autoencoder import AutoencoderConfig, autoencoder
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.models.weight_files import read_json, read_tensors, take, translate
from msfs_functional.params import Params

Hub = Mapping[str, Any]  # a config.json

RESNET_WORDS = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "time": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}
TRANSFORMER_WORDS = {
    "project_in": "proj_in",
    "blocks": "transformer_blocks",
    "self_norm": "norm1",
    "self_attention": "attn1",
    "cross_norm": "norm2",
    "cross_attention": "attn2",
    "feed_forward_norm": "norm3",
    "feed_forward.up_gate": "ff.net.0.proj",
    "feed_forward.down": "ff.net.2",
    "project_out": "proj_out",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
}
UNET_WORDS = {
    **RESNET_WORDS,
    **TRANSFORMER_WORDS,
    "input": "conv_in",
    "time.up": "time_embedding.linear_1",
    "time.down": "time_embedding.linear_2",
    "down": "down_blocks",
    "middle": "mid_block",
    "up": "up_blocks",
    "transformers": "attentions",
    "shrink": "downsamplers.0.conv",
    "enlarge": "upsamplers.0.conv",
    "output_norm": "conv_norm_out",
    "output": "conv_out",
}
AUTOENCODER_WORDS = {
    **RESNET_WORDS,
    "input": "conv_in",
    "down": "down_blocks",
    "middle": "mid_block",
    "up": "up_blocks",
    "shrink": "downsamplers.0.conv",
    "enlarge": "upsamplers.0.conv",
    "attention": "attentions.0",
    "attention.norm": "attentions.0.group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "output_norm": "conv_norm_out",
    "output": "conv_out",
    "mix_moments": "quant_conv",
    "mix_latents": "post_quant_conv",
}
# Names in folders that diffusers wrote before 2023, Stable Diffusion 1.5 among them.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
AUTOENCODER_PLAIN = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
# The values for which diffusers computes what `unet` computes; any other is refused.
UNET_PLAIN = {
    "center_input_sample": False,
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}


def unet_name(name: str) -> str:
    """down.0.resnets.1.norm_in.weight -> down_blocks.0.resnets.1.norm1.weight"""
    return translate(name, UNET_WORDS)


def refuse_unknown(hub: Hub, plain: Mapping[str, Any], kind: str) -> None:
    """Raises for the first option whose value is another than the one a model here computes."""
    for name, value in plain.items():
        given = hub.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise ValueError(
                f"{name} ({given!r}) of the {kind} must be {value!r}: the option is not known here"
            )


def per_level(value: Any, levels: int) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def same(values: Iterable[Any], name: str) -> Any:
    """The one value that all of these are."""
    values = list(values)
    if any(value != values[0] for value in values):
        raise ValueError(f"{name} {values} must be one value at all levels")
    return values[0]


def read_unet(hub: Hub) -> UNetConfig:
    """The configuration that a unet/config.json describes.

    Raises:
        ValueError: an option or a kind of block that `unet` does not have.
    """
    refuse_unknown(hub, UNET_PLAIN, "UNet")
    widths = tuple(hub["block_out_channels"])
    levels = len(widths)
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    attention = tuple(kinds.get(name) for name in hub["down_block_types"])
    backwards = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
    on_the_way_up = tuple(backwards.get(name) for name in reversed(hub["up_block_types"]))
    if None in attention or on_the_way_up != attention:
        raise ValueError(
            f"down_block_types {list(hub['down_block_types'])} must be of {list(kinds)}, and "
            f"up_block_types {list(hub['up_block_types'])} their mirror image"
        )
    middles = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}
    middle = hub.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle not in middles:
        raise ValueError(f"mid_block_type ({middle!r}) must be one of {list(middles)}")
    shift = hub.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"resnet_time_scale_shift ({shift!r}) must be 'default' or 'scale_shift'")
    channels = hub.get("in_channels", 4)
    outputs = hub.get("out_channels", 4)
    return UNetConfig(
        channels=channels,
        outputs=None if outputs == channels else outputs,
        widths=widths,
        depth=same(per_level(hub.get("layers_per_block", 2), levels), "layers_per_block"),
        attention=tuple(bool(has) for has in attention),
        middle_attention=middles[middle],
        # What diffusers calls attention_head_dim is the number of heads, by an old mistake.
        heads=per_level(hub.get("attention_head_dim", 8), levels),
        transformer_depth=same(
            per_level(hub.get("transformer_layers_per_block", 1), levels),
            "transformer_layers_per_block",
        ),
        context=same(per_level(hub.get("cross_attention_dim", 1280), levels), "context"),
        classes=hub.get("num_class_embeds"),
        linear_projection=hub.get("use_linear_projection", False),
        scale_shift=shift == "scale_shift",
        groups=hub.get("norm_num_groups", 32),
        norm_eps=hub.get("norm_eps", 1e-5),
        cosine_first=hub.get("flip_sin_to_cos", True),
        frequency_shift=hub.get("freq_shift", 0),
    )


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """The unet/config.json of a configuration.

    Raises:
        ValueError: an option that diffusers' UNet2DConditionModel does not have.
    """
    if config.context is None or config.interval:
        raise ValueError(
            f"context ({config.context}) must be a width and interval ({config.interval}) False: "
            f"diffusers has no such UNet"
        )
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(config.attention)]
    heads = list(config.heads)
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.channels,
        "out_channels": config.outputs or config.channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.depth,
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": f"UNetMidBlock2D{'CrossAttn' if config.middle_attention else ''}",
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": config.transformer_depth,
        "cross_attention_dim": config.context,
        "num_class_embeds": config.classes,
        "use_linear_projection": config.linear_projection,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
        "flip_sin_to_cos": config.cosine_first,
        "freq_shift": config.frequency_shift,
    }


def unet_from(hub: Hub, weights: Mapping[str, Tensor]) -> tuple[UNetConfig, Params]:
    """Configuration and parameters of a published UNet.

    Raises:
        ValueError: an option that `unet` does not have; weights that do not fit.
    """
    config = _complete(read_unet, hub, "UNet")
    return config, take(unet(config).shapes, weights, unet_name, kind="UNet")


def unet_to(config: UNetConfig, params: Params) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `unet_from`: what goes into config.json, and the weights by their names."""
    return write_unet(config), {unet_name(name): value for name, value in params.items()}


def load_unet(folder: str | Path) -> tuple[UNetConfig, Params]:
    """The unet/ of a Stable Diffusion folder, parameters as stored."""
    return unet_from(read_json(Path(folder) / "config.json"), read_weights(Path(folder)))


def save_unet(folder: str | Path, config: UNetConfig, params: Params) -> None:
    """Writes a folder that diffusers' UNet2DConditionModel.from_pretrained reads."""
    write_model(folder, *unet_to(config, params))


def autoencoder_name(name: str) -> str:
    """encoder.down.0.resnets.1.norm_in.weight -> encoder.down_blocks.0.resnets.1.norm1.weight"""
    return translate(name, AUTOENCODER_WORDS)


def read_autoencoder(hub: Hub) -> AutoencoderConfig:
    """The configuration that a vae/config.json describes.

    Raises:
        ValueError: an option or a kind of block that `autoencoder` does not have.
    """
    refuse_unknown(hub, AUTOENCODER_PLAIN, "autoencoder")
    for name, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if set(hub[name]) != {kind}:
            raise ValueError(f"{name} {list(hub[name])} must all be {kind!r}")
    mixed = same(
        (hub.get("use_quant_conv", True), hub.get("use_post_quant_conv", True)),
        "use_quant_conv and use_post_quant_conv",
    )
    channels = same(
        (hub.get("in_channels", 3), hub.get("out_channels", 3)), "in_channels and out_channels"
    )
    return AutoencoderConfig(
        channels=channels,
        latent=hub.get("latent_channels", 4),
        widths=tuple(hub["block_out_channels"]),
        depth=hub.get("layers_per_block", 1),
        middle_attention=hub.get("mid_block_add_attention", True),
        mixed=mixed,
        groups=hub.get("norm_num_groups", 32),
        scaling_factor=hub.get("scaling_factor", 0.18215),
        shift=hub.get("shift_factor") or 0.0,
    )


def write_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """The vae/config.json of a configuration.

    Raises:
        ValueError: an option that diffusers' AutoencoderKL does not have.
    """
    if config.norm_eps != 1e-6:
        raise ValueError(f"norm_eps ({config.norm_eps}) must be 1e-6: diffusers has no other")
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.depth,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": config.middle_attention,
        "use_quant_conv": config.mixed,
        "use_post_quant_conv": config.mixed,
        "norm_num_groups": config.groups,
        "act_fn": "silu",
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift or None,
    }


def autoencoder_from(hub: Hub, weights: Mapping[str, Tensor]) -> tuple[AutoencoderConfig, Params]:
    """Configuration and parameters of a published AutoencoderKL.

    Raises:
        ValueError: an option that `autoencoder` does not have; weights that do not fit.
    """
    config = _complete(read_autoencoder, hub, "autoencoder")
    weights = {translate(name, OLD_ATTENTION): value for name, value in weights.items()}
    shapes = autoencoder(config).shapes
    return config, take(shapes, weights, autoencoder_name, kind="autoencoder")


def autoencoder_to(
    config: AutoencoderConfig, params: Params
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `autoencoder_from`."""
    weights = {autoencoder_name(name): value for name, value in params.items()}
    return write_autoencoder(config), weights


def load_autoencoder(folder: str | Path) -> tuple[AutoencoderConfig, Params]:
    """The vae/ of a Stable Diffusion folder, parameters as stored."""
    return autoencoder_from(read_json(Path(folder) / "config.json"), read_weights(Path(folder)))


def save_autoencoder(folder: str | Path, config: AutoencoderConfig, params: Params) -> None:
    """Writes a folder that diffusers' AutoencoderKL.from_pretrained reads."""
    write_model(folder, *autoencoder_to(config, params))


def read_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> dict[str, Tensor]:
    """The weights in a model's folder by their names: safetensors, else a .bin read as data alone.

    Raises:
        ValueError: no such file, or one that is broken.
    """
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin"]
    for name in names:
        if (folder / name).exists():
            return read_tensors(folder / name)
    raise ValueError(f"none of {names} in {folder}: fetch the weights of the model")


def write_model(folder: str | Path, hub: Hub, weights: Mapping[str, Tensor]) -> None:
    """config.json and weights of one model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
    values = {name: value.detach().contiguous() for name, value in weights.items()}
    save_file(values, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _complete(read: Callable[[Hub], Any], hub: Hub, kind: str) -> Any:
    try:
        return read(hub)
    except KeyError as error:
        raise ValueError(f"config.json of the {kind} lacks {error}: it may be truncated") from None
