"""How pytest is to run the benchmarks."""

from __future__ import annotations

from pathlib import Path

from .rows import ROOT


def options(device: str, threads: int, select: str, rows: Path) -> list[str]:
    """Arguments for pytest; ``select`` is its -k. What is measured is appended to ``rows``."""
    return [
        str(ROOT / "benchmarks"), f"--rootdir={ROOT}", "-o", "python_files=bench_*.py",
        "-o", "python_functions=bench_*", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--disable-warnings",
        f"--device={device}", f"--threads={threads}", "-k", select,
        "--benchmark-enable", "--benchmark-quiet", f"--rows={rows}",
    ]  # fmt: skip
