"""What a decoder thinks of answers that are there already: log-probabilities, entropies, values.

Rows are prompt, answer and padding; everything that comes back stands at the token it speaks of:

    tokens   p p p a a E 0 0
    mask     0 0 0 1 1 1 0 0
    logps    0 0 0 x x x 0 0         log-probability of the token that stands there

Dimension key: N rows, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from msfs_functional.logps import (
    completion_logps,
    completion_logps_and_entropies,
    token_logps,
    token_logps_and_entropies,
)
from msfs_functional.models.decoder import output_weight
from msfs_functional.params import Functional, Params


def answer_logps(
    model: Functional,
    params: Params,
    tokens: Int64[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    most: int | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> Float[Tensor, "N T"]:
    """Log-probabilities of the tokens where mask is True [nats], zeros elsewhere.

    Args:
        model: a decoder; params: its own, in the dtype of the computation.
        mask: never True in column 0, which nothing predicts.
        most: at least the number of True in mask, see `logps.completion_logps`; None: all tokens.
        temperature: that of the sampling.
        options: of the decoder's `hidden`.
    """
    states = model.apply(params, tokens[:, :-1], method="hidden", **options)
    weight, labels, kept = output_weight(params), tokens[:, 1:], mask[:, 1:]
    if most is None:
        logps = token_logps(states, weight, labels, temperature=temperature)
        logps = torch.where(kept, logps, 0.0)
    else:
        logps = completion_logps(states, weight, labels, kept, most=most, temperature=temperature)
    return F.pad(logps, (1, 0))


def answer_statistics(
    model: Functional,
    params: Params,
    tokens: Int64[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    most: int | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"], Float[Tensor, "N T D"]]:
    """(log-probabilities, entropies in nats, states); the state at a token is the one before it,
    which is what a critic may know when the token is chosen. Zeros where masked, but for states.

    Arguments as for `answer_logps`.
    """
    states = model.apply(params, tokens[:, :-1], method="hidden", **options)
    weight, labels, kept = output_weight(params), tokens[:, 1:], mask[:, 1:]
    if most is None:
        both = token_logps_and_entropies(states, weight, labels, temperature=temperature)
        both = (torch.where(kept, x, 0.0) for x in both)
    else:
        both = completion_logps_and_entropies(
            states, weight, labels, kept, most=most, temperature=temperature
        )
    aligned = (F.pad(x, (1, 0)) for x in both)
    return *aligned, F.pad(states, (0, 0, 1, 0))  # pyright: ignore[reportReturnType]


def in_parts(fn: Callable[..., Tensor], data: Mapping[str, Tensor], size: int) -> Tensor:
    """fn(**part) of `size` rows at a time, without gradients, in one tensor again.

    The last part is filled up with the last row, so that all have one shape.
    """
    n, found = len(next(iter(data.values()))), []
    with torch.no_grad():
        for start in range(0, n, size):
            rows = torch.arange(start, start + size).clamp(max=n - 1)
            found.append(fn(**{name: x[rows.to(x.device)] for name, x in data.items()}))
    return torch.cat(found)[:n]
