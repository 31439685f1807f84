"""Changes made one at a time in a copy of the tree, and the tests that must see them run there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from time import perf_counter

from .change import Change

LONGEST = 600  # seconds; of a run that takes longer, a loop has lost its end
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
        with _serving(tree) as first_failed:
            tests = dict.fromkeys(test for change in changes for test in change.tests)
            if tests and (failed := first_failed(tests, LONGEST * len(changes))):
                raise RuntimeError(f"without any change {failed} fails; a change can only be judged by tests that pass")
            for change in changes:
                path, begin = tree / change.file, perf_counter()
                text, changed = path.read_text(), change.applied(tree)
                path.write_text(changed)
                try:
                    by = first_failed(change.tests, LONGEST)
                finally:
                    path.write_text(text)
                yield Verdict(change, by, perf_counter() - begin)


@contextmanager
def _serving(tree: Path) -> Iterator[Callable[[Iterable[str], int], str]]:
    """What runs tests in the tree for so many seconds, and gives the first that fails, "" for none."""
    # Bytecode is told apart by whole seconds and sizes: of two changes in a row the second might not be seen.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("server.py"))]
    with Popen(command, cwd=tree, env=environment, stdin=PIPE, stdout=PIPE, text=True) as server:
        requests, answers = server.stdin, server.stdout
        assert requests is not None
        assert answers is not None

        def first_failed(tests: Iterable[str], seconds: int) -> str:
            print(json.dumps({"tests": list(tests), "seconds": seconds}), file=requests, flush=True)
            return _first_failed(**json.loads(answers.readline()))

        try:
            yield first_failed
        finally:
            requests.close()


def _first_failed(code: int, output: str) -> str:
    if code == -signal.SIGALRM:
        return "the time, which ran out"
    if code not in (_PASSED, _FAILED):
        raise RuntimeError(f"the tests did not run: {output}")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return "" if code == _PASSED else found[1] if found else "a test"
