"""From results to a folder: one figure each, all numbers as JSON, and a Markdown report that shows both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .result import DARK, Result

_INTRODUCTION = """# The homogeneity trap, measured

Doubly-stochastic mixing averages. "The Homogeneity Trap" (arXiv 2601.02080) says, by its abstract, that Sinkhorn's bias
towards high entropy suppresses sigma2, the second singular value, that sigma2 bounds how deep such a network can see, and
that LayerNorm does not restore what noise has covered. The laws and bounds below are derived in fastdsm.diagnostics; each
table has measured beside predicted.
"""


def write(results: Sequence[Result], conditions: str, folder: Path) -> Path:
    """Write everything into ``folder``; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_INTRODUCTION, f"{conditions}\n"]
    for result in results:
        _figure(result, folder / f"{result.name}.png")
        parts += [f"## {result.title}\n", f"{result.text}\n", f"![{result.title}]({result.name}.png)\n", _table(result)]
    tables = {result.name: [dict(zip(result.columns, row, strict=True)) for row in result.rows] for result in results}
    numbers = json.dumps(_finite(tables), indent=1, allow_nan=False)
    (folder / "numbers.json").write_text(numbers + "\n", encoding="utf-8")
    report = folder / "report.md"
    report.write_text("\n".join(parts), encoding="utf-8")
    return report


def cell(value: float | str) -> str:
    """A number in four significant digits; words as they are."""
    return value if isinstance(value, str) else f"{value:.4g}"


def _finite(value: object) -> object:
    """Infinite numbers as words, which JSON has none for."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return str(value) if value in (float("inf"), float("-inf")) or value != value else value


def _table(result: Result) -> str:
    lines = [result.columns, ["---:"] * len(result.columns), *([cell(x) for x in row] for row in result.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figure(result: Result, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * result.panels, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, result.panels, squeeze=False)[0]
    result.draw(list(axes))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result.title, x=0.01, ha="left", fontweight="bold", color=DARK)
    figure.savefig(path)
