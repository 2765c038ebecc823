"""Published decoders in and out: a local Hugging Face folder <-> (DecoderConfig, Params).

    config.json + model.safetensors (or shards and their index) (+ tokenizer.json)

Names, shapes and options are mapped, once for each family: GPT-2, Llama (SmolLM2 too), Mistral,
Qwen 2 and 3, Gemma 1 and 2. Nothing of transformers' code is used.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msfs_functional.models.decoder import DecoderConfig, decoder, gpt2, unfuse
from msfs_functional.models.hub_folders import (
    Hub,
    Published,
    check_shapes,
    load_folder,
    write_folder,
)
from msfs_functional.params import Params
from msfs_functional.rotary import Scaling

ACTIVATIONS = {
    "silu": "swish",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
LLAMA_NAMES = {
    "blocks": "model.layers",
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
GEMMA2_NAMES = {
    **LLAMA_NAMES,
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
GPT2_NAMES = {
    "blocks": "transformer.h",
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "output": "lm_head",
    "attention_norm": "ln_1",
    "attention.q": "attn.c_attn",
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.o": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}


def read_scaling(rope: Hub, longest: int) -> Scaling | None:
    """`rope_parameters` (transformers 5) or `rope_scaling` (4) as a Scaling."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor ({rope['partial_rotary_factor']}) must be 1: heads rotate whole"
        )
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type ({kind!r}) must be default, linear, llama3 or yarn")
    if not rope.get("truncate", True):
        raise ValueError("yarn with truncate=false is not known here")
    scaling = Scaling(kind, rope["factor"])
    if kind == "linear":
        return scaling
    scaling = replace(
        scaling, original_length=rope.get("original_max_position_embeddings") or longest
    )
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return replace(scaling, low_factor=low, high_factor=high)
    magnitude = rope.get("attention_factor")
    if magnitude is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        grown = (0.1 * rope[m] * math.log(scaling.factor) + 1 for m in ("mscale", "mscale_all_dim"))
        above, below = grown
        magnitude = above / below
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    return replace(scaling, fast=fast, slow=slow, magnitude=magnitude)


def write_scaling(scaling: Scaling | None) -> dict[str, Any]:
    """The inverse of `read_scaling`, without rope_theta."""
    if scaling is None:
        return {"rope_type": "default"}
    rope = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_factor, "high_freq_factor": scaling.high_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.fast, "beta_slow": scaling.slow}
        if scaling.magnitude is not None:
            rope["attention_factor"] = scaling.magnitude
    return rope


def read_windows(hub: Hub) -> tuple[int | None, ...]:
    """The window of each layer."""
    depth, window = hub["num_hidden_layers"], hub.get("sliding_window")
    kinds = hub.get("layer_types")
    if hub["model_type"] in ("llama", "gpt2") or window is None:
        return (None,)
    if kinds is not None:
        known = {"sliding_attention": window, "full_attention": None}
        if set(kinds) - known.keys():
            raise ValueError(f"layer_types {sorted(set(kinds))} must be among {list(known)}")
        return tuple(known[kind] for kind in kinds)
    if hub["model_type"] == "gemma2":
        return tuple(window if i % 2 == 0 else None for i in range(depth))
    if hub["model_type"] == "mistral":
        return (window,)
    if not hub.get("use_sliding_window", False):
        return (None,)
    first = hub.get("max_window_layers", 28)
    return tuple(window if i >= first else None for i in range(depth))


def read_llama(hub: Hub, **options: Any) -> DecoderConfig:
    """Llama, and what the other families share with it; `options` override."""
    rope = dict(hub.get("rope_parameters") or hub.get("rope_scaling") or {})
    longest, bias = hub["max_position_embeddings"], hub.get("attention_bias", False)
    shared = {
        "width": hub["hidden_size"],
        "depth": hub["num_hidden_layers"],
        "heads": hub["num_attention_heads"],
        "kv_heads": hub.get("num_key_value_heads"),
        "head_dim": hub.get("head_dim"),
        "hidden": hub["intermediate_size"],
        "max_length": longest,
        "norm_eps": hub["rms_norm_eps"],
        "rotary_base": rope.get("rope_theta", hub.get("rope_theta", 10000.0)),
        "rotary_scaling": read_scaling(rope, longest),
        "windows": read_windows(hub),
        "activation": _activation(hub.get("hidden_act", "silu")),
        "qkv_bias": bias,
        "output_bias": bias,
        "hidden_bias": hub.get("mlp_bias", False),
        "tied": hub.get("tie_word_embeddings", False),
        "attention_dropout": hub.get("attention_dropout", 0.0),
    }
    return DecoderConfig(hub["vocab_size"], **{**shared, **options})


