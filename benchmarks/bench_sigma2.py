"""sinkhorn_sigma2, sigma2 and sigma2_bounds beside full decompositions."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdsm

from .baselines import PLAN_AND_SIGMA2, SIGMA2, SIGMA2_TWICE, sigma2_by_eigvalsh, sigma2_by_svdvals, sinkhorn_loop
from .bench_sinkhorn import project
from .harness import SHAPES, SWEEPS, Case, Implementation, Outputs, measure
from .rows import BACKWARD, FORWARD

SECONDS = 2.0  # for the rounds of a case
CPU_SHARE = 4  # full decompositions are slow: on a CPU, a quarter of each batch; the rows carry the shape measured
# sigma2's default asks for 1e-4, its bounds promise 1e-3. The gradient is ill-conditioned near a multiple singular
# value: its error is reported, but no reason to leave out a row.
SIGMA2_TOLERANCE = 2e-4
BOUNDS_TOLERANCE = 2e-3


def _logits(shape: tuple[int, ...], device: str) -> Tensor:
    batch = shape[0] // CPU_SHARE if device == "cpu" else shape[0]
    return torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sinkhorn_sigma2(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], direction: str) -> None:
    """Project standard normal logits and measure the plans."""

    def ours(x: Tensor) -> Outputs:
        spectrum = fastdsm.sinkhorn_sigma2(x, n_iters=SWEEPS)
        return spectrum.plan, spectrum.sigma2

    def eager(x: Tensor) -> Outputs:
        plan = sinkhorn_loop(x)
        return plan, sigma2_by_svdvals(plan)

    call = f"fastdsm.sinkhorn_sigma2(x, n_iters={SWEEPS})"
    implementations = [
        Implementation("fastdsm", call, ours, PLAN_AND_SIGMA2),
        Implementation("eager", "loop of torch.logsumexp, torch.linalg.svdvals", eager, PLAN_AND_SIGMA2),
    ]
    case = Case("sinkhorn_sigma2", _logits(shape, device), direction, SWEEPS, SIGMA2_TOLERANCE, None, SECONDS)
    measure(benchmark, case, implementations)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sigma2(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], direction: str) -> None:
    """Measure the projections of standard normal logits."""
    plans = project(_logits(shape, device))
    implementations = [
        Implementation("fastdsm", "fastdsm.sigma2(x)", _sigma2, SIGMA2),
        *_decompositions(),
    ]
    measure(benchmark, Case("sigma2", plans, direction, None, SIGMA2_TOLERANCE, None, SECONDS), implementations)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sigma2_bounds(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...]) -> None:
    """Bound sigma2 of the projections of standard normal logits from both sides."""
    plans = project(_logits(shape, device))
    implementations = [
        Implementation("fastdsm", "fastdsm.sigma2_bounds(x)", fastdsm.sigma2_bounds, SIGMA2_TWICE),
        *_decompositions(),
    ]
    measure(benchmark, Case("sigma2_bounds", plans, FORWARD, None, BOUNDS_TOLERANCE, None, SECONDS), implementations)


def _sigma2(plans: Tensor) -> Outputs:
    return (fastdsm.sigma2(plans),)


def _decompositions() -> list[Implementation]:
    """Every singular value, the eager way; every eigenvalue of the Gram matrix, which loses half the digits."""
    return [
        Implementation("eager", "torch.linalg.svdvals of M", lambda x: (sigma2_by_svdvals(x),), SIGMA2),
        Implementation("eigvalsh", "torch.linalg.eigvalsh of M^T M", lambda x: (sigma2_by_eigvalsh(x),), SIGMA2),
    ]
