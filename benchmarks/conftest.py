"""Options of the benchmarks: on which device, with how many threads, and where each leaves its rows as soon as it has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--device``, ``--threads`` and ``--rows``."""
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    parser.addoption("--threads", default=2, type=int, help="threads of PyTorch on the CPU")
    parser.addoption("--rows", type=Path, help="file that rows are appended to, as JSON lines")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Device to measure on, with the threads set and torch.compile's caches empty."""
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.compiler.reset()
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _kept(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[None]:
    """What was measured outlives a run that is cut off, as that of a GPU lent for minutes may be."""
    yield
    path = request.config.getoption("--rows")
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in benchmark.extra_info.get("rows", []))
