"""Contrastive losses of image and text vectors, exact at any batch size.

    softmax   1/2 sum_i [-log softmax_j(s <u_i, v_j>)_i - log softmax_j(s <v_i, u_j>)_i]     CLIP
    sigmoid   -sum_i sum_j log sigmoid(z_ij (s <u_i, v_j> + b)),  z = 1 for pairs, -1 else   SigLIP

Every item of a batch is a negative of every other, so a large batch has to be one batch. Its memory
is kept down where it arises: neither loss ever holds the B x B logits; `gradient_cache` and
`in_chunks` hold the activations of one chunk of the batch; with `group` each rank embeds its share
and the negatives are everybody's.

Dimension key: B pairs (of this rank), E embedding.
"""

from collections.abc import Callable
from typing import Any

import optree
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from msfs_functional import random
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.transforms import NAMESPACE, accumulate, remat, value_and_grad

EmbedFn = Callable[[Any, Any, Tensor | None], Any]  # (params, batch, key) -> pytree of (B, E)
Scalar = Float[Tensor, ""] | float


def softmax_loss(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Scalar,
    *,
    group: str | None = None,
) -> tuple[Float[Tensor, ""], int]:
    """CLIP's loss: the sum over this rank's pairs of both directions' mean, in nats, and B.

    The mean over all ranks is that of the whole batch, and so is the sum of their gradients.

    Args:
        image, text: unit vectors; row i of one belongs to row i of the other.
        scale: of the cosines, 1 / temperature.
        group: name of a process group whose ranks hold the other pairs, as many as this one.

    Raises:
        ValueError: shapes that do not fit.

    Source: Radford et al. 2021, figure 3.
    """
    image, text = _checked(image, text)
    labels = torch.arange(len(image), device=image.device)
    images, texts = image, text
    if group is not None:
        from msfs_functional.collectives import all_gather, group_rank, group_size

        size = len(image) * group_size(group)
        images, texts = (all_gather(x, 0, size, group) for x in (image, text))
        labels = labels + group_rank(group) * len(image)
    sides = ((image, texts), (text, images))
    losses = (linear_cross_entropy(scale * x, y, labels, ignore_index=-1)[0] for x, y in sides)
    return sum(losses, torch.zeros((), device=image.device)) / 2, len(image)


def sigmoid_loss(
    image: Float[Tensor, "B E"],
    text: Float[Tensor, "B E"],
    scale: Scalar,
    bias: Scalar,
    *,
    group: str | None = None,
    chunk: int = 4096,
) -> tuple[Float[Tensor, ""], int]:
    """SigLIP's loss: the sum over this rank's images and everybody's texts, in nats, and B.

    Texts come by in chunks, whose logits are computed again in the backward pass; with `group` the
    ranks pass their texts around the ring, so no rank ever holds all of them.

    Args:
        image, text, scale, group: as in `softmax_loss`.
        bias: of the logits; -10 makes the first steps calm, when nearly all pairs are negative.
        chunk: texts at a time.

    Raises:
        ValueError: shapes that do not fit, chunk below 1.

    Source: Zhai et al. 2023, algorithm 1 and section 3.3.
    """
    image, text = _checked(image, text)
    if chunk < 1:
        raise ValueError(f"chunk ({chunk}) must be at least 1 text")

    def against(image: Tensor, texts: Tensor, scale: Scalar, bias: Scalar) -> Tensor:
        return F.softplus(scale * (image @ texts.mT) + bias).sum()  # as if none were a pair

    total = torch.zeros((), device=image.device, dtype=image.dtype)
    hops, texts = 1, text
    if group is not None:
        from msfs_functional.collectives import group_size

        hops = group_size(group)
    for hop in range(hops):
        if group is not None and hop > 0:
            from msfs_functional.collectives import shift

            texts = shift(texts, 1, group)
        for part in texts.split(chunk):
            total = total + remat(against)(image, part, scale, bias)
    # log sigmoid(x) = log sigmoid(-x) + x makes pairs of the diagonal.
    own = scale * (image * text).sum(-1) + bias
    return total - own.sum(), len(image)


