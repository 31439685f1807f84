"""The committed results: a run's rows replace those of the same builds; rows of other compilers or other source go."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from fastdsm.kernels.common.configuration import Configuration

from .compilation import describe, kernel_name, source
from .report import Row, ordered

_IDENTITY = ("kernel", "constants", "pointers", "num_warps", "num_stages", "maxnreg")


def record(path: Path, rows: Iterable[Row], table: Sequence[Configuration]) -> None:
    """Write ``rows`` and what ``path`` still holds of the launchable ``table``; the header says how much of it that is."""
    header = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": triton.knobs.nvidia.ptxas.version,
    }
    kept = {}
    if path.exists():
        before, *known = (json.loads(line) for line in path.read_text().splitlines())
        if header.items() <= before.items():
            kept = {build_of(row): row for row in known}
    kept |= {build_of(row): row for row in rows}
    current = {build(x, target): source(x) for x in table for target in x.targets}
    kept = {build: row for build, row in kept.items() if build in current and current[build] == row.get("source")}
    header |= {"rows": len(kept), "of": len(current)}
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(x) for x in (header, *ordered(kept.values()))) + "\n")


def build(configuration: Configuration, target: str) -> str:
    """What :func:`build_of` finds in a row of ``configuration``."""
    return build_of({"kernel": kernel_name(configuration), **describe(configuration), "target": target})


def build_of(row: dict[str, Any]) -> str:
    """What two rows share exactly when they are of one kernel and target."""
    return json.dumps([row["target"], *(row.get(name) for name in _IDENTITY)], sort_keys=True)
