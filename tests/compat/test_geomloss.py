"""compat.geomloss, against the package where it has converged, and against Sinkhorn sweeps in float64 where it has not.

It comes to its limit slowly: at reg = 1, after 2,000 iterations, plans agree to 1e-6 and values, whose error is the square of
the plan's, to 1e-9.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdsm.compat import geomloss as compat

from ..interop.parity import DTYPES, assert_close, gradient_tolerance, value_tolerance
from .oracles import potentials

origin = pytest.importorskip("geomloss.ot", reason="the extra parity")


def problem(dtype: torch.dtype = torch.float64, total: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """C (4, 7, 9), a (4, 7) and b (4, 9)."""
    a, b = (total * torch.randn(4, n, dtype=dtype).softmax(-1) for n in (7, 9))
    return torch.cdist(torch.rand(4, 7, 2, dtype=dtype), torch.rand(4, 9, 2, dtype=dtype)).square(), a, b


def solved_there(C: Any, reg: float, a: Any, b: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # it makes numbers of tensors
        return origin.solve_batch(C, reg=reg, a=a, b=b, max_iter=2000)


def sums(f: Tensor, g: Tensor) -> Tensor:
    """What potentials determine, which are free by a constant."""
    return f.unsqueeze(-1) + g.unsqueeze(-2)


@pytest.mark.parametrize("total", [1.0, 2.0])
def test_the_package(total: float) -> None:
    C, a, b = problem(total=total)
    found, theirs = compat.solve_batch(C, reg=1.0, a=a, b=b), solved_there(C, 1.0, a, b)
    assert_close(found.value, theirs.value, 1e-9)
    for name in ("plan", "density", "marginal_a", "marginal_b"):
        assert_close(getattr(found, name), getattr(theirs, name), 1e-5 if name == "density" else 1e-6)
    assert_close(sums(found.potential_a, found.potential_b), sums(theirs.potential_a, theirs.potential_b), 1e-5)


@DTYPES
@pytest.mark.parametrize("reg", [1.0, 0.05])
def test_the_limit(reg: float, dtype: torch.dtype) -> None:
    C, a, b = problem(dtype)
    found = compat.solve_batch(C, reg=reg, a=a, b=b)
    wide = a.double(), (b.double() * (a.double().sum(-1) / b.double().sum(-1))[:, None])
    f, g = potentials(-C.double() / reg, 4000, "col", *wide)
    plan = (sums(f, g) - C.double() / reg).exp()
    f, g = (reg * (x - masses.log()) for x, masses in zip((f, g), wide, strict=True))
    tolerance = value_tolerance(dtype)
    assert_close(found.plan, plan, tolerance)
    assert_close(found.value, (wide[0] * f).sum(-1) + (wide[1] * g).sum(-1), tolerance)
    assert_close(sums(found.potential_a, found.potential_b), sums(f, g), 10 * tolerance)
    assert_close(found.density, plan / (wide[0].unsqueeze(-1) * wide[1].unsqueeze(-2)), 10 * tolerance)


@DTYPES
def test_gradient_of_the_value(dtype: torch.dtype) -> None:
    """The envelope theorem's: P in C, f and g in the masses along changes of no total. The origin's in C is 2 P."""
    C, a, b = (x.requires_grad_() for x in problem(dtype))
    found = compat.solve_batch(C, reg=0.5, a=a, b=b)
    slopes = torch.autograd.grad(found.value.sum(), [C, a, b], retain_graph=True)
    assert_close(slopes[0], found.plan.detach(), value_tolerance(dtype))
    for slope, f in zip(slopes[1:], (found.potential_a, found.potential_b), strict=True):
        difference = (slope - f).detach()
        assert_close(difference, difference.mean(-1, keepdim=True).expand_as(difference), gradient_tolerance(dtype))
    if dtype == torch.float64:
        (theirs,) = torch.autograd.grad(solved_there(C, 1.0, a, b).value.sum(), C)
        (ours,) = torch.autograd.grad(compat.solve_batch(C, reg=1.0, a=a, b=b).value.sum(), C)
        assert_close(theirs, 2 * ours, 1e-5)


def test_finite_differences_twice() -> None:
    C, a, b = problem()
    C = C[:1, :3, :4].requires_grad_()
    a, b = (torch.randn(1, n, dtype=C.dtype).requires_grad_() for n in (3, 4))

    def value(C: Tensor, a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = compat.solve_batch(C, reg=0.5, a=a.softmax(-1), b=b.softmax(-1)).value
        return found

    assert torch.autograd.gradcheck(value, (C, a, b))
    assert torch.autograd.gradgradcheck(value, (C, a, b))


def test_gradient_of_the_plan() -> None:
    C, a, b = problem()
    C.requires_grad_()
    f, g = potentials(-C / 0.5, 400, "col", a, b * (a.sum(-1) / b.sum(-1))[:, None])
    cotangent = torch.randn_like(C)
    right = torch.autograd.grad((sums(f, g) - C / 0.5).exp(), C, cotangent)[0]
    found = torch.autograd.grad(compat.solve_batch(C, reg=0.5, a=a, b=b).plan, C, cotangent)[0]
    assert_close(found, right, 1e-10)


def test_one_problem_lists_and_numpy() -> None:
    C = [[0.0, 0.3, 0.7], [0.5, 0.2, 0.0]]
    found, theirs = (
        compat.solve(C, reg=1.0, a=[2.0, 2.0], b=[1.0, 1.0, 2.0]),
        origin.solve(C, reg=1.0, a=[2.0, 2.0], b=[1.0, 1.0, 2.0], max_iter=2000),
    )
    for name in ("plan", "marginal_a", "value"):
        ours, right = getattr(found, name), getattr(theirs, name)
        assert isinstance(ours, (np.ndarray, np.floating))
        assert np.shape(ours) == np.shape(right)
        assert np.abs(ours - right).max() < 1e-6
    single = compat.solve(np.array(C, dtype=np.float32), reg=1.0)
    assert single.plan.dtype == np.float32
    assert abs(single.plan.sum() - 1) < 1e-6


def test_strides_small_reg_and_nothing() -> None:
    C, a, b = problem()
    turned = C.mT.contiguous().mT
    assert_close(compat.solve_batch(turned, reg=0.1, a=a, b=b).plan, compat.solve_batch(C, reg=0.1, a=a, b=b).plan, 1e-12)
    found = compat.solve_batch(C.float(), reg=2e-3)
    assert_close(found.marginal_a, torch.full((4, 7), 1 / 7), 1e-6)
    assert compat.solve_batch(C[:0], reg=0.1).value.shape == (0,)


@pytest.mark.parametrize("name", ["solve", "solve_batch"])
def test_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (compat, origin))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [(p.name, p.default, p.kind) for p in theirs.values()]


def test_bad_input() -> None:
    C, a, b = problem()
    with pytest.raises(NotImplementedError, match=r"unbalanced=1\.0; call geomloss\.ot\.solve"):
        compat.solve_batch(C, reg=1.0, unbalanced=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be one of 'auto'"):
        compat.solve_batch(C, reg=1.0, method="annealing")
    with pytest.raises(ValueError, match="equal totals"):
        compat.solve_batch(C, reg=1.0, a=a, b=2 * b)
    with pytest.raises(ValueError, match=r"a must have shape \(4, 7\), got \(4, 9\)"):
        compat.solve_batch(C, reg=1.0, a=b)
    with pytest.raises(ValueError, match="a must be > 0 everywhere"):
        compat.solve_batch(C, reg=1.0, a=a * (torch.arange(7) > 0), b=b)
    with pytest.raises(ValueError, match="reg must be > 0"):
        compat.solve_batch(C, reg=0.0)
    with pytest.raises(ValueError, match="for batches there is solve_batch"):
        compat.solve(C, reg=1.0)
    with pytest.warns(RuntimeWarning, match="are left; increase max_iter"):
        compat.solve_batch(C, reg=1e-3, max_iter=1)
