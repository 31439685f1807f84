"""Where a monitor's rows go: a JSON-lines file, a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .measured import Row

_SCALARS = ("sigma2", "to_uniform", "to_identity")


class Sink(Protocol):
    """Takes rows as they arrive."""

    def write(self, rows: Sequence[Row]) -> None:
        """Append."""

    def close(self) -> None:
        """Nothing comes after."""


def sinks_of(path: str | Path | None, tensorboard: Any) -> list[Sink]:
    """The sinks that a monitor's arguments name."""
    sinks: list[Sink] = []
    if path is not None:
        suffix = Path(path).suffix
        if suffix not in (".jsonl", ".csv"):
            raise ValueError(f"path must end in .jsonl or .csv, got {str(path)!r}")
        sinks.append(_JsonLines(Path(path)) if suffix == ".jsonl" else _Csv(Path(path)))
    if tensorboard is not None:
        sinks.append(_TensorBoard(tensorboard))
    return sinks


class _JsonLines:
    """One object per line; NaN, which JSON does not have, as null. Written through, so that a crash loses nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def write(self, rows: Sequence[Row]) -> None:
        lines = (
            {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row._asdict().items()}
            for row in rows
        )
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))

    def close(self) -> None:
        self._file.close()


class _Csv:
    """A header and one line per row; NaN as an empty field."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(Row._fields)

    def write(self, rows: Sequence[Row]) -> None:
        self._writer.writerows([["" if x != x else x for x in row] for row in rows])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """Scalars ``fastdsm/<layer>/<head>/<number>``; a writer that was given is the caller's to close."""

    def __init__(self, target: Any) -> None:
        self._own = isinstance(target, (str, Path))
        self._writer = _summary_writer(target) if self._own else target

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name in _SCALARS:
                value = getattr(row, name)
                if value == value:
                    self._writer.add_scalar(f"fastdsm/{row.layer}/{row.head}/{name}", value, row.step)

    def close(self) -> None:
        if self._own:
            self._writer.close()


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "tensorboard= needs the tensorboard package; install it with: pip install 'fastdsm[monitor]', or pass a writer "
            "that has add_scalar(tag, value, step)"
        ) from None
    return SummaryWriter(str(folder))
