"""The monitor's figure: mean sigma2 of every layer and head, over steps, or at the one step there is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measured import Row

_DARK, _GREY, _UNIFORM, _IDENTITY = "#1f2933", "#b8c0c8", "#c2571a", "#7b3fa0"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the figure (the format is the path's suffix), without touching pyplot's state, so that no display is needed."""
    if not rows:
        raise ValueError("there are no rows to draw: run at least one recorded step first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the figure needs matplotlib; install it with: pip install 'fastdsm[monitor]'") from None
    series: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        series[row.layer, row.head].append(row)
    several = any(len(found) > 1 for found in series.values())
    figure = Figure(figsize=(11, 5.5 if several else max(0.24 * len(series) + 1.5, 3)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    (_over_steps if several else _at_one_step)(axis, series)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _over_steps(axis: Any, series: dict[tuple[str, int], list[Row]]) -> None:
    from matplotlib import colormaps

    layers = list(dict.fromkeys(layer for layer, _ in series))
    for (layer, _), found in series.items():
        colour = colormaps["viridis"](layers.index(layer) / max(len(layers) - 1, 1))
        axis.plot([row.step for row in found], [row.sigma2 for row in found], color=colour, linewidth=1.2, alpha=0.85)
    _mark(axis, [(row.step, row.sigma2, row.collapse) for found in series.values() for row in found])
    axis.set_xlabel("step")
    axis.set_ylabel("mean σ₂")
    axis.set_ylim(bottom=0)
    axis.set_title(f"σ₂ of {len(layers)} layers, first (dark) to last (bright)", loc="left", color=_DARK)


def _at_one_step(axis: Any, series: dict[tuple[str, int], list[Row]]) -> None:
    rows = [found[0] for found in series.values()]
    for place, row in enumerate(rows):
        axis.plot([row.sigma2_min, row.sigma2_max], [place, place], color=_GREY, linewidth=3, solid_capstyle="round")
    axis.plot([row.sigma2 for row in rows], range(len(rows)), "o", color=_DARK, markersize=4)
    _mark(axis, [(row.sigma2, place, row.collapse) for place, row in enumerate(rows)])
    labels = [f"{row.layer} {row.head}" if any(head for _, head in series) else row.layer for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("σ₂: mean, least and largest")
    axis.set_title("σ₂ of every layer and head", loc="left", color=_DARK)


def _mark(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Collapse, by a marker of its colour."""
    for kind, colour in (("uniform", _UNIFORM), ("identity", _IDENTITY)):
        at = [(x, y) for x, y, collapse in points if collapse == kind]
        if at:
            axis.plot(*zip(*at, strict=True), "x", color=colour, markersize=6, label=f"collapsed: {kind}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
