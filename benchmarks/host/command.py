"""The command: measure, print, record, and fail if a promise is missed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import targets
from .rows import COMPILED, HOST, OWN, HostRow, record
from .timing import measured


def main(
    device: Annotated[str, typer.Option(help="cpu, where launches are stubbed; cuda: stubbed, and real")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="of some milliseconds of each call")] = 50,
    match: Annotated[str, typer.Option(help="only calls whose text contains this; nothing is recorded")] = "",
) -> None:
    """What the host does for every public call, with one thread; exit code 1 if a promise is missed.

    The rows replace those of the same device in benchmarks/results/host.jsonl, from which docs/performance.md has a table.
    """
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device}")
    torch.set_num_threads(1)
    console = Console()
    rows = list(measured(device, rounds, match))
    console.print(*tables(rows), "x empty: of an empty autograd.Function", sep="\n")
    if not match:
        record(rows)
        console.print(f"{len(rows)} rows: {HOST}")
    verdicts = [x for x in targets.verdicts(rows) if not match or x.measured is not None]
    missed = [x for x in verdicts if not x.ok]
    for x in missed:
        found = "not measured" if x.measured is None else f"measured {x.measured:.2f}"
        console.print(f"missed: {x.direction}, {x.promise} {x.required:g}, {found}", style="red", markup=False)
    console.print(f"{len(verdicts) - len(missed)} of {len(verdicts)} promises kept")
    raise typer.Exit(1 if missed else 0)


def tables(rows: Iterable[HostRow]) -> Iterator[Table]:
    """Every row: microseconds, how many empty Functions that is, and what was promised."""
    rows = list(rows)
    for direction, launches in dict.fromkeys((row.direction, row.launches) for row in rows if row.launches != OWN):
        title = f"{direction}, launches {launches}"
        shown = Table(title=title, title_justify="left", min_width=78)
        shown.add_column("call", overflow="fold")
        for name in ("us", "x empty", "promised", ""):
            shown.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row.direction == direction and row.launches in (launches, OWN):
                reason = f": {row.left_out}" if row.left_out is not None else ""
                shown.add_row(f"{row.call}, {'x'.join(map(str, row.shape))}{reason}", *_cells(row))
        yield shown


def _cells(row: HostRow) -> list[str]:
    if row.seconds_min is None:
        return []
    verdict = targets.verdict(row)
    cells = [f"{1e6 * row.seconds_min:.2f}", "" if row.ratio is None else f"{row.ratio:.2f}"]
    if verdict is None:
        return cells
    unit = "us" if row.direction == COMPILED else "x"
    return [*cells, f"{verdict.required:g} {unit}", "[green]kept[/green]" if verdict.ok else "[red]missed[/red]"]
