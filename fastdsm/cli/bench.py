"""``fastdsm bench``: the benchmark suite, its rows as JSON lines, and whether the promised numbers were kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from benchmarks.rows import Row
    from benchmarks.targets import Verdict

_CHECKOUT = Path(__file__).parents[2]


class Device(StrEnum):
    """What ``--device`` may name."""

    CPU = "cpu"
    CUDA = "cuda"


def bench(
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.CPU,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch on the CPU.")] = 2,
    select: Annotated[
        str, typer.Option("-k", metavar="EXPR", help="Only matching benchmarks (pytest's -k); nothing is recorded.")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where a promised number is missed.")] = False,
) -> None:
    """Measure every operation beside what one would use instead, in interleaved rounds; about five minutes on a CPU.

    Needs a checkout of the repository and the extra [bench]. The rows replace benchmarks/results/DEVICE.jsonl, from
    which `python -m benchmarks.report` makes docs/performance.md, the README's table and the figures; a run that is cut off
    leaves DEVICE.part.jsonl.

    Examples:

        fastdsm bench

        fastdsm bench -k "sigma2 and 64"

        fastdsm bench --device cuda
    """
    console = Console()
    if not (_CHECKOUT / "benchmarks" / "harness.py").exists():
        console.print(
            "fastdsm bench needs a checkout: the benchmarks are not part of the installed package; "
            'clone the repository, run pip install -e ".[bench]" in it, and call it again',
            style="red",
            markup=False,
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(_CHECKOUT))
    from benchmarks import gpu_targets, targets
    from benchmarks.rows import RESULTS, write_rows

    rows = _measured(console, device, threads, select)
    _print_times(console, rows)
    if not select:
        path = RESULTS / f"{device.value}.jsonl"
        write_rows(path, rows)
        console.print(f"{len(rows)} rows: {path}")
    verdicts = (targets if device is Device.CPU else gpu_targets).verdicts(rows)
    kept = [verdict for verdict in verdicts if not select or verdict.measured is not None]
    if kept:
        console.print(_promises(kept, device))
        if strict and not all(verdict.ok for verdict in kept):
            raise typer.Exit(1)


def _measured(console: Console, device: Device, threads: int, select: str) -> list[Row]:
    """Run the suite under pytest and collect what each benchmark left in its extra_info."""
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        message = f'fastdsm bench needs the extra [bench] ({error}); in the checkout: pip install -e ".[bench]"'
        console.print(message, style="red", markup=False)
        raise typer.Exit(2) from error
    from benchmarks.rows import RESULTS, read_rows
    from benchmarks.suite import options

    output = RESULTS / f"{device.value}.part.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("")
    code = pytest.main(options(device.value, threads, select, output))
    if code != pytest.ExitCode.OK:
        console.print(f"what was measured until then: {output}", markup=False)
        raise typer.Exit(int(code))
    rows = read_rows(output)
    output.unlink()
    if not rows:
        console.print(f"nothing to measure on {device.value}" + f" matches {select}" * bool(select), markup=False)
        raise typer.Exit(2)
    return rows


def _print_times(console: Console, rows: list[Row]) -> None:
    """Everything measured, one table per case."""
    for (operation, shape, direction), of_case in groupby(rows, key=lambda row: (row.operation, row.shape, row.direction)):
        group = list(of_case)
        on_device = any(row.device_seconds is not None for row in group)
        table = Table(title=f"{operation}, {'x'.join(map(str, shape))}, {direction}", title_justify="left", min_width=78)
        table.add_column("implementation", overflow="fold")
        columns: list[tuple[str, str, Callable[[Row], float | None]]] = [
            ("ms", ".3g", lambda row: _scaled(row.seconds_median, 1e3)),
            ("x eager", ".2f", lambda row: row.ratio_to_eager),
            *[
                ("in a graph", ".3g", lambda row: _scaled(row.device_seconds, 1e3)),
                ("x eager", ".2f", lambda row: row.device_ratio_to_eager),
            ]
            * on_device,
            ("% of clone", ".1f", lambda row: row.percent_of_floor),
            ("memory", ".2f", lambda row: _scaled(row.peak_extra_bytes, 1 / row.input_bytes)),
            ("error", ".1e", lambda row: row.error),
            ("gradient", ".1e", lambda row: row.gradient_error),
        ]
        for name, _, _ in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            if row.left_out is not None:
                table.add_row(f"{row.implementation}: {row.left_out}")
                continue
            numbers = [(number(row), style) for _, style, number in columns]
            table.add_row(row.implementation, *("" if x is None else format(x, style) for x, style in numbers))
        console.print(table)
    console.print("memory: peak extra bytes in sizes of the input; error, gradient: against float64")
    if any(row.device_seconds is not None for row in rows):
        console.print("in a graph: ms of a call among others in a CUDA graph, without what the host does for it")


def _scaled(number: float | None, factor: float) -> float | None:
    return None if number is None else number * factor


def _promises(kept: list[Verdict], device: Device) -> Table:
    """The promised numbers, pass or fail."""
    where = "attention 3" if device is Device.CPU else "attention bfloat16, 3"
    table = Table(title=f"Promised and measured: float32, 20 sweeps, {where}")
    for name in ("shape", "direction" if device is Device.CPU else "operation", "promise"):
        table.add_column(name)
    for name in ("required", "measured", ""):
        table.add_column(name, justify="right")
    for verdict in kept:
        table.add_row(
            "x".join(map(str, verdict.shape)),
            verdict.direction,
            verdict.promise,
            f"{verdict.required:g}",
            "not measured" if verdict.measured is None else f"{verdict.measured:.2f}",
            "[green]pass[/green]" if verdict.ok else "[red]fail[/red]",
        )
    return table
