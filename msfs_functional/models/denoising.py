"""What denoising networks share, UNet and DiT: their call, the embedding of the time, attention.

    prediction = network(x, t, context, classes=..., interval=...)

Dimension key: B batch, C channels, H height, W width, T tokens, S context tokens, X width of the
context, D width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msfs_functional.attention import Implementation, attention
from msfs_functional.models.convolutions import linear
from msfs_functional.params import Params


def check_call(
    config: Any,
    x: Float[Tensor, "B C H W"],
    context: Float[Tensor, "B S X"] | None,
    classes: Int[Tensor, "B"] | None,
    interval: Float[Tensor, "B"] | None,
) -> None:
    """Raises where a network was given a condition that its configuration has no use for, or not
    one that it needs; where x or the context are of another size."""
    for name, value in (("context", context), ("classes", classes), ("interval", interval)):
        wanted = getattr(config, name) not in (None, False)
        if wanted != (value is not None):
            raise ValueError(
                f"{name} must {'' if wanted else 'not '}be given: the configuration says "
                f"{name}={getattr(config, name)}"
            )
    if context is not None and context.shape[-1] != config.context:
        raise ValueError(
            f"context {tuple(context.shape)} must end in {config.context}: take the text encoder "
            f"this model was trained with"
        )
    if x.ndim != 4 or x.shape[1] != config.channels:
        raise ValueError(f"x {tuple(x.shape)} must be (B, {config.channels}, H, W)")


def time_embedding(
    t: Float[Tensor, "B"],
    width: int,
    *,
    cosine_first: bool = True,
    frequency_shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B D"]:
    """Cosines and sines of t at geometrically falling frequencies, 1 to 1 / 10000 (Ho et al. 2020).

    Args:
        t: in steps of a schedule of about a thousand; multiply a time in [0, 1] by 1000.
        frequency_shift: 1 ends at 1 / 10000 itself, 0 one frequency before it.
    """
    half = width // 2
    # Angles in float32 at least: bfloat16 cannot tell step 999 from 1000.
    wide = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.arange(half, device=t.device, dtype=wide) / (half - frequency_shift)
    angles = t.to(wide)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    waves = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(waves, -1).to(dtype)


class TimeEmbedding(nn.Module):
    """down(silu(up(waves of the time)))."""

    def __init__(self, waves: int, width: int):
        super().__init__()
        self.up = nn.Linear(waves, width)
        self.down = nn.Linear(width, width)

    def forward(self, waves: Float[Tensor, "B _"]) -> Float[Tensor, "B D"]:
        return self.down(F.silu(self.up(waves)))


def attend(
    params: Params,
    name: str,
    x: Float[Tensor, "B T D"],
    memory: Float[Tensor, "B S _"] | None,
    heads: int,
    implementation: Implementation,
    key_lengths: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T D"]:
    """Multi-head attention of x to itself, or to a memory, with the matrices of that name."""
    if memory is None:  # one product: x, which is long, is read once
        weight = torch.cat([params[f"{name}.{part}.weight"] for part in "qkv"])
        bias = None
        if f"{name}.q.bias" in params:
            bias = torch.cat([params[f"{name}.{part}.bias"] for part in "qkv"])
        q, k, v = F.linear(x, weight, bias).chunk(3, -1)
    else:
        q = linear(params, f"{name}.q", x)
        k, v = (linear(params, f"{name}.{part}", memory) for part in "kv")
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    y = attention(q, k, v, key_lengths=key_lengths, implementation=implementation)
    return linear(params, f"{name}.o", y.transpose(1, 2).flatten(2))


class AttentionWeights(nn.Module):
    """Holds the matrices of `attend`.

    Args:
        memory: width of what is attended to; default: of x.
        bias: of q, k and v.
    """

    def __init__(self, width: int, memory: int | None = None, *, bias: bool = False):
        super().__init__()
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(memory or width, width, bias=bias)
        self.v = nn.Linear(memory or width, width, bias=bias)
        self.o = nn.Linear(width, width)
