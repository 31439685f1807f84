"""POT: ot.sinkhorn, ot.bregman.sinkhorn_log, ot.solve and ot.batch, by the line that stands in their place.

A cost M over a regularisation reg is -M / reg as logits. ``ot.sinkhorn`` normalises columns first and ends with exact rows, as
n_iters does; ``ot.batch`` rows first. ``stopThr=0`` makes exactly numItermax sweeps, which is n_iters.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdsm

from .parity import DTYPES, assert_close, assert_same

ot = pytest.importorskip("ot", reason="the extra parity")
pytest.importorskip("ot.batch", reason="POT since 0.9.6")


def transport(*batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Masses a (..., 12) and b (..., 9) of one total and squared distances M (..., 12, 9), with gradients."""
    a, b = (torch.randn(*batch, n, dtype=dtype).softmax(-1) for n in (12, 9))
    M = torch.cdist(torch.rand(*batch, 12, 2, dtype=dtype), torch.rand(*batch, 9, 2, dtype=dtype)).square()
    return a.requires_grad_(), b.requires_grad_(), M.requires_grad_()


@DTYPES
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("sweeps", [1, 10, 100])
def test_so_many_sweeps(method: str, sweeps: int, dtype: torch.dtype) -> None:
    a, b, M = transport(dtype=dtype)
    reg = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    origin = ot.sinkhorn(a, b, M, reg, method=method, numItermax=sweeps, stopThr=0.0, warn=False)
    found = fastdsm.sinkhorn(-M, temperature=reg, row_marginal=a, col_marginal=b, n_iters=sweeps)
    assert_same(found, origin, [a, b, M, reg])


@DTYPES
def test_potentials_and_warm_start(dtype: torch.dtype) -> None:
    """The log dictionary's log_u and log_v are f and g, and the first part of a warm start is f0; the other is not used there.

    Masses come of a softmax: ours are of one total, and what moves b's alone is no change, where theirs moves f and g by a
    constant.
    """
    _, _, M = transport(dtype=dtype)
    scores = [torch.randn(n, dtype=dtype, requires_grad=True) for n in (12, 9)]
    a, b = (x.softmax(-1) for x in scores)
    u = torch.randn(12, dtype=dtype, requires_grad=True)
    origin, log = ot.bregman.sinkhorn_log(
        a, b, M, 0.2, numItermax=7, stopThr=0.0, warn=False, warmstart=(u, torch.zeros_like(b)), log=True
    )
    found, info = fastdsm.sinkhorn(-M, temperature=0.2, row_marginal=a, col_marginal=b, n_iters=7, f0=u, return_info=True)
    for ours, theirs in ((found, origin), (info.f, log["log_u"]), (info.g, log["log_v"])):
        assert_same(ours, theirs, [M, u, *scores])


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


@DTYPES
def test_loss(dtype: torch.dtype) -> None:
    a, b, M = transport(dtype=dtype)
    origin = ot.sinkhorn2(a, b, M, 0.2, method="sinkhorn_log", numItermax=50, stopThr=0.0, warn=False)
    plan = fastdsm.sinkhorn(-M, temperature=0.2, row_marginal=a, col_marginal=b, n_iters=50)
    assert_same((plan * M).sum(), origin, [a, b, M])


@DTYPES
def test_many_second_masses(dtype: torch.dtype) -> None:
    """b (m, k) is k problems of one cost, of which ``ot.sinkhorn`` gives the losses."""
    a, _, M = transport(dtype=dtype)
    b = torch.randn(9, 4, dtype=dtype).softmax(0).requires_grad_()
    origin = ot.sinkhorn(a, b, M, 0.2, numItermax=20, stopThr=0.0, warn=False)
    plans = fastdsm.sinkhorn((-M).expand(4, 12, 9), temperature=0.2, row_marginal=a, col_marginal=b.mT, n_iters=20)
    assert_same((plans * M).sum((-2, -1)), origin, [a, b, M])


def test_solve() -> None:
    """``ot.solve`` is the plan and <P, M> + reg KL(P | a b^T), until ``tol``."""
    a, b, M = transport(dtype=torch.float64)
    origin = ot.solve(M, a, b, reg=0.1, tol=1e-15, max_iter=3000)
    plan = fastdsm.sinkhorn(-M, temperature=0.1, row_marginal=a, col_marginal=b, solver="newton")
    assert_same(plan, origin.plan, [M], gradient=1e-9)
    assert_close((plan * M).sum().detach(), origin.value_linear.detach(), 1e-12)


@DTYPES
@pytest.mark.parametrize("sweeps", [1, 10])
def test_batch(sweeps: int, dtype: torch.dtype) -> None:
    """Rows first, so that columns are exact; ``tol=0`` makes exactly max_iter sweeps, ``grad="autodiff"`` unrolls them.

    Ours scales b to the total of a, and so the gradient of b is along changes that keep it, to which masses that come of a
    softmax belong.
    """
    _, _, M = transport(5, dtype=dtype)
    scores = [torch.randn(5, n, dtype=dtype, requires_grad=True) for n in (12, 9)]
    a, b = (x.softmax(-1) for x in scores)
    origin = ot.batch.solve_batch(M, 0.1, a, b, max_iter=sweeps, tol=0.0, grad="autodiff")
    options = {"temperature": 0.1, "row_marginal": a, "col_marginal": b, "first": "row", "n_iters": sweeps}
    found = fastdsm.sinkhorn(-M, **options)
    assert_same(found, origin.plan, [M, *scores])
    projected = ot.batch.bregman_log_projection_batch(-M / 0.1, a, b, max_iter=sweeps, tol=0.0, grad="autodiff")
    assert_same(fastdsm.log_sinkhorn(-M, **options), projected["log_T"], [M, *scores])


@DTYPES
def test_batch_with_uniform_masses(dtype: torch.dtype) -> None:
    _, _, M = transport(5, dtype=dtype)
    origin = ot.batch.solve_batch(M, 0.1, max_iter=20, tol=0.0, grad="autodiff").plan
    found = fastdsm.sinkhorn(-M, temperature=0.1, row_marginal=1 / 12, first="row", n_iters=20)
    assert_same(found, origin, [M])


def test_values_of_a_batch() -> None:
    """<P, M> - reg H(P), with the gradient that ``grad="envelope"`` gives it in the cost: the plan itself."""
    a, b, M = transport(5, dtype=torch.float64)
    origin = ot.batch.solve_batch(M, 0.1, a, b, max_iter=3000, tol=1e-15, grad="envelope")
    plan = fastdsm.sinkhorn(-M, temperature=0.1, row_marginal=a, col_marginal=b, solver="newton")
    value = (plan * M - 0.1 * torch.special.entr(plan)).sum((-2, -1))
    assert_same(value, origin.value, [M], gradient=1e-9)
