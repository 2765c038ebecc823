"""What an attention call asks for beyond q, k and v, in the canonical form that every backend
reads.

B batch (all leading dims flattened), H heads, G kv heads, T query tokens, S key tokens, K head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("msfs_kernels", "DEF")
OPS = torch.ops.msfs_kernels


class Options(NamedTuple):
    """Optional tensors and scalars of one call; the order is that of the raw ops' schemas.

    A key j is visible to query i, which stands at p = i + S - T, when all of these hold:
      (j <= p if causal) and (window < 0, or p - j < window if causal, |p - j| < window if not),
         or j < prefix_lengths[b];
      j < key_lengths[b];  q_segments[b, i] == k_segments[b, j];  bias is boolean and True.
    The logit of a visible pair is  cap(scale * q.k) - alibi[b, h] * |p - j| + bias,
    cap(a) = softcap * tanh(a / softcap), or a itself when softcap is 0.
    """

    bias: Tensor | None = None  # bool or float, (B | 1, H | 1, T | 1, S | 1)
    key_lengths: Tensor | None = None  # (B,) int32
    prefix_lengths: Tensor | None = None  # (B,) int32
    q_segments: Tensor | None = None  # (B, T) int32
    k_segments: Tensor | None = None  # (B, S) int32
    alibi: Tensor | None = None  # (B, H) float32, float64 for float64 inputs
    # int64: (B, 2), one Philox key for each batch row, or (B, H, 3), a key and the head's number in
    # the mask for each row and head, so that a shard of the heads drops what the whole would.
    rng: Tensor | None = None
    causal: bool = False
    window: int = -1  # tokens; -1 is none
    scale: float = 1.0
    softcap: float = 0.0  # 0 is none
    dropout: float = 0.0
    precision: str = "ieee"  # of float32 products on tensor cores: "ieee" | "tf32"
    deterministic: bool = False

    @property
    def has_float_bias(self) -> bool:
        return self.bias is not None and self.bias.dtype is not torch.bool

    @property
    def drop_threshold(self) -> int:
        """A pair is kept when its random 32-bit word is at least this."""
        return round(self.dropout * 2**32)


OPTION_SCHEMA = (  # the bias, which is differentiable, stands with q, k and v
    "Tensor? key_lengths, Tensor? prefix_lengths, Tensor? q_segments, Tensor? k_segments,"
    " Tensor? alibi, Tensor? rng, bool causal, int window, float scale, float softcap,"
    " float dropout, str precision, bool deterministic"
)
OPTION_COUNT = len(Options._fields) - 1
OPTION_TENSORS = OPTION_SCHEMA.count("Tensor?")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums, log-sum-exps and everything in between are float32, or float64 for float64 inputs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def empty_tokens_first(
    like: Tensor,
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """An uninitialised (B, H, T, K) whose memory is (B, T, H, K): merging heads back is then a
    view.

    Every (B, H, T, K) result of every backend and of the fake kernels has this layout, whatever the
    inputs' strides.
    """
    return like.new_empty((batch, tokens, heads, head_dim), dtype=dtype or like.dtype).transpose(
        1, 2
    )
