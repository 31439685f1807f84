"""Converged plans of the tile family, interpreted: Newton's method and the implicit gradient, with every option.

Budgets are those of ``fastdsm._verify.newton``; the PyTorch path does the same steps. Every output starts as NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

import fastdsm
from fastdsm import pytorch
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm._verify.newton import NewtonCase, verify_newton_case
from fastdsm._verify.sinkhorn import SIGMA2_TOL, Target
from fastdsm.kernels.common.configuration import Configuration, finite_jit
from fastdsm.kernels.tile import laplacian as tile_laplacian
from fastdsm.kernels.tile import launch as tile
from fastdsm.kernels.tile import launch_converged as tile_converged

from .test_registers import empty_outputs

TOL = 1e-6  # of the runs, and how far two plans may lie apart whose residuals are within it: near the end a step squares them
EPS = torch.finfo(torch.float32).eps
INTERPRETER = Target("triton", "cpu")


def random_logits(n: int, m: int, std: float, batch: int = 3) -> Tensor:
    return std * torch.randn(batch, n, m, generator=torch.Generator().manual_seed(n + m))


def newton(problem: Problem, solver: Any = tile_converged) -> Outputs:
    outputs = replace(empty_outputs(problem), sigma2=None)
    solver.newton_forward(problem, outputs)
    return outputs


def implicit(problem: Problem, grad_plan: Tensor, g: Tensor, solver: Any = tile_converged) -> Gradients:
    batch, n, m = problem.logits.shape
    vectors = [torch.full((batch, lines), torch.nan) for lines in (n, n, m)]
    gradients = Gradients(torch.full_like(problem.logits, torch.nan), *vectors)
    solver.implicit_backward(problem, grad_plan, g, gradients)
    return gradients


@pytest.mark.parametrize("option", ["", "row first", "temperature", "marginals", "one marginal", "f0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 9, 12)])
def test_plan_and_gradient_are_the_oracles(
    shape: tuple[int, ...], dtype: torch.dtype, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "newton_forward", None)
    monkeypatch.setattr(pytorch, "implicit_backward", None)
    records = verify_newton_case(NewtonCase(shape, dtype, 2.0, 40, option), INTERPRETER)
    assert [record for record in records if not record.ok] == []


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 1, 7), (2, 16, 16), (1, 20, 33), (1, 40, 64)])
def test_any_size(shape: tuple[int, ...], std: float) -> None:
    records = verify_newton_case(NewtonCase(shape, torch.float32, std, 40), INTERPRETER)
    assert [record for record in records if not record.ok] == []


def in_no_more_steps(problem: Problem) -> tuple[Outputs, Outputs]:
    """What the kernel and the PyTorch path come to, both to the tolerance, the kernel in at most one step more."""
    found, known = newton(problem), newton(problem, pytorch)
    assert found.sweeps is not None
    assert known.sweeps is not None
    assert (known.residual <= TOL).all()
    assert (found.residual <= TOL).all()
    assert (found.sweeps <= known.sweeps + 1).all()
    return found, known


@pytest.mark.parametrize(("n", "m", "std"), [(5, 5, 8.0), (8, 8, 30.0), (5, 5, 100.0), (16, 16, 8.0)])
def test_no_more_steps_than_the_pytorch_path(n: int, m: int, std: float, as_kernels_step: None) -> None:
    """Its first step is one sweep, that of a tile several; rounding may turn the last comparison with tol."""
    problem = Problem(random_logits(n, m, std, 6), 60, tol=TOL)
    found, known = in_no_more_steps(problem)
    torch.testing.assert_close(found.plan, known.plan, atol=TOL, rtol=0)


@pytest.mark.parametrize(("n", "std"), [(5, 16.0), (8, 30.0)])
def test_uneven_marginals_take_no_more_steps_either(n: int, std: float, as_kernels_step: None) -> None:
    """With an even one steps around 0 leave the linear part of the dual alone; here it decides which are refused."""
    col = torch.rand(8, n, generator=torch.Generator().manual_seed(n)) + 0.1
    col *= n / col.sum(1, keepdim=True)
    problem = Problem(random_logits(n, n, std, 8), 60, row_marginal=torch.ones(8, n), col_marginal=col, tol=TOL)
    in_no_more_steps(problem)


def test_a_matrix_that_whole_steps_never_solve() -> None:
    """Of logit std 100: only with steps refused that raise the dual, and made again damped, it does not go round in circles."""
    logits = 100.0 * torch.randn(7, 8, 8, generator=torch.Generator().manual_seed(2))[6:]
    assert (newton(Problem(logits, 60, tol=TOL)).residual <= TOL).all()


def cold_costs(n: int, batch: int = 2) -> Tensor:
    """Squared distances in the unit square over 1e-5, as logits."""
    points, others = torch.rand(2, batch, n, 2, generator=torch.Generator().manual_seed(n))
    return -(torch.cdist(points, others) ** 2) / 1e-5


COLD = {"costs": cold_costs(24), "std 1e3": random_logits(16, 16, 1e3), "std 1e5": random_logits(9, 12, 1e5)}


@pytest.mark.parametrize("logits", COLD.values(), ids=COLD.keys())
def test_cold_problems(logits: Tensor) -> None:
    """They are warmed, as on the PyTorch path, which computes them in float64."""
    problem = Problem(logits, 60, tol=TOL)
    found, known = newton(problem), newton(problem, pytorch)
    assert (known.residual <= TOL).all()
    assert (found.residual <= TOL).all()
    assert (found.sweeps <= known.sweeps + 4).all()
    torch.testing.assert_close(found.plan, known.plan, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_iters", [2, 8])
def test_cold_problems_that_are_left_warm(n_iters: int) -> None:
    """Their potentials and residual are those of the problem that was asked for."""
    logits = cold_costs(24)
    found = newton(Problem(logits, n_iters, tol=TOL))
    assert found.sweeps.tolist() == [n_iters, n_iters]
    torch.testing.assert_close((found.plan.double().sum(1) - 1).abs().amax(1).float(), found.residual, atol=1e-5, rtol=1e-5)
    plan = (logits.double() + found.f[:, :, None] + found.g[:, None, :]).exp()
    torch.testing.assert_close(plan.float(), found.plan, atol=0.1, rtol=0)


@pytest.mark.parametrize("size", [1e4, 1e7, 1e9])
def test_rows_and_columns_far_apart(size: float) -> None:
    """Plans, and gradients near potentials of that size, whose rounding alone moves a plan of theirs by all that it has."""
    rows, cols, cotangent = random_logits(12, 9, 1.0), random_logits(12, 9, 1.0), random_logits(12, 9, 1.0)
    rows[:, -3:], cols[:, :, -3:] = -size, -size
    for logits in (rows, cols):
        problem = Problem(logits, 40, tol=TOL)
        exact = replace(problem, logits=logits.double(), tol=1e-12)
        found, known = newton(problem), newton(exact, pytorch)
        assert (found.residual <= TOL).all()
        torch.testing.assert_close(found.plan.double(), known.plan, atol=TOL, rtol=0)
        gradient, truth = implicit(problem, cotangent, found.g), Gradients(torch.full_like(exact.logits, torch.nan))
        pytorch.implicit_backward(exact, cotangent.double(), known.g, truth)
        torch.testing.assert_close(gradient.logits.double(), truth.logits, atol=32 * EPS, rtol=0)


@pytest.mark.parametrize("n_iters", [0, 1])
def test_a_row_step_and_one_sweep(n_iters: int) -> None:
    for unit_rows in (True, False):
        problem = Problem(random_logits(5, 6, 2.0), n_iters, unit_rows=unit_rows, tol=TOL)
        found, known = newton(problem), newton(problem, pytorch)
        assert torch.equal(found.sweeps, known.sweeps)
        for name in ("plan", "residual", "f", "g"):
            torch.testing.assert_close(getattr(found, name), getattr(known, name), atol=8 * EPS, rtol=8 * EPS)


@pytest.mark.parametrize("size", [6, 20])
def test_matrices_that_sweeps_bring_there_keep_what_these_found(size: int) -> None:
    """Whatever the others of their program go on to do, asked for or not."""
    std = torch.tensor([1.0, 9.0, 0.5, 12.0, 1.0])[:, None, None]
    problem = Problem(random_logits(size, size, 1.0, 5) * std, 40, tol=TOL)
    swept = replace(empty_outputs(problem), sigma2=None)
    tile.sinkhorn_forward(replace(problem, n_iters=32), swept)
    found, alone = newton(problem), torch.full_like(problem.logits, torch.nan)
    assert swept.residual is not None
    assert found.sweeps is not None
    arrived = swept.residual <= TOL
    assert arrived.tolist() == [True, False, True, False, True]
    assert ((found.sweeps == 1) == arrived).all()
    assert (found.residual <= TOL).all()
    for name in ("plan", "residual", "f", "g"):
        assert torch.equal(getattr(found, name)[arrived], getattr(swept, name)[arrived]), name
    tile_converged.newton_forward(problem, Outputs(alone))
    assert torch.equal(alone, found.plan)


def test_sweeps_alone_where_they_arrive() -> None:
    """And Newton's steps where they would not: the first step stops sweeping, and few steps do the rest."""
    easy, hard = (newton(Problem(random_logits(16, 16, std), 20, tol=TOL)) for std in (1.0, 8.0))
    assert (easy.residual <= TOL).all()
    assert (easy.sweeps == 1).all()
    assert (hard.residual <= TOL).all()
    assert (hard.sweeps > 1).all()
    truth = fastdsm.reference.sinkhorn(random_logits(16, 16, 1.0).double(), n_iters=200)
    torch.testing.assert_close(easy.plan.double(), truth, atol=TOL, rtol=0)


