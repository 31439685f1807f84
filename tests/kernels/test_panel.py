"""The panel kernels, interpreted, against the float64 oracle under the error policy of ``tolerances``."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastdsm import reference
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm.kernels.panel import launch as panel

from ..tolerances import assert_within

SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = (SINGLE, DOUBLE, HALF, BRAIN)


def logits_of(batch: int, n: int, m: int, std: float = 1.0, dtype: torch.dtype = SINGLE) -> Tensor:
    """Normal logits, representable in float16 if they are to be so."""
    return (torch.randn(batch, n, m) * std).to(dtype)


def couple(batch: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Uneven marginals of one total."""
    r, c = torch.rand(batch, n) + 0.1, torch.rand(batch, m) + 0.1
    return r, c * (r.sum(-1, keepdim=True) / c.sum(-1, keepdim=True))


def empty_outputs(problem: Problem) -> Outputs:
    batch, n, m = problem.logits.shape
    dtype = problem.compute_dtype
    return Outputs(
        torch.full((batch, n, m), torch.nan, dtype=problem.logits.dtype),
        torch.full((batch,), torch.nan, dtype=dtype),
        torch.full((batch,), -7, dtype=torch.int32),
        torch.full((batch, n), torch.nan, dtype=dtype),
        torch.full((batch, m), torch.nan, dtype=dtype),
    )


def empty_gradients(problem: Problem) -> Gradients:
    batch, n, m = problem.logits.shape
    dtype = problem.compute_dtype
    vectors = (torch.full((batch, size), torch.nan, dtype=dtype) for size in (n, n, m))
    return Gradients(torch.full((batch, n, m), torch.nan, dtype=problem.logits.dtype), *vectors)


def oracle(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Outputs, list[Tensor | None]]:
    """The reference in ``dtype``: its plan with a graph, all it returns, and the leaves (logits, f0, r, c)."""
    given = (problem.logits, problem.f0, problem.row_marginal, problem.col_marginal)
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    logits, f0, row, col = leaves
    assert logits is not None
    tau, mask = problem.temperature, problem.mask
    flipped = not problem.unit_rows and row is None and col is None
    plan, info = reference.swept(
        logits.mT if flipped else logits,
        n_iters=problem.n_iters,
        temperature=tau.to(dtype) if isinstance(tau, Tensor) else tau,
        first="row" if flipped else "col",
        tol=None if problem.tol < 0 else problem.tol,
        f0=f0,
        row_marginal=row,
        col_marginal=col,
        mask=mask.mT if flipped and mask is not None else mask,
    )
    f, g = (x.detach() for x in ((info.g, info.f) if flipped else (info.f, info.g)))
    plan = plan.mT if flipped else plan
    return plan, Outputs(plan.detach(), info.residual, info.sweeps, f, g), leaves


def check_forward(problem: Problem, family: ModuleType = panel) -> Outputs:
    found = empty_outputs(problem)
    family.sinkhorn_forward(problem, found)
    (_, truth, _), (_, plain, _) = oracle(problem, DOUBLE), oracle(problem, SINGLE)
    assert truth.sweeps is not None
    assert found.sweeps is not None
    assert found.sweeps.tolist() == truth.sweeps.tolist()
    for name in ("plan", "residual", "f", "g"):
        assert_within(getattr(found, name), getattr(truth, name), getattr(plain, name))
    return found


