"""``spectral_report``: the spectra of a network's Sinkhorn layers on one batch, as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .measured import Row
from .monitor import SpectralMonitor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def spectral_report(
    model: nn.Module,
    batch: Any,
    *,
    figure: str | Path | None = "spectral_report.png",
    sample: int = 1024,
    console: Console | None = None,
) -> list[Row]:
    """Run ``model`` on ``batch`` once, without gradient; print a table of every Sinkhorn layer and head and save a figure.

    Args:
        model: a module with fastdsm layers; it runs in the mode it is in.
        batch: a tensor, or a tuple or list of positional, or a mapping of keyword arguments.
        figure: where to save it, None for no figure; needs the extra ``fastdsm[monitor]``.
        sample: plans per layer and head at most.
        console: a rich Console; by default one on standard output.

    Returns:
        The rows, one per layer and head; [] and a line that says so where no fastdsm layer was called.
    """
    from rich.console import Console

    with torch.no_grad(), SpectralMonitor(model, sample=sample, training_only=False) as monitor:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    console = Console() if console is None else console
    if not monitor.rows:
        console.print("no fastdsm layer was called: nothing to report")
        return []
    console.print(_table(monitor.rows))
    if figure is not None:
        monitor.figure(figure)
        console.print(f"figure: {figure}", highlight=False)
    return monitor.rows


def _table(rows: list[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="Spectra", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.caption = "to uniform, to identity: distances, 0 there and 1 from one to the other"
    table.add_column("layer", vertical="bottom", overflow="fold")
    for name in ("head", "sigma2", "range", "to\nuniform", "to\nidentity", "residual"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("collapse")
    for row in rows:
        extent = f"{row.sigma2_min:.2f}-{row.sigma2_max:.2f}"
        distances = ("" if x != x else f"{x:.3f}" for x in (row.to_uniform, row.to_identity))
        name = row.layer or "(model)"
        table.add_row(name, str(row.head), f"{row.sigma2:.3f}", extent, *distances, f"{row.residual:.0e}", row.collapse)
    return table
