"""fastdsm.sinkhorn beside the eager loop, torch.compile of it, and the peers."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdsm

from .baselines import COLUMNS_THEN_ROWS, sinkhorn_baselines
from .harness import SHAPES, SWEEPS, Case, Implementation, measure
from .peers import sinkhorn_peers
from .rows import BACKWARD, FORWARD


def project(logits: Tensor) -> Tensor:
    """The call that is timed."""
    return cast(Tensor, fastdsm.sinkhorn(logits, n_iters=SWEEPS))


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sinkhorn(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], direction: str) -> None:
    """Project standard normal logits."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    ours = Implementation(
        "fastdsm",
        f"fastdsm.sinkhorn(x, n_iters={SWEEPS})",
        lambda x: (project(x),),
        COLUMNS_THEN_ROWS,
    )
    implementations = [ours, *sinkhorn_baselines(), *sinkhorn_peers(logits, direction)]
    measure(benchmark, Case("sinkhorn", logits, direction), implementations)