def oracle_gradients(problem: Problem, grad_plan: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Of logits, f0, log r and log c: None where the call has no such input or its plan does not depend on it."""
    plan, _, leaves = oracle(problem, dtype)
    plan.backward(grad_plan.to(dtype))
    logits, f0, row, col = (None if leaf is None else leaf.grad for leaf in leaves)
    row = None if row is None else row * leaves[2].detach()  # type: ignore[union-attr]
    col = None if col is None else col * leaves[3].detach()  # type: ignore[union-attr]
    return [logits, f0, row, col]


def check_backward(
    problem: Problem, grad_plan: Tensor | None = None, sweeps: Tensor | None = None, family: ModuleType = panel
) -> Gradients:
    if grad_plan is None:
        grad_plan = torch.randn(problem.logits.shape).to(problem.logits.dtype)
    found = empty_gradients(problem)
    family.sinkhorn_backward(problem, grad_plan, found, sweeps)
    row, col, log_row, log_col = problem.row_marginal, problem.col_marginal, found.log_row, found.log_col
    assert log_row is not None
    assert log_col is not None
    if row is not None and col is None:
        log_row = log_row + row / row.sum(-1, keepdim=True) * log_col.sum(-1, keepdim=True)
    if col is not None and row is None:
        log_col = log_col + col / col.sum(-1, keepdim=True) * log_row.sum(-1, keepdim=True)
    truth, plain = (oracle_gradients(problem, grad_plan, dtype) for dtype in (DOUBLE, SINGLE))
    for value, exact, usual in zip((found.logits, found.f0, log_row, log_col), truth, plain, strict=True):
        if exact is not None and usual is not None:
            assert value is not None
            assert_within(value, exact, usual, cotangent=grad_plan)
    return found


SIZES = [
    (2, 3, 3, 1.0, 20),
    (1, 1, 1, 1.0, 3),
    (1, 1, 5, 2.0, 3),
    (1, 33, 33, 0.1, 3),
    (1, 20, 33, 5.0, 20),
    (1, 65, 65, 30.0, 3),
    (1, 33, 70, 200.0, 8),
    (1, 9, 130, 5.0, 9),
    (1, 130, 20, 200.0, 1),
    (1, 33, 64, 1.0, 0),
]


@pytest.mark.parametrize(("batch", "n", "m", "std", "n_iters"), SIZES)
def test_forward_of_every_size(batch: int, n: int, m: int, std: float, n_iters: int) -> None:
    check_forward(Problem(logits_of(batch, n, m, std), n_iters))


@pytest.mark.parametrize(("batch", "n", "m", "std", "n_iters"), SIZES)
def test_backward_of_every_size(batch: int, n: int, m: int, std: float, n_iters: int) -> None:
    check_backward(Problem(logits_of(batch, n, m, std), n_iters))


@pytest.mark.parametrize("n_iters", [0, 1, 2])
def test_rows_are_exact_whatever_the_potentials(n_iters: int) -> None:
    """Of thousands they round by 1e-4, which the row factor of every sweep takes back, that of a log sweep too."""
    problem = Problem(logits_of(2, 9, 12, 2.0) + 1000.0 * torch.randn(2, 9, 1), n_iters)
    found = empty_outputs(problem)
    panel.sinkhorn_forward(problem, found)
    assert ((found.plan.double().sum(-1) - 1.0).abs() <= 16 * torch.finfo(SINGLE).eps).all()


def test_largest_size() -> None:
    problem = Problem(logits_of(1, 256, 256, 30.0), 2)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 40), (1, 20, 37)])
def test_every_dtype(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    problem = Problem(logits_of(*shape, 3.0, dtype), 9, temperature=0.7)
    assert panel._aligned(problem.logits) == (shape[2] == 40)
    check_forward(problem)
    check_backward(problem)


def optioned(option: str, n: int, m: int, n_iters: int) -> Problem:
    """A problem of two matrices under one option, or all."""
    every = option == "everything"
    problem = Problem(logits_of(2, n, m, 5.0), n_iters)
    if option == "marginals" or every:
        r, c = couple(2, n, m)
        r[0, 2] = 0.0
        c[1, 3] = 0.0
        r, c = r / r.sum(-1, keepdim=True), c / c.sum(-1, keepdim=True)
        problem = replace(problem, row_marginal=r, col_marginal=c)
    if option == "row marginal":
        problem = replace(problem, row_marginal=couple(2, n, m)[0])
    if option == "column marginal":
        problem = replace(problem, col_marginal=couple(2, n, m)[1])
    if option == "extreme marginals":
        r, c = torch.logspace(-14, 0, n).repeat(2, 1), torch.ones(2, m)
        problem = replace(problem, row_marginal=r / r.sum(-1, keepdim=True), col_marginal=c / m)
    if option == "f0" or every:
        f0 = torch.randn(2, n) * 3.0
        f0[0, 2] = 50.0
        problem = replace(problem, f0=f0 if n_iters else None)
    if option == "temperature" or every:
        problem = replace(problem, temperature=torch.tensor([0.3, 2.5]))
    if option == "unit columns":
        problem = replace(problem, unit_rows=False)
    if option in ("mask", "masked unit columns") or every:
        mask = torch.rand(2, n, m) < 0.7
        mask[0, 5], mask[0, :, 1] = False, False
        problem = replace(problem, mask=mask, unit_rows=option != "masked unit columns")
    if option == "-inf":
        problem.logits[torch.rand(2, n, m) < 0.3] = -torch.inf
        problem.logits[1, 4] = -torch.inf
    return problem


OPTIONS = (
    "marginals",
    "row marginal",
    "column marginal",
    "extreme marginals",
    "f0",
    "temperature",
    "unit columns",
    "mask",
    "masked unit columns",
    "-inf",
    "everything",
)


@pytest.mark.parametrize("n_iters", [0, 9])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, n_iters: int) -> None:
    problem = optioned(option, 18, 11, n_iters)
    check_forward(problem)
    check_backward(problem)


def test_a_tiny_column_marginal_whose_line_has_one_entry() -> None:
    """Row 0 has no other entry, so that every sweep multiplies its factor by r / c: every sweep is a log sweep."""
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[:, 0] = torch.arange(5) == 2
    mask[:, 1:, 2] = False
    row, col = torch.full((2, 4), 0.25), torch.tensor([[0.3, 0.2, 1e-10, 0.3, 0.2]]).expand(2, 5)
    problem = Problem(logits_of(2, 4, 5, 2.0), 6, row_marginal=row, col_marginal=col, mask=mask)
    check_forward(problem)
    check_backward(problem)


def test_gradients_of_vectors_alone() -> None:
    problem = optioned("everything", 20, 35, 3)
    r, c = problem.row_marginal, problem.col_marginal
    assert r is not None
    assert c is not None
    assert problem.mask is not None
    found = check_backward(problem)
    assert found.log_row is not None
    assert found.log_col is not None
    assert found.f0 is not None
    assert (found.log_row[0, [2, 5]] == 0).all()
    assert (found.f0[0, [2, 5]] == 0).all()
    assert found.log_col[1, 3] == 0
    assert found.log_col[0, 1] == 0
    assert (found.logits[~problem.mask] == 0).all()


def test_tol_stops_each_matrix_by_itself() -> None:
    logits = torch.stack([logits_of(1, 33, 33, std)[0] for std in (0.1, 2.0, 20.0)])
    problem = Problem(logits, 15, tol=1e-3)
    found = check_forward(problem)
    assert found.sweeps is not None
    first, second, third = found.sweeps.tolist()
    assert first < second < third == 15
    check_backward(problem, sweeps=found.sweeps)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("n_iters", [0, 8])
def test_poison_stays_in_its_matrix(poison: float, n_iters: int) -> None:
    logits, grad_plan = logits_of(3, 33, 20, 3.0), torch.randn(3, 33, 20)
    mask = torch.rand(3, 33, 20) < 0.8
    mask[0, 0, 0], mask[1, 7, 7] = False, True
    poisoned = logits.clone()
    poisoned[0, 0, 0] = poisoned[1, 7, 7] = poison
    results = []
    for values in (logits, poisoned):
        problem = Problem(values, n_iters, mask=mask)
        outputs, gradients = empty_outputs(problem), empty_gradients(problem)
        panel.sinkhorn_forward(problem, outputs)
        panel.sinkhorn_backward(problem, grad_plan, gradients, None)
        results.append([outputs.plan, outputs.residual, outputs.f, outputs.g, *vars(gradients).values()])
    for clean, touched in zip(*results, strict=True):
        assert torch.equal(clean[[0, 2]], touched[[0, 2]])
    plan, residual, grad = results[1][0], results[1][1], results[1][4]
    assert plan[1].isnan().all()
    assert residual[1].isnan()
    assert grad[1].isnan().all()


def test_what_is_excluded_is_never_used() -> None:
    problem = optioned("everything", 35, 20, 6)
    assert problem.mask is not None
    assert problem.f0 is not None
    grad_plan = torch.randn(2, 35, 20)
    dirty = replace(
        problem,
        logits=problem.logits.masked_fill(~problem.mask, torch.nan),
        f0=problem.f0.masked_fill(~problem.mask.any(-1), torch.nan),
    )
    clean_found, dirty_found = check_forward(problem), empty_outputs(problem)
    panel.sinkhorn_forward(dirty, dirty_found)
    assert torch.equal(clean_found.plan, dirty_found.plan)
    clean_grad, dirty_grad = check_backward(problem, grad_plan), empty_gradients(problem)
    panel.sinkhorn_backward(dirty, grad_plan.masked_fill(~problem.mask, torch.nan), dirty_grad, None)
    for name in ("logits", "f0", "log_row", "log_col"):
        assert torch.equal(getattr(clean_grad, name), getattr(dirty_grad, name))


@pytest.mark.parametrize("n_iters", [0, 3])
def test_nothing_takes_part(n_iters: int) -> None:
    problem = Problem(logits_of(1, 33, 20), n_iters, mask=torch.zeros(1, 33, 20, dtype=torch.bool))
    outputs, gradients = empty_outputs(problem), empty_gradients(problem)
    panel.sinkhorn_forward(problem, outputs)
    panel.sinkhorn_backward(problem, torch.randn(1, 33, 20), gradients, None)
    for value in (outputs.plan, outputs.residual, outputs.f, outputs.g, *vars(gradients).values()):
        assert (value == 0).all()


def test_any_strides() -> None:
    problem = Problem(
        torch.randn(2, 80, 42)[:, ::2, 1:34].mT,
        4,
        temperature=torch.tensor([1.5, 0.0, 0.5])[::2],
        row_marginal=torch.rand(1, 1).add(0.5).expand(2, 33),
        mask=(torch.rand(33, 1) < 0.9).expand(2, 33, 40),
    )
    buffer = torch.full((2, 40, 99), torch.nan)
    outputs = replace(empty_outputs(problem), plan=buffer[:, :, 33:99:2].mT)
    panel.sinkhorn_forward(problem, outputs)
    truth, plain = (oracle(problem, dtype)[1] for dtype in (DOUBLE, SINGLE))
    assert_within(outputs.plan, truth.plan, plain.plan)
    assert buffer[:, :, :33].isnan().all()
    assert buffer[:, :, 34:99:2].isnan().all()
    grad_plan = torch.randn(40).expand(2, 33, 40)
    buffer = torch.full((2, 80, 33), torch.nan)
    panel.sinkhorn_backward(problem, grad_plan, Gradients(buffer[:, ::2].mT), None)
    exact, usual = (oracle_gradients(problem, grad_plan, dtype)[0] for dtype in (DOUBLE, SINGLE))
    assert exact is not None
    assert usual is not None
    assert_within(buffer[:, ::2].mT, exact, usual, cotangent=grad_plan)
    assert buffer[:, 1::2].isnan().all()


def test_strided_marginals_and_starts() -> None:
    """Every other entry of wider ones, one of them zero, whose matrices lie further apart than they need."""
    row, col = (x.repeat_interleave(2, 1) for x in couple(2, 7, 9))
    row[0, 4], col[1, 6] = 0.0, 0.0
    row, col = row[:, ::2], col[:, ::2]
    col.mul_(row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True))
    f0 = torch.randn(2, 21)[:, ::3]
    problem = Problem(logits_of(2, 7, 9, 2.0), 3, row_marginal=row, col_marginal=col, f0=f0)
    check_forward(problem)
    check_backward(problem)


def test_vectors_may_be_left_out() -> None:
    problem = optioned("everything", 18, 11, 4)
    outputs, gradients = empty_outputs(problem), empty_gradients(problem)
    bare, bare_gradients = Outputs(empty_outputs(problem).plan), Gradients(empty_gradients(problem).logits)
    grad_plan = torch.randn(2, 18, 11)
    for some_outputs, some_gradients in ((outputs, gradients), (bare, bare_gradients)):
        panel.sinkhorn_forward(problem, some_outputs)
        panel.sinkhorn_backward(problem, grad_plan, some_gradients, None)
    assert torch.equal(bare.plan, outputs.plan)
    assert torch.equal(bare_gradients.logits, gradients.logits)


def test_empty_batch() -> None:
    problem = Problem(torch.empty(0, 33, 40), 3)
    panel.sinkhorn_forward(problem, empty_outputs(problem))
    panel.sinkhorn_backward(problem, torch.empty(0, 33, 40), empty_gradients(problem), None)


def test_support_and_table() -> None:
    assert panel.supports(Problem(torch.empty(1, 256, 3), 1))
    assert not panel.supports(Problem(torch.empty(1, 3, 257), 1))
    table = panel.configurations()
    assert len(table) == len({(c.kernel.fn.__name__, c.label) for c in table}) == 60
    for configuration in table:
        assert set(configuration.constants) | set(configuration.signature()) == set(configuration.kernel.arg_names)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (7, 5)])
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_sigma2_in_float64(shape: tuple[int, int], std: float) -> None:
    """Of few lines it is as exact as the plan that it is made from again, out of float64 potentials and their bases."""
    problem = Problem(logits_of(3, *shape, std, DOUBLE), 20)
    outputs = replace(empty_outputs(problem), sigma2=torch.full((3,), torch.nan, dtype=DOUBLE))
    panel.sinkhorn_forward(problem, outputs)
    truth = reference.sinkhorn_sigma2(problem.logits, n_iters=20)
    torch.testing.assert_close(outputs.sigma2, truth.sigma2, rtol=1e-12, atol=1e-12)
