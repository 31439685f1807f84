"""What executions found: one issue for each kind and instruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parsing import Instruction

BENIGN = (
    "same value stored twice",
    "same value stored again",
    "copies differ",
    "branch not uniform",
    "condition not uniform",
)
"""Copies of one value that a layout holds in several lanes, equal or rounded differently, and what follows from them."""


@dataclass
class Issue:
    """What went wrong at one instruction, how often, and the first occurrence."""

    kind: str
    kernel: str
    line: int
    text: str
    source: str
    detail: str
    count: int = 1

    @property
    def benign(self) -> bool:
        """Whether no test need fail for it."""
        return self.kind in BENIGN

    def __str__(self) -> str:
        return (
            f"{self.kind} x{self.count}: {self.kernel} line {self.line}: {self.text}\n    at {self.source}\n    {self.detail}"
        )


class Report:
    """Issues, and what was executed."""

    def __init__(self) -> None:
        self.issues: dict[Any, Issue] = {}
        self.instructions = 0  # executed once for a whole group
        self.lane_instructions = 0  # summed over lanes
        self.launches = 0
        self.context = ""  # put before the detail of an issue

    def add(self, kind: str, kernel: str, i: Instruction, detail: str) -> None:
        """Record one occurrence."""
        key = kind, kernel, self.context, i.line
        if key in self.issues:
            self.issues[key].count += 1
            return
        self.issues[key] = Issue(kind, kernel, i.line, i.text, i.source, f"[{self.context}] {detail}")

    def harmful(self) -> list[Issue]:
        """Issues that are not benign."""
        return [issue for issue in self.issues.values() if not issue.benign]
