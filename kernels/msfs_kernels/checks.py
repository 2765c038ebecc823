"""What can be wrong with the arguments of flash_attention, found before any kernel starts."""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Any,
    window: int | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    segment_ids: Any,
    softcap: Any,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    dropout_key: Tensor | None,
    precision: str,
) -> str | None:
    """The first problem as value, rule and remedy, or None."""
    return None
