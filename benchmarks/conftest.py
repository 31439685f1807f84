"""Options of the benchmarks: on which device, with how many threads."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--device`` and ``--threads``."""
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure")
    parser.addoption("--threads", default=2, type=int, help="threads of PyTorch on the CPU")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Device to measure on, with the threads set and torch.compile's caches empty."""
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.compiler.reset()
    return request.config.getoption("--device")
