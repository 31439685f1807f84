"""The README's short table: a few cases of the committed rows, the peers by name, and what is lost, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from .rows import BACKWARD, FORWARD, Row
from .targets import FLASH, Shape, times_faster
from .text import pass_text, size_text, time_text

Rows = Mapping[str, Sequence[Row]]  # by device


@dataclass(frozen=True)
class Shown:
    """A case that the README shows, and beside whom."""

    device: str
    operation: str
    shape: Shape
    direction: str
    peers: tuple[str, ...]


MILLION = Shown("cuda", "sinkhorn", (1048576, 4, 4), FORWARD, ("eager", "hyper-connections", "GeomLoss"))
SHOWN = (
    MILLION,
    Shown("cuda", "sinkhorn", (65536, 4, 4), BACKWARD, ("eager", "torch.compile", "hyper-connections", "GeomLoss")),
    Shown("cuda", "sinkhorn", (4096, 64, 64), BACKWARD, ("eager", "hyper-connections", "GeomLoss")),
    Shown("cuda", "sinkhorn_attention", (64, 4096, 3, 64), FORWARD, ("eager", "flash-sinkhorn")),
    Shown("cuda", "sinkhorn_attention", (8, 1024, 3, 64), FORWARD, ("eager", "torch.compile")),
    Shown("cuda", "newton", (4096, 64, 64), FORWARD, ("eager",)),
    Shown("cpu", "sinkhorn", (65536, 4, 4), BACKWARD, ("eager", "torch.compile", "hyper-connections", "POT", "GeomLoss")),
    Shown("cpu", "sigma2", (128, 64, 64), FORWARD, ("eager", "eigvalsh")),
)
PEERS = ("eager", "torch.compile", "hyper-connections", "POT", "GeomLoss", "Liger", "flash-sinkhorn", "eigvalsh")
"""Whose being faster is a loss."""


def proof(rows: Rows) -> str:
    """The sentence that the README opens with."""
    ours, others = _found(rows, MILLION)
    clone = next((row for row in others if row.implementation == "clone"), None)
    if ours.device_seconds is None or clone is None:
        raise ValueError(f"the README shows the time of {MILLION} in a CUDA graph, beside a clone's; measure both")
    return (
        f"{size_text(ours.shape).replace(' of ', ' matrices of ')} take {time_text(ours.device_seconds)} for {ours.sweeps} "
        f"sweeps on an {_chip(ours)}, in a CUDA graph: {ratio_to(ours, others, 'eager'):.0f} times faster than the eager loop, "
        f"{1 / times_faster(ours, clone):.1f} times as long as a copy of the same bytes."
    )


def section(rows: Rows, lost_beside: Sequence[str] = ()) -> str:
    """The table, how to read it, and the losses, those of other results among them."""
    cases = [(shown.peers, *_found(rows, shown)) for shown in SHOWN]
    runs = "; ".join(dict.fromkeys(_conditions(ours) for _, ours, _ in cases))
    lines = [
        "| on | call | input | pass | time | times faster than |",
        "| --- | --- | --- | --- | ---: | --- |",
        *(_line(*case) for case in cases),
    ]
    return "\n".join([*lines, "", f"{runs}. {_READING}", "", *losses(rows, lost_beside)])


_READING = (
    "float32 unless said; 20 sweeps, attention 3. Bold: slower. In brackets, and in ratios where both have one: the time in "
    "a CUDA graph, without the host's part. newton converges to 1e-6, and its eager loop sweeps to the same. Every output was "
    "held against float64 first. A peer that is not named was not measured there, or left out for a reason that the whole "
    "tables give."
)


def losses(rows: Rows, beside: Sequence[str] = ()) -> list[str]:
    """Every case in which what was measured beside fastdsm is faster, a line for each machine, ``beside``, flash attention."""
    lost: dict[str, list[str]] = {}
    flash: list[float] = []
    for device in dict.fromkeys(shown.device for shown in SHOWN):
        for _, group in groupby(rows[device], key=lambda row: (row.operation, row.shape, row.direction)):
            ours, others = _sorted(list(group))
            slower = {name: ratio for name in PEERS if (ratio := ratio_to(ours, others, name)) is not None and ratio < 1}
            if slower:
                case = f"`{ours.operation}` of {size_text(ours.shape)}" + (", with backward" * (ours.direction != FORWARD))
                lost.setdefault(_chip(ours), []).append(f"{case} ({_figures(slower)})")
            flash += [ratio for ratio in [ratio_to(ours, others, FLASH)] if ratio is not None]
    lines = [f"- {where}: {'; '.join(what)}." for where, what in lost.items()] + list(beside)
    if flash:
        lines.append(
            f"- PyTorch's flash attention, which is of softmax, another function: {min(flash):.2f} to {max(flash):.2f} times."
        )
    return (
        ["Lost, of all that was measured, with the ratios as above:", "", *lines]
        if lines
        else ["Lost: nothing that was measured."]
    )


def ratio_to(ours: Row, others: Iterable[Row], name: str) -> float | None:
    """How many times faster than this peer; None where either was not timed."""
    other = next((row for row in others if row.implementation == name), None)
    if other is None or other.seconds_median is None or ours.seconds_median is None:
        return None
    return ours.device_ratio_to_eager or ours.ratio_to_eager if name == "eager" else times_faster(ours, other)


def _found(rows: Rows, shown: Shown) -> tuple[Row, list[Row]]:
    """fastdsm's row of a case and the others; ValueError where it or a peer that is to be shown was not timed."""
    key = (shown.operation, shown.shape, shown.direction)
    group = [row for row in rows.get(shown.device, ()) if (row.operation, row.shape, row.direction) == key]
    timed = {row.implementation for row in group if row.seconds_median is not None}
    missing = [name for name in ("fastdsm", *shown.peers) if name not in timed]
    if missing:
        raise ValueError(f"the README shows {shown}, and no time of {', '.join(missing)}; measure it, or change SHOWN")
    return _sorted(group)


def _sorted(group: Sequence[Row]) -> tuple[Row, list[Row]]:
    ours = next(row for row in group if row.implementation == "fastdsm")
    return ours, [row for row in group if row is not ours]


def _line(peers: Sequence[str], ours: Row, others: Sequence[Row]) -> str:
    assert ours.seconds_median is not None
    ratios = {name: ratio for name in peers if (ratio := ratio_to(ours, others, name)) is not None}
    cells = (
        _chip(ours),
        f"`{ours.operation}`",
        size_text(ours.shape) + ("" if ours.dtype == "float32" else f", {ours.dtype}"),
        pass_text(ours.direction),
        time_text(ours.seconds_median) + (f" ({time_text(ours.device_seconds)})" if ours.device_seconds else ""),
        _figures(ratios, bold=True),
    )
    return "| " + " | ".join(cells) + " |"


def _figures(ratios: Mapping[str, float], bold: bool = False) -> str:
    """Each peer and two digits that say something: "eager 230, POT 5.7, eigvalsh 0.92"."""
    digits = {name: f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}" for name, x in ratios.items()}
    return ", ".join(f"**{name} {text}**" if bold and ratios[name] < 1 else f"{name} {text}" for name, text in digits.items())


def _chip(row: Row) -> str:
    """CPU, or the chip alone: H100 of "NVIDIA H100 80GB HBM3"."""
    return "CPU" if row.run.device == "cpu" else row.run.machine.removeprefix("NVIDIA ").split()[0]


def _conditions(row: Row) -> str:
    threads = f", {row.run.threads} threads" if row.run.device == "cpu" else ""
    return f"{row.run.machine}{threads}, torch {row.run.versions['torch']}, {row.run.date[:10]}"
