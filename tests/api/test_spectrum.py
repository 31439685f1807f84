"""fastdsm.sigma2 and its bounds on the PyTorch path against a full SVD in float64."""

from __future__ import annotations

import mpmath  # torch depends on it
import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference
from fastdsm._ops.krylov import _top_on_device
from fastdsm.pytorch import spectrum
from fastdsm.pytorch.spectrum import METHODS

from ..tolerances import assert_within

SIZES = ((1, 1), (1, 5), (2, 2), (3, 3), (4, 4), (5, 9), (8, 8), (16, 16), (40, 12), (64, 64), (100, 100))


def plans(n: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random ones, one next to uniform, one next to a permutation."""
    logits = (
        torch.randn(5, n, m, dtype=torch.float64)
        * torch.tensor([0.1, 1.0, 4.0, 1e-4, 50.0], dtype=torch.float64)[:, None, None]
    )
    return reference.sinkhorn(logits, n_iters=200).to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_values_vectors_and_bounds(size: tuple[int, int]) -> None:
    plan = plans(*size)
    truth = reference.sigma2(plan.double())
    value, u, v = fastdsm.sigma2(plan, return_vectors=True)
    lower, upper = fastdsm.sigma2_bounds(plan)
    assert bool(((value - truth).abs() <= 1e-4 * truth + 1e-12).all())
    assert bool((lower <= truth + 1e-13).all())
    assert bool((upper >= truth - 1e-13).all())
    assert bool((upper <= 1.001 * lower + 1e-12).all())
    if min(size) > 1:
        M = reference.deflated_plan(plan.double(), None, None, None)
        torch.testing.assert_close(torch.einsum("bn,bnm,bm->b", u.double(), M, v.double()), truth, rtol=2e-4, atol=1e-9)
        torch.testing.assert_close(u.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(v.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(4, 4), (6, 8), (8, 20)])
def test_methods_agree(method: str, size: tuple[int, int]) -> None:
    plan = plans(*size, torch.float64)[:3]
    truth = reference.sigma2(plan)
    torch.testing.assert_close(fastdsm.sigma2(plan, method=method, tol=1e-8), truth, rtol=1e-5, atol=0)


def test_bounds_hold_whatever_lanczos_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = torch.cat([plans(50, 40), torch.full((1, 50, 40), 1 / 40)])
    truth = reference.sigma2(plan.double())
    found = fastdsm.sigma2(plan, return_vectors=True)
    misled = [torch.linalg.svd(reference.deflated_plan(plan.double(), None, None, None))[2][:, 2].float()] * 3
    monkeypatch.setattr(spectrum, "lanczos", lambda *_: misled)
    lower, upper = fastdsm.sigma2_bounds(plan)
    assert bool((lower <= truth + 1e-13).all() & (upper >= truth - 1e-13).all() & (upper <= 1.001 * lower + 1e-7).all())
    torch.testing.assert_close(lower, found[0], rtol=1e-3, atol=1e-7)


def gram_matrix(plan: Tensor, r: Tensor, c: Tensor) -> mpmath.matrix:
    """M^T M of one plan, in 40 digits."""
    n, m = plan.shape
    root_r, root_c = ([mpmath.sqrt(x) for x in line.tolist()] for line in (r, c))
    M = mpmath.matrix(n, m)
    for i in range(n):
        for j in range(m):
            M[i, j] = mpmath.mpf(plan[i, j].item()) / (root_r[i] * root_c[j])
    q, p = mpmath.matrix(root_r) / mpmath.norm(root_r), mpmath.matrix(root_c) / mpmath.norm(root_c)
    M -= q * (q.T * M)
    M -= (M * p) * p.T
    return M.T * M


def exceeds(value: float, gram: mpmath.matrix) -> bool:
    """Whether ``value`` is above sigma2: exactly then its square less M^T M has a Cholesky factor."""
    try:
        mpmath.cholesky(mpmath.mpf(value) ** 2 * mpmath.eye(gram.rows) - gram)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "size"), [(8, (4, 4)), (8, (3, 7)), (4, (9, 12)), (1, (34, 33))])
def test_bounds_enclose_the_value_in_forty_digits(batch: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Next to uniform too, where forming M rounds at the size of the plan."""
    n, m = size
    row, col = torch.rand(n, dtype=torch.float64) + 0.3, torch.rand(m, dtype=torch.float64) + 0.3
    uneven = {"row_marginal": row.to(dtype), "col_marginal": (col * row.sum() / col.sum()).to(dtype)}
    even = {"row_marginal": torch.ones(n), "col_marginal": torch.full((m,), n / m, dtype=torch.float64)}
    with mpmath.workdps(40):
        for std in (1e-7, 1e-3, 1.0, 6.0):
            logits = torch.randn(batch, n, m, dtype=torch.float64) * std
            for given in ({}, uneven):
                plan = reference.sinkhorn(logits, n_iters=50, **given).to(dtype)
                lower, upper = fastdsm.sigma2_bounds(plan, **given)
                for matrix, least, most in zip(plan, lower.tolist(), upper.tolist(), strict=True):
                    gram = gram_matrix(matrix, *(given or even).values())
                    assert not exceeds(least, gram)
                    assert exceeds(most, gram)


def test_of_a_truncated_plan() -> None:
    """Whose columns leak: rows alone are exact after one sweep, and columns alone if these are the last."""
    for size in ((4, 4), (7, 12), (40, 36)):
        for first in ("col", "row"):
            plan = reference.sinkhorn(torch.randn(3, *size, dtype=torch.float64) * 3, n_iters=1, first=first)
            truth = reference.sigma2(plan)
            torch.testing.assert_close(fastdsm.sigma2(plan, tol=1e-8), truth, rtol=1e-6, atol=0)
            lower, upper = fastdsm.sigma2_bounds(plan)
            assert bool((lower <= truth * (1 + 1e-13)).all() & (upper >= truth * (1 - 1e-13)).all())


def test_multiplicity() -> None:
    """Permutations: every singular value is 1."""
    plan = torch.eye(40)[torch.randperm(40)]
    for method in ("auto", "squaring", "lanczos", "power"):
        torch.testing.assert_close(fastdsm.sigma2(plan, method=method), torch.tensor(1.0), rtol=1e-5, atol=0)
    lower, upper = fastdsm.sigma2_bounds(plan)
    assert lower <= 1 <= upper <= 1.001


def test_two_values_close_together() -> None:
    """0.9 and 6e-5 below it: of four lines or fewer the policy leaves no room for what few squarings keep of the second."""
    second = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64) / 6**0.5
    plan = (0.1 / 3 + 0.9 * (torch.eye(3) - 6e-5 * second.outer(second))).float()
    assert_within(fastdsm.sigma2(plan), reference.sigma2(plan.double()), reference.sigma2(plan))


