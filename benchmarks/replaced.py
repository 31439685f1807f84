"""What ``python -m benchmarks.origins`` measured, as the table of docs/performance.md and the losses of the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .origins import OriginRow
from .rows import RESULTS, Run
from .text import pass_text, time_text

ORIGINS = RESULTS / "origins.jsonl"


def read(path: Path = ORIGINS) -> list[OriginRow]:
    """The committed rows, in the order of the file."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [OriginRow(**{**row, "shape": tuple(row["shape"]), "run": Run(**row["run"])}) for row in found]


def section(rows: Sequence[OriginRow]) -> str:
    """A line for each case, times and ratios by number of threads."""
    threads = sorted({row.run.threads for row in rows})
    heads = [f"{count} thread{'s' * (count > 1)}" for count in threads]
    lines = [
        "**Loops that calls replace**, on a CPU: fastdsm's time / the loop's, and how many times faster it is; slower in bold. "
        "SwAV's loop in place, that of Megatron-LM's router, POT's products with K in float64, `sinkhorn(q k^T) v` in 8 batches"
        " of 12 heads and the eager loop of attention, the mHC layer (tokens, streams, channels) as its definition, as "
        "`torch.compile` of it, and as hyper-connections' module. "
        "Medians of interleaved rounds, results held to each other first.",
        "",
        f"| replaced | input | sweeps | pass | {' | '.join(heads)} |",
        f"| --- | --- | ---: | --- |{' ---: |' * len(threads)}",
    ]
    cases: dict[tuple[object, ...], dict[int, OriginRow]] = {}
    for row in rows:
        cases.setdefault((row.origin, row.shape, row.sweeps, row.direction), {})[row.run.threads] = row
    for (origin, shape, sweeps, direction), of_threads in cases.items():
        assert isinstance(shape, tuple)
        cells = (_cell(of_threads.get(count)) for count in threads)
        size = " × ".join(f"{x:,}" for x in shape)
        lines.append(f"| {origin} | {size} | {sweeps} | {pass_text(str(direction))} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _made(row.run for row in rows)])


def losses(rows: Iterable[OriginRow]) -> list[str]:
    """What is faster than fastdsm, by what it is, in one line of a list."""
    slower: dict[str, list[float]] = {}
    for row in rows:
        if _is_lost(row):
            slower.setdefault(row.origin.partition(", eps")[0], []).append(row.ratio)
    if not slower:
        return []
    ranges = (
        f"{origin} {min(found):.2f}" + (f" to {max(found):.2f}" if f"{max(found):.2f}" != f"{min(found):.2f}" else "")
        for origin, found in slower.items()
    )
    return [f"- Loops that calls replace, CPU, 1 and 2 threads, where they are faster: {'; '.join(ranges)}."]


def _cell(row: OriginRow | None) -> str:
    if row is None:
        return ""
    ratio = f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:.0f}"
    return f"{time_text(row.fastdsm / 1e3)} / {time_text(row.loop / 1e3)}: " + (f"**{ratio}**" if _is_lost(row) else ratio)


def _is_lost(row: OriginRow) -> bool:
    """Slower by what the table shows of it."""
    return round(row.ratio, 2) < 1.0


def _made(runs: Iterable[Run]) -> str:
    """Machine, days, commits and versions."""
    runs = list(runs)
    days = sorted({run.date[:10] for run in runs})
    commits = ", ".join(dict.fromkeys(run.commit for run in runs))
    versions = "; ".join(dict.fromkeys(f"torch {run.versions['torch']}" for run in runs))
    return f"{runs[0].machine}; {' to '.join([days[0], *days[1:][-1:]])}, commits {commits}; {versions}."
