"""Pictures of a run as matplotlib figures: training curves and attention maps, without pyplot state."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The curves in a run's metrics.jsonl: name -> (steps, values)."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves


def training_curves(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    panels: Sequence[tuple[str, Mapping[str, str]]],
) -> Figure:
    """One panel per entry of `panels`, drawn over the step; curves that the run has not are left out.

    Args:
        curves: what `read_metrics` returns.
        panels: (label of the y axis with its unit, {name of a curve: its label}).
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (ylabel, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, label in names.items():
            if name in curves:
                steps, values = curves[name]
                axes.plot(steps, values, label=label, marker="." if len(steps) < 30 else None)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def attention_map(
    weights: np.ndarray, queries: Sequence[str], keys: Sequence[str], *, title: str = ""
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
    for place, (axes, (name, weight)) in enumerate(zip(grid.flat, panels)):
        axes.imshow(weight, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.xaxis.set_major_locator(FixedLocator(range(len(keys))))
        axes.set_xticklabels(keys, rotation=90, fontsize=7)
        if place % columns == 0:
            axes.yaxis.set_major_locator(FixedLocator(range(len(queries))))
            axes.set_yticklabels(queries, fontsize=7)
        else:
            axes.yaxis.set_major_locator(NullLocator())
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def mask_picture(mask: np.ndarray, *, title: str = "") -> Figure:
    """A boolean (T, S) mask as squares: filled where query i may look at key j."""
    figure = Figure(figsize=(0.6 + 0.25 * mask.shape[1], 0.9 + 0.25 * mask.shape[0]))
    axes = figure.subplots()
    axes.imshow(mask, vmin=0, vmax=1, cmap="Greens")
    axes.set_xticks(np.arange(mask.shape[1] + 1) - 0.5, labels=[])
    axes.set_yticks(np.arange(mask.shape[0] + 1) - 0.5, labels=[])
    axes.grid(color="grey", linewidth=0.5)
    axes.set(xlabel="key", ylabel="query", title=title)
    return figure
