"""The command: execute every configuration that public calls launch, record, and fail on what is harmful or wrong."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.static.compilation import kernel_name
from benchmarks.static.record import build
from benchmarks.static.report import identify
from fastdsm import kernels
from fastdsm.kernels.common.configuration import TARGETS

from . import record
from .calls import FAMILIES, Call
from .recording import Planning, Recording
from .table import EVERYTHING, reason, wanted

SECONDS_BETWEEN_WRITES = 60
WIDTH = 180  # of what is no terminal


def main(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100; may be repeated")] = None,
    share: Annotated[str, typer.Option(help="K/N: the K-th of N parts of what is to be done")] = "1/1",
    match: Annotated[str, typer.Option(help="only kernels whose name or label contains this")] = "",
) -> None:
    """Execute compiled kernels by public calls on a few small matrices each, without a GPU; exit code 1 on what is wrong.

    A row for each configuration and target in benchmarks/results/execution.jsonl; those whose source is the same are not
    executed again. Written as it goes: a run that is cut off goes on where it was.
    """
    targets = target or [EVERYTHING, *(x for x in TARGETS if x != EVERYTHING)]
    if unknown := set(targets) - set(TARGETS):
        raise typer.BadParameter(f"expected targets among {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    part, parts = (int(x) for x in share.split("/"))
    if not 1 <= part <= parts:
        raise typer.BadParameter(f"expected a share such as 2/3, got {share}")
    warnings.filterwarnings("ignore", ".*deterministic.*")
    torch.set_num_threads(1)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDTH
    record.write(record.RESULTS, ())  # without what is of other source
    failed = [fault for name in targets for fault in execute(name, match, part, parts, console)]
    report(targets, match, console)
    console.print(f"{len(failed)} fail")
    raise typer.Exit(1 if failed else 0)


def execute(target: str, match: str, part: int, parts: int, console: Console) -> list[str]:
    """Bring the rows of ``target`` up to date, the ``part``-th of ``parts`` of them; print and return what is wrong."""
    left = {identify(x): x for x in record.missing(record.read(record.RESULTS), target)}
    left = {key: x for key, x in left.items() if match in f"{kernel_name(x)} {x.label}"}
    if not left:
        return []
    plan = planned(target)
    reached = list(dict.fromkeys(key for _, keys in plan for key in sorted(keys)))
    chosen = left.keys() & reached[len(reached) * (part - 1) // parts : len(reached) * part // parts]
    plan = [(call, keys & chosen) for call, keys in plan if keys & chosen]
    remaining = Counter(key for _, keys in plan for key in keys)
    recording, rows, failed, written = Recording(target), [], [], time.monotonic()
    recording.install()

    def shown(faults: Iterable[str]) -> list[str]:
        faults = list(faults)
        for fault in faults:
            console.print(fault, highlight=False, soft_wrap=True, markup=False)
        return faults

    for place, (call, keys) in enumerate(plan, 1):
        start = time.monotonic()
        run(recording, call)
        spent = time.monotonic() - start
        console.print(f"{target} {place}/{len(plan)} {call.name}: {spent:.1f} s", highlight=False, soft_wrap=True)
        remaining.subtract(keys)
        done = [key for key in sorted(keys) if not remaining[key] and key in recording.executed]
        rows += [recording.executed[key].row(target) for key in done]
        if time.monotonic() - written > SECONDS_BETWEEN_WRITES or place == len(plan):
            record.write(record.RESULTS, rows)
            failed += shown(fault for row in rows for fault in record.faults(row))
            rows, written = [], time.monotonic()
    unreached = [x for key, x in left.items() if key not in reached or (key in chosen and key not in recording.executed)]
    return failed + shown(f"{kernel_name(x)} {x.label} {target}: no call launches it" for x in unreached)


def planned(target: str) -> list[tuple[Call, set[str]]]:
    """Every call that launches nothing which is not to be executed, with the keys of the configurations that it launches."""
    planning = Planning(target)
    planning.install()
    barred = {identify(x) for x in wanted(target) if reason(x, target)}
    plan = [(call, planning.launched(call)) for calls in FAMILIES for call in calls()]
    return [(call, keys) for call, keys in plan if not keys & barred]


def run(recording: Recording, call: Call) -> None:
    """Run a call, and where approximations decide with each of them off by its documented error, up or down."""
    recording.judge(call, None)
    if call.noise:
        recording.judge(call, np.sign)


def report(targets: list[str], match: str, console: Console) -> None:
    """Print how many configurations of each kernel were executed, or why not."""
    table = Table(
        "kernel", "target", "executed", "listed", "unknown", "launches", "worst error / budget", "with noise", "issues"
    )
    rows = record.read(record.RESULTS)
    for target in targets:
        for name in sorted({kernel_name(x) for x in kernels.configurations()}):
            mine = [x for x in wanted(target) if kernel_name(x) == name and match in f"{name} {x.label}"]
            if not mine:
                continue
            unknown = sum(kernel_name(x) == name and x in mine for x in record.missing(rows, target))
            listed = sum(bool(reason(x, target)) for x in mine)
            found = [rows[key] for key in (build(x, target) for x in mine) if key in rows]
            worst, noisy = ([x["worst"] for x in of if x] for of in (found, [row["noise"] for row in found]))
            issues: Counter[str] = Counter()
            for row in found:
                issues.update(row["issues"])
            table.add_row(
                name, target, str(len(mine) - listed - unknown), str(listed), str(unknown),
                str(sum(row["launches"] for row in found)),
                f"{max(worst):.2f}" if worst else "", f"{max(noisy):.2f}" if noisy else "",
                ", ".join(f"{kind} {count}" for kind, count in sorted(issues.items())),
            )  # fmt: skip
    console.print(table)
