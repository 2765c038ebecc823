"""Stable Diffusion in one file, in the key layout of the original latent-diffusion code.

    weights = read_tensors("v1-5-pruned-emaonly.safetensors")
    unet_config, unet_params = unet_from(weights)
    autoencoder_config, autoencoder_params = autoencoder_from(weights)
    text_config, text_params = text_from(weights)

    model.diffusion_model.*    the UNet, its blocks counted through: input_blocks, output_blocks
    first_stage_model.*        the autoencoder
    cond_stage_model.*         the text tower: CLIP's in version 1, OpenCLIP's in version 2

Such a file holds no configuration: sizes are read off the shapes. What shapes do not show, the
number of heads, follows from the version. Averaged weights (model_ema.*) and the schedule that may
lie beside are left where they are.

Source: CompVis/latent-diffusion and Stability-AI/stablediffusion, the layout of their checkpoints.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from msfs_functional.models.autoencoder import AutoencoderConfig, autoencoder
from msfs_functional.models.clip import TextConfig, text_tower
from msfs_functional.models.diffusers_format import TRANSFORMER_WORDS
from msfs_functional.models.tower_options import TOWERS, substitute
from msfs_functional.models.unet import UNetConfig, unet
from msfs_functional.models.weight_files import take, translate
from msfs_functional.params import Params

Weights = Mapping[str, Tensor]

UNET, AUTOENCODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIP, OPEN_CLIP = "transformer.text_model.", "model."

UNET_WORDS = {
    **TRANSFORMER_WORDS,
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "time": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
AUTOENCODER_WORDS = {
    "input": "conv_in",
    "resnets": "block",
    "middle.resnets.0": "mid.block_1",
    "middle.resnets.1": "mid.block_2",
    "middle.attention": "mid.attn_1",
    "norm_in": "norm1",
    "conv_in": "conv1",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "nin_shortcut",
    "shrink": "downsample.conv",
    "enlarge": "upsample.conv",
    "o": "proj_out",
    "output_norm": "norm_out",
    "output": "conv_out",
    "mix_moments": "quant_conv",
    "mix_latents": "post_quant_conv",
}
OPEN_CLIP_WORDS = {
    "embedding": "token_embedding",
    "positions.weight": "positional_embedding",
    "blocks": "transformer.resblocks",
    "norm": "ln_final",
    "attention_norm": "ln_1",
    "attention.q.weight": "attn.in_proj_weight.q",
    "attention.k.weight": "attn.in_proj_weight.k",
    "attention.v.weight": "attn.in_proj_weight.v",
    "attention.q.bias": "attn.in_proj_bias.q",
    "attention.k.bias": "attn.in_proj_bias.k",
    "attention.v.bias": "attn.in_proj_bias.v",
    "attention.o": "attn.out_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}


def inside(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it.

    Raises:
        ValueError: there are none.
    """
    found = {n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)}
    if not found:
        raise ValueError(
            f"no weights named {prefix}*: the file must be a whole model in the latent-diffusion "
            f"layout; a folder in diffusers' layout loads with its own function"
        )
    return found


