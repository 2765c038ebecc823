"""What a model of images and texts knows without training for the task.

    classification   the class whose name, in a sentence, lies nearest to the image
    retrieval        recall@k: is one of the image's texts among the k nearest, and the other way
    questions        exact match of answers

Dimension key: N queries, M keys, C classes, E embedding.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msfs_functional.models.clip import unit

# Seven of eighty prompts that do best together on ImageNet (Radford et al. 2021, their notebook).
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def class_vectors(
    embed_fn: Callable[[list[str]], Float[Tensor, "N E"]],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch: int = 256,
) -> Float[Tensor, "C E"]:
    """One unit vector a class: the mean of the unit vectors of its name in every template.

    Args:
        embed_fn: texts -> their vectors, of any length.
        names: of the classes.
        templates: sentences with {} where the name goes.
        batch: texts at a time.

    Raises:
        ValueError: no classes, an empty name, a class twice, no templates, one without {}.

    Source: Radford et al. 2021, section 3.1.4.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names ({names!r}) must be a list with one text a class, at least one")
    if not all(name.strip() for name in names):
        raise ValueError(f"classes {list(names)[:8]} hold an empty name: a class needs a text")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"classes {twice[:4]} are named more than once: drop the copies")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates ({templates!r}) must be a list of at least one text")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} must hold {{}} where the class's name goes")
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = [embed_fn(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    vectors = unit(torch.cat(parts)).unflatten(0, (len(names), len(templates)))
    return unit(vectors.mean(1))


def classify(
    images: Float[Tensor, "N E"], classes: Float[Tensor, "C E"], k: int = 1
) -> Int[Tensor, "N k"]:
    """The k classes nearest to each image, nearest first.

    Raises:
        ValueError: k beyond the number of classes.
    """
    if not 1 <= k <= len(classes):
        raise ValueError(
            f"k ({k}) must be at least 1 and at most the number of classes ({len(classes)})"
        )
    return (images @ classes.mT).topk(k, -1).indices


def ranks(
    queries: Float[Tensor, "N E"],
    keys: Float[Tensor, "M E"],
    query_ids: Int[Tensor, "N"],
    key_ids: Int[Tensor, "M"],
    *,
    chunk: int = 1024,
) -> Int[Tensor, "N"]:
    """How many strangers lie at least as near to each query as the nearest key of its own id.

    0 is a hit at 1. Ties count against the model: one that gives every text the same vector finds
    nothing. Similarities are inner products, `chunk` queries at a time.

    Raises:
        ValueError: a query whose id no key has; shapes that do not fit.
    """
    if len(queries) != len(query_ids) or len(keys) != len(key_ids) or not len(queries):
        raise ValueError(
            f"{len(queries)} queries with {len(query_ids)} ids and {len(keys)} keys with "
            f"{len(key_ids)}: each needs one id, and there must be a query"
        )
    lost = ~torch.isin(query_ids, key_ids)
    if lost.any():
        raise ValueError(f"{int(lost.sum())} queries have an id that no key has: leave them out")

    def parts() -> Iterator[Tensor]:
        for x, own in zip(queries.split(chunk), query_ids.split(chunk), strict=True):
            nearness = x @ keys.mT
            match = own[:, None] == key_ids
            best = torch.where(match, nearness, -torch.inf).amax(-1, keepdim=True)
            yield ((nearness >= best) & ~match).sum(-1)

    return torch.cat(list(parts()))


def recall(
    images: Float[Tensor, "N E"],
    texts: Float[Tensor, "M E"],
    image_ids: Int[Tensor, "N"] | None = None,
    text_ids: Int[Tensor, "M"] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """{"image_to_text@1": share of images with a text of theirs among the nearest 1, ...}.

    Args:
        images, texts: unit vectors.
        image_ids, text_ids: an image's texts have its id; default: row i belongs to row i.
        ks: how many of the nearest to look at.
    """
    image_ids = torch.arange(len(images), device=images.device) if image_ids is None else image_ids
    text_ids = torch.arange(len(texts), device=texts.device) if text_ids is None else text_ids
    sides = {
        "image_to_text": ranks(images, texts, image_ids, text_ids),
        "text_to_image": ranks(texts, images, text_ids, image_ids),
    }
    return {f"{name}@{k}": (r < k).float().mean().item() for name, r in sides.items() for k in ks}


def exact_match(answers: Sequence[str], truths: Sequence[str | Sequence[str]]) -> float:
    """Share of answers that equal the truth (or one of several), but for case, space, full stop.

    Raises:
        ValueError: no answers, or not one truth for each.
    """
    if len(answers) != len(truths) or not answers:
        raise ValueError(f"{len(answers)} answers need as many truths ({len(truths)}), at least 1")

    def plain(text: str) -> str:
        return " ".join(text.lower().split()).rstrip(".").rstrip()

    hits = 0
    for answer, truth in zip(answers, truths, strict=True):
        accepted = [truth] if isinstance(truth, str) else truth
        hits += plain(answer) in {plain(one) for one in accepted}
    return hits / len(answers)
