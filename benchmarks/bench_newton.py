"""solver="newton" beside the sweeps to the same residual: what convergence costs where sigma2 is near 1."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdsm

from .baselines import FIXED_POINT
from .harness import Case, Implementation, measure
from .rows import FORWARD
from .targets import NEWTON_SHAPE

LOGIT_STD = 4.0
TOL = 1e-6
MOST_SWEEPS = 2000
# Two matrices in a hundred have not converged after so many sweeps: their plans err by up to 2e-4, Newton's by 1e-6.
TOLERANCE = 1e-3
SECONDS = 20.0  # the sweeps take one to two


@pytest.mark.parametrize("shape", [NEWTON_SHAPE, (64, 64, 64)], ids=str)
def bench_newton(benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...]) -> None:
    """Converge the projections of normal logits of standard deviation 4."""
    logits = LOGIT_STD * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def newton(x: Tensor) -> Tensor:
        return fastdsm.sinkhorn(x, solver="newton", tol=TOL)

    def sweeps(x: Tensor) -> Tensor:
        return fastdsm.sinkhorn(x, tol=TOL, n_iters=MOST_SWEEPS)

    by_newton, by_sweeps = f'solver="newton", tol={TOL:g}', f"tol={TOL:g}, n_iters={MOST_SWEEPS}"
    implementations = [
        Implementation("fastdsm", f"fastdsm.sinkhorn(x, {by_newton})", lambda x: (newton(x),), FIXED_POINT),
        Implementation("eager", f"fastdsm.sinkhorn(x, {by_sweeps})", lambda x: (sweeps(x),), FIXED_POINT),
    ]
    measure(benchmark, Case("newton", logits, FORWARD, None, TOLERANCE, None, SECONDS), implementations)
