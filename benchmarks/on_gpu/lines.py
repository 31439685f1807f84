"""Files of JSON lines that grow by whole lines, and outlive a writer that is stopped in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, *records: Record) -> None:
    """Add lines in one write; the rest of a line that was cut off is ended first."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read(path: Path) -> list[Record]:
    """Every whole line, none where there is no file."""
    return list(_whole(path.read_text().splitlines())) if path.exists() else []


def _whole(lines: Iterable[str]) -> Iterable[Record]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
