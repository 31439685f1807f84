"""log_sinkhorn: the logarithm of plans that underflow, its value and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference
from fastdsm._verify.sinkhorn import half_ulp

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16


def with_dustbins(scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores (B, n, m) with a row and a column for what has no partner, and their marginals, as SuperGlue's."""
    batch, n, m = scores.shape
    padded = torch.nn.functional.pad(scores, (0, 1, 0, 1), value=1.0)
    row, col = torch.ones(batch, n + 1, dtype=DOUBLE), torch.ones(batch, m + 1, dtype=DOUBLE)
    row[:, -1], col[:, -1] = m, n
    return padded, {"row_marginal": row / (n + m), "col_marginal": col / (n + m)}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "std"), [(SINGLE, 100.0), (HALF, 8.0), (SINGLE, 8.0), (torch.bfloat16, 8.0)])
def test_of_a_dustbin_problem(dtype: torch.dtype, std: float, backend: str) -> None:
    logits, marginals = with_dustbins((torch.randn(3, 11, 17) * std).to(dtype))
    cotangent = torch.randn(logits.shape).to(dtype)

    def of(call: object, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        given = {name: y.to(torch.promote_types(x.dtype, SINGLE)) for name, y in marginals.items()}
        value = -call(leaf, n_iters=100, **given, **options)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(value, leaf, cotangent.to(value.dtype))
        return value.detach(), gradient

    value, gradient = of(fastdsm.log_sinkhorn, logits, backend=backend)
    truth, slope = of(reference.log_sinkhorn, logits.double())
    plain, plain_slope = of(reference.log_sinkhorn, logits.float())
    assert value.dtype == gradient.dtype == dtype
    for found, right, usual in ((value, truth, plain), (gradient, slope, plain_slope)):
        error, usual_error = (found.double() - right).abs(), (usual.double() - right).abs().max()
        assert bool((error <= half_ulp(right, dtype) + 2 * usual_error + 1e-6 * right.abs().max()).all())


def test_entries_near_one_are_better_than_sums_of_large_potentials() -> None:
    logits = torch.randn(5, 30, 30) * 200
    truth = reference.log_sinkhorn(logits.double())
    error, usual = (
        (call(logits).double() - truth).abs()[truth > -1].max() for call in (fastdsm.log_sinkhorn, reference.log_sinkhorn)
    )
    assert error < 0.2 * usual


def test_where_the_plan_underflows_it_does_not() -> None:
    logits = torch.tensor([[0.0, -400.0], [-400.0, 0.0]])
    assert fastdsm.sinkhorn(logits)[0, 1] == 0
    assert torch.equal(fastdsm.log_sinkhorn(logits), logits)


@pytest.mark.parametrize("options", [{}, {"n_iters": 0}, {"solver": "newton"}, {"grad": "implicit", "n_iters": 300}])
@pytest.mark.parametrize("first", ["col", "row"])
def test_gradient_of_every_operand(options: dict[str, object], first: str) -> None:
    logits, tau = torch.randn(6, 4, 5, dtype=DOUBLE), torch.rand(6, dtype=DOUBLE) + 0.5
    row, col = torch.rand(6, 4, dtype=DOUBLE) + 0.1, torch.rand(6, 5, dtype=DOUBLE) + 0.1
    row, col = row / row.sum(-1, keepdim=True), col / col.sum(-1, keepdim=True)
    leaves = [x.requires_grad_() for x in (logits, tau, row, col)]
    cotangent, found = torch.randn_like(logits), []
    for call in (fastdsm.log_sinkhorn, reference.log_sinkhorn):
        value = call(logits, temperature=tau, row_marginal=row, col_marginal=col, first=first, **options)  # type: ignore[operator]
        gradients = torch.autograd.grad(value, leaves, cotangent, allow_unused=True, materialize_grads=True)
        found.append((value, *gradients))
    for x, truth in zip(*found, strict=True):
        assert (x - truth).abs().max() <= 1e-9 * truth.abs().max()


def test_second_derivatives() -> None:
    logits = torch.randn(2, 3, 3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fastdsm.log_sinkhorn(x, n_iters=4), logits)
    assert torch.autograd.gradgradcheck(lambda x: fastdsm.log_sinkhorn(x, solver="newton"), logits)


def test_what_takes_no_part() -> None:
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[:, 1], mask[:, :, 2], mask[0, 3, 0] = False, False, False
    logits = torch.randn(3, 4, 4, dtype=DOUBLE).masked_fill(~mask, torch.nan).requires_grad_()
    found = fastdsm.log_sinkhorn(logits, mask=mask)
    assert torch.equal(found == -torch.inf, ~mask)
    cotangent = torch.randn_like(logits)
    gradients = [
        torch.autograd.grad(found, logits, cotangent.masked_fill(~mask, x), retain_graph=True)[0] for x in (0.0, torch.nan)
    ]
    assert torch.equal(*gradients)
    assert not gradients[0][~mask].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_is_nan_and_others_are_not(bad: float) -> None:
    logits = torch.randn(3, 4, 4)
    alone = fastdsm.log_sinkhorn(logits)
    logits[1, 2, 3] = bad
    found = fastdsm.log_sinkhorn(logits)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], alone[::2])


def test_shapes_transforms_and_compilation() -> None:
    assert fastdsm.log_sinkhorn(torch.randn(2, 0, 3)).shape == (2, 0, 3)
    assert fastdsm.log_sinkhorn(torch.randn(0, 3, 3)).shape == (0, 3, 3)
    logits = torch.randn(2, 3, 4, 5)
    whole = fastdsm.log_sinkhorn(logits)
    assert whole.shape == logits.shape
    assert (torch.vmap(fastdsm.log_sinkhorn)(logits) - whole).abs().max() < 1e-6

    def loss(x: Tensor) -> Tensor:
        return -fastdsm.log_sinkhorn(x).diagonal(dim1=-2, dim2=-1).sum()

    leaf = logits.clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(leaf), leaf)
    assert (torch.func.grad(loss)(logits) - truth).abs().max() < 1e-6
    assert (torch.vmap(torch.func.grad(loss))(logits) - truth).abs().max() < 1e-6
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert (torch.autograd.grad(compiled(leaf), leaf)[0] - truth).abs().max() < 1e-6