@pytest.mark.parametrize(("backend", "method"), [("triton", "auto"), *(("torch", x) for x in ("auto", *METHODS))])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (5, 5), (8, 8), (6, 40), (40, 40)])
def test_vectors_of_uniform_plans(size: tuple[int, int], backend: str, method: str) -> None:
    """Zeros, or unit vectors that have nothing of the trivial pair; the gradient has none of it either way."""
    if method == "jacobi" and min(size) > 8:
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plan = torch.full((3, *size), 1 / size[1], dtype=dtype).requires_grad_()
        value, u, v = fastdsm.sigma2(plan, method=method, backend=backend, return_vectors=True)
        assert (value < 1e-14).all()
        for x in (u, v):
            norm = x.norm(dim=-1)
            assert (((norm - 1).abs() < 1e-6) | (norm == 0)).all()
            if dtype != torch.float64:
                assert (x.sum(-1).abs() < 1e-5).all()
        (slope,) = torch.autograd.grad(value.sum(), plan)
        for dim in (-1, -2):
            torch.testing.assert_close(slope.double().sum(dim), torch.zeros_like(slope.double().sum(dim)), rtol=0, atol=1e-5)


def test_uniform_is_zero() -> None:
    for n in (4, 40):
        plan = torch.full((2, n, n), 1 / n, dtype=torch.float64)
        assert bool((fastdsm.sigma2(plan) < 1e-15).all())


def test_power_starts_warm() -> None:
    plan = plans(30, 30)[1]
    _, _, v = fastdsm.sigma2(plan, return_vectors=True, tol=1e-8)
    value = fastdsm.sigma2(plan, method="power", v0=v, max_iters=1)
    torch.testing.assert_close(value, reference.sigma2(plan.double()).float(), rtol=1e-5, atol=0)


def test_masks_and_marginals() -> None:
    row = torch.rand(4, 6, dtype=torch.float64) + 0.1
    col = torch.rand(4, 9, dtype=torch.float64) + 0.1
    col = col * row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True)
    logits = torch.randn(4, 6, 9, dtype=torch.float64)
    plan = reference.sinkhorn(logits, row_marginal=row, col_marginal=col, n_iters=300)
    found = fastdsm.sigma2(plan, row_marginal=row, col_marginal=col)
    torch.testing.assert_close(found, reference.sigma2(plan, row_marginal=row, col_marginal=col), rtol=1e-4, atol=0)
    assert bool((found <= 1).all())
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[4:], mask[:, 5:] = False, False
    cut = reference.sinkhorn(logits[:, :4, :5])
    padded = torch.full_like(logits, torch.nan)
    padded[:, :4, :5] = cut
    torch.testing.assert_close(fastdsm.sigma2(padded, mask=mask), reference.sigma2(cut), rtol=1e-4, atol=0)
    fused = fastdsm.sinkhorn_sigma2(logits, mask=mask)
    torch.testing.assert_close(fused.sigma2, reference.sigma2(cut), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [4, 20, 50])
