"""Pictures of what a model makes of images, as matplotlib figures without pyplot state."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure


def similarity_matrix(
    cosines: Float[np.ndarray, "N M"],
    images: UInt8[np.ndarray, "N h w 3"],
    texts: Sequence[str],
) -> Figure:
    """Cosines of images (rows, drawn beside them) and texts (columns): pairs on the diagonal.

    Raises:
        ValueError: rows and columns that are not the images' and the texts'.
    """
    rows, columns = len(images), len(texts)
    if cosines.shape != (rows, columns):
        raise ValueError(f"cosines {cosines.shape} must be ({rows} images, {columns} texts)")
    figure = Figure(figsize=(4.2 + 0.42 * columns, 2.8 + 0.42 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2, width_ratios=(1, columns), wspace=0.0)
    for i, image in enumerate(images):
        axes = figure.add_subplot(grid[i, 0])
        axes.imshow(image)
        axes.axis("off")
    axes = figure.add_subplot(grid[:, 1])
    shown = axes.imshow(cosines, cmap="viridis", aspect="auto")
    for i, j in np.ndindex(cosines.shape):
        tone = "black" if cosines[i, j] > 0.6 * cosines.max() else "white"
        axes.text(j, i, f"{cosines[i, j]:.1f}", ha="center", va="center", fontsize=6, color=tone)
    labels = [textwrap.fill(text, 28, max_lines=2) for text in texts]
    axes.set_xticks(range(columns), labels, rotation=60, ha="right", fontsize=7, parse_math=False)
    axes.set_yticks([])
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.6)
    return figure


def answers(
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    asked: Sequence[str],
    answered: Sequence[str],
    truths: Sequence[str],
    *,
    columns: int = 5,
) -> Figure:
    """Each image with its question, the answer (green where it is the truth) and the truth."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.9 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, image, question, answer, truth in zip(
        grid, images, asked, answered, truths, strict=False
    ):
        axes.imshow(image)
        right = answer == truth
        said = f"{answer}" if right else f"{answer} (truth: {truth})"
        text = f"{textwrap.fill(question, 26)}\n{textwrap.fill(said, 26)}"
        tone = "darkgreen" if right else "firebrick"
        axes.set_title(text, fontsize=8, color=tone, parse_math=False)
    return figure


def gaze(
    image: UInt8[np.ndarray, "h w 3"],
    weights: Sequence[Float[np.ndarray, "y x"]],
    words: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Where over the image each word looks: the image, then its weights laid over it, word by word.

    Args:
        weights: of each word over a grid of the image's parts, at least 0.
        words: labels.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(2.1 * (1 + len(words)), 2.7), layout="constrained")
    panels = figure.subplots(1, 1 + len(words), squeeze=False)[0]
    panels[0].imshow(image)
    panels[0].set_title("image", fontsize=8)
    for axes, weight, word in zip(panels[1:], weights, words, strict=True):
        axes.imshow(image.mean(-1), cmap="gray", extent=(0, width, height, 0))
        axes.imshow(weight, cmap="inferno", alpha=0.6, extent=(0, width, height, 0), vmin=0)
        axes.set_title(word, fontsize=8, parse_math=False)
    for axes in panels:
        axes.axis("off")
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure
