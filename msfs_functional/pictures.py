"""Pictures of a run: a training curve and an attention map, drawn without a display.

Every function returns a matplotlib `Figure` made by itself: pyplot, its global state and the
choice of a backend are left alone, so pictures can be drawn from a thread, a server or a notebook.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from numpy.typing import NDArray
from torch import Tensor

# DejaVu comes with matplotlib (Latin, Greek, Cyrillic, Arabic, ...); the rest if installed.
_FONTS = [
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Hebrew",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
]


def _fonts() -> list[str]:
    installed = set(fontManager.get_font_names())
    return [name for name in _FONTS if name in installed]


def _visible(token: str) -> str:
    """A label that takes one line and shows spaces and control characters."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
    return shown.replace(" ", "␣") or "∅"


def training_curve(
    records: Iterable[Mapping[str, Any]],
    keys: Sequence[str] = ("loss",),
    *,
    x: str = "step",
    logarithmic: bool = False,
) -> Figure:
    """Metrics against the step (or seconds, or tokens), one line for each key.

    Args:
        records: as `tracking.read_metrics` gives them; a record without a key is passed over.
        keys: the metrics to draw.
        x: the horizontal axis: "step", "seconds" or "tokens".
        logarithmic: draw the vertical axis in powers of ten.

    Raises:
        ValueError: no record has any of the keys.
    """
    records = list(records)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    drawn = False
    for key in keys:
        points = [(record[x], record[key]) for record in records if x in record and key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else "")
            drawn = True
    if not drawn:
        raise ValueError(f"none of {len(records)} records has {x!r} and one of {list(keys)}")
    axes.set_xlabel(x)
    if logarithmic:
        axes.set_yscale("log")
    if len(keys) == 1:
        axes.set_ylabel(keys[0])
    else:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure


def attention_map(
    weights: Float[Tensor, "*H T S"],
    target_tokens: Sequence[str],
    source_tokens: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Attention probabilities as squares: queries downwards, keys from left to right.

    Args:
        weights: probabilities in [0, 1] of one head, or of several (one picture each).
        target_tokens: T labels of the queries; any Unicode, drawn as they are (no TeX).
        source_tokens: S labels of the keys.
        title: a line above.

    Raises:
        ValueError: weights are not 2-d or 3-d, or the labels are not as many as rows and columns.
    """
    rows, columns = len(target_tokens), len(source_tokens)
    if weights.ndim not in (2, 3) or tuple(weights.shape[-2:]) != (rows, columns):
        raise ValueError(
            f"weights {tuple(weights.shape)} must be (T, S) or (H, T, S) with T = {rows} target "
            f"and S = {columns} source tokens"
        )
    heads = weights.detach().float().cpu().reshape(-1, rows, columns).numpy()
    across = math.ceil(math.sqrt(len(heads)))
    down = math.ceil(len(heads) / across)
    width, height = (min(1.5 + 0.32 * count, 24.0) for count in (columns, rows))
    scale = min(1.0, 48.0 / max(across * width, down * height))
    size = across * width * scale, down * height * scale
    figure = Figure(figsize=size, layout="constrained")
    fonts = _fonts()
    image = None
    for head, weight in enumerate(heads):
        axes = figure.add_subplot(down, across, head + 1)
        image = axes.imshow(weight, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        for axis, tokens, rotation in (
            (axes.xaxis, source_tokens, 90),
            (axes.yaxis, target_tokens, 0),
        ):
            axis.set_ticks(range(len(tokens)))
            axis.set_ticklabels(
                [_visible(token) for token in tokens],
                rotation=rotation,
                fontfamily=fonts,
                fontsize=8,
                parse_math=False,
            )
        axes.xaxis.tick_top()
        if len(heads) > 1:
            axes.set_xlabel(f"head {head}", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.6, label="probability")
    if title:
        figure.suptitle(" ".join(title.split()), fontfamily=fonts, parse_math=False)
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The picture as (height, width, 4) bytes of red, green, blue and opacity."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():  # a script without an installed font shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def save_png(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write the picture as a PNG, its directory made if missing; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=dpi, format="png")
    return path
