"""Results of Triton's compiler, for tests of a run whose kernels are interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def rows_of(module: str, function: str) -> list[Any]:
    """What ``module.function()`` returns in a process of its own.

    The interpreter of the other tests replaces Triton's compiler for good, so that one starts without it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import json; from {module} import {function}; print(json.dumps({function}()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found
