"""compat.superglue, against dustbins and sweeps written out in float64; tests/interop has it inside transformers' model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdsm.compat import superglue

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of
from .oracles import log_projection


def transported(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    """log of (m + n) times the plan of masses 1 / (m + n), a dustbin's being as many as there are opposite."""
    b, m, n = scores.shape
    Z = scores.new_zeros(b, m + 1, n + 1).double() + alpha
    Z = torch.cat([torch.cat([scores.double(), Z[:, :m, n:]], -1), Z[:, m:]], -2)
    masses = [torch.ones(b, k + 1, dtype=Z.dtype) for k in (m, n)]
    masses[0][:, -1], masses[1][:, -1] = n, m
    rows, columns = (x / (m + n) for x in masses)
    return log_projection(Z, 2 * iters, "row", rows, columns) + torch.tensor(float(m + n), dtype=Z.dtype).log()


@DTYPES
@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 9, 4), (2, 1, 1)])
@pytest.mark.parametrize("iters", [0, 1, 20])
def test_log_optimal_transport(iters: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores, alpha = leaves_of(shape, (), dtype=dtype, scale=2.0)
    found = superglue.log_optimal_transport(scores, alpha, iters)
    assert_same(found, transported(scores, alpha, iters).to(dtype), [scores, alpha])


def test_a_score_for_each_pair_and_strides() -> None:
    alpha = torch.randn(3, 1, 1, dtype=torch.float64)
    scores = torch.randn(9, 14, 3, dtype=torch.float64).permute(2, 0, 1)[..., ::2]
    assert_close(superglue.log_optimal_transport(scores, alpha, 5), transported(scores, alpha, 5), 1e-12)
    assert superglue.log_optimal_transport(scores[:0], torch.zeros(1).double(), 5).shape == (0, 10, 8)


def test_where_the_plan_underflows() -> None:
    """Logarithms down to -300 and their gradients, of which the plan's would be NaN."""
    scores, alpha = leaves_of((3, 7, 9), (1,), dtype=torch.float32, scale=50.0)
    origin = transported(scores, alpha, 50)
    assert origin.min() < -150
    assert_same(superglue.log_optimal_transport(scores, alpha, 50), origin.float(), [scores, alpha])


@DTYPES
@pytest.mark.parametrize("iters", [1, 7])
def test_log_sinkhorn_iterations(iters: int, dtype: torch.dtype) -> None:
    """Of masses whose totals differ, rows first: columns are exact."""
    Z, log_mu, log_nu = leaves_of((3, 5, 6), (3, 5), (3, 6), dtype=dtype)
    found = superglue.log_sinkhorn_iterations(Z, log_mu, log_nu, iters)
    origin = log_projection(Z, 2 * iters, "row", log_mu.double().exp(), log_nu.double().exp())
    assert_same(found, origin.to(dtype), [Z, log_mu, log_nu])
    assert superglue.log_sinkhorn_iterations(Z, log_mu, log_nu, 0) is Z


def test_excluded_entries() -> None:
    Z = torch.randn(2, 5, 6, dtype=torch.float64)
    Z[:, 2, 3] = -torch.inf
    mu, nu = torch.full((2, 5), -5.0, dtype=Z.dtype), torch.full((2, 6), -5.0, dtype=Z.dtype)
    found = superglue.log_sinkhorn_iterations(Z, mu, nu, 4)
    assert_close(found, log_projection(Z, 8, "row", mu.exp(), nu.exp()), 1e-12)


def test_bad_input() -> None:
    scores = torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match=r"alpha must be a torch\.Tensor"):
        superglue.log_optimal_transport(scores, 1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha must be broadcastable to \(2, 1, 1\)"):
        superglue.log_optimal_transport(scores, torch.zeros(5), 3)
    with pytest.raises(ValueError, match="iters must be >= 0"):
        superglue.log_optimal_transport(scores, torch.zeros(1), -1)
    with pytest.raises(ValueError, match=r"row_marginal must have shape \(\.\.\., 3\)"):
        superglue.log_sinkhorn_iterations(scores, torch.zeros(2, 5), torch.zeros(2, 4), 3)
