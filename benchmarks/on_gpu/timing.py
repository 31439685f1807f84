"""Prediction against measurement: each ordinary call's kernels on a batch that fills the chip, beside the committed prediction.

    python -m benchmarks.on_gpu.timing OUT [MATCH]

MATCH: only calls whose text contains it. Rows are appended as they are made, and what is there is not measured again. Without a
GPU nothing is measured, and rows have the prediction alone, that for an H100.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

import torch

import fastdsm

from ..static.devices import H100
from ..static.launches import Call
from ..static.predicted import batch_of
from ..static.predicted import read as read_predictions
from ..static.report import SWEEPS, largest_usages
from .lines import Record, append, read

TIMES = "prediction.jsonl"
ROUNDS = 7


def chosen(match: str) -> Iterator[tuple[str, Call]]:
    """The largest call of each operation that a kernel serves, by its text; of float32 and bfloat16, the first first."""
    calls = {usage.call for usages in largest_usages().values() for usage in usages}
    wanted = [call for call in calls if call.dtype in (torch.float32, torch.bfloat16)]
    for call in sorted(wanted, key=lambda call: (call.dtype != torch.float32, call.operation, call.n)):
        text = f"{call.operation} {call.n}x{call.m} {str(call.dtype).removeprefix('torch.')}"
        if match in text:
            yield text, call


def make(out: Path, match: str = "") -> None:
    """Measure what ``out`` lacks."""
    known = {line["call"] for line in read(out / TIMES)}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else H100.name
    for text, call in chosen(match):
        if text not in known:
            row = _row(text, call, machine)
            append(out / TIMES, row)
            print(row, flush=True)


def _row(text: str, call: Call, machine: str) -> Record:
    batch = batch_of(call)
    measured = _measured(call, batch) if torch.cuda.is_available() else None
    predicted = _predicted(call, machine)
    ratio = None if measured is None or predicted is None else measured / predicted
    row: Record = {"call": text, "machine": machine, "batch": batch, "predicted": predicted, "measured": measured}
    return {**row, "measured_over_predicted": ratio}


def _predicted(call: Call, machine: str) -> float | None:
    """Microseconds, from the committed rows."""
    found = (
        row.predicted
        for row in read_predictions()
        if (row.device, row.operations, row.n, row.batch) == (machine, (call.operation,), call.n, batch_of(call))
    )
    return next(found, None) if (call.n, call.dtype) == (call.m, torch.float32) else None


def _measured(call: Call, batch: int) -> float:
    """Microseconds: the median of launches between two events, the host ahead of the device."""
    tensors = call.tensors(batch, "cuda")
    tensors.matrix.normal_()
    tensors.other.normal_()
    if call.operation.startswith("sigma2"):
        tensors.matrix.copy_(fastdsm.sinkhorn(tensors.matrix))
    call.launch(SWEEPS, tensors)
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)
        begin.record()
        call.launch(SWEEPS, tensors)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * median(times)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:])
