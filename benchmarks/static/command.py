"""The command: compile every launchable kernel for every target, report, record, and fail if any spills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdsm import kernels
from fastdsm.kernels.common.configuration import TARGETS

from .record import record
from .report import Row, faults, ordered, summary, title
from .table import rows_of

RESULTS = Path(__file__).parents[1] / "results" / "static.jsonl"


def main(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100; may be repeated")] = None,
    match: Annotated[str, typer.Option(help="only kernels whose name, constants, types or label contain this")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> None:
    """Compile every launchable kernel without a GPU; a JSON line each; exit code 1 if any spills.

    The rows replace those of the same builds in benchmarks/results/static.jsonl.
    """
    targets = target or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        raise typer.BadParameter(f"expected targets among {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compile", total=None)
        for total, row in rows_of(targets, match, jobs):
            progress.update(task, total=total, advance=1)
            rows.append(row)
    rows = ordered(rows)
    lines = [json.dumps(row) for row in rows]
    print(*lines, sep="\n")
    record(RESULTS, rows, kernels.configurations())
    for table in summary(rows):
        console.print(table)
    failed = [(title(row), reason) for row in rows for reason in faults(row)]
    for name, reason in failed:
        console.print(f"[red]{escape(name)}[/red]: {escape(reason)}", highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} compiled, {len({name for name, _ in failed})} fail")
    raise typer.Exit(1 if failed or not rows else 0)
