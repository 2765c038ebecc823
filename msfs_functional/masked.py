"""Means over the tokens that count: arrays (B, T) with a mask that is True on them.

What stands where the mask is False changes nothing, wherever it stands: prompts, padding, answers
of tools.

Dimension key: B rows, T tokens.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msfs_functional.checks import check_mask


def masked_mean(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """The mean of x where mask is True; 0 where nothing is."""
    check_mask(mask, x, "x")
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def average(
    losses: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    over: Literal["tokens", "sequences", "sums", "constant"] = "tokens",
    length: int | None = None,
) -> Float[Tensor, ""]:
    """One number from per-token losses: the choice that decides what a long answer weighs.

        tokens      sum / number of tokens: each token weighs the same (Yu et al. 2025, DAPO)
        sequences   mean over rows of the row's mean: each answer weighs the same (GRPO)
        sums        mean over rows of the row's sum: each answer weighs its length (LUSPO)
        constant    sum / (B length): no length in the denominator, hence no bias towards long wrong
                    answers (Liu et al. 2025, Dr. GRPO)

    Rows without a token do not count, except in "constant". For packed rows use tokens or constant.

    Args:
        length: with "constant" the most tokens a completion may have.

    Raises:
        ValueError: shapes that do not fit, an unknown `over`, "constant" without a length.
    """
    check_mask(mask, losses, "losses")
    total = torch.where(mask, losses, 0.0)
    if over == "tokens":
        return total.sum() / mask.sum().clamp(min=1)
    if over == "sequences":
        lengths = mask.sum(-1)
        return (total.sum(-1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum().clamp(min=1)
    if over == "sums":
        return total.sum() / mask.any(-1).sum().clamp(min=1)
    if over != "constant":
        raise ValueError(f'over ({over!r}) must be "tokens", "sequences", "sums" or "constant"')
    if length is None or length < 1:
        raise ValueError(
            f'length ({length}) must be above 0 with over="constant": the most tokens a completion '
            "may have"
        )
    return total.sum() / (losses.shape[0] * length)


def whiten(
    x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], *, centre: bool = True, eps: float = 1e-8
) -> Float[Tensor, "..."]:
    """(x - mean) / sqrt(variance + eps) over where mask is True; zeros elsewhere.

    The variance is the unbiased one; centre=False puts the mean back.
    """
    check_mask(mask, x, "x")
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    whitened = centred * (variance + eps).rsqrt()
    return whitened if centre else torch.where(mask, whitened + mean, 0.0)
