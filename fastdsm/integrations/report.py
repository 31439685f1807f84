"""What became of a model's attention: a table that prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Entry(NamedTuple):
    """An attention module: its path in the model, its class as it was found, and what was done or why nothing was."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """The attention modules of a model: which are Sinkhorn's now, and which are not, each with its reason.

    ``str`` gives a table. A module that stands in several places has one entry, by its first path.
    """

    changed: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("changed", *entry) for entry in self.changed] + [("left", *entry) for entry in self.left]
        if not rows:
            return "no attention modules"
        table = [("", "name", "class", "what"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in table]
        return "\n".join(lines)
