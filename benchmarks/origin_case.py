"""A case of :mod:`benchmarks.origins`: two calls of one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Two calls of one result, and how far apart these may be; None where they are of the same work alone."""

    origin: str
    shape: tuple[int, ...]
    sweeps: int
    direction: str
    ours: Callable[[], Tensor]
    loop: Callable[[], Tensor]
    tolerance: float | None
