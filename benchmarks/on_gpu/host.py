"""The host's time on a GPU, call by call: the rows of each are appended when it has been timed, and not measured again.

python -m benchmarks.on_gpu.host OUT DEVICE ROUNDS [MATCH]
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ..host.calls import calls
from ..host.rows import OWN, HostRow
from ..host.timing import measured
from .lines import append, read

ROWS = "host.jsonl"


def make(out: Path, device: str, rounds: int, match: str = "") -> None:
    """Time what ``out`` lacks; of what has no launches, an empty function and a peer's call, the first rows are kept."""
    torch.set_num_threads(1)
    known = {line["call"] for line in read(out / ROWS)}
    for call in calls(device):
        if match in call.text and call.text not in known:
            rows = [row for row in measured(device, rounds, call.text) if _wanted(row, call.text, known)]
            append(out / ROWS, *map(asdict, rows))
            known |= {row.call for row in rows}
            print(f"{call.text}: {len(rows)} rows", flush=True)


def _wanted(row: HostRow, text: str, known: set[str]) -> bool:
    return row.call == text or (row.launches == OWN and row.call not in known)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
