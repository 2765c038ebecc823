"""The decoder as `generation` wants it: prefill, one step, and a fast way for a single row.

Dimension key: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from msfs_kernels import one_row as rows
from torch import Tensor

from msfs_functional.attention import Implementation
from msfs_functional.generation import LanguageModel
from msfs_functional.models.decoder import Cache, Decoder, output_weight
from msfs_functional.models.decoder_block import AttentionFn, BlockFn, Context
from msfs_functional.models.decoder_config import DecoderConfig
from msfs_functional.params import Functional, Params

ALIGNED = 16  # rows of logits begin at multiples of 32 bytes


def one_row(config: DecoderConfig) -> Callable[[BlockFn], BlockFn] | None:
    """For `around_block`: the block for one new token of one sequence, in five launches.

    The cache it is given is written IN PLACE. None for a config that it does not know (norms of
    heads or of what a sublayer adds).
    """
    if config.qk_norm or config.post_norm or config.activation not in rows.ACTIVATIONS:
        return None
    norm = {
        "norm": config.norm,
        "eps": config.norm_eps,
        "offset": 1.0 if config.norm_offset else 0.0,
    }
    scale = config.attention_scale or config.size_of_head**-0.5

    def product(params: Params, name: str, x: Tensor, normed: str = "", **options: Any) -> Tensor:
        if normed:
            gain, shift = params[f"{normed}.weight"], params.get(f"{normed}.bias")
            options |= {"gain": gain, "shift": shift, **norm}
        return rows.row_linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"), **options)

    def run(
        params: Params, x: Tensor, key: None, context: Context, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert context.slots is not None
        parts = ["qkv"] if config.fused else ["q", "k", "v"]
        parts = [product(params, f"attention.{part}", x, "attention_norm") for part in parts]
        heads = rows.row_attention(
            torch.cat(parts, -1) if len(parts) > 1 else parts[0],
            *cache,
            context.slots[:, 0],
            context.rotary,
            heads=config.heads,
            scale=scale,
            softcap=config.attention_softcap,
            window=context.window,
        )
        x = product(params, "attention.o", heads, residual=x)
        options: dict[str, Any] = {"normed": "feed_forward_norm", "activation": config.activation}
        if not config.gated:
            y = product(params, "feed_forward.up", x, **options)
        elif config.fused:
            y = product(params, "feed_forward.gate_up", x, gated=True, **options)
        else:
            y = product(params, "feed_forward.gate", x, **options)
            y = y * product(params, "feed_forward.up", x, "feed_forward_norm")
        return product(params, "feed_forward.down", y, residual=x), cache

    return lambda fn: run


def language_model(
    model: Functional,
    params: Params,
    *,
    implementation: Implementation | AttentionFn = "flash",
    fast_row: bool | None = None,
    aligned: bool | None = None,
) -> LanguageModel:
    """The model with these parameters in the form of module `generation`.

    Prefill takes `embeddings` and `prefix_lengths` as further inputs, see `Decoder.extend`.

    Args:
        fast_row: steps of a single row by `one_row`, where the config allows; default: with flash
            attention on a GPU.
        aligned: logits through a copy of the output matrix that has a multiple of 16 rows, made
            anew by each prefill: a GPU's fast kernels write no rows that begin at odd addresses.
            Default: on a GPU, where the vocabulary is no such multiple.
    """
    some, config = params["norm.weight"], cast(Decoder, model.skeleton).config
    if fast_row is None:
        fast_row = implementation == "flash" and some.is_cuda
    around = one_row(config) if fast_row else None

    weight, vocab = output_weight(params), config.vocab
    if aligned is None:
        aligned = weight.is_cuda
    aligned = aligned and vocab % ALIGNED > 0
    matrix = weight.new_zeros(vocab + -vocab % ALIGNED, config.width) if aligned else weight

    def logits(states: Tensor) -> Tensor:
        if not aligned:
            return model.apply(params, states, method="logits")
        found = F.linear(states, matrix)[..., :vocab]
        cap = config.logit_softcap
        return found if cap is None else cap * torch.tanh(found / cap)

    def init_cache(rows: int, length: int) -> Cache:
        kind = {"dtype": some.dtype, "device": some.device}
        return model.apply(params, rows, length, **kind, method="init_cache")

    def prefill(
        tokens: Tensor, lengths: Tensor, cache: Cache, **inputs: Tensor
    ) -> tuple[Tensor, Cache]:
        given = None if "embeddings" in inputs else tokens
        options = {**inputs, "implementation": implementation, "method": "extend", "donate": True}
        if aligned:
            matrix[:vocab].copy_(weight)  # which a training step may have written into
        states, cache = model.apply(params, given, cache, **options)
        last = states.take_along_dim(lengths[:, None, None] - 1, 1)[:, 0]
        return logits(last), cache

    def step(tokens: Tensor, cache: Cache, positions: Tensor) -> tuple[Tensor, Cache]:
        fast = around is not None and tokens.shape[0] == 1
        options = {"implementation": implementation, "around_block": around if fast else None}
        options["donate"] = True
        states, cache = model.apply(
            params, tokens[:, None], cache, positions, method="extend", **options
        )
        if fast and config.logit_softcap is None:
            return rows.row_linear(states[:, 0], weight), cache
        return logits(states[:, 0]), cache

    return LanguageModel(init_cache, prefill, step, config.max_length, some.device)