def count(weights: Weights, pattern: str) -> int:
    """One more than the largest number that the pattern's group finds in a name; 0 for none."""
    found = (re.match(pattern, name) for name in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def unet_names(config: UNetConfig) -> dict[str, str]:
    """{our name of a parameter: its name under model.diffusion_model}.

    Raises:
        ValueError: a configuration that the original code does not have.
    """
    if not config.middle_attention or config.interval:
        raise ValueError("middle_attention must be True and interval False in this layout")
    places = {
        "input": "input_blocks.0.0",
        "time.up": "time_embed.0",
        "time.down": "time_embed.2",
        "class_embedding": "label_emb",
        "middle.resnets.0": "middle_block.0",
        "middle.transformers.0": "middle_block.1",
        "middle.resnets.1": "middle_block.2",
        "output_norm": "out.0",
        "output": "out.2",
    }
    levels, n = len(config.widths), 1
    for i in range(levels):
        for j in range(config.depth):
            places[f"down.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            places[f"down.{i}.transformers.{j}"] = f"input_blocks.{n}.1"
            n += 1
        places[f"down.{i}.shrink"] = f"input_blocks.{n}.0.op"
        n += 1
    n = 0
    for i in range(levels):
        attends = config.attention[levels - 1 - i]
        for j in range(config.depth + 1):
            places[f"up.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            places[f"up.{i}.transformers.{j}"] = f"output_blocks.{n}.1"
            n += 1
        places[f"up.{i}.enlarge"] = f"output_blocks.{n - 1}.{2 if attends else 1}.conv"
    names = {}
    for name in unet(config).shapes:
        place = next(place for place in places if name.startswith(f"{place}."))
        rest = name.removeprefix(f"{place}.")
        names[name] = f"{places[place]}.{translate(rest, UNET_WORDS)}"
    return names


def read_unet(weights: Weights, heads: tuple[int, ...] | None = None) -> UNetConfig:
    """The configuration that the shapes of a UNet's weights show.

    Args:
        weights: without their prefix.
        heads: of each level; default: 8 with a context of 768 (version 1), else width / 64.
    """

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"the UNet lacks {name}: the file is not complete")
        return weights[name].shape

    blocks = count(weights, r"input_blocks\.(\d+)\.")
    halvings = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in weights]
    depth = (halvings[0] if halvings else blocks) - 1
    firsts = [1 + i * (depth + 1) for i in range(len(halvings) + 1)]
    widths = tuple(shape(f"input_blocks.{n}.0.out_layers.3.weight")[0] for n in firsts)
    attention = tuple(f"input_blocks.{n}.1.norm.weight" in weights for n in firsts)
    context = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    if heads is None:
        heads = (8,) * len(widths) if context == 768 else tuple(width // 64 for width in widths)
    channels, outputs = shape("input_blocks.0.0.weight")[1], shape("out.2.weight")[0]
    return UNetConfig(
        channels=channels,
        outputs=None if outputs == channels else outputs,
        widths=widths,
        depth=depth,
        attention=attention,
        heads=heads,
        transformer_depth=count(weights, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        context=context,
        classes=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
        linear_projection=weights["middle_block.1.proj_in.weight"].ndim == 2,
        groups=min(32, widths[0]),
    )


def unet_from(weights: Weights, config: UNetConfig | None = None) -> tuple[UNetConfig, Params]:
    """Configuration and parameters of the UNet in a file.

    Args:
        config: default: read off the shapes, see `read_unet`.

    Raises:
        ValueError: weights that are missing, extra or misshapen.
    """
    found = inside(weights, UNET)
    config = config or read_unet(found)
    names = unet_names(config)
    return config, take(unet(config).shapes, found, names.__getitem__, kind="UNet")


def autoencoder_name(name: str, levels: int) -> str:
    """decoder.up.0.resnets.1.norm_in.weight -> decoder.up.3.block.1.norm1.weight, of 4 levels."""
    name = translate(name, AUTOENCODER_WORDS)
    return re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)


def read_autoencoder(weights: Weights) -> AutoencoderConfig:
    """The configuration that the shapes of an autoencoder's weights show."""
    levels = count(weights, r"encoder\.down\.(\d+)\.")
    names = [f"encoder.down.{i}.block.0.conv2.weight" for i in range(levels)]
    for name in (*names, "encoder.conv_in.weight", "decoder.conv_in.weight"):
        if name not in weights:
            raise ValueError(f"the autoencoder lacks {name}: the file is not complete")
    widths = tuple(weights[name].shape[0] for name in names)
    return AutoencoderConfig(
        channels=weights["encoder.conv_in.weight"].shape[1],
        latent=weights["decoder.conv_in.weight"].shape[1],
        widths=widths,
        depth=count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        middle_attention="encoder.mid.attn_1.q.weight" in weights,
        mixed="quant_conv.weight" in weights,
        groups=min(32, widths[0]),
    )


def autoencoder_from(
    weights: Weights, config: AutoencoderConfig | None = None
) -> tuple[AutoencoderConfig, Params]:
    """Configuration and parameters of the autoencoder in a file; what trained it is left out.

    Raises:
        ValueError: weights that are missing, extra or misshapen.
    """
    found = inside(weights, AUTOENCODER)
    found = {n: x for n, x in found.items() if not n.startswith(("loss.", "model_ema."))}
    config = config or read_autoencoder(found)
    levels = len(config.widths)
    shapes = autoencoder(config).shapes
    params = take(shapes, found, lambda name: autoencoder_name(name, levels), kind="autoencoder")
    return config, params


def clip_name(name: str) -> str:
    """blocks.0.attention.q.weight -> encoder.layers.0.self_attn.q_proj.weight"""
    return substitute(f"text.{name}", TOWERS).removeprefix("text_model.")


def open_clip_name(name: str) -> str:
    """blocks.0.attention.q.weight -> transformer.resblocks.0.attn.in_proj_weight.q"""
    return translate(name, OPEN_CLIP_WORDS)


def text_from(weights: Weights, heads: int | None = None) -> tuple[TextConfig, Params]:
    """Configuration and parameters of the text tower in a file.

    OpenCLIP's tower lies there whole, but version 2 was trained on what goes into its last block:
    that block is left out, and so is the projection.

    Args:
        heads: default: width / 64, as in every published tower.

    Raises:
        ValueError: weights that are missing, extra or misshapen.
    """
    found = inside(weights, TEXT)
    if any(name.startswith(CLIP) for name in found):
        their_name, activation, leave_out = clip_name, "quick_gelu", 0
        found = {n.removeprefix(CLIP): x for n, x in found.items() if "position_ids" not in n}
    else:
        their_name, activation, leave_out = open_clip_name, "gelu", 1
        found = _unpacked(inside(found, OPEN_CLIP))
    blocks = their_name("blocks.0.").removesuffix("0.")
    depth = count(found, rf"{re.escape(blocks)}(\d+)\.") - leave_out
    for name in (f"{blocks}{depth}.", "text_projection", "logit_scale"):
        found = {n: x for n, x in found.items() if not n.startswith(name)}
    for ours in ("embedding.weight", "positions.weight", "blocks.0.feed_forward.up.weight"):
        if their_name(ours) not in found:
            raise ValueError(f"the text tower lacks {their_name(ours)}: is the file complete?")
    vocab, width = found[their_name("embedding.weight")].shape
    config = TextConfig(
        width=width,
        depth=depth,
        heads=heads or width // 64,
        hidden=found[their_name("blocks.0.feed_forward.up.weight")].shape[0],
        activation=activation,
        vocab=vocab,
        max_length=found[their_name("positions.weight")].shape[0],
        pooling="largest",
        projection=None,
    )
    return config, take(text_tower(config).shapes, found, their_name, kind="text tower")


def _unpacked(weights: Weights) -> dict[str, Tensor]:
    """q, k and v apart, which OpenCLIP keeps in one tensor: in_proj_weight -> in_proj_weight.q."""
    apart: dict[str, Tensor] = {}
    for name, value in weights.items():
        if re.search(r"in_proj_(weight|bias)$", name):
            apart |= {f"{name}.{part}": x for part, x in zip("qkv", value.chunk(3), strict=True)}
        else:
            apart[name] = value
    return apart