def read_gemma(hub: Hub) -> DecoderConfig:
    if hub.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention must be off: a decoder sees the past only")
    return read_llama(
        hub,
        norm_offset=True,
        embedding_scale=hub["hidden_size"] ** 0.5,
        activation=_activation(hub.get("hidden_activation") or hub["hidden_act"]),
        tied=hub.get("tie_word_embeddings", True),
    )


def read_gemma2(hub: Hub) -> DecoderConfig:
    if hub.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention must be off: a decoder sees the past only")
    return read_llama(
        hub,
        norm_offset=True,
        post_norm=True,
        embedding_scale=hub["hidden_size"] ** 0.5,
        attention_scale=hub["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hub.get("attn_logit_softcapping"),
        logit_softcap=hub.get("final_logit_softcapping"),
        activation=_activation(hub.get("hidden_activation") or "gelu_pytorch_tanh"),
        tied=hub.get("tie_word_embeddings", True),
    )


def read_gpt2(hub: Hub) -> DecoderConfig:
    for name, plain in (
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
        ("scale_attn_weights", True),
    ):
        if hub.get(name, plain) != plain:
            raise ValueError(f"{name} ({hub[name]}) must be {plain}: the option is not known here")
    return gpt2(
        hub["vocab_size"],
        width=hub["n_embd"],
        depth=hub["n_layer"],
        heads=hub["n_head"],
        hidden=hub.get("n_inner") or 4 * hub["n_embd"],
        max_length=hub["n_positions"],
        norm_eps=hub["layer_norm_epsilon"],
        activation=_activation(hub["activation_function"]),
        dropout=hub["resid_pdrop"],
        attention_dropout=hub["attn_pdrop"],
        tied=hub.get("tie_word_embeddings", True),
    )


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    rope = {"rope_theta": float(config.rotary_base), **write_scaling(config.rotary_scaling)}
    windows = [config.window(i) for i in range(config.depth)]
    sizes = {window for window in windows if window is not None}
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    hub = {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.size_of_head,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "hidden_act": activation,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.hidden_bias,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.attention_dropout,
    }
    if config.rotary_scaling is not None:
        hub["rope_scaling"] = rope  # the name before transformers 5
    if len(sizes) == 1:
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        hub |= {"sliding_window": sizes.pop(), "use_sliding_window": True, "layer_types": kinds}
    return hub


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    hub = write_llama(config)
    hub.pop("layer_types", None)
    return {"sliding_window": None, **hub}


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    hub = write_llama(config)
    activation, scale = hub.pop("hidden_act"), config.attention_scale
    return hub | {
        "hidden_activation": activation,
        "query_pre_attn_scalar": round(scale**-2) if scale else config.size_of_head,  # an integer
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activations[config.activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": config.tied,
    }


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation ({name!r}) must be one of {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class Family:
    """How one kind of published model writes its options and names its weights."""

    architecture: str  # transformers' class
    read: Callable[[Hub], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    names: dict[str, str]
    packed: bool = False  # q, k and v in one matrix, matrices of blocks stored (in, out)


FAMILIES = {
    "gpt2": Family("GPT2LMHeadModel", read_gpt2, write_gpt2, GPT2_NAMES, packed=True),
    "llama": Family("LlamaForCausalLM", read_llama, write_llama, LLAMA_NAMES),
    "mistral": Family("MistralForCausalLM", read_llama, write_mistral, LLAMA_NAMES),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda hub: read_llama(hub, qkv_bias=True, output_bias=False),
        write_llama,
        LLAMA_NAMES,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", lambda hub: read_llama(hub, qk_norm=True), write_llama, LLAMA_NAMES
    ),
    "gemma": Family("GemmaForCausalLM", read_gemma, write_llama, LLAMA_NAMES),
    "gemma2": Family("Gemma2ForCausalLM", read_gemma2, write_gemma2, GEMMA2_NAMES),
}


def family_of(config: DecoderConfig) -> str:
    """The family that can say all of this configuration.

    Raises:
        ValueError: none can; the options that the nearest one lacks are named.
    """

    def facts(config: DecoderConfig) -> dict[str, Any]:
        windows = tuple(config.window(i) for i in range(config.depth))
        config = replace(
            config,
            kv_heads=config.kv_heads or config.heads,
            head_dim=config.size_of_head,
            attention_scale=config.attention_scale or config.size_of_head**-0.5,
            windows=windows,
            fused=False,
            dropout=0.0,
            attention_dropout=0.0,
        )
        return {field.name: getattr(config, field.name) for field in fields(config)}

    lacking: dict[str, list[str]] = {}
    ours = facts(config)
    for name, family in FAMILIES.items():
        theirs = facts(family.read({"model_type": name, **family.write(config)}))
        lacking[name] = [key for key in ours if not _same(ours[key], theirs[key])]
        if not lacking[name]:
            return name
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise ValueError(
        f"no published family has this configuration; {nearest!r} comes nearest but differs in "
        f"{lacking[nearest]}"
    )


def _same(a: Any, b: Any) -> bool:
    both = isinstance(a, float) and isinstance(b, float)
    return math.isclose(a, b, rel_tol=1e-6) if both else a == b


def their_name(name: str, family: Family) -> str:
    """blocks.3.attention.q.weight -> model.layers.3.self_attn.q_proj.weight"""
    stem, _, last = name.rpartition(".")
    if not stem.startswith("blocks."):
        return f"{family.names[stem]}.{last}"
    _, i, rest = stem.split(".", 2)
    return f"{family.names['blocks']}.{i}.{family.names[rest]}.{last}"


def from_hub(hub: Hub, weights: Mapping[str, Tensor]) -> tuple[DecoderConfig, Params]:
    """Configuration and parameters of a published model, from config.json and its weights by name.

    Raises:
        ValueError: a family or option this decoder does not have; weights that are missing, extra
            or misshapen.
    """
    kind = hub.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type ({kind!r}) must be one of {list(FAMILIES)}")
    if "quantization_config" in hub:
        raise ValueError("the weights are quantized (quantization_config): use the original ones")
    family = FAMILIES[kind]
    try:
        config = family.read(hub)
    except KeyError as error:
        raise ValueError(f"config.json of a {kind} lacks {error}: it may be truncated") from None
    params: Params = {}
    missing, used = [], {"lm_head.weight"} if config.tied else set()
    for name, shape in decoder(config).shapes.items():
        theirs = their_name(name, family)
        if theirs not in weights:
            theirs = theirs.split(".", 1)[1]  # saved without the head: names lack "model."
        if theirs not in weights:
            missing.append(their_name(name, family))
            continue
        used.add(theirs)
        value = weights[theirs]
        if family.packed and "blocks." in name:
            value = value.mT if value.ndim == 2 else value
            part = "qkv".find(name.split(".")[-2])
            if part >= 0:
                value = value.chunk(3)[part]
        if value.shape != shape:
            raise ValueError(
                f"{theirs} gives {tuple(value.shape)} for {name!r}, config.json says {tuple(shape)}"
            )
        params[name] = value.contiguous()
    buffers = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
    extra = [name for name in weights if name not in used and not name.endswith(buffers)]
    if missing or extra:
        raise ValueError(
            f"weights do not fit config.json ({kind}): missing {missing[:4]}, unexpected "
            f"{extra[:4]} ({len(missing)} and {len(extra)} in all)"
        )
    return config, params


def to_hub(
    config: DecoderConfig, params: Params, family: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `from_hub`: what goes into config.json, and the weights by their names.

    Args:
        family: default: the first of FAMILIES that has all of the configuration's options.
    """
    kind = family or family_of(config)
    chosen = FAMILIES[kind]
    weights: dict[str, Tensor] = {}
    for name, value in params.items():
        theirs = their_name(name, chosen)
        if chosen.packed and "blocks." in name:
            if theirs in weights:
                continue  # k and v, which q brought along
            if ".attention.q." in name:
                parts = (params[name.replace(".q.", f".{part}.")] for part in "qkv")
                value = torch.cat(list(parts))
            value = value.mT if value.ndim == 2 else value
        weights[theirs] = value.detach().contiguous()
    dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
    hub = {"model_type": kind, "architectures": [chosen.architecture], "dtype": dtype}
    return {**hub, **chosen.write(config)}, weights


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Published[DecoderConfig]:
    """A local Hugging Face folder as configuration and parameters.

    Args:
        dtype: of the parameters; default: as stored.

    Raises:
        ValueError: a missing or broken file, a family or option this decoder does not have.
    """
    return load_folder(folder, from_hub, dtype=dtype, device=device)


def save(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: str | None = None,
    family: str | None = None,
    **extra: Any,
) -> None:
    """Writes a folder that `load` and transformers' from_pretrained read.

    Args:
        tokenizer: text of a tokenizer.json.
        family: see `to_hub`.
        extra: more entries of config.json: bos_token_id=1, eos_token_id=2, ...

    Raises:
        ValueError: a configuration that no published family has; parameters of another one.
    """
    check_shapes(params, decoder(config).shapes)
    if config.fused:
        config, params = replace(config, fused=False), unfuse(params, config)
    hub, weights = to_hub(config, params, family)
    write_folder(folder, {**hub, **extra}, weights, tokenizer)
