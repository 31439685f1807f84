"""The section of docs/performance.md on machine code, from the committed results of ``python -m benchmarks.static``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .rows import RESULTS

STATIC = RESULTS / "static.jsonl"
_SMALL = ((4, "forward"), (4, "forward+sigma2"), (4, "backward"), (8, "forward"), (8, "backward"))


def section(path: Path = STATIC) -> str:
    """How many kernels were compiled, whether any spills, and what the small float32 matrices of mHC cost by target."""
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    spilling = sum(bool(row.get("error") or row["stack_bytes"] or row["local_bytes"]) for row in rows)
    targets = sorted({row["target"] for row in rows}, key=lambda target: int(target.removeprefix("sm_")))
    lines = [
        "| float32, 20 sweeps | " + " | ".join(targets) + " |",
        "| --- |" + " ---: |" * len(targets),
    ]
    for n, operation in _SMALL:
        cells = (_cell(_found(rows, target, n, operation)) for target in targets)
        lines.append(f"| {n} × {n}, {operation.replace('+', ' + ')} | {' | '.join(cells)} |")
    return (
        f"{len(rows):,} builds compiled of the {header['of']:,} that can be launched, for {', '.join(targets)}: "
        f"{spilling or 'none'} of them {'spill' if spilling != 1 else 'spills'}. Thread-instructions per matrix (registers), "
        f"counted in the machine code:\n\n" + "\n".join(lines) + f"\n\ntriton {header['triton']}, ptxas {header['ptxas']}."
    )


def sources(path: Path = STATIC) -> set[str]:
    """Hashes of the device code that the committed results are of."""
    _, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return {row["source"] for row in rows}


def _found(rows: list[dict[str, Any]], target: str, n: int, operation: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row and the executed call of n x n matrices."""
    wanted = {"operation": operation, "n": n, "m": n, "dtype": "float32"}
    return next(
        (row, call)
        for row in rows
        if row["target"] == target
        for call in row.get("executed", [])
        if wanted.items() <= call.items()
    )


def _cell(found: tuple[dict[str, Any], dict[str, Any]]) -> str:
    row, call = found
    return f"{call['thread_instructions_per_matrix']:,.0f} ({row['registers']})"
