"""The section of docs/performance.md on the host's time, from the committed rows of ``python -m benchmarks.host``."""

from __future__ import annotations

from collections.abc import Sequence

from ..rows import BACKWARD, FORWARD
from .rows import COMPILED, OWN, STUBBED, HostRow
from .targets import measured, verdict

DIRECTIONS = (FORWARD, BACKWARD, COMPILED)


def section(rows: Sequence[HostRow]) -> str:
    """A table of each device, and of stubbed and real launches, with what was promised of them."""
    modes = dict.fromkeys((row.run.device, row.launches) for row in rows if row.launches != OWN)
    tables = [_table([x for x in rows if x.run.device == device], launches) for device, launches in modes]
    return "\n\n".join([f"**What a call costs.** {_ABOUT}", *tables])


_ABOUT = (
    "The host's time of a call, with one thread, least of interleaved rounds, and how many times that of an empty "
    "`autograd.Function` of the same direction it is; in brackets what is promised. Stubbed: all but the kernel, whose call "
    "does nothing. In a graph: three calls less one in a function that `torch.compile` (inductor) made, halved. What PyTorch "
    "itself computes of a call is in its time, as is all of hyper-connections' call, which has no launch to stub. "
    "Input of attention: heads, lines, operands, features."
)


def _table(rows: Sequence[HostRow], launches: str) -> str:
    shown = [row for row in rows if row.launches in (launches, OWN)]
    run = next(row.run for row in shown if row.launches == launches)
    versions = ", ".join(f"{name} {run.versions[name]}" for name in _VERSIONS if name in run.versions)
    lines = [
        f"| launches {launches} | input | forward | forward + backward | one more in a graph |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for call, shape in dict.fromkeys((row.call, row.shape) for row in shown):
        of_call = {row.direction: row for row in shown if (row.call, row.shape) == (call, shape)}
        cells = [_cell(of_call.get(direction)) for direction in DIRECTIONS]
        lines.append(f"| {_name(call)} | {' × '.join(map(str, shape))} | {' | '.join(cells)} |")
    where = f"{run.machine}; {run.date[:10]}, commit {run.commit}; {versions}."
    return "\n".join([*lines, "", where])


_VERSIONS = ("python", "torch", "triton", "fastdsm", "hyper-connections")


def _name(call: str) -> str:
    return f"`{call}`" if "(" in call else call


def _cell(row: HostRow | None) -> str:
    """Time, ratio and promise."""
    found = None if row is None else measured(row)
    if row is None or row.seconds_min is None or found is None:
        return ""
    microseconds = 1e6 * row.seconds_min
    text = f"{microseconds:.3g} µs" if microseconds < 1000 else f"{microseconds:,.0f} µs"
    if row.direction != COMPILED:
        text += f", {found:.2f} ×"
    promise = verdict(row) if row.launches == STUBBED else None
    if promise is None:
        return text
    unit = "µs" if row.direction == COMPILED else "×"
    return f"{text} ({'' if promise.ok else 'missed: '}≤ {promise.required:g} {unit})"
