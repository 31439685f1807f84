"""``fastdsm verify``: every call against the float64 oracle, errors beside budgets, exit code 1 on a miss."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .outputs import writable_file

if TYPE_CHECKING:
    from .._verify.sinkhorn import Case, Record, Target

_SHOWN_MISSES = 12
_CASES_AT_A_TIME = 5  # neighbours differ in their logit scale alone: one process compiles the kernels of all of them


class Backend(StrEnum):
    """What ``--backend`` may name."""

    ALL = "all"
    TRITON = "triton"
    TORCH = "torch"


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the grid, a few seconds.")] = False,
    backend: Annotated[Backend, typer.Option(help="Verify one backend only.")] = Backend.ALL,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes; of one thread each if several.")] = 1,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every comparison to FILE.", dir_okay=False, callback=writable_file),
    ] = None,
) -> None:
    """Hold every call to its error budget, on whatever this machine has.

    Plans, residuals, gradients, sigma2, its certified bounds, Newton's method and attention are compared with the float64
    oracle over shapes, dtypes, logit scales, numbers of sweeps and options: the Triton kernels on a CUDA device, the same
    kernels in Triton's interpreter where TRITON_INTERPRET=1 is set (tiny sizes), and the PyTorch path. Exit code 1 on any miss.

    Budget, float32: twice the error of plain log-domain PyTorch, plus 1e-6. float16 and bfloat16 add half a unit in the
    last place; float64 scales the float32 figure down. `fastdsm._verify.sinkhorn` derives it.

    Examples:

        fastdsm verify

        fastdsm verify --quick --json verify.json

        fastdsm verify --jobs 16

        TRITON_INTERPRET=1 fastdsm verify --backend triton
    """
    from .._verify.grid import grid
    from .._verify.sinkhorn import targets

    console = Console()
    chosen = [target for target in targets() if backend in (Backend.ALL, target.backend)]
    if not chosen:
        console.print(
            f"[red]--backend {backend.value}[/red] needs a CUDA device or Triton's interpreter, and here is neither; "
            "set TRITON_INTERPRET=1, or use --backend torch"
        )
        raise typer.Exit(2)
    records: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        asked = [(case, target) for target in chosen for case in grid(target, quick)]
        bars = {target: progress.add_task(str(target), total=sum(x == target for _, x in asked)) for target in chosen}
        for target, found in _verified(asked, jobs):
            records += found
            progress.advance(bars[target])
    for target in chosen:
        console.print(_table(target, records))
    if json_file is not None:
        _write(json_file, records)
        console.print(f"all {len(records)} comparisons: {json_file}")
    misses = [record for record in records if not record.ok]
    if misses:
        _print_misses(console, misses)
        raise typer.Exit(1)
    console.print(f"[green]{len(records)} comparisons, every one within its budget[/green]")


def _verified(asked: list[tuple[Case, Target]], jobs: int) -> Iterator[tuple[Target, list[Record]]]:
    """What each case shows, in this process or in ``jobs`` others, in order."""
    if jobs == 1:
        yield from map(_verify, asked)
        return
    with get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # CUDA bears no fork
        yield from pool.imap(_verify, asked, chunksize=_CASES_AT_A_TIME)


def _verify(case_and_target: tuple[Case, Target]) -> tuple[Target, list[Record]]:
    from .._verify.grid import verify

    case, target = case_and_target
    return target, verify(case, target)


def _table(target: Target, records: list[Record]) -> Table:
    """One row per group and dtype: how many comparisons, and the one closest to its budget."""
    table = Table(
        title=f"{target}: errors against float64",
        caption="worst: the comparison that uses most of its budget",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("group", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("checks", "misses", "error", "budget", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst")
    rows: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.target == str(target):
            rows.setdefault((record.group, str(record.case.dtype).removeprefix("torch.")), []).append(record)
    for group in ("forward", "gradient", "sigma2", "bounds", "newton", "attention", "mhc"):
        for row in [row for row in rows if row[0] == group]:
            worst = max(rows[row], key=lambda record: record.share)
            misses = sum(not record.ok for record in rows[row])
            table.add_row(
                *row,
                str(len(rows[row])),
                f"[red]{misses}[/red]" if misses else "0",
                f"{worst.error:.1e}",
                f"{worst.budget:.1e}",
                f"{worst.share:.0%}" if worst.share < 10 else f"{worst.share:.0f}x",
                escape(f"{worst.quantity}, {worst.case.summary}"),
            )
        table.add_section()
    return table


def _print_misses(console: Console, misses: list[Record]) -> None:
    """The worst misses, one line each."""
    console.print(f"[red]{len(misses)} over budget[/red]")
    for record in sorted(misses, key=lambda record: record.share, reverse=True)[:_SHOWN_MISSES]:
        console.print(
            f"  {record.target}: {record.quantity}; {record.case}: {record.error:.2e} > {record.budget:.2e}",
            markup=False,
        )
    if len(misses) > _SHOWN_MISSES:
        console.print(f"  and {len(misses) - _SHOWN_MISSES} more; --json FILE keeps all")


def _write(path: Path, records: list[Record]) -> None:
    """Machine, versions and every comparison; NaN, which JSON lacks, becomes null."""
    rows = [record.as_dict() for record in records]
    for row in rows:
        row |= {key: None for key in ("error", "budget") if row[key] != row[key]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    document = {"torch": torch.__version__, "python": platform.python_version(), "device": device, "comparisons": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
