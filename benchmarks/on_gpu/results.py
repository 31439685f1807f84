"""What a folder of results says, in a few lines, and its rows brought to the committed ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..host import rows as host_rows
from ..rows import RESULTS, Row, read_rows, row_of, write_rows
from . import host, timing, verification
from .lines import read
from .outcomes import outcomes
from .runner import FAILED, Progress, Step, progress_of
from .steps import ROWS, TESTS
from .table import TABLE, committed, differences


def failed(out: Path, steps: Sequence[Step]) -> bool:
    """Whether a step ran to its end and found something."""
    found = progress_of(out)
    return any(found.get(step.name, Progress()).outcome == FAILED for step in steps)


def summary(out: Path, steps: Sequence[Step]) -> Iterator[str]:
    """What has come of each step, and what is in the files."""
    progress = progress_of(out)
    yield "--- steps"
    for step in steps:
        x = progress.get(step.name, Progress())
        yield f"{step.name}: {x.outcome or 'not begun'}, {x.seconds:.0f} s{f', {x.reason}' if x.reason else ''}"
    yield "--- found"
    rows = read(out / TABLE)
    yield f"table: {len(rows)} kernels, {len(list(differences(rows, committed())))} unlike the committed rows"
    tests = outcomes(out / TESTS)
    yield f"tests and benchmarks: {_text(Counter(tests.values()))}"
    yield from (f"  {outcome}: {name}" for name, outcome in tests.items() if outcome not in ("passed", "skipped"))
    number, missed = verification.misses(out)
    yield f"verify: {number} comparisons, {len(missed)} over their budget"
    yield f"rows: {len(read(out / ROWS))} of benchmarks, {len(read(out / host.ROWS))} of the host"
    ratios = [line["measured_over_predicted"] for line in read(out / timing.TIMES)]
    known = [ratio for ratio in ratios if ratio is not None]
    within = sum(1 / 1.25 <= ratio <= 1.25 for ratio in known)
    yield f"prediction: {len(ratios)} kernels, {len(known)} of them with a measurement beside it, {within} within 25 %"


def _text(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "none"


def take(out: Path, results: Path = RESULTS) -> Iterator[str]:
    """Put a GPU's rows in the place of those of the same cases, in a file for each machine, which ``make report`` reads."""
    found = [row_of(line) for line in read(out / ROWS)]
    others = {row.run.device for row in found} - {"cuda"}
    if others:
        raise ValueError(f"expected rows of a GPU, got rows of {', '.join(others)}: {out} is of a dry run")
    for machine in dict.fromkeys(row.run.machine for row in found):
        new = [row for row in found if row.run.machine == machine]
        path = _file_of(machine, results)
        cases = {_case(row) for row in new}
        kept = [row for row in read_rows(path) if _case(row) not in cases] if path.exists() else []
        write_rows(path, [*kept, *new])
        yield f"{len(new)} rows, {len(cases)} cases: {path}"
    if (out / host.ROWS).exists():
        of_host = host_rows.read(out / host.ROWS)
        host_rows.record(of_host, results / host_rows.HOST.name)
        yield f"{len(of_host)} rows: {results / host_rows.HOST.name}"


def _case(row: Row) -> tuple[str, tuple[int, ...], str, str]:
    return row.operation, row.shape, row.dtype, row.direction


def _file_of(machine: str, results: Path) -> Path:
    """cuda.jsonl where it is free or of this machine, else one that is named after it."""
    first = results / ROWS
    if not first.exists() or read_rows(first)[0].run.machine == machine:
        return first
    return results / f"cuda-{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.jsonl"