@finite_jit
def _eliminated_fwd_kernel(w_ptr, b_ptr, ground_ptr, d_ptr, m: tl.int32, P: tl.constexpr):
    """One system of ``m`` columns, P in code."""
    j = tl.arange(0, P)[None, :]
    edges = tl.load(w_ptr + j[:, :, None] * P + j[:, None, :])
    tl.store(d_ptr + j, tile_laplacian.eliminated(edges, tl.load(b_ptr + j), tl.load(ground_ptr + j), m))


@pytest.mark.interpreter
def test_elimination_of_grounded_columns() -> None:
    """Edges and grounds of all sizes from 1e-6 to 1: a solution of positive numbers, each of which keeps its digits."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** (-6 * torch.rand(8, 8, generator=generator))
    edges = (scale * scale.mT).sqrt()
    ground, b = 10.0 ** (-6 * torch.rand(8, generator=generator)), torch.rand(8, generator=generator)
    found = torch.full_like(b, torch.nan)
    Configuration(_eliminated_fwd_kernel, {}, {"P": 8}, 1, 1).launch(
        1, w_ptr=edges, b_ptr=b, ground_ptr=ground, d_ptr=found, m=8
    )
    others = edges.double().fill_diagonal_(0.0)
    exact = torch.linalg.solve(torch.diag(others.sum(1) + ground.double()) - others, b.double())
    torch.testing.assert_close(found.double(), exact, rtol=64 * EPS, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize(("n", "m"), [(16, 16), (20, 30), (40, 64)])
def test_conjugate_gradients_serve_where_they_are_quick(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dozen steps or fewer, and nothing is eliminated then; where a column has next to no edges, elimination does."""

    def unreachable(*_: object) -> None:
        raise AssertionError("eliminated")

    cotangent = random_logits(n, m, 1.0)
    for std, quick in ((0.5, True), (2.0, True), (30.0, False)):
        problem = Problem(random_logits(n, m, std), 60, tol=TOL)
        g = newton(problem, pytorch).g
        assert g is not None
        gradients, exact = (implicit(problem, cotangent, g, solver) for solver in (tile_converged, pytorch))
        with monkeypatch.context() as patched:
            patched.setattr(tile_laplacian, "_eliminated_tile", unreachable)
            patched.setattr(tile_laplacian, "_STEPS", tl.constexpr(6 if std < 1 else 12))
            if quick:
                assert torch.equal(implicit(problem, cotangent, g).logits, gradients.logits)
                allowed = 32 * EPS * (1 + std)
                torch.testing.assert_close(gradients.logits, exact.logits, atol=allowed, rtol=0)
            else:
                with pytest.raises(InterpreterError, match="eliminated"):
                    implicit(problem, cotangent, g)


