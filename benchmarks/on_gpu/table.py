"""The table compiled by the Triton at hand, and what differs from the committed rows, another release's perhaps.

    python -m benchmarks.on_gpu.table OUT TARGET JOBS [MATCH]

Rows are appended to OUT as they are made, and what is there is not made again. Exit code 1 where a kernel does not compile or
spills.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

from fastdsm import kernels

from ..machine_code import STATIC
from ..static.record import build, build_of
from ..static.report import Row, faults, title
from ..static.table import compiled, places
from .lines import append, read

TABLE = "table.jsonl"
_COMPARED = ("registers", "stack_bytes", "local_bytes", "spill_instructions", "shared_bytes")


def make(out: Path, target: str, jobs: int, match: str = "") -> None:
    """Compile what ``out`` lacks."""
    table = kernels.configurations()
    made = {build_of(row) for row in read(out / TABLE)}
    chosen = [(index, target) for index, target in places([target], match) if build(table[index], target) not in made]
    for row in compiled(chosen, {}, jobs):
        append(out / TABLE, row)


def committed() -> dict[str, Row]:
    """The committed rows by their builds."""
    _, *rows = (json.loads(line) for line in STATIC.read_text().splitlines())
    return {build_of(row): row for row in rows}


def differences(rows: list[Row], known: dict[str, Row]) -> Iterator[str]:
    """What differs of each kernel, a line each; a row of other source is not compared, and a line says so."""
    for row in rows:
        before = known.get(build_of(row))
        if "error" in row:
            yield f"{title(row)}: does not compile: {row['error']}"
        elif before is None or before["source"] != row["source"]:
            yield f"{title(row)}: no committed row of this source"
        else:
            changed = [f"{name} {before[name]} -> {row[name]}" for name in _COMPARED if before[name] != row[name]]
            if changed:
                yield f"{title(row)}: {', '.join(changed)}"


def main(out: str, target: str, jobs: str, match: str = "") -> None:
    """Make the rows and print what differs."""
    make(Path(out), target, int(jobs), match)
    rows = read(Path(out) / TABLE)
    found = list(differences(rows, committed()))
    print(*found, sep="\n")
    failing = sum(bool(faults(row)) for row in rows)
    print(f"{len(rows)} kernels for {target}: {len(found)} differ from the committed rows, {failing} fail")
    sys.exit(1 if failing else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
