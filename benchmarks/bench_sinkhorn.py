"""fastdsm.sinkhorn beside the eager loop, torch.compile of it, and the peers."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdsm

from .baselines import COLUMNS_THEN_ROWS, sinkhorn_baselines, sinkhorn_eager
from .harness import SHAPES, SWEEPS, Case, Implementation, measure
from .peers import sinkhorn_peers
from .rows import BACKWARD, FORWARD
from .targets import LARGE_SHAPE


def project(logits: Tensor) -> Tensor:
    """The call that is timed."""
    return fastdsm.sinkhorn(logits, n_iters=SWEEPS)


OURS = Implementation(
    "fastdsm", f"fastdsm.sinkhorn(x, n_iters={SWEEPS})", lambda x: (project(x),), COLUMNS_THEN_ROWS, capturable=True
)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sinkhorn(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], direction: str) -> None:
    """Project standard normal logits."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    implementations = [OURS, *sinkhorn_baselines(), *sinkhorn_peers(logits, direction)]
    measure(benchmark, Case("sinkhorn", logits, direction), implementations)


def bench_sinkhorn_of_large_matrices(benchmark: BenchmarkFixture, device: str) -> None:
    """Project matrices that no cache holds; beside the eager loop alone, for a call takes seconds."""
    logits = torch.randn(LARGE_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    measure(benchmark, Case("sinkhorn", logits, FORWARD), [OURS, sinkhorn_eager()])