def test_masks_and_excluded_lines() -> None:
    logits = random_logits(7, 6, 2.0)
    logits[1, 2], logits[1, :, 4] = -torch.inf, -torch.inf
    mask = torch.rand(3, 7, 6, generator=torch.Generator().manual_seed(1)) < 0.8
    problem = Problem(logits, 40, mask=mask, temperature=torch.tensor([0.7, 1.0, 1.6]), tol=TOL)
    found, known = newton(problem), newton(problem, pytorch)
    assert (known.residual <= TOL).all()
    assert (found.residual <= TOL).all()
    torch.testing.assert_close(found.plan, known.plan, atol=TOL, rtol=0)
    assert (found.plan[~mask | (logits == -torch.inf)] == 0).all()

    cotangent = random_logits(7, 6, 1.0)
    assert known.g is not None
    gradients, exact = (implicit(problem, cotangent, known.g, solver) for solver in (tile_converged, pytorch))
    for name in ("logits", "f0", "log_row", "log_col"):
        torch.testing.assert_close(getattr(gradients, name), getattr(exact, name), atol=32 * EPS, rtol=0)
    hidden = replace(problem, logits=logits.masked_fill(~mask, torch.nan))
    unseen = cotangent.masked_fill(~mask, torch.nan)
    assert torch.equal(newton(hidden).plan, found.plan)
    assert torch.equal(implicit(hidden, unseen, known.g).logits, gradients.logits)


