"""fastdsm.sinkhorn_attention beside the eager loop and torch.compile of it, which store every sweep's logits."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdsm

from .baselines import ATTENTION, attention_baselines, split
from .harness import Case, Implementation, Outputs, measure
from .rows import BACKWARD, FORWARD
from .targets import ATTENTION_SHAPE, ATTENTION_SWEEPS


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def bench_sinkhorn_attention(benchmark: BenchmarkFixture, device: str, direction: str) -> None:
    """Attend with standard normal operands."""

    def ours(x: Tensor) -> Outputs:
        return (fastdsm.sinkhorn_attention(*split(x), n_iters=ATTENTION_SWEEPS),)

    call = f"fastdsm.sinkhorn_attention(query, key, value, n_iters={ATTENTION_SWEEPS})"
    operands = torch.randn(ATTENTION_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    implementations = [Implementation("fastdsm", call, ours, ATTENTION), *attention_baselines()]
    measure(benchmark, Case("sinkhorn_attention", operands, direction, ATTENTION_SWEEPS), implementations)
