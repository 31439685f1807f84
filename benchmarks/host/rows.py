"""One row: what a call takes of the host, where, and beside what. Kept as JSON lines, those of each device by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from ..rows import RESULTS, Run, write_rows

HOST = RESULTS / "host.jsonl"
COMPILED = "one more in a compiled graph"
STUBBED, REAL, OWN = "stubbed", "real", "its own"
EMPTY = "an empty autograd.Function"


@dataclass(frozen=True)
class HostRow:
    """One call in one direction. A row with ``left_out`` says why nothing was timed; its numbers are None."""

    call: str
    shape: tuple[int, ...]  # of the input; attention: heads, lines, which operand, features
    direction: str  # FORWARD, BACKWARD (both, by autograd.grad) or COMPILED: a graph of three calls less one of one, halved
    launches: str  # STUBBED or REAL; OWN: of what has none to stub, its own work is in the time
    kernels: int | None  # launches of one call
    seconds_min: float | None  # least mean over the calls of a slice of a round
    seconds_median: float | None
    rounds: int
    ratio: float | None  # seconds_min / that of an empty autograd.Function in the same rounds; None of COMPILED
    left_out: str | None
    run: Run


def read(path: Path = HOST) -> list[HostRow]:
    """Read the rows of a file; ValueError where their fields are others."""
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        expected = {field.name for field in fields(HostRow)}
        if set(record) != expected:
            raise ValueError(f"a row has the fields {sorted(expected)}, got {sorted(record)}; run python -m benchmarks.host")
        found.append(HostRow(**{**record, "shape": tuple(record["shape"]), "run": Run(**record["run"])}))
    return found


def record(rows: Iterable[HostRow], path: Path = HOST) -> None:
    """Write rows in place of those of the same device."""
    rows = list(rows)
    devices = {row.run.device for row in rows}
    others = [row for row in read(path) if row.run.device not in devices] if path.exists() else []
    write_rows(path, [*rows, *others])
