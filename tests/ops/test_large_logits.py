"""Logits of any size on a CPU: float32 ones beyond its range are computed in float64, each matrix by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference

DOUBLE = torch.float64
OPTIONS = ("", "mask", "marginals", "tol", "f0", "temperature", "row first", "newton", "implicit", "sigma2")


def logits_of(size: float, kind: str, shape: tuple[int, int, int]) -> Tensor:
    batch, n, m = shape
    if kind == "normal":
        return torch.randn(shape) * size
    rows, cols = (torch.rand(batch, n, 1) * 2 - 1) * size, (torch.rand(batch, 1, m) * 2 - 1) * size
    return torch.randn(shape) + rows + (cols if kind == "both sides" else 0.0)


@pytest.mark.parametrize("kind", ["normal", "rows", "both sides"])
@pytest.mark.parametrize("shape", [(40, 4, 4), (6, 12, 9), (3, 40, 50), (1, 300, 20)])
def test_the_oracles_plan(shape: tuple[int, int, int], kind: str) -> None:
    """To 1e-6 up to 1e9, and to 1e-4 up to 1e11."""
    for exponent in range(2, 12):
        logits = logits_of(10.0**exponent, kind, shape)
        plan = fastdsm.sinkhorn(logits)
        error = (plan - reference.sinkhorn(logits.double())).abs().max()
        assert error < (2e-6 if exponent <= 9 else 1e-4), exponent
        assert (plan.sum(-1) - 1).abs().max() < 4e-7


@pytest.mark.parametrize("size", [1e20, 1e37, 3.4e38])
def test_one_side_is_exact_whatever_the_size(size: float) -> None:
    for shape in ((40, 4, 4), (2, 30, 20)):
        logits = (torch.rand(shape) * 2 - 1) * size
        for first, dim in (("col", -1), ("row", -2)):
            for options in ({}, {"solver": "newton"}):
                plan = fastdsm.sinkhorn(logits, first=first, **options)
                mass = 1.0 if first == "col" else shape[1] / shape[2]
                assert (plan.sum(dim) - mass).abs().max() < 4e-7 * mass
        leaf = logits.requires_grad_()
        (gradient,) = torch.autograd.grad(fastdsm.sinkhorn(leaf), leaf, torch.randn(shape))
        assert gradient.isfinite().all()


def options_of(option: str, batch: int, n: int, m: int) -> dict[str, Any]:
    if option == "mask":
        return {"mask": (torch.rand(batch, n, m) > 0.2) | (torch.arange(m) == 0) | (torch.arange(n) == 0).unsqueeze(-1)}
    if option == "marginals":
        row, col = torch.rand(batch, n) + 0.1, torch.rand(batch, m) + 0.1
        return {"row_marginal": row / row.sum(-1, keepdim=True), "col_marginal": col / col.sum(-1, keepdim=True)}
    return {
        "tol": {"tol": 1e-4, "n_iters": 50},
        "f0": {"f0": torch.randn(batch, n)},
        "temperature": {"temperature": torch.rand(batch) + 0.5},
        "row first": {"first": "row"},
        "newton": {"solver": "newton", "n_iters": 60},
        "implicit": {"grad": "implicit", "n_iters": 100},
    }.get(option, {})


def plan_and_gradient(call: Any, logits: Tensor, cotangent: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    plan = call(leaf, **options)
    (gradient,) = torch.autograd.grad(plan, leaf, cotangent.to(plan.dtype))
    return plan.detach(), gradient


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_gradients_and_neighbours(option: str, size: float) -> None:
    batch, n, m = 12, 6, 5
    logits = torch.randn(batch, n, m) + torch.randn(batch, n, 1) * size
    logits[::2] = torch.randn(batch // 2, n, m)
    options, cotangent = options_of(option, batch, n, m), torch.randn(batch, n, m)
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}
    found = plan_and_gradient(fastdsm.sinkhorn, logits, cotangent, **options)
    truth = plan_and_gradient(reference.sinkhorn, logits.double(), cotangent, **wide)
    for x, y in zip(found, truth, strict=True):
        assert (x - y).abs().max() < 2e-6
    others = logits.clone()
    others[1::2] = torch.randn(batch // 2, n, m)
    again = plan_and_gradient(fastdsm.sinkhorn, others, cotangent, **options)
    assert torch.equal(found[0][::2], again[0][::2])
    if option != "tol":  # whose adjoint's terms are summed in groups of as many sweeps as some matrix took
        assert torch.equal(found[1][::2], again[1][::2])
    if option == "sigma2":
        value = fastdsm.sinkhorn_sigma2(logits).sigma2
        assert (value - reference.sinkhorn_sigma2(logits.double()).sigma2).abs().max() < 2e-6


def test_newtons_method_on_cold_costs() -> None:
    """100 x 100 squared distances over 1e-5, where Newton's method had a residual of 2 after 200 steps."""
    points, others = torch.rand(100, 2, dtype=DOUBLE), torch.rand(100, 2, dtype=DOUBLE)
    cost = torch.cdist(points, others) ** 2
    for reg in (1e-3, 1e-5, 1e-7):
        plan, info = fastdsm.sinkhorn(-cost / reg, solver="newton", n_iters=60, tol=1e-8, return_info=True)
        assert info.converged
        assert info.sweeps < 47  # what halving the temperature by hand takes in all at 1e-5
        assert (plan.sum(-2) - 1).abs().max() < 1e-7
        single = fastdsm.sinkhorn((-cost / reg).float(), solver="newton", n_iters=60)
        assert (single - plan).abs().max() < (1e-4 if reg > 1e-6 else 2)  # of other, rounded logits


def test_newtons_method_takes_a_good_start_as_it_is() -> None:
    logits = torch.randn(20, 8, 8, dtype=DOUBLE) * 300
    _, cold = fastdsm.sinkhorn(logits, solver="newton", n_iters=100, return_info=True)
    assert cold.converged.all()
    _, warm = fastdsm.sinkhorn(logits, solver="newton", n_iters=100, f0=cold.f, return_info=True)
    assert (warm.sweeps <= 2).all()
    _, close = fastdsm.sinkhorn(
        logits, solver="newton", n_iters=100, f0=cold.f + 1e-2 * torch.randn_like(cold.f), return_info=True
    )
    slow = close.sweeps > 1  # those that the sweeps of the first step do not solve
    assert slow.any()
    assert (close.sweeps[slow] <= 6).all()
    assert (cold.sweeps[slow] >= 9).all()
    # potentials are in units of logits / temperature
    _, colder = fastdsm.sinkhorn(logits, temperature=0.99, solver="newton", n_iters=100, f0=cold.f / 0.99, return_info=True)
    assert colder.converged.all()
