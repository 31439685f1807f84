"""benchmarks/results/prediction.md, from the committed rows of ``python -m benchmarks.static.predicted``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from . import layer
from .devices import DEVICES, Device
from .predicted import Predicted

WITHIN = 1.25


def fits(row: Predicted) -> bool:
    """Whether measurement and prediction are within 25 % of one another."""
    return row.ratio is not None and 1 / WITHIN <= row.ratio <= WITHIN


def section(rows: Sequence[Predicted], layers: list[dict[str, Any]], current: Collection[str]) -> str:
    """What was measured beside what the model says, and what it says of what nobody measured; current: sources of the table."""
    measured = [row for row in rows if row.where]
    same = [row for row in measured if not row.changed]
    countable = [row for row in same if row.predicted is not None]
    others = [row for row in measured if row.changed]
    table = [
        "| float32, 20 sweeps | measured | predicted | measured / predicted | |",
        "| --- | ---: | ---: | ---: | --- |",
        *(_line(row, current) for row in measured),
    ]
    return "\n\n".join(
        [
            "# Prediction against measurement",
            _ABOUT,
            f"Of the {len(measured)} measurements on an {measured[0].device}, {len(same)} are of kernels whose machine code "
            f"was the same when they were predicted; {len(countable)} of these can be followed, and "
            f"{sum(map(fits, countable))} are within 25 %. Of the other {len(others)}, {sum(map(fits, others))} are. "
            + _since(measured, current),
            "\n".join(table),
            _MISSES,
            "## Not measured yet",
            _since([row for row in rows if not row.where], current),
            *_not_measured(rows),
            "## The mHC layer, not measured yet",
            layer.section(layers, current),
            "## Constants",
            *(_constants(device) for device in DEVICES),
        ]
    )


_ABOUT = """A model of one multiprocessor runs the machine code (`benchmarks/static/multiprocessor.py`): warps issue in order,
as the assembler's own waits and counters say, into pipes of the throughput that the CUDA programming guide gives; registers
and shared memory say how many programs are there at a time; every address of a warp is followed, to the lines, sectors and
banks that it touches, and what it touches again comes from L1 or L2. Nothing is fitted to a kernel: the constants, below, are
the GPU's. Times are of launches alone, in a CUDA graph. What was measured had been compiled by Triton 3.6; what is predicted
is, by the release in static.jsonl."""
_MISSES = """Of another kernel: those of 4 lines read and write memory otherwise since. The kernels of commit 5c8ecd1
compiled by Triton 3.6, which is what was measured, give measured / predicted 0.94 for 4 × 4 forward, 1.27 for its backward
(the difference of two measurements), 0.90, 1.17, 0.95 for 16, 64 and 128 lines forward, 0.91 and 0.94 for `sigma2` of 4 and
16 lines, 0.82 and 0.94 for their bounds.

Where it does not fit. `sigma2` and its bounds of 64 lines: the data decide how many squarings are made, and the model makes
as many as there can be. Backwards of 16 lines and more, and what has over 128: where their loops end is in memory, or too far
to follow. Newton's method, attention and the stream family are not modelled; one sweep of 8192 × 8192 reads 268 MB, 96 µs at
the H100's rate of copying, and took 102. 64 lines are a sixth slower than the model: a program walks through 72 KB of code,
and caches of instructions are not modelled (`ncu` would show stalls for want of an instruction).

What was seen on the way: threads of 128 lines exchange their sums through shared memory eleven at a bank, which takes a third
of the time, those of 64 lines three at a bank."""


def _line(row: Predicted, current: Collection[str]) -> str:
    remarks = ["another kernel was measured"] * row.changed + ["cannot be followed"] * (row.predicted is None)
    remarks += ["predicted before the kernel was changed"] * _is_old(row, current)
    if row.ratio is not None and not fits(row):
        remarks.insert(0, "**off**")
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {_call(row)} ({row.where}) | {_time(row.measured)} | {_time(row.predicted)} | {ratio} | {', '.join(remarks)} |"


def _is_old(row: Predicted, current: Collection[str]) -> bool:
    """Whether one of its kernels is not what it was when it was predicted."""
    return not set(row.sources) <= set(current)


def _since(rows: Sequence[Predicted], current: Collection[str]) -> str:
    """How many of these predictions are of today's kernels."""
    old = sum(_is_old(row, current) for row in rows)
    return f"Since they were predicted the kernels of {old} of these {len(rows)} have changed."


def _not_measured(rows: Sequence[Predicted]) -> Iterator[str]:
    """A table: what has no measurement, by device."""
    cases: dict[str, dict[str, Predicted]] = {}
    for row in rows:
        if not row.where:
            cases.setdefault(_call(row), {})[row.device] = row
    names = [device.name for device in DEVICES]
    lines = [f"| predicted | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for case, of_case in cases.items():
        cells = (_time(of_case[name].predicted) if name in of_case else "" for name in names)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    yield "\n".join(lines)


def _call(row: Predicted) -> str:
    return f"{row.batch:,} of {row.n} × {row.n}: {' and '.join(row.operations)}"


def _time(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:,.3g} µs" if microseconds < 1000 else f"{microseconds:,.0f} µs"


def _constants(device: Device) -> str:
    return (
        f"{device.name}: {device.multiprocessors} multiprocessors at {device.clock_ghz:g} GHz; memory "
        f"{device.memory / 1000:g} TB/s, {device.memory_latency:g} cycles; L2 {device.l2 / 1000:g} TB/s, "
        f"{device.l2_latency:g} cycles; L1 {device.l1_latency:g}, shared memory {device.shared_latency:g} cycles; "
        f"{device.launch / 1000:g} µs a launch. Where from: `benchmarks/static/devices.py`."
    )
