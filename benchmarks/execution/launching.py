"""A launch: all CTAs of a grid, some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .approximations import Noise
from .elements import f4, f8, i4, i8, u1, u2, u4, u8
from .module import Module
from .regions import Region
from .report import Report
from .run import Run

_PARAMETER: dict[str, Any] = {
    "u64": u8, "u32": u4, "f32": f4, "f64": f8, "u16": u2, "u8": u1, "b64": u8, "b32": u4, "s32": i4, "s64": i8,
}  # fmt: skip
_UNSIGNED = {"u64": 64, "b64": 64, "u32": 32, "b32": 32}  # signed numbers come as these, too


def launch(
    module: Module,
    grid: int,
    values: Sequence[float],
    dynamic_shared: int,
    regions: list[Region],
    report: Report,
    *,
    group_lanes: int = 1024,
    noise: Noise | None = None,
) -> None:
    """Run all CTAs of a one-dimensional grid, about ``group_lanes`` lanes of them at a time.

    values: of each parameter, in order, as numbers (addresses for pointers). dynamic_shared: bytes. regions: the memory that
    may be touched, in the order of addresses. noise: what approximations are off by, exact if None.
    """
    parameters = {name: _parameter(kind, value) for (name, kind), value in zip(module.parameters, values, strict=True)}
    together = max(1, group_lanes // module.threads)
    for first in range(0, grid, together):
        ctas = np.arange(first, min(first + together, grid))
        Run(module, ctas, grid, parameters, dynamic_shared, regions, report, noise).execute()
    report.launches += 1


def _parameter(kind: str, value: float) -> Any:
    bits = _UNSIGNED.get(kind)
    if bits and not isinstance(value, float):
        return _PARAMETER[kind](int(value) & ((1 << bits) - 1))
    return _PARAMETER[kind](value)
