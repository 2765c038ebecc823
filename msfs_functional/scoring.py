"""What a decoder thinks of answers that are there already: log-probabilities, entropies, values.

Rows are prompt, answer and padding; everything that comes back stands at the token it speaks of:

    tokens   p p p a a E 0 0
    mask     0 0 0 1 1 1 0 0
    logps    0 0 0 x x x 0 0         log-probability of the token that stands there

A model of `gathering.sharded` gives the same: ranks of tp hold parts of the vocabulary, ranks of cp
compute parts of each row (T' tokens of it, padded so that all have as many) and put what comes out
together. That is for losses in `gathering.gathered`, to which ranks of cp are shares of the batch.

Dimension key: N rows, T tokens, T' those of a rank of cp, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from msfs_functional.collectives import pvary
from msfs_functional.context_parallel import all_tokens, own_tokens, ring_attention
from msfs_functional.gathering import Sharded
from msfs_functional.logps import (
    completion_logps,
    completion_logps_and_entropies,
    token_logps,
    token_logps_and_entropies,
)
from msfs_functional.meshes import axis_size
from msfs_functional.models.decoder import output_weight
from msfs_functional.params import Functional, Params
from msfs_functional.vocabulary_parallel import Cut


def is_cut(model: Functional, axis: Literal["tp", "cp"]) -> bool:
    """Whether ranks along the axis share the work on a row."""
    return isinstance(model, Sharded) and axis_size(model.mesh, axis) > 1


def vocabulary_cut(model: Functional) -> Cut | None:
    """Over which ranks the model's vocabulary is cut; None: it is not."""
    if not isinstance(model, Sharded) or not is_cut(model, "tp"):
        return None
    return Cut(model.mesh.get_group("tp").group_name, model.shapes["embedding.weight"][0])


def own_part(model: Functional, x: Shaped[Tensor, "N T"]) -> Shaped[Tensor, "N T'"]:
    """What this process computes of rows: all, or a rank's tokens of cp."""
    if not isinstance(model, Sharded) or not is_cut(model, "cp"):
        return x
    return own_tokens(F.pad(x, (0, -x.shape[1] % (2 * axis_size(model.mesh, "cp")))), model.mesh)


def whole_rows(model: Functional, x: Float[Tensor, "N T'"], width: int) -> Float[Tensor, "N T"]:
    """The inverse of `own_part`, on all ranks of cp: each uses the rows in its own way."""
    if not isinstance(model, Sharded) or not is_cut(model, "cp"):
        return x
    rows = all_tokens(x, model.mesh)[:, :width]
    return pvary(rows, model.mesh.get_group("cp").group_name)


def states_of(
    model: Functional, params: Params, tokens: Int64[Tensor, "N T"], **options: Any
) -> Float[Tensor, "N T' D"]:
    """The decoder's states of `own_part` of the tokens; options of its `hidden`."""
    if isinstance(model, Sharded) and is_cut(model, "cp"):
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        # what fills a row up is computed at position 0, and seen by nobody
        options |= {"positions": own_part(model, positions)}
        options |= {"implementation": ring_attention(model.mesh)}
    return model.apply(params, own_part(model, tokens), method="hidden", **options)


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
    states, weight = states_of(model, params, tokens[:, :-1], **options), output_weight(params)
    labels, kept = own_part(model, tokens[:, 1:]), own_part(model, mask[:, 1:])
    given: dict[str, Any] = {"temperature": temperature, "cut": vocabulary_cut(model)}
    if most is None:
        logps = torch.where(kept, token_logps(states, weight, labels, **given), 0.0)
    else:
        logps = completion_logps(states, weight, labels, kept, most=most, **given)
    return F.pad(whole_rows(model, logps, mask.shape[1] - 1), (1, 0))


def answer_statistics(
    model: Functional,
    params: Params,
    tokens: Int64[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    most: int | None = None,
    temperature: float = 1.0,
    head: Float[Tensor, "D"] | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """(log-probabilities, entropies in nats, values) of the tokens; zeros where masked.

    Arguments as for `answer_logps`, and

    Args:
        head: a critic's, which reads the state before a token: what may be known when the token is
            chosen. None: all values are zero.
    """
    states, weight = states_of(model, params, tokens[:, :-1], **options), output_weight(params)
    labels, kept = own_part(model, tokens[:, 1:]), own_part(model, mask[:, 1:])
    given: dict[str, Any] = {"temperature": temperature, "cut": vocabulary_cut(model)}
    if most is None:
        both = token_logps_and_entropies(states, weight, labels, **given)
    else:
        both = completion_logps_and_entropies(states, weight, labels, kept, most=most, **given)
    values = torch.zeros_like(both[0]) if head is None else (states.float() * head.float()).sum(-1)
    found = (torch.where(kept, x, 0.0) for x in (*both, values))
    rows = [F.pad(whole_rows(model, x, mask.shape[1] - 1), (1, 0)) for x in found]
    return rows[0], rows[1], rows[2]


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
