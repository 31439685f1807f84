"""compat.megatron, against the router's loop in float64, with and without the 1e-8 that it adds to every sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdsm.compat import megatron

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of


def routed(cost: Tensor, tol: float, eps: float) -> tuple[Tensor, int]:
    """The plan and the number of sweeps: d0 = 1 / (n (K d1 + eps)), d1 = 1 / (m (K^T d0 + eps)), from d1 = 1."""
    K = cost.double().exp()
    n, m = K.shape
    factors, change, sweeps = torch.ones(m, dtype=K.dtype), torch.inf, 0
    while change > tol:
        tokens = 1 / (n * (K @ factors + eps))
        experts = 1 / (m * (K.mT @ tokens + eps))
        change, factors, sweeps = float((experts - factors).abs().mean().detach()), experts, sweeps + 1
    return tokens.unsqueeze(1) * K * factors, sweeps


@DTYPES
@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (1, 4), (5, 1)])
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_value_and_gradient(tol: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same number of sweeps: one more or less would be off by up to ``tol``."""
    (cost,) = leaves_of(shape, dtype=dtype)
    origin, sweeps = routed(cost, tol, 0.0)
    found = megatron.sinkhorn(cost, tol)
    assert sweeps > 1 or 1 in shape
    assert_same(found, origin.to(dtype), [cost])


def test_the_default_tolerance() -> None:
    cost = torch.randn(64, 8, dtype=torch.float64)
    assert_close(megatron.sinkhorn(cost), routed(cost, 1e-4, 0.0)[0], 1e-12)
    assert (routed(cost, 1e-4, 0.0)[0] - routed(cost, 1e-2, 0.0)[0]).abs().max() > 1e-6


def test_what_the_origin_adds() -> None:
    """Relatively about 1e-8 m, as its sums of columns are 1 / m."""
    cost = torch.randn(64, 8, dtype=torch.float64)
    found, origin = megatron.sinkhorn(cost), routed(cost, 1e-4, 1e-8)[0]
    assert 1e-9 < (found / origin - 1).abs().max() < 2e-8 * 8


def test_a_token_of_low_logits() -> None:
    """All at -30: the 1e-8 of the origin takes its mass from it, and 2,000 sweeps and more do not give it back."""
    cost = torch.randn(64, 8, dtype=torch.float64)
    cost[3] -= 30.0
    theirs, sweeps = routed(cost, 1e-4, 1e-8)
    assert sweeps > 1000
    assert 64 * theirs[3].sum() < 0.9
    found = megatron.sinkhorn(cost)
    assert_close(found, routed(cost, 1e-4, 0.0)[0], 1e-12)
    assert (64 * found[3].sum() - 1).abs() < 1e-3


def test_logits_that_overflow() -> None:
    cost = torch.randn(64, 8) + 100.0
    assert cost.exp().isinf().any()
    assert_close(megatron.sinkhorn(cost), routed(cost - 100.0, 1e-4, 0.0)[0], 1e-6)


def test_strides_and_half_precision() -> None:
    cost = torch.randn(8, 128, dtype=torch.float64).mT[::2]
    assert_close(megatron.sinkhorn(cost), routed(cost, 1e-4, 0.0)[0], 1e-12)
    rounded = torch.randn(64, 8).bfloat16()
    assert megatron.sinkhorn(rounded).dtype == torch.bfloat16


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cost must have shape \(tokens, experts\), got \(2, 3, 4\)"):
        megatron.sinkhorn(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="tol must be >= 0"):
        megatron.sinkhorn(torch.randn(3, 4), -1.0)
    monkeypatch.setattr(megatron, "_MOST", 2)
    with pytest.warns(RuntimeWarning, match="2 sweeps left changes of more than tol = 1e-12"):
        megatron.sinkhorn(torch.randn(8, 8, dtype=torch.float64), 1e-12)
