"""``python -m benchmarks.static.predicted``: the model's times, beside those measured on an H100 and for ordinary calls.

    python -m benchmarks.static.predicted [MATCH]

MATCH: only rows whose case contains it; they replace those of the same case in benchmarks/results/prediction.jsonl, from which
``make report`` makes prediction.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter replaces the compiler, from Triton's import on

import torch

from ..rows import FORWARD, RESULTS, read_rows
from .devices import DEVICES, H100, Device
from .launches import Call
from .prediction import predict

PREDICTIONS = RESULTS / "prediction.jsonl"
BATCH_BYTES = 2**28  # of the matrices of an ordinary call: many times what caches hold, and what fills the chip
BY_HAND = "h100.md"
# Operation, lines, matrices: microseconds, by hand on the H100 (benchmarks/results/h100.md).
_MEASURED = (
    ("forward", 32, 16384, 176.0),
    ("forward", 128, 512, 243.0),
    ("forward", 128, 1024, 474.0),
    ("forward+sigma2", 4, 1048576, 83.0),
    ("sigma2", 4, 1048576, 57.0),
    ("sigma2", 16, 65536, 750.0),
    ("sigma2", 64, 4096, 1360.0),
    ("sigma2_bounds", 4, 1048576, 3049.0),
    ("sigma2_bounds", 16, 65536, 760.0),
    ("sigma2_bounds", 64, 4096, 1370.0),
)
_ORDINARY = {
    "forward": (4, 5, 6, 7, 8, 16, 32, 64, 128),
    "backward": (4, 5, 6, 7, 8),
    "forward+sigma2": (4, 16),
    "sigma2": (4, 8, 16),
    "sigma2_bounds": (8, 16),
}
# The rows are of commits 5c8ecd1 and 7369202. With one compiler their machine code is today's, opcode by opcode, but for these.
_CHANGED_SINCE = {("forward", 4), ("backward", 4), ("forward+sigma2", 4), ("sigma2", 4)}


@dataclass(frozen=True)
class Predicted:
    """One case: operations one after the other on ``batch`` float32 matrices of n x n.

    measured: microseconds, and ``where`` they are from, empty if nowhere; predicted: None where the code's loops end by data.
    changed: whether what was measured was another kernel than what is predicted.
    """

    device: str
    operations: tuple[str, ...]
    n: int
    batch: int
    kernels: tuple[str, ...]
    sources: tuple[str, ...]
    measured: float | None
    where: str
    changed: bool
    predicted: float | None

    @property
    def case(self) -> str:
        """Device, operations, size and batch."""
        return f"{self.device}: {' and '.join(self.operations)}, {self.batch} of {self.n}x{self.n}"

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return None if self.measured is None or self.predicted is None else self.measured / self.predicted


def read(path: Path = PREDICTIONS) -> list[Predicted]:
    """The committed rows."""
    return [_row(json.loads(line)) for line in path.read_text().splitlines()]


def _row(record: dict[str, Any]) -> Predicted:
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}
    return Predicted(**values)


def batch_of(call: Call) -> int:
    """Matrices of an ordinary call."""
    return max(BATCH_BYTES // (call.n * call.m * call.dtype.itemsize), 1)


def _cases() -> Iterator[tuple[Device, tuple[str, ...], int, int, float | None, str]]:
    """Device, operations, lines, matrices, microseconds, and where these are from."""
    for row in read_rows(RESULTS / "cuda.jsonl"):
        ours = (row.operation, row.implementation, row.dtype) == ("sinkhorn", "fastdsm", "float32")
        if ours and row.run.machine == H100.name and row.device_seconds is not None and row.shape[-1] <= 256:
            operations = ("forward",) if row.direction == FORWARD else ("forward", "backward")
            where = f"cuda.jsonl, {row.run.commit}"
            yield H100, operations, row.shape[-1], row.shape[0], 1e6 * row.device_seconds, where
    for operation, n, batch, microseconds in _MEASURED:
        yield H100, (operation,), n, batch, microseconds, BY_HAND
    for device in DEVICES:
        for operation, sizes in _ORDINARY.items():
            for n in sizes:
                yield device, (operation,), n, batch_of(Call(operation, n, n, torch.float32)), None, ""


def rows(match: str = "") -> Iterator[Predicted]:
    """Predict the cases that contain ``match``."""
    for device, operations, n, batch, measured, where in _cases():
        changed = bool(where) and any((operation, n) in _CHANGED_SINCE for operation in operations)
        empty = Predicted(device.name, operations, n, batch, (), (), measured, where, changed, None)
        if match not in empty.case:
            continue
        found = [predict(Call(operation, n, n, torch.float32), batch, device) for operation in operations]
        times = [x.ns for x in found if x.ns is not None]
        predicted = round(1e-3 * batch * sum(times), 2) if len(times) == len(found) else None
        names, sources = tuple(y for x in found for y in x.kernels), tuple(y for x in found for y in x.sources)
        yield replace(empty, kernels=names, sources=sources, predicted=predicted)


def record(new: Iterable[Predicted], path: Path = PREDICTIONS) -> None:
    """Put rows in the place of those of the same cases, in the order of the cases."""
    kept = {(row.case, row.where): row for row in (read(path) if path.exists() else [])}
    kept |= {(row.case, row.where): row for row in new}
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in kept.values()))


if __name__ == "__main__":
    for row in rows(*sys.argv[1:]):
        record([row])
        print(f"{row.case}: predicted {row.predicted}, measured {row.measured}, ratio {row.ratio}", flush=True)
