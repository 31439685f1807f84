"""compat.gumbel, against its loops in float64, of the same seed; no package index has it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fastdsm.compat import gumbel

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of
from .oracles import log_projection

SHAPES = pytest.mark.parametrize("shape", [(4, 6, 6), (1, 6, 4), (3, 4, 6)])


def noise_like(x: Tensor) -> Tensor:
    """Gumbel noise, of the generator's next draw."""
    return -torch.log(-torch.log(torch.rand_like(x) + 1e-20) + 1e-20)


@DTYPES
@SHAPES
@pytest.mark.parametrize("n_iter", [1, 20])
def test_projections(n_iter: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (x,) = leaves_of(shape, dtype=dtype)
    origin = log_projection(x, 2 * n_iter, "row").exp().to(dtype)
    assert_same(gumbel.log_sinkhorn_norm(x, n_iter), origin, [x])
    assert_same(gumbel.sinkhorn_norm(x.exp(), n_iter), origin, [x])


@DTYPES
@SHAPES
@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_samples_of_one_seed(tau: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (x,) = leaves_of(shape, dtype=dtype)
    torch.manual_seed(3)
    found = gumbel.gumbel_sinkhorn(x, tau, 10)
    torch.manual_seed(3)
    noisy = (x + noise_like(x)).double() / tau
    assert_same(found, log_projection(noisy, 20, "row").exp().to(dtype), [x])


def test_the_temperature_without_noise() -> None:
    """The origin forgets tau there; the paper's operator has it."""
    x = torch.randn(3, 5, 5, dtype=torch.float64)
    assert_close(gumbel.gumbel_sinkhorn(x, 0.3, 10, noise=False), log_projection(x / 0.3, 20, "row").exp(), 1e-12)
    assert_close(gumbel.gumbel_sinkhorn(x, 1.0, 10, noise=False), log_projection(x, 20, "row").exp(), 1e-12)


def test_zeros_of_a_kernel() -> None:
    """They stay 0, with a finite gradient; the other entries' is the origin's."""
    alpha = torch.rand(3, 5, 5, dtype=torch.float64)
    alpha[:, 1, 2] = 0.0
    alpha.requires_grad_()
    found, origin = gumbel.sinkhorn_norm(alpha, 7), alpha
    for _ in range(7):
        origin = origin / origin.sum(-1, keepdim=True)
        origin = origin / origin.sum(-2, keepdim=True)
    assert_close(found.detach(), origin.detach(), 1e-12)
    cotangent = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(x, alpha, cotangent)[0] for x in (found, origin))
    zero = alpha.detach() == 0
    assert not ours[zero].any()
    assert_close(ours[~zero], theirs[~zero], 1e-10)


def test_large_logits_and_strides() -> None:
    x = torch.randn(6, 3, 12).permute(1, 0, 2)[..., ::2] * 50
    assert_close(gumbel.log_sinkhorn_norm(x, 5), log_projection(x, 10, "row").exp(), 1e-6)
    assert gumbel.gumbel_sinkhorn(x[:0]).shape == (0, 6, 6)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (4, 3, 6), (4, 6, 3), (5, 5)])
def test_matchings(shape: tuple[int, ...]) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(5)
    found = gumbel.gumbel_matching(x)
    torch.manual_seed(5)
    noisy = (x + noise_like(x)).detach()
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    for matching, scores in zip(found.reshape(-1, *shape[-2:]), noisy.reshape(-1, *shape[-2:]), strict=True):
        rows, columns = optimize.linear_sum_assignment(-scores.numpy())
        assert torch.equal(matching.nonzero(), torch.stack([torch.from_numpy(rows), torch.from_numpy(columns)], 1))
        assert matching.sum() == min(shape[-2:])
    assert torch.equal(gumbel.gumbel_matching(x, noise=False), gumbel.gumbel_matching(x.detach(), False))


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        gumbel.gumbel_matching(torch.randn(2, 3, 3))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        gumbel.sinkhorn_norm(-torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="n_iter must be >= 1"):
        gumbel.log_sinkhorn_norm(torch.ones(2, 3, 3), 0)
    with pytest.raises(ValueError, match="tau must be > 0"):
        gumbel.gumbel_sinkhorn(torch.ones(2, 3, 3), 0.0)
