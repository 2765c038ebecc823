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
from msfs_functional.params import Params


def check_call(
    config: Any,
    x: Float[Tensor, "B C H W"],
    context: Float[Tensor, "N S X"] | None,
    classes: Int[Tensor, "B"] | None,
    interval: Float[Tensor, "B"] | None,
    *,
    several: bool = False,
) -> None:
    """Raises where a network was given a condition that its configuration has no use for, or not
    one that it needs; where x or the context are of another size.

    Args:
        several: there may be a multiple of B contexts.
    """
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
    if context is not None and (
        len(context) % len(x) or (len(context) != len(x) and not several) or not len(context)
    ):
        rule = "a multiple of " if several else ""
        raise ValueError(
            f"context {tuple(context.shape)} must be for {rule}{len(x)} images: one for each"
        )


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


def lane(head_dim: int, x: Tensor, implementation: Implementation = "flash") -> int:
    """The width that a head gets in memory: on a GPU tiles are powers of two wide anyway, and heads
    of 64 and 128 have the fastest kernels, which those of 40 and 80 have not. torch's own have."""
    between = x.is_cuda and 32 < head_dim < 128 and implementation != "sdpa"
    return 1 << (head_dim - 1).bit_length() if between else head_dim


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
    width = params[f"{name}.q.weight"].shape[0] // heads
    # Zeros beside each head: products and gradients are the same.
    more = lane(width, x, implementation) - width

    def rows(part: str) -> Tensor:
        w = params[f"{name}.{part}"]
        return F.pad(w.unflatten(0, (heads, width)), (0, 0) * (w.ndim - 1) + (0, more)).flatten(
            0, 1
        )

    def projected(parts: str, x: Tensor) -> tuple[Tensor, ...]:
        """Of all parts in one product: x, which is long, is read once."""
        weight, bias = torch.cat([rows(f"{part}.weight") for part in parts]), None
        if f"{name}.q.bias" in params:
            bias = torch.cat([rows(f"{part}.bias") for part in parts])
        return F.linear(x, weight, bias).chunk(len(parts), -1)

    if memory is None:
        q, k, v = projected("qkv", x)
    else:
        q, k, v = *projected("q", x), *projected("kv", memory)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    options: dict[str, Any] = {"key_lengths": key_lengths, "implementation": implementation}
    y = attention(q, k, v, scale=width**-0.5, **options).transpose(1, 2).flatten(2)
    out = F.pad(params[f"{name}.o.weight"].unflatten(1, (heads, width)), (0, more)).flatten(1)
    return F.linear(y, out, params[f"{name}.o.bias"])


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
