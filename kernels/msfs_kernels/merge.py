"""Joining attention over parts of the keys: ring attention and split-KV decoding build on it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def merge_attention(
    outputs: Sequence[Float[Tensor, "... T Kv"]], lses: Sequence[Float[Tensor, "... T"]]
) -> tuple[Float[Tensor, "... T Kv"], Float[Tensor, "... T"]]:
    """Attention over all keys from attention over each part of them.

        lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

    Plain torch operations, right under every transform. A query without keys in a part has lse_i =
    -inf there and takes nothing from it; without keys in any part it stays zeros.

    Args:
        outputs: of each part, (..., T, Kv), one dtype and shape.
        lses: of each part, (..., T), float32 or float64, as flash_attention(..., return_lse=True)
            returns them.

    Returns:
        o in the outputs' dtype, and lse: as attention over the parts' keys together would return
        them.

    Raises:
        ValueError: no part, or not one lse for each output.
    """
    if len(outputs) != len(lses) or not outputs:
        raise ValueError(
            f"outputs ({len(outputs)}) and lses ({len(lses)}) must pair up, at least one of each"
        )
    for o, lse in zip(outputs, lses, strict=True):
        if lse.shape != o.shape[:-1] or o.shape != outputs[0].shape:
            raise ValueError(
                f"an output {tuple(o.shape)} and its lse {tuple(lse.shape)} must have the first"
                f" output's shape {tuple(outputs[0].shape)}, the lse without the last dim"
            )
    lse = torch.stack(tuple(lses))
    highest = lse.detach().amax(0)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = (lse - highest).exp()
    total = weights.sum(0)
    some = total > 0
    total = total.masked_fill(~some, 1.0)
    o = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights / total, outputs, strict=True))
    merged = (total.log() + highest).masked_fill(~some, float("-inf"))
    return torch.as_tensor(o).to(outputs[0].dtype), merged
