"""fastdsm.round_to_birkhoff: exact marginals, the bound on what moves, the edges of the algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastdsm
from fastdsm._ops.marginals import marginals_of


def marginals(batch: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    row, col = torch.rand(batch, n, dtype=torch.float64) + 0.1, torch.rand(batch, m, dtype=torch.float64) + 0.1
    row[:, n // 2] = 0.0
    return row, col * (row.sum(-1) / col.sum(-1)).unsqueeze(-1)


@pytest.mark.parametrize("shape", [(7, 4, 4), (3, 9, 5), (2, 40, 40), (4, 1, 6), (4, 6, 1), (3, 1, 1), (0, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_are_exact_and_little_moves(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, n, m = shape
    logits = torch.randn(shape, dtype=dtype) * 4
    cases: list[dict[str, Tensor]] = [{}]
    if n > 1:
        row, col = marginals(batch, n, m)
        cases += [{"row_marginal": row.to(dtype), "col_marginal": col.to(dtype)}, {"row_marginal": row.to(dtype)}]
    for options in cases:
        for plan in (fastdsm.sinkhorn(logits, n_iters=2, **options), logits.exp(), torch.zeros_like(logits)):
            found = fastdsm.round_to_birkhoff(plan, **options)
            plan, out = plan.double(), found.double()
            r, c = marginals_of(out, *(options.get(x) for x in ("row_marginal", "col_marginal")), None)
            plan = torch.where(r.unsqueeze(-1) == 0, 0.0, plan)  # what lies on excluded lines takes no part
            scale = 20 * max(n, m) * torch.finfo(dtype).eps * (r.amax() + c.amax() if batch else 1.0)
            assert bool((out >= 0).all())
            assert bool(((out.sum(-1) - r).abs() <= scale).all())
            assert bool(((out.sum(-2) - c).abs() <= scale).all())
            errors = (plan.sum(-1) - r).abs().sum(-1) + (plan.sum(-2) - c).abs().sum(-1)
            assert bool(((out - plan).abs().sum((-2, -1)) <= 2 * errors * (1 + 1e-5) + scale * n).all())


def literally(plan: Tensor, **options: Tensor) -> Tensor:
    """Algorithm 2 as it is printed, in float64, line by line."""
    mask = options.pop("mask", torch.ones_like(plan, dtype=torch.bool))
    r, c = marginals_of(plan.double(), *(options.get(x) for x in ("row_marginal", "col_marginal")), mask)
    P = torch.where(mask & (r != 0).unsqueeze(-1) & (c != 0).unsqueeze(-2), plan.double(), 0.0)
    P = P * torch.where(P.sum(-1) > r, r / P.sum(-1), 1.0).unsqueeze(-1)
    P = P * torch.where(P.sum(-2) > c, c / P.sum(-2), 1.0).unsqueeze(-2)
    a, b = (r - P.sum(-1)).clamp(min=0), (c - P.sum(-2)).clamp(min=0)
    return P + torch.where(a.sum(-1) > 0, 1 / a.sum(-1), 0.0)[:, None, None] * a.unsqueeze(-1) * b.unsqueeze(-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 8, 8), (5, 3, 7), (5, 7, 3), (4, 1, 6), (4, 6, 1), (0, 4, 4)])
@pytest.mark.parametrize("kind", ["uniform", "marginals", "rows", "mask"])
def test_is_the_algorithm(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    plan = (2 * torch.randn(shape)).exp().to(dtype)
    row, col = (x.to(torch.promote_types(dtype, torch.float32)) for x in marginals(*shape))
    options: dict[str, Tensor] = {}
    if kind == "mask":
        options = {"mask": torch.rand(shape) > 0.2}
    elif kind != "uniform" and shape[1] > 1:
        options = {"row_marginal": row, "col_marginal": col} if kind == "marginals" else {"row_marginal": row}
    found = fastdsm.round_to_birkhoff(plan, **options)
    assert found.dtype == dtype
    # Computed in float32 and more, and rounded once to the plan's dtype.
    inner, eps = (torch.finfo(x).eps for x in (torch.promote_types(dtype, torch.float32), dtype))
    torch.testing.assert_close(found.double(), literally(plan, **options).double(), rtol=eps, atol=20 * inner)
    wanted = fastdsm.round_to_birkhoff(plan.clone().requires_grad_(), **options)
    assert torch.equal(wanted, found)


def test_by_hand() -> None:
    """Row 0 is halved, then column 0: each row misses 1/2, and only column 1 misses anything."""
    found = fastdsm.round_to_birkhoff(torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], [0.5, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_plans_are_left_alone(dtype: torch.dtype) -> None:
    fine = [torch.full(shape, 1 / shape[-1], dtype=dtype) for shape in ((2, 4, 4), (3, 4), (6, 2), (5, 1))]
    for plan in (torch.eye(4, dtype=dtype), *fine):
        found = fastdsm.round_to_birkhoff(plan)
        assert torch.equal(found, plan)
        assert found.data_ptr() != plan.data_ptr()


def test_gradient_at_a_tie_is_that_of_no_excess() -> None:
    for plan in (torch.eye(4), torch.full((6, 2), 0.5)):
        exact, weight = plan.clone().requires_grad_(), torch.randn_like(plan)
        for options in ({}, {"row_marginal": torch.ones(len(plan))}):
            (found,) = torch.autograd.grad(fastdsm.round_to_birkhoff(exact, **options), exact, weight)
            assert torch.equal(found, weight)


def test_a_poisoned_matrix_stays_alone() -> None:
    plan = torch.rand(5, 4, 6)
    row, mask = torch.ones(4), torch.rand(4, 6) > 0.2
    mask[0, 0] = True
    broken = plan.clone()
    broken[1, 0, 0], broken[3, 0, 0] = torch.nan, torch.inf
    cases: list[dict[str, Tensor]] = [{}, {"row_marginal": row}, {"mask": mask}]
    for options in cases:
        known, found = (fastdsm.round_to_birkhoff(x, **options) for x in (plan, broken))
        assert torch.equal(found[[0, 2, 4]], known[[0, 2, 4]])
        assert bool(found[[1, 3]].isnan().any(-1).any(-1).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_lines_of_zero_marginal_are_zero_and_never_read(value: float) -> None:
    row, col = marginals(3, 5, 4)
    col[:, 2] = 0.0
    col = col * (row.sum(-1) / col.sum(-1)).unsqueeze(-1)
    plan = torch.rand(3, 5, 4, dtype=torch.float64)
    unseen = (row == 0).unsqueeze(-1) | (col == 0).unsqueeze(-2)
    found, clean = (
        fastdsm.round_to_birkhoff(plan.masked_fill(unseen, x), row_marginal=row, col_marginal=col) for x in (value, 0.0)
    )
    assert torch.equal(found, clean)
    assert bool((found[unseen] == 0).all())
    torch.testing.assert_close(found.sum(-1), row)


def test_masked_lines_are_zero_and_never_read() -> None:
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[1], mask[:, 2], mask[4, 0] = False, False, False
    logits = torch.randn(3, 5, 4)
    plan = fastdsm.sinkhorn(logits, mask=mask, n_iters=1)
    found = fastdsm.round_to_birkhoff(plan.masked_fill(~mask, torch.nan), mask=mask)
    assert bool((found[:, 1] == 0).all())
    assert bool((found[:, :, 2] == 0).all())
    keep = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(found.sum(-1)[:, keep], torch.ones(3, 4))
    torch.testing.assert_close(found.sum(-2)[:, [0, 1, 3]], torch.full((3, 3), 4 / 3))


def test_gradients() -> None:
    plan = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    row = (torch.rand(2, 3, dtype=torch.float64) + 0.2).requires_grad_()
    call = lambda plan, row: fastdsm.round_to_birkhoff(plan, row_marginal=row)  # noqa: E731
    assert gradcheck(call, (plan, row))
    assert gradgradcheck(call, (plan, row))
    exact = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(fastdsm.round_to_birkhoff(exact).square().sum(), exact)
    assert bool(found.isfinite().all())


def test_compiles_and_maps() -> None:
    plans = torch.rand(5, 4, 4)
    expected = fastdsm.round_to_birkhoff(plans)
    torch._dynamo.reset()
    compiled = torch.compile(fastdsm.round_to_birkhoff, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(plans), expected)
    torch.testing.assert_close(torch.vmap(fastdsm.round_to_birkhoff)(plans), expected)
    torch.testing.assert_close(fastdsm.round_to_birkhoff(plans.mT.contiguous().mT), expected)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"row_marginal": torch.ones(3)}, ValueError, r"row_marginal must have shape \(\.\.\., 4\)"),
        ({"mask": torch.ones(4, 4)}, TypeError, "mask must be a bool tensor"),
        ({"row_marginal": torch.ones(4), "col_marginal": torch.full((4,), 2.0)}, ValueError, "equal totals"),
    ],
)
def test_errors(options: dict[str, Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fastdsm.round_to_birkhoff(torch.ones(4, 4), **options)
