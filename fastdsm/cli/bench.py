"""``fastdsm bench``: the benchmark suite, its rows as JSON lines, and whether the promised numbers were kept."""

from __future__ import annotations

import json
import sys
import tempfile
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
    which `python -m benchmarks.report` makes the README's table and figure.

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
    from benchmarks.rows import RESULTS, write_rows
    from benchmarks.targets import verdicts

    rows = _measured(console, device, threads, select)
    _print_times(console, rows)
    if not select:
        path = RESULTS / f"{device.value}.jsonl"
        write_rows(path, rows)
        console.print(f"{len(rows)} rows: {path}")
    kept = [verdict for verdict in verdicts(rows) if not select or verdict.measured is not None]
    if device is Device.CPU and kept:
        console.print(_promises(kept))
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
    from benchmarks.rows import row_of

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        options = [
            str(_CHECKOUT / "benchmarks"), f"--rootdir={_CHECKOUT}", "-o", "python_files=bench_*.py",
            "-o", "python_functions=bench_*", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--disable-warnings",
            f"--device={device.value}", f"--threads={threads}", "-k", select,
            "--benchmark-enable", "--benchmark-quiet", f"--benchmark-json={output}",
        ]  # fmt: skip
        code = pytest.main(options)
        if code != pytest.ExitCode.OK:
            raise typer.Exit(int(code))
        report = json.loads(output.read_text())
    return [row_of(record) for entry in report["benchmarks"] for record in entry["extra_info"]["rows"]]


def _print_times(console: Console, rows: list[Row]) -> None:
    """Everything measured, one table per case."""
    for (operation, shape, direction), group in groupby(rows, key=lambda row: (row.operation, row.shape, row.direction)):
        table = Table(title=f"{operation}, {'x'.join(map(str, shape))}, {direction}", title_justify="left", min_width=78)
        table.add_column("implementation", overflow="fold")
        for name in ("ms", "x eager", "% of clone", "memory", "error", "gradient"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            if row.left_out is not None:
                table.add_row(f"{row.implementation}: {row.left_out}")
                continue
            milliseconds = None if row.seconds_median is None else 1e3 * row.seconds_median
            memory = None if row.peak_extra_bytes is None else row.peak_extra_bytes / row.input_bytes
            numbers = (
                (milliseconds, ".2f"),
                (row.ratio_to_eager, ".2f"),
                (row.percent_of_floor, ".1f"),
                (memory, ".2f"),
                (row.error, ".1e"),
                (row.gradient_error, ".1e"),
            )
            texts = ("" if number is None else format(number, style) for number, style in numbers)
            table.add_row(row.implementation, *texts)
        console.print(table)
    console.print("memory: peak extra bytes in sizes of the input; error, gradient: against float64")


def _promises(kept: list[Verdict]) -> Table:
    """The promised numbers, pass or fail."""
    table = Table(title="Promised and measured: float32, 20 sweeps, attention 3")
    for name in ("shape", "direction", "promise"):
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
