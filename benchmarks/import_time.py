"""What ``import fastdsm`` takes beyond torch: python -m benchmarks.import_time [pairs]

Fresh processes in pairs, ``import torch`` in one and ``import torch, fastdsm`` in the other, in alternating order, each timing
its own statement; a first pair, which may compile bytecode and read cold files, is not counted. Printed is the median
difference of a pair, and its row replaces benchmarks/results/import.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from statistics import median

from .rows import RESULTS, ROOT, Run, current_run

_TIMED = "from time import perf_counter; start = perf_counter(); import {modules}; print(perf_counter() - start)"


@dataclass(frozen=True)
class ImportRow:
    """Seconds of the two statements in pairs of fresh processes."""

    statement: str
    rounds: int
    seconds_median: float
    torch_seconds_median: float  # of `import torch`
    beyond_seconds_median: float  # of the differences within pairs
    beyond_seconds_min: float
    run: Run


def measured(pairs: int) -> ImportRow:
    """Time so many pairs, after one that is not counted."""
    torch_alone: list[float] = []
    both: list[float] = []
    for pair in range(-1, pairs):
        order = (("torch", torch_alone), ("torch, fastdsm", both))
        for modules, seconds in order[:: 1 if pair % 2 else -1]:
            seconds.append(_seconds(modules))
    del torch_alone[0], both[0]
    beyond = [b - a for a, b in zip(torch_alone, both, strict=True)]
    numbers = median(both), median(torch_alone), median(beyond), min(beyond)
    return ImportRow("import torch, fastdsm", pairs, *numbers, current_run("cpu"))


def _seconds(modules: str) -> float:
    command = [sys.executable, "-c", _TIMED.format(modules=modules)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print and record."""
    row = measured(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
    (RESULTS / "import.jsonl").write_text(json.dumps(asdict(row)) + "\n")
    print(f"import torch: {row.torch_seconds_median:.3f} s")
    print(f"fastdsm beyond it: {row.beyond_seconds_median:.3f} s, at best {row.beyond_seconds_min:.3f} s, {row.rounds} pairs")


if __name__ == "__main__":
    main()