def test_without_support_everything_stays_finite_and_is_flagged() -> None:
    logits = random_logits(6, 6, 2.0)
    logits[:, 1:, :2] = -torch.inf  # two columns that only row 0 can fill
    problem = Problem(logits, 25, tol=TOL)
    outputs = newton(problem)
    assert (outputs.residual > 0.1).all()
    assert (outputs.sweeps == 25).all()
    for name in ("plan", "residual", "f", "g"):
        assert getattr(outputs, name).isfinite().all(), name
    assert outputs.g is not None
    assert implicit(problem, random_logits(6, 6, 1.0), outputs.g).logits.isfinite().all()


def test_rows_of_small_gradients_sum_to_zero() -> None:
    """Close to a permutation the gradient is small beside its cotangent, and so is what may be left of a row's sum."""
    problem = Problem(14 * torch.eye(6) + random_logits(6, 6, 0.5), 30, tol=TOL)
    g = newton(problem).g
    assert g is not None
    found = implicit(problem, random_logits(6, 6, 1.0), g).logits
    size = found.abs().amax(-1)
    assert (size > 0).all()
    assert size.max() < 1e-4
    assert (found.double().sum(-1).abs() <= 8 * EPS * size).all()


def test_a_poisoned_matrix_stays_alone() -> None:
    clean = random_logits(6, 5, 3.0, 6)
    dirty = clean.clone()
    dirty[1, 2, 1], dirty[4, 0, 3] = torch.nan, torch.inf
    bad = torch.tensor([False, True, False, False, True, False])
    before, after = (newton(Problem(x, 20, tol=TOL)) for x in (clean, dirty))
    for name in ("plan", "residual"):
        assert getattr(after, name)[bad].isnan().all(), name
        assert torch.equal(getattr(after, name)[~bad], getattr(before, name)[~bad]), name
    assert before.g is not None
    first, second = (implicit(Problem(x, 20), random_logits(6, 5, 1.0, 6), before.g) for x in (clean, dirty))
    for name in ("logits", "log_row", "log_col"):
        assert getattr(second, name)[bad].isnan().all(), name
        assert torch.equal(getattr(second, name)[~bad], getattr(first, name)[~bad]), name


@pytest.mark.parametrize("n_iters", [0, 1, 2])
def test_a_poisoned_matrix_is_marked_after_no_step_and_after_one(n_iters: int) -> None:
    clean = random_logits(6, 5, 3.0, 4)
    dirty = clean.clone()
    dirty[1, 2, 1], dirty[2, 0, 3] = torch.nan, torch.inf
    before, after = (newton(Problem(x, n_iters, tol=TOL)) for x in (clean, dirty))
    assert after.plan[1:3].isnan().all()
    assert after.residual is not None
    assert after.residual.isnan().tolist() == [False, True, True, False]
    for name in ("plan", "residual", "sweeps", "f", "g"):
        assert torch.equal(getattr(after, name)[::3], getattr(before, name)[::3]), name


def test_strides_and_what_is_not_asked_for() -> None:
    logits = random_logits(6, 5, 3.0)
    spread = torch.full((3, 6, 10), torch.nan)
    spread[:, :, ::2] = logits
    expected = newton(Problem(logits, 25, tol=TOL))
    assert torch.equal(newton(Problem(spread[:, :, ::2], 25, tol=TOL)).plan, expected.plan)
    alone = torch.full((3, 5, 6), torch.nan).mT
    tile_converged.newton_forward(Problem(logits, 25, tol=TOL), Outputs(alone))
    assert torch.equal(alone, expected.plan)
    newton(Problem(torch.empty(0, 6, 5), 3))


def test_what_is_supported() -> None:
    problem = Problem(torch.zeros(2, 64, 5), 100, tol=TOL)
    assert tile_converged.supports_forward(problem, with_sigma2=False)
    assert not tile_converged.supports_forward(problem, with_sigma2=True)
    for other in (torch.zeros(2, 65, 5), torch.zeros(2, 6, 5, dtype=torch.float64)):
        assert not tile_converged.supports_backward(replace(problem, logits=other))


@pytest.mark.parametrize("first", ["col", "row"])
def test_sigma2_beside_a_converged_plan(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(7, 5, 2.0)
    logits[1, 2] = -torch.inf
    known = fastdsm.sinkhorn_sigma2(logits, solver="newton", first=first, backend="torch")
    monkeypatch.setattr(pytorch, "newton_forward", None)
    monkeypatch.setattr(pytorch, "sigma2", None)
    found = fastdsm.sinkhorn_sigma2(logits, solver="newton", first=first, backend="triton")
    torch.testing.assert_close(found.plan, known.plan, atol=TOL, rtol=0)
    torch.testing.assert_close(found.sigma2, known.sigma2, atol=TOL, rtol=SIGMA2_TOL)
