"""Every test runs with the kernels interpreted and with uninitialised memory filled with NaN."""

import math
import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, hence before anything else

import pytest
import torch

from fastdsm.kernels.common.configuration import Configuration
from fastdsm.pytorch import chunk, newton

torch.set_num_threads(1)  # small tensors: a second thread would only wait, and badly so on a busy machine


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """torch.empty and its kin return NaN: an output that a kernel leaves unwritten cannot pass for a number."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch has two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def as_kernels_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton's method on the PyTorch path in float32 and from the logits as they are, whose steps are compared."""
    monkeypatch.setattr(newton, "WARM_RANGE", math.inf)
    monkeypatch.setattr(chunk, "_SINGLE_RANGE", math.inf)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is launched as on Hopper, whose tiles are its own."""
    monkeypatch.setattr(Configuration, "on", lambda self, device: self.own or self)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
