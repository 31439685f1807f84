"""The committed record of executions: a row for each configuration and target that was found clean, as its source is now."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.static.compilation import kernel_name, source
from benchmarks.static.record import build, build_of
from benchmarks.static.report import ordered
from fastdsm.kernels.common.configuration import TARGETS, Configuration

from .table import reason, wanted

RESULTS = Path(__file__).parents[1] / "results" / "execution.jsonl"

Row = dict[str, Any]


def read(path: Path) -> dict[str, Row]:
    """Rows by build, of the compiler at hand."""
    if not path.exists():
        return {}
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return {build_of(row): row for row in rows} if _compiler().items() <= header.items() else {}


def missing(rows: dict[str, Row], target: str) -> list[Configuration]:
    """What is to be executed for a target and has no row, or one of other source."""
    return [x for x in wanted(target) if not reason(x, target) and not _current(rows, x, target)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Put ``rows`` in the place of those of the same builds, but for those that fail, and leave out what is not current.

    The header says how much of the table that is: rows, what is not executed by its reason, what is left by its kernel.
    """
    path.parent.mkdir(exist_ok=True)
    with _alone(path.parent):
        known = read(path) | {build_of(row): row for row in rows}
        known = {key: row for key, row in known.items() if not faults(row)}
        kept = [known[build(x, target)] for target in TARGETS for x in wanted(target) if _current(known, x, target)]
        new = path.with_suffix(".new")
        new.write_text("\n".join(json.dumps(x) for x in (_compiler() | counts(known), *ordered(kept))) + "\n")
        new.replace(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: parts of a run may go side by side."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def counts(rows: dict[str, Row]) -> dict[str, Any]:
    """By target: configurations that have a row, those that are not executed by their reason, those left by their kernel."""
    return {
        target: {
            "executed": sum(_current(rows, x, target) for x in wanted(target)),
            "unexecuted": dict(sorted(Counter(filter(None, (reason(x, target) for x in wanted(target)))).items())),
            "left": dict(sorted(Counter(kernel_name(x) for x in missing(rows, target)).items())),
        }
        for target in TARGETS
    }


def faults(row: Row) -> list[str]:
    """Why a row fails; empty where nothing harmful was found and all errors are within their budgets."""
    name = f"{row['kernel']} {row['label']} {row['target']}"
    found = [f"{name}: {issue}" for issue in row["harmful"]]
    if not row["at"]:
        found.append(f"{name}: no result of it was judged")
    for what, worst in (("error", row), ("error with noise", row["noise"])):
        if worst is not None and not worst["worst"] <= 1:
            found.append(f"{name}: {what} {worst['worst']} times its budget, {worst['at']}")
    return found


def _current(rows: dict[str, Row], configuration: Configuration, target: str) -> bool:
    return rows.get(build(configuration, target), {}).get("source") == source(configuration)


def _compiler() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}
