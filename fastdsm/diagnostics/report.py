"""``spectral_report``: the spectra of a network's Sinkhorn layers on one batch, as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from .measured import Row
from .monitor import SpectralMonitor
from .streams import StreamRow


def spectral_report(
    model: nn.Module,
    batch: Any,
    *,
    figure: str | Path | None = "spectral_report.png",
    sample: int = 1024,
    file: TextIO | None = None,
) -> list[Row]:
    """Run ``model`` on ``batch`` once, without gradient; print a table of every Sinkhorn layer and head and save a figure.

    Args:
        model: a module with fastdsm layers; it runs in the mode it is in.
        batch: a tensor, or a tuple or list of positional, or a mapping of keyword arguments.
        figure: where to save it, None for no figure; needs the extra ``fastdsm[monitor]``.
        sample: plans per layer and head at most.
        file: where to print, by default standard output.

    Returns:
        The rows, one per layer and head; [] and a line that says so where no fastdsm layer was called. Of mHC layers what
        becomes of their streams is printed too (``SpectralMonitor.stream_rows``).
    """
    with torch.no_grad(), SpectralMonitor(model, sample=sample, training_only=False) as monitor:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    if not monitor.rows:
        print("no fastdsm layer was called: nothing to report", file=file)
        return []
    print(*_table(monitor.rows), sep="\n", file=file)
    if monitor.stream_rows:
        print("", *_stream_table(monitor.stream_rows), sep="\n", file=file)
    if figure is not None:
        monitor.figure(figure)
        print(f"figure: {figure}", file=file)
    return monitor.rows


def _table(rows: list[Row]) -> list[str]:
    """Lines of text, numbers to the right."""
    cells = [["layer", "head", "sigma2", "range", "to uniform", "to identity", "residual", "collapse"]]
    for row in rows:
        extent = f"{row.sigma2_min:.2f}-{row.sigma2_max:.2f}"
        distances = ("" if x != x else f"{x:.3f}" for x in (row.to_uniform, row.to_identity))
        numbers = (str(row.head), f"{row.sigma2:.3f}", extent, *distances, f"{row.residual:.0e}")
        cells.append([row.layer or "(model)", *numbers, row.collapse])
    lines = _aligned(cells, "<" + ">" * 6 + "<")
    return [*lines, "to uniform, to identity: distances, 0 there and 1 from one to the other"]


def _stream_table(rows: list[StreamRow]) -> list[str]:
    """The same of streams: extremes of a layer's mix and of the product of all up to it."""
    cells = [["streams of", "sigma2", "sigma min", "through depth", "sigma min", "cosine"]]
    for row in rows:
        values = [x for part in (row.singular_values, row.through_depth) for x in ((part[0], part[-1]) if part else (1.0, 1.0))]
        cells.append([row.layer or "(model)", *(f"{x:.3g}" for x in values), f"{row.cosine:.3f}"])
    lines = _aligned(cells, "<" + ">" * 5)
    return [
        *lines,
        "through depth: sigma2 and sigma min of the product of all mixes so far; cosine: of the streams that come in",
    ]


def _aligned(cells: list[list[str]], sides: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{x:{side}{width}}" for x, side, width in zip(line, sides, widths, strict=True)).rstrip() for line in cells
    ]
