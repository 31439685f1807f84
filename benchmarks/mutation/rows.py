"""One row: a change, and which test saw it. Kept as JSON lines, in the order of the list."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..rows import RESULTS, Run, current_run, write_rows
from .change import Change
from .run import Verdict

MUTATION = RESULTS / "mutation.jsonl"


@dataclass(frozen=True)
class MutationRow:
    """What was changed, by which test it was seen first ("" for none), and how long that took."""

    file: str
    before: str
    after: str
    reason: str
    caught: bool
    by: str
    seconds: float
    equivalent: str | None
    run: Run

    @property
    def key(self) -> tuple[str, str, str]:
        """What two rows share exactly when they are of one change."""
        return self.file, self.before, self.after


def read(path: Path = MUTATION) -> list[MutationRow]:
    """Read what :func:`record` wrote."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [MutationRow(**{**line, "run": Run(**line["run"])}) for line in lines]


def record(verdicts: Iterable[Verdict], changes: Sequence[Change], path: Path = MUTATION) -> list[MutationRow]:
    """Write the verdicts in place of those of the same changes; what is no longer among ``changes`` goes. The rows kept."""
    rows = {row.key: row for row in (read(path) if path.exists() else [])}
    for verdict in verdicts:
        x = verdict.change
        row = MutationRow(
            x.file, x.before, x.after, x.reason, verdict.caught, verdict.by, round(verdict.seconds, 1), x.equivalent,
            current_run("cpu"),
        )  # fmt: skip
        rows[row.key] = row
    kept = [rows[key] for x in changes if (key := (x.file, x.before, x.after)) in rows]
    write_rows(path, kept)
    return kept
