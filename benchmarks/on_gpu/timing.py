"""Prediction against measurement: each ordinary call's kernels on a batch that fills the chip, beside what the model says.

    python -m benchmarks.on_gpu.timing OUT TARGET [MATCH]

MATCH: only calls whose text contains it. Rows are appended as they are made, and what is there is not measured again. Without a
GPU nothing is measured, and rows have the prediction alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

import torch

import fastdsm

from ..rows import current_run
from ..static.launches import Call
from ..static.prediction import predict
from ..static.report import SWEEPS, largest_usages
from .lines import Record, append, read

TIMES = "prediction.jsonl"
MATRIX_BYTES = 2**28  # of a batch: many times what caches hold, and what fills the chip
ROUNDS = 7


def chosen(match: str) -> Iterator[tuple[str, Call]]:
    """The largest call of each operation that a kernel serves, by its text; of float32 and bfloat16, the first first."""
    calls = {usage.call for usages in largest_usages().values() for usage in usages}
    wanted = [call for call in calls if call.dtype in (torch.float32, torch.bfloat16)]
    for call in sorted(wanted, key=lambda call: (call.dtype != torch.float32, call.operation, call.n)):
        text = f"{call.operation} {call.n}x{call.m} {str(call.dtype).removeprefix('torch.')}"
        if match in text:
            yield text, call


def make(out: Path, target: str, match: str = "") -> None:
    """Measure what ``out`` lacks."""
    known = {line["call"] for line in read(out / TIMES)}
    for text, call in chosen(match):
        if text not in known:
            row = {"call": text, **_row(call, target)}
            append(out / TIMES, row)
            print(row, flush=True)


def _row(call: Call, target: str) -> Record:
    batch = max(MATRIX_BYTES // (call.n * call.m * call.dtype.itemsize), 1)
    found = predict(call, target)
    measured = _measured(call, batch) if torch.cuda.is_available() else None
    row: Record = {"batch": batch, "kernels": found.kernels, "predicted_ns": found.ns, "bound": found.bound}
    ratio = None if measured is None or found.ns is None else measured / found.ns
    return {**row, "measured_ns": measured, "measured_over_predicted": ratio, "machine": _machine()}


def _machine() -> str:
    return current_run("cuda" if torch.cuda.is_available() else "cpu").machine


def _measured(call: Call, batch: int) -> float:
    """Nanoseconds a matrix: the median of launches between two events, the host ahead of the device."""
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
    return 1e6 * median(times) / batch


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:])
