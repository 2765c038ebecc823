"""Pictures of a run as matplotlib figures: curves, attention maps, masks; no pyplot state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator


def _laid_out(figure: Figure) -> Figure:
    """Places axes and labels once; otherwise every rendering does, which is most of its time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def training_curves(
    records: Sequence[Mapping[str, Any]], panels: Mapping[str, Mapping[str, str]]
) -> Figure:
    """Metrics over the step, one panel for each unit, rows of at most five; metrics that no record
    holds are left out.

    Args:
        records: what `tracking.read_metrics` returns.
        panels: {label of the y axis, with its unit: {metric: its label}}.
    """
    rows = max(1, -(-len(panels) // 5))
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, (unit, names) in zip(places, panels.items(), strict=False):
        for name, label in names.items():
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                marker = "." if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), label=label, marker=marker)
        axes.set(xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    return _laid_out(figure)


def attention_map(
    weights: Float[np.ndarray, "H T S"],
    queries: Sequence[str],
    keys: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Attention as one picture per head: row i shows how target token i looks at the source.

    Args:
        weights: (H, T, S) in [0, 1], each row sums to one; one panel per head, the mean first.
        queries: T labels of the rows.
        keys: S labels of the columns.

    Raises:
        ValueError: labels that do not match the weights' shape.
    """
    if weights.ndim != 3 or weights.shape[1:] != (len(queries), len(keys)):
        raise ValueError(
            f"weights {weights.shape} must be (heads, {len(queries)} queries, {len(keys)} keys)"
        )
    panels = [("mean of the heads", weights.mean(0))] if len(weights) > 1 else []
    panels += [(f"head {head}", weight) for head, weight in enumerate(weights)]
    columns = min(len(panels), 5)
    rows = -(-len(panels) // columns)
    panel_size = (0.8 + 0.24 * len(keys), 0.9 + 0.24 * len(queries))
    figure = Figure(
        figsize=(max(4.0, columns * panel_size[0]), max(2.5, rows * panel_size[1])),
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for place, (axes, (name, weight)) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.imshow(weight, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.xaxis.set_major_locator(FixedLocator(range(len(keys))))
        axes.set_xticklabels(keys, rotation=90, fontsize=7, parse_math=False)
        if place % columns == 0:
            axes.yaxis.set_major_locator(FixedLocator(range(len(queries))))
            axes.set_yticklabels(queries, fontsize=7, parse_math=False)
        else:
            axes.yaxis.set_major_locator(NullLocator())
    if title:
        figure.suptitle(title, fontsize=9)
    return _laid_out(figure)


def mask_picture(mask: Bool[np.ndarray, "T S"], *, title: str = "") -> Figure:
    """A boolean (T, S) mask as squares: filled where query i may look at key j."""
    figure = Figure(figsize=(0.6 + 0.25 * mask.shape[1], 0.9 + 0.25 * mask.shape[0]))
    axes = figure.subplots()
    axes.imshow(mask, vmin=0, vmax=1, cmap="Greens")
    axes.set_xticks(np.arange(mask.shape[1] + 1) - 0.5, labels=[])
    axes.set_yticks(np.arange(mask.shape[0] + 1) - 0.5, labels=[])
    axes.grid(color="grey", linewidth=0.5)
    axes.set(xlabel="key", ylabel="query", title=title)
    return figure


def save_png(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Writes the figure; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, format="png")