def test_a_broken_plan_stays_alone(size: int) -> None:
    plan = plans(size, size)
    clean = fastdsm.sigma2(plan)
    plan[2, 0, 1] = torch.nan
    found = fastdsm.sigma2(plan)
    keep = torch.arange(5) != 2
    assert bool(found[2].isnan())
    torch.testing.assert_close(found[keep], clean[keep])
    assert bool(torch.stack(fastdsm.sigma2_bounds(plan))[:, 2].isnan().all())


@pytest.mark.parametrize("size", [(4, 4), (12, 12), (40, 40), (5, 20)])
def test_gradient_is_the_outer_product(size: tuple[int, int]) -> None:
    plan = plans(*size, torch.float64)[1:2].requires_grad_()
    (found,) = torch.autograd.grad(fastdsm.sigma2(plan).sum(), plan)
    (truth,) = torch.autograd.grad(reference.sigma2(plan).sum(), plan)
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-4 * truth.abs().max().item())


@pytest.mark.parametrize("given", [(), ("row_marginal",), ("col_marginal",), ("row_marginal", "col_marginal")], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_marginals(masked: bool, given: tuple[str, ...]) -> None:
    """Of plans and of marginals, lines without mass among them, against autograd through the oracle's SVD."""
    plan = torch.rand(3, 7, 5, dtype=torch.float64)
    mask = torch.ones(7, 5, dtype=torch.bool)
    if masked:
        mask[0], mask[2, 1] = False, False
    row, col = torch.rand(3, 7, dtype=torch.float64) + 0.3, torch.rand(3, 5, dtype=torch.float64) + 0.3
    row[1, 1] = 0.0
    totals = ((x * mask.any(dim)).sum(-1, keepdim=True) for x, dim in ((row, -1), (col, -2)))
    marginals = {"row_marginal": row, "col_marginal": col * (next(totals) / next(totals))}
    weights, found = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64), []
    for call in (fastdsm.sigma2, reference.sigma2):
        leaves = {"plan": plan, **{name: marginals[name] for name in given}}
        leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        operands = dict(leaves)
        if len(given) == 2:  # the columns' total is made the rows' in the call
            both = operands["row_marginal"], operands["col_marginal"]
            operands["col_marginal"] = reference._of_one_total(plan, *both, mask)
        value = call(operands.pop("plan"), mask=mask, **operands)
        found.append(torch.autograd.grad((value * weights).sum(), list(leaves.values())))
    for slope, truth in zip(*found, strict=True):
        torch.testing.assert_close(slope, truth.nan_to_num(0.0), rtol=1e-9, atol=1e-9)


def test_a_truncated_plan_may_exceed_one_by_its_leak() -> None:
    """|sigma2 - second largest of {1, sigma_i(M)}| is bounded by the leak ||P^T 1 - c|| / sqrt(n), on every plan."""
    plan = reference.sinkhorn(torch.randn(200, 6, 6, dtype=torch.float64) * 6, n_iters=1)
    leak = (plan.sum(-2) - 1).norm(dim=-1) / 6**0.5
    of_plan = torch.linalg.svdvals(plan)[:, 1]
    of_deflated = torch.linalg.svdvals(reference.deflated_plan(plan, None, None, None))
    second = torch.cat([torch.ones(200, 1, dtype=torch.float64), of_deflated], 1).sort(dim=1, descending=True).values[:, 1]
    assert bool(((of_plan - second).abs() <= leak + 1e-12).all())
    assert bool((leak > 0.1).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    plan = plans(8, 12, dtype).mT
    value = fastdsm.sigma2(plan)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), reference.sigma2(plan.double()), rtol=1e-4, atol=1e-9)
    assert fastdsm.sigma2(plan[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["random", "cluster", "split", "zero", "single"])
def test_top_on_device_is_that_of_eigh(kind: str) -> None:
    size = 1 if kind == "single" else 24
    diagonal, off = torch.rand(5, size, dtype=torch.float64), torch.rand(5, size - 1, dtype=torch.float64) / 3
    if kind == "cluster":
        diagonal, off = 1 - 1e-9 * diagonal, 1e-10 * off
    elif kind == "split":
        off[:, ::2] = 0.0
    elif kind == "zero":
        diagonal, off = 0 * diagonal, 0 * off
    T = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    truth = torch.linalg.eigvalsh(T)[:, -1]
    vector, bound = _top_on_device(T)
    value = (vector * (T @ vector.unsqueeze(-1)).squeeze(-1)).sum(-1)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=0)
    assert ((bound >= truth * (1 - 1e-14)) & (bound <= truth * (1 + 1e-10))).all()
    torch.testing.assert_close(vector.norm(dim=-1), torch.full_like(truth, float(kind != "zero")))
