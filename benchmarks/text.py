"""Sizes, times and passes as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import FORWARD
from .targets import ATTENTION_SHAPE


def pass_text(direction: str) -> str:
    """Forward, or both passes."""
    return "forward" if direction == FORWARD else "forward + backward"


def size_text(shape: Sequence[int]) -> str:
    """Say how many matrices of what size: "65,536 of 4 × 4", "8 heads of 1,024 × 1,024, d = 64"."""
    if len(shape) == len(ATTENTION_SHAPE):
        heads, lines, _, features = shape
        return f"{heads} heads of {lines:,} × {lines:,}, d = {features}"
    *batch, n, m = shape
    count = 1
    for length in batch:
        count *= length
    return f"{count:,} of {n} × {m}"


def time_text(seconds: float) -> str:
    """Three digits with the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