def _checked(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)} must be (pairs, width), both "
            "alike and not empty"
        )
    wide = torch.promote_types(image.dtype, torch.float32)
    return image.to(wide), text.to(wide)


def cut(batch: Any, size: int) -> list[Any]:
    """The batch in chunks of `size` items along dim 0 of every tensor; the last may be shorter.

    Raises:
        ValueError: a size below 1, tensors of different lengths.
    """
    leaves: list[Any] = optree.tree_leaves(batch, namespace=NAMESPACE)
    lengths = {len(leaf) for leaf in leaves}
    if size < 1 or len(lengths) != 1:
        raise ValueError(
            f"chunk size ({size}) must be at least 1, and all tensors have one length, got "
            f"{sorted(lengths)}"
        )
    starts = range(0, lengths.pop(), size)
    return [
        optree.tree_map(lambda x, i=i: x[i : i + size], batch, namespace=NAMESPACE) for i in starts
    ]


def _calls(batch: Any, key: Tensor | None, size: int) -> list[tuple[Any, Tensor | None]]:
    chunks = cut(batch, size)
    return [(x, None if key is None else random.fold_in(key, i)) for i, x in enumerate(chunks)]


def _joined(parts: list[Any]) -> Any:
    return optree.tree_map(lambda *x: torch.cat(x), *parts, namespace=NAMESPACE)


def in_chunks(embed_fn: EmbedFn, size: int) -> EmbedFn:
    """embed_fn for batches of any length in the memory of `size` items: for a step's loss function.

    Forward it goes chunk by chunk and keeps the vectors alone; backward it recomputes each chunk.
    Equals embed_fn where items do not depend on each other; a chunk folds its number into the key.
    """

    def run(params: Any, batch: Any, key: Tensor | None = None) -> Any:
        return _joined([remat(embed_fn)(params, *call) for call in _calls(batch, key, size)])

    return run


def gradient_cache(
    embed_fn: EmbedFn, loss_fn: Callable[[Any, Any], Any], size: int
) -> Callable[..., tuple[tuple[Tensor, Any], Any]]:
    """value_and_grad of loss_fn(params, embed_fn(params, batch)) in the memory of `size` items.

        ((loss, aux), grads) = gradient_cache(embed_fn, loss_fn, 256)(params, batch, key)

    Embed in chunks and keep the vectors; differentiate the loss once, with respect to them; embed
    each chunk again and pull its vectors' cotangents back to the parameters:

        d loss / d params = sum_k J_k^T (d loss / d vectors_k) + the loss's own

    Args:
        embed_fn: (params, chunk, key) -> vectors, a pytree of tensors with one row an item.
        loss_fn: (params, vectors of the whole batch) -> (0-d loss, aux).
        size: items of a chunk.

    Source: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited
    setup".
    """

    def run(
        params: Any, batch: Any, key: Int64[Tensor, "2"] | None = None
    ) -> tuple[tuple[Tensor, Any], Any]:
        calls = _calls(batch, key, size)
        with torch.no_grad():
            vectors = _joined([embed_fn(params, *call) for call in calls])
        whole = value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (value, aux), (own, cotangents) = whole(params, vectors)

        def pulled(params: Any, chunk: Any, key: Tensor | None, cotangents: Any) -> tuple:
            vectors = embed_fn(params, chunk, key)
            products = optree.tree_map(
                lambda x, g: (x * g).sum(), vectors, cotangents, namespace=NAMESPACE
            )
            return sum(optree.tree_leaves(products, namespace=NAMESPACE)), ()

        replay = zip(calls, cut(cotangents, size), strict=True)
        _, grads = accumulate(pulled, params, ((*call, part) for call, part in replay))
        return (value, aux), optree.tree_map(torch.add, own, grads, namespace=NAMESPACE)

    return run
