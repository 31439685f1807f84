"""GeomLoss: plan, value and potentials where its solver has converged.

Its updates are averaged and annealed: after so many iterations its plan is none of ours, in the limit there is but one. It
comes there slowly, at reg = 0.1 with marginals 1e-4 off after 5,000 iterations, so that reg = 1 is compared, to 1e-6, and the
value, whose error is the square of the plan's, to 1e-9. Its potentials are relative to the masses. The gradient of its value in
the cost is twice the plan where it should be the plan.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import fastdsm

from .parity import assert_close

geomloss_ot = pytest.importorskip("geomloss.ot", reason="the extra parity")


def test_converged() -> None:
    a, b = (torch.randn(4, n, dtype=torch.float64).softmax(-1) for n in (7, 9))
    C = torch.cdist(torch.rand(4, 7, 2, dtype=a.dtype), torch.rand(4, 9, 2, dtype=a.dtype)).square().requires_grad_()
    reg = 1.0
    with warnings.catch_warnings(action="ignore"):  # it makes numbers of tensors
        origin = geomloss_ot.solve_batch(C, reg=reg, a=a, b=b, max_iter=2000)
    plan, info = fastdsm.sinkhorn(
        -C, temperature=reg, row_marginal=a, col_marginal=b, solver="newton", return_info=True
    )  # the swap
    f, g = reg * (info.f - a.log()), reg * (info.g - b.log())
    value = (a * f).sum(-1) + (b * g).sum(-1)
    assert info.residual.max() < 1e-12
    assert_close(plan.detach(), origin.plan.detach(), 1e-6)
    assert_close(value.detach(), origin.value.detach(), 1e-9)
    difference = (
        f.unsqueeze(-1) + g.unsqueeze(-2) - origin.potential_a.unsqueeze(-1) - origin.potential_b.unsqueeze(-2)
    ).detach()
    assert_close(difference, torch.zeros_like(plan), 1e-5)
    (slope,) = torch.autograd.grad(value.sum(), C)
    assert_close(slope, plan.detach(), 1e-12)
    (theirs,) = torch.autograd.grad(origin.value.sum(), C)
    assert_close(theirs, 2 * slope, 1e-5)
