"""What executions found: one issue for each kind and instruction."""

from __future__ import annotations

import re
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
    """What went wrong at one instruction, how often, and the first occurrence. known: to be harmless, see ``known``."""

    kind: str
    kernel: str
    line: int
    text: str
    source: str
    detail: str
    count: int = 1
    known: bool = False

    @property
    def benign(self) -> bool:
        """Whether no test need fail for it."""
        return self.known or self.kind in BENIGN

    def __str__(self) -> str:
        return (
            f"{self.kind} x{self.count}: {self.kernel} line {self.line}: {self.text}\n    at {self.source}\n    {self.detail}"
        )


class Report:
    """Issues, and what was executed.

    known: kinds, and patterns in kernel, text and source of the instruction, of what is known to be harmless.
    """

    def __init__(self, known: tuple[tuple[str, str], ...] = ()) -> None:
        self.known = known
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
        described = f"{kernel} {i.text} {i.source}"
        known = any(kind == k and re.search(pattern, described) for k, pattern in self.known)
        self.issues[key] = Issue(kind, kernel, i.line, i.text, i.source, f"[{self.context}] {detail}", known=known)

    def harmful(self) -> list[Issue]:
        """Issues that are not benign."""
        return [issue for issue in self.issues.values() if not issue.benign]
