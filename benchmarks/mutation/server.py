"""A process that has imported what takes long, and forks for each run of pytest: ``python -P server.py``, in a tree.

A request is a line of JSON on stdin, {"tests": [...], "seconds": 9}; the answer one on stdout, {"code": 0, "output": "..."}:
the exit code of pytest, or less than 0, that of the signal which ended it, SIGALRM after so many seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from tempfile import TemporaryFile
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, as in tests/conftest.py

import pytest

for name in ("torch._inductor", "triton", "hypothesis"):  # which tests come to import, in seconds
    with suppress(ImportError):
        import_module(name)

_OPTIONS = ("-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider")


def answer(tests: list[str], seconds: int) -> dict[str, Any]:
    """Run the tests in a child."""
    with TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = pytest.main([*_OPTIONS, *tests])
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "output": output.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
