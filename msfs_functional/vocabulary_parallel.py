"""The vocabulary over tensor-parallel ranks: none holds all of the embedding or of the logits.

    loss_of = sharded_linear_cross_entropy(mesh, vocab)     # losses.linear_cross_entropy if tp is 1
    total, count = loss_of(states, output_weight(params), labels)

Rank r holds rows [start_r, stop_r) of the embedding and of the output matrix, W_r. Per item, with
logits s_r = h W_r^T,

    lse    = logsumexp over ranks of logsumexp(s_r)
    s[y]   = sum over ranks of  s_r[y - start_r]  where the rank holds y, else 0

so that two numbers an item travel, not V. Everything is made of the linear maps of `collectives`:
every derivative is right, and gradients of W_r stay where W_r is.

Dimension key: N items, D width, V vocabulary. Source: Shoeybi et al. 2019, section 3.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from msfs_functional.collectives import chunk_bounds, group_rank, group_size, join, psum, pvary
from msfs_functional.losses import PAD, linear_cross_entropy
from msfs_functional.meshes import axis_size
from msfs_functional.transforms import remat

CHUNK = {"cpu": 2**21, "cuda": 2**27}  # logits that a rank holds at once


class Cut(NamedTuple):
    """A vocabulary over the ranks of a process group."""

    group: str
    vocab: int

    @property
    def rows(self) -> int:
        """Most rows that a rank holds; equal on all ranks, whose own numbers are not."""
        return -(-self.vocab // group_size(self.group))


def label_logits(
    logits: Float[Tensor, "N V_r"], labels: Int[Tensor, "N"], cut: Cut
) -> Float[Tensor, "N"]:
    """Each item's logit of its label, out of every rank's part; NaN where no rank holds it."""
    local, own = _own(labels, cut.vocab, cut.group)
    found = _some(logits.mT).mT.gather(-1, local[..., None])[..., 0]
    found = psum(torch.where(own, found, 0.0), cut.group)
    return torch.where((labels >= 0) & (labels < cut.vocab), found, math.nan)


def log_sum_exp(logits: Float[Tensor, "N V_r"], cut: Cut) -> Float[Tensor, "N"]:
    """logsumexp over all of V, out of every rank's part."""
    own = logits.logsumexp(-1)[None]
    return join(own, 0, group_size(cut.group), cut.group).logsumexp(0)


def check_rows(hidden: Tensor, weight: Tensor, labels: Tensor, cut: Cut) -> None:
    """Raises ValueError where weight is not what this rank holds, or labels do not fit hidden."""
    start, stop = chunk_bounds(cut.vocab, group_size(cut.group), group_rank(cut.group))
    if weight.shape != (stop - start, hidden.shape[-1]) or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} must be (..., D), ({stop - start}, D) and (...): this rank "
            f"holds rows {start} to {stop} of {cut.vocab}"
        )


def lookup(
    ids: Int[Tensor, "..."], rows: Float[Tensor, "V_r D"], vocab: int, group: str
) -> Float[Tensor, "... D"]:
    """The rows of these ids, of which this rank holds its chunk; the same on all ranks.

    The row of an id that no rank holds is NaN: to refuse it here would leave ranks waiting.
    """
    local, own = _own(ids, vocab, group)
    found = psum(torch.where(own[..., None], F.embedding(local, _some(rows)), 0.0), group)
    return torch.where(((ids >= 0) & (ids < vocab))[..., None], found, math.nan)


def sharded_linear_cross_entropy(
    mesh: DeviceMesh, vocab: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`losses.linear_cross_entropy` whose weight and bias are this rank's rows of V, cut over tp.

    Value and gradients are those of one process. A rank holds the logits of a chunk of the items
    and its part of V only; they are computed again in the backward pass. A label that is no class
    makes the loss NaN.
    """
    if axis_size(mesh, "tp") == 1:
        return linear_cross_entropy
    return functools.partial(_loss, mesh.get_group("tp").group_name, vocab)


def _loss(
    group: str,
    vocab: int,
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V_r D"],
    labels: Int[Tensor, "..."],
    *,
    bias: Float[Tensor, "V_r"] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = PAD,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    cut = Cut(group, vocab)
    check_rows(hidden, weight, labels, cut)
    if not 0 <= label_smoothing <= 1 or z_loss < 0:
        raise ValueError(
            f"label_smoothing ({label_smoothing}) must be in [0, 1], z_loss ({z_loss}) at least 0"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap ({softcap}) must be a positive number, or None for no cap")

    def part(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        s = F.linear(h, weight, bias)
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        lse = log_sum_exp(s, cut)
        loss = lse - (1 - label_smoothing) * label_logits(s, y, cut)
        if label_smoothing:
            loss = loss - label_smoothing * psum(s.sum(-1), group) / vocab
        if z_loss:
            loss = loss + z_loss * lse.square()
        return torch.where(y != ignore_index, loss, 0.0).sum()

    labels = labels.long()
    h, y = pvary(hidden.flatten(0, -2), group), labels.flatten()
    limit = CHUNK.get(h.device.type, CHUNK["cuda"]) * group_size(group)
    count = max(1, -(-len(y) * vocab // limit))  # equal on all ranks, whose parts of V are not
    pairs = zip(h.chunk(count), y.chunk(count), strict=True)
    total = sum(remat(part)(items, weight, bias, own) for items, own in pairs)
    assert isinstance(total, Tensor)
    return total, (labels != ignore_index).sum()


def _own(ids: Tensor, vocab: int, group: str) -> tuple[Tensor, Tensor]:
    """(places in this rank's chunk, 0 where it lies elsewhere; whether it lies here)."""
    start, stop = chunk_bounds(vocab, group_size(group), group_rank(group))
    own = (ids >= start) & (ids < stop)
    return torch.where(own, ids - start, 0), own


def _some(rows: Tensor) -> Tensor:
    """A rank beyond the end of a small vocabulary holds no row: zeros to look up in."""
    return rows if rows.shape[0] else rows.new_zeros(1, *rows.shape[1:])
