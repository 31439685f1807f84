"""Triton's compiler stopped at PTX, with a cache of its own.

What is kept there has no machine code, and would break every other user of Triton's cache: it lies in ``PTX_CACHE_DIR``, by
default ``~/.triton/ptx-cache``, under keys of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton


def cache_dir() -> str:
    """Where compiled kernels are kept."""
    return os.environ.get("PTX_CACHE_DIR") or str(Path.home() / ".triton" / "ptx-cache")


@contextmanager
def stopping_at_ptx() -> Iterator[None]:
    """``triton.compile`` within compiles, even where kernels are interpreted, and leaves machine code out."""
    with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
        triton.knobs.cache.dir = cache_dir()
        triton.knobs.runtime.interpret = False
        triton.knobs.runtime.add_stages_inspection_hook = _without_machine_code
        yield


def _without_machine_code(*stages_and_options: Any) -> tuple[str, str] | None:
    """Triton's hook: called with a backend, its stages and options to change them, or for a part of the cache's key."""
    if not stages_and_options:
        return "ptx alone", "ptx alone"
    stages: dict[str, Callable[..., Any]] = stages_and_options[1]
    stages["cubin"] = lambda source, metadata: b"none"
    return None
