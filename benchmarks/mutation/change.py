"""A small semantic change of one file, and the tests that must see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """``before``, which ``file`` holds exactly once, becomes ``after``; one of ``tests`` must then fail.

    tests: what pytest is given, files or ``file::test``, the fewest that show it. equivalent: of a change that no result
    shows, the reason.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    reason: str  # what it breaks
    equivalent: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"

    def applied(self, root: Path) -> str:
        """The text of the file with the change; ValueError where its text is not there exactly once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.before)) != 1:
            raise ValueError(f"{self.file} must hold the text to change once, it does {count} times: {self.before!r}")
        return text.replace(self.before, self.after)

    def matches(self, text: str) -> bool:
        """Whether the file, the reason or a test contains ``text``."""
        return any(text in x for x in (self.file, self.reason, *self.tests))
