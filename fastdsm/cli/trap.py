"""``fastdsm trap``: the homogeneity trap and the way out, measured against predicted, as tables, figures and a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__
from .outputs import writable_folder

if TYPE_CHECKING:
    from ..trap.result import Result


def trap(
    out: Annotated[
        Path,
        typer.Option(help="Folder for the report, the figures and the numbers.", file_okay=False, callback=writable_folder),
    ] = Path("trap_output"),
    trained: Annotated[bool, typer.Option("--trained", help="Also train small networks on digits, some minutes.")] = False,
    mhc: Annotated[bool, typer.Option("--mhc", help="Also train small mHC language models, some minutes.")] = False,
) -> None:
    """Measure the homogeneity trap: temperature, depth, noise, residual connections, and sigma2 held at a floor.

    Five experiments, each with measured beside predicted, on random logits and on the attention of all-MiniLM-L6-v2. Seeds are
    fixed. Offline, on the CPU, in minutes. With --trained a sixth: deep networks that learn handwritten digits, their tokens
    mixed by softmax, by Sinkhorn, and by Sinkhorn with a floor under sigma2. With --mhc a character language model on mHC
    streams: plain, mHC, mHC with a floor, and streams that are never mixed.

    Needs the extra: pip install 'fastdsm\\[demo]'

    Examples:

        fastdsm trap

        fastdsm trap --trained --out results
    """
    from ..demo.model import DemoUnavailableError, attention_logits, require_extra
    from ..trap import depth, digits, floor, language, noise, residual, temperature
    from ..trap.report import write

    console = Console()
    try:
        require_extra()
    except DemoUnavailableError as error:
        console.print(str(error), markup=False, style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    experiments: dict[str, Callable[[], Result]] = {
        "temperature": temperature.run,
        "depth": lambda: depth.run(attention_logits().logits),
        "noise": noise.run,
        "residual connections": residual.run,
        "the way out": floor.run,
    }
    if trained:
        experiments["training on digits"] = digits.run
    if mhc:
        experiments["language models on mHC streams"] = language.run
    start, results = time.perf_counter(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.no_grad(), Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(experiments))
        for name, run in experiments.items():
            progress.update(bar, description=name)
            results.append(run())
            progress.advance(bar)
    conditions = (
        f"fastdsm {__version__}, torch {torch.__version__}, {platform.machine()}, CPU threads: {torch.get_num_threads()}, "
        f"{time.perf_counter() - start:.0f} s."
    )
    for result in results:
        console.print(_table(result))
        console.print(result.text, highlight=False)
    console.print(f"report: {write(results, conditions, out)}", highlight=False)


def _table(result: Result) -> Table:
    from ..trap.report import cell

    table = Table(title=result.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in result.columns:
        table.add_column(name, justify="right", vertical="bottom")
    for row in result.rows:
        table.add_row(*map(cell, row))
    return table
