"""Changes made one at a time in a copy of the tree, and the tests that must see them run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from .change import Change

LONGEST = 600.0  # seconds; of a run that takes longer, a loop has lost its end
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info")
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Verdict:
    """Whether the tests saw a change; ``by``: the first that did, "" for none."""

    change: Change
    by: str
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether any did."""
        return bool(self.by)


def verdicts(changes: Sequence[Change], root: Path) -> Iterator[Verdict]:
    """Each change of the tree ``root``, judged in a copy of it; RuntimeError where its tests fail without any change."""
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(root, tree, symlinks=True, ignore=_LEFT_OUT)
        tests = dict.fromkeys(test for change in changes for test in change.tests)
        if tests and (failed := _first_failed(tree, tests, LONGEST * len(changes))):
            raise RuntimeError(f"without any change {failed} fails; a change can only be judged by tests that pass")
        for change in changes:
            begin = perf_counter()
            yield Verdict(change, _seen_by(change, tree), perf_counter() - begin)


def _seen_by(change: Change, tree: Path) -> str:
    path = tree / change.file
    text, changed = path.read_text(), change.applied(tree)
    path.write_text(changed)
    try:
        return _first_failed(tree, change.tests, LONGEST)
    finally:
        path.write_text(text)


def _first_failed(tree: Path, tests: Iterable[str], longest: float) -> str:
    """The first of the tests that fails in the tree, "" for none."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    # Bytecode is told apart by whole seconds and sizes: of two changes in a row the second might not be seen.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=longest)
    except subprocess.TimeoutExpired:
        return f"no end within {longest:.0f} s"
    if done.returncode not in (_PASSED, _FAILED):
        raise RuntimeError(f"the tests did not run: {done.stdout}{done.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return "" if done.returncode == _PASSED else found[1] if found else "a test"
