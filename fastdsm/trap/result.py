"""What an experiment hands to the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DARK, GREY, ACCENT, SECOND, THIRD = "#1f2933", "#b8c0c8", "#0b6e99", "#c2571a", "#5b8c2a"


@dataclass(frozen=True)
class Result:
    """One experiment: ``name`` of its files, ``title`` and ``text`` of its section, a table, and what draws its figure.

    ``draw`` takes as many axes as there are ``panels``.
    """

    name: str
    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float | str]]
    panels: int
    draw: Callable[[Sequence[Axes]], None]


def number(x: Tensor) -> float:
    """The one number in a tensor."""
    return float(x.item())
