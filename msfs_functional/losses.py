"""Losses as pure functions of logits or hidden states; each returns (sum over items, item count).

Sums and counts, because means of means are wrong when batches differ in padding: add the sums, add
the counts, divide once.

Dimension key: ... items (sentences, tokens), D width, V vocabulary.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msfs_functional.regions import region

PAD = 0


def cross_entropy(
    logits: Float[Tensor, "... V"],
    labels: Int[Tensor, "..."],
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = PAD,
    z_loss: float = 0.0,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum over items of -log softmax(logits)[label] in nats, and the number of items.

        loss = (1 - e) (lse - logits[label]) + e (lse - mean(logits)) + z lse^2
        lse = logsumexp(logits)

    Computed in float32 (float64 for float64 logits).

    Args:
        label_smoothing: e in [0, 1], as in F.cross_entropy (Szegedy et al. 2016, section 7).
        ignore_index: items with this label count nothing.
        z_loss: z >= 0; keeps the softmax's denominator near 1 (Chowdhery et al. 2022, section 5).

    Raises:
        ValueError: shapes that do not fit, options out of range.
    """
    _validate(logits.shape[:-1], labels, label_smoothing, z_loss)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = labels != ignore_index
    lse = logits.logsumexp(-1)
    chosen = logits.gather(-1, torch.where(kept, labels, 0)[..., None])[..., 0]
    loss = lse - (1 - label_smoothing) * chosen
    if label_smoothing > 0:
        loss = loss - label_smoothing * logits.mean(-1)
    if z_loss > 0:
        loss = loss + z_loss * lse.square()
    return torch.where(kept, loss, 0.0).sum(), kept.sum()


def check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden (..., D), weight (V, D) and bias (V,) fit one another.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} must be (V, {hidden.shape[-1]}), the width of hidden "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be ({weight.shape[0]},), one per class")
    if {x.dtype for x in (hidden, weight, bias) if x is not None} != {hidden.dtype}:
        raise ValueError(
            f"hidden ({hidden.dtype}), weight ({weight.dtype}) and bias must have one dtype: cast "
            "the parameters"
        )


def linear_cross_entropy(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, "..."],
    *,
    bias: Float[Tensor, "V"] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = PAD,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """cross_entropy(hidden @ weight.T + bias, labels), whose logits never exist all at once.

    Exact. Items go through in chunks, forward and backward in one pass, so the memory is that of
    the gradients; the logits of a batch of 32,768 tokens and 32,768 words would take 4 GiB. First
    and second derivatives are right under autograd and any transform of torch.func, eager and
    compiled; a third one raises.

    Args:
        hidden, weight, bias: of one dtype; products are in it, softmax and sums in float32.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None for no cap.
        others: as in `cross_entropy`.

    Raises:
        ValueError: shapes or dtypes that do not fit, options out of range; on CPU also a label
            that is no class. On a GPU, where to look would make the CPU wait, such a label makes
            the loss and the gradient NaN: a training step skips and counts it.
    """
    _validate(hidden.shape[:-1], labels, label_smoothing, z_loss)
    check_projection(hidden, weight, bias)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap ({softcap}) must be a positive number, or None for no cap")
    from msfs_kernels.linear_cross_entropy import linear_cross_entropy as op

    labels = labels.long()
    loss = op(
        hidden.reshape(1, -1, hidden.shape[-1]),
        weight[None],
        None if bias is None else bias[None],
        labels.reshape(1, -1),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        z_loss=z_loss,
        softcap=softcap or 0.0,
    )
    return loss.reshape(()), (labels != ignore_index).sum()


@region
def disagreement(
    p_logits: Float[Tensor, "... V"],
    q_logits: Float[Tensor, "... V"],
    labels: Int[Tensor, "..."],
    *,
    ignore_index: int = PAD,
) -> Float[Tensor, ""]:
    """Sum over items of KL(p, q) + KL(q, p) in nats, p and q the softmax of the logits.

    What R-Drop punishes between two predictions under different dropout (Liang et al. 2021, eq. 2).
    A region: inside a compiled step it is one pass over the logits, not one for each operation.

    Args:
        labels: only says which items count: those that are not `ignore_index`.
    """
    p, q = (logits.float().log_softmax(-1) for logits in (p_logits, q_logits))
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1)
    return divergence.masked_fill(labels == ignore_index, 0.0).sum()


def _validate(items: torch.Size, labels: Tensor, label_smoothing: float, z_loss: float) -> None:
    if labels.shape != items:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the shape of the items, {tuple(items)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, expected integers: one class an item")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing ({label_smoothing}) must be in [0, 1]")
    if z_loss < 0:
        raise ValueError(f"z_loss ({z_loss}) must not be negative")
