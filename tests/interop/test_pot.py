"""POT: ``compat.pot`` in the place of what its own functions and classes call, and Newton's method in the place of its limit.

The calls by themselves are compared in tests/compat. A cost M over a regularisation reg is -M / reg as logits.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import compat

from .parity import DTYPES, assert_close, assert_same

ot = pytest.importorskip("ot", reason="the extra parity")
pytest.importorskip("ot.batch", reason="POT since 0.9.6")


def transport(*batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Masses a (..., 12) and b (..., 9) of one total and squared distances M (..., 12, 9), with gradients."""
    a, b = (torch.randn(*batch, n, dtype=dtype).softmax(-1) for n in (12, 9))
    M = torch.cdist(torch.rand(*batch, 12, 2, dtype=dtype), torch.rand(*batch, 9, 2, dtype=dtype)).square()
    return a.requires_grad_(), b.requires_grad_(), M.requires_grad_()


def test_domain_adaptation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that a class of ot.da fits, from NumPy."""
    source, target = np.random.default_rng(0).random((12, 2)), np.random.default_rng(1).random((9, 2))
    origin = ot.da.SinkhornTransport(reg_e=0.5).fit(Xs=source, Xt=target)
    monkeypatch.setattr(ot.da, "sinkhorn", compat.pot.sinkhorn)  # the swap
    swapped = ot.da.SinkhornTransport(reg_e=0.5).fit(Xs=source, Xt=target)
    assert np.abs(swapped.coupling_ - origin.coupling_).max() < 1e-12
    assert swapped.log_["niter"] == origin.log_["niter"]
    assert np.abs(swapped.transform(Xs=source) - origin.transform(Xs=source)).max() < 1e-12


@DTYPES
def test_divergence_of_samples(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Three losses of ot.bregman, with the gradient in the samples."""
    x, y = (torch.rand(n, 2, dtype=dtype, requires_grad=True) for n in (12, 9))
    origin = ot.bregman.empirical_sinkhorn_divergence(x, y, 0.5, numIterMax=30, stopThr=0.0, warn=False)
    monkeypatch.setattr(ot.bregman._empirical, "sinkhorn2", compat.pot.sinkhorn2)  # the swap
    assert_same(ot.bregman.empirical_sinkhorn_divergence(x, y, 0.5, numIterMax=30, stopThr=0.0, warn=False), origin, [x, y])


@DTYPES
@pytest.mark.parametrize("reg", [0.3, 0.05])
def test_converged(reg: float, dtype: torch.dtype) -> None:
    """Sweeps until nothing changes, unrolled by autograd, against Newton's method and the implicit gradient.

    What POT rounds in thousand sweeps counts in float32, hence float64 is what both are held to.
    """
    a, b, M = transport(dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (a, b, M)]
    wide[1] = (wide[1] * (wide[0].sum() / wide[1].sum())).detach().requires_grad_()
    origin = ot.sinkhorn(*wide, reg, method="sinkhorn_log", numItermax=3000, stopThr=1e-15)
    found = fastdsm.sinkhorn(-M, temperature=reg, row_marginal=a, col_marginal=b, solver="newton")
    assert_close(found.detach(), origin.detach(), 1e-6 if dtype == torch.float32 else 1e-12)
    cotangent = torch.randn_like(origin)
    truth = torch.autograd.grad(origin, wide, cotangent)
    pulled = torch.autograd.grad(found, [a, b, M], cotangent.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert_close(pulled[2], truth[2], tolerance)
    for ours, theirs in zip(pulled[:2], truth[:2], strict=True):  # masses of one total: up to a constant
        assert_close(ours - ours.mean(), theirs - theirs.mean(), tolerance)


def test_solve() -> None:
    """``ot.solve`` is the plan and <P, M> + reg KL(P | a b^T), until ``tol``."""
    a, b, M = transport(dtype=torch.float64)
    origin = ot.solve(M, a, b, reg=0.1, tol=1e-15, max_iter=3000)
    plan = fastdsm.sinkhorn(-M, temperature=0.1, row_marginal=a, col_marginal=b, solver="newton")
    assert_same(plan, origin.plan, [M], gradient=1e-9)
    assert_close((plan * M).sum().detach(), origin.value_linear.detach(), 1e-12)


def test_values_of_a_batch() -> None:
    """<P, M> - reg H(P), with the gradient that ``grad="envelope"`` gives it in the cost: the plan itself."""
    a, b, M = transport(5, dtype=torch.float64)
    origin = ot.batch.solve_batch(M, 0.1, a, b, max_iter=3000, tol=1e-15, grad="envelope")
    plan = fastdsm.sinkhorn(-M, temperature=0.1, row_marginal=a, col_marginal=b, solver="newton")
    value = (plan * M - 0.1 * torch.special.entr(plan)).sum((-2, -1))
    assert_same(value, origin.value, [M], gradient=1e-9)
