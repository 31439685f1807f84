"""The register kernels, interpreted, against the oracle in float64.

Errors are judged by the one policy (``tolerances``); potentials, which may be large, get four units in their last place
on top. Every output starts as NaN.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from fastdsm import reference
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm.kernels.registers import launch as registers
from fastdsm.kernels.registers import sigma2 as registers_sigma2
from fastdsm.results import SinkhornSpectrum

from ..tolerances import assert_within, drift

BATCH = 40
SHAPES = [(1, 1), (1, 4), (2, 2), (3, 4), (4, 3)]
LINES = (4, 5, 6, 7, 8)  # of packed matrices


def random_logits(n: int, m: int, std: float, seed: int = 0) -> Tensor:
    return std * torch.randn(BATCH, n, m, generator=torch.Generator().manual_seed(seed))


def square_logits(lines: int, std: float) -> Tensor:
    """Of 40 saturated matrices the plain run, whose error sets the budget, may err in none; hence 160 of those."""
    return torch.cat([random_logits(lines, lines, std, seed) for seed in range(4 if std > 100 else 1)])


def empty_outputs(problem: Problem) -> Outputs:
    b, n, m = problem.logits.shape
    plan = torch.full_like(problem.logits, torch.nan)
    residual, f, g, sigma2 = (torch.full(shape, torch.nan) for shape in ((b,), (b, n), (b, m), (b,)))
    return Outputs(plan, residual, torch.full((b,), -1, dtype=torch.int32), f, g, sigma2 if max(n, m) <= 4 else None)


def forward(problem: Problem) -> Outputs:
    outputs = empty_outputs(problem)
    assert registers.supports_forward(problem, outputs)
    registers.sinkhorn_forward(problem, outputs)
    return outputs


def backward(problem: Problem, grad_plan: Tensor) -> Tensor:
    gradients = Gradients(torch.full_like(problem.logits, torch.nan))
    assert registers.supports_backward(problem, grad_plan, gradients)
    registers.sinkhorn_backward(problem, grad_plan, gradients)
    return gradients.logits


def oracle_options(problem: Problem, dtype: torch.dtype) -> dict[str, object]:
    tau = problem.temperature.to(dtype) if isinstance(problem.temperature, Tensor) else problem.temperature
    per_column = None if problem.unit_rows else torch.ones(problem.logits.shape[0], problem.logits.shape[2], dtype=dtype)
    return {"n_iters": problem.n_iters, "temperature": tau, "mask": problem.mask, "col_marginal": per_column}


def oracle(problem: Problem, dtype: torch.dtype) -> SinkhornSpectrum:
    return reference.sinkhorn_sigma2(problem.logits.to(dtype), **oracle_options(problem, dtype))


def oracle_gradient(problem: Problem, grad_plan: Tensor, dtype: torch.dtype) -> Tensor:
    logits = problem.logits.to(dtype).requires_grad_()
    plan = reference.sinkhorn(logits, **oracle_options(problem, dtype))
    return torch.autograd.grad(plan, logits, grad_plan.to(dtype))[0]


def check_forward(problem: Problem) -> Outputs:
    outputs, truth, plain = forward(problem), oracle(problem, torch.float64), oracle(problem, torch.float32)
    for name in ("plan", "residual", "sigma2"):
        if getattr(outputs, name) is not None:
            assert_within(getattr(outputs, name), getattr(truth, name), getattr(plain, name))
    for name in ("f", "g"):
        found, exact, own = getattr(outputs, name), getattr(truth, name), getattr(plain, name)
        allowed = 2 * (own - exact).abs().max() + 1e-6 + 2.0**-22 * exact.abs().max() + drift(problem.n_iters)
        assert (found - exact).abs().max() <= allowed, name
    assert (outputs.sweeps == problem.n_iters).all()
    return outputs


def check_backward(problem: Problem) -> Tensor:
    grad_plan = torch.randn(problem.logits.shape, generator=torch.Generator().manual_seed(5)).to(problem.logits.dtype)
    found = backward(problem, grad_plan)
    truth, plain = (oracle_gradient(problem, grad_plan, dtype) for dtype in (torch.float64, torch.float32))
    assert_within(found, truth, plain, cotangent=grad_plan)
    return found


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("n_iters", [0, 1, 3, 20, 100])
def test_forward_of_packed_matrices(n_iters: int, lines: int) -> None:
    for std in (0.1, 4.0, 200.0) if n_iters < 100 else (8.0,):
        check_forward(Problem(square_logits(lines, std), n_iters, temperature=0.7))


@pytest.mark.parametrize("lines", [4, 7, 8])
def test_batches_larger_than_a_program(lines: int) -> None:
    logits = random_logits(lines, lines, 2.0).repeat(8, 1, 1)[:299]
    for x in (forward(Problem(logits, 3)).plan, backward(Problem(logits, 3), logits)):
        assert torch.equal(x[:40].repeat(8, 1, 1)[:299], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lines", [5, 6, 7])
def test_runs_of_any_length_are_moved_to_their_last_value(lines: int, dtype: torch.dtype) -> None:
    """Pieces of 16 bytes end where some number of matrices does; what lies behind is left alone."""
    logits = random_logits(lines, lines, 2.0).to(dtype)
    plans, gradients = forward(Problem(logits, 3)).plan, backward(Problem(logits, 3), logits)
    for count in (1, 2, 3, 31, 33, 39):
        problem, room = Problem(logits[:count], 3), torch.full((2, *logits.shape), torch.nan, dtype=dtype)
        registers.sinkhorn_forward(problem, Outputs(room[0, :count]))
        registers.sinkhorn_backward(problem, logits[:count], Gradients(room[1, :count]))
        assert torch.equal(room[:, :count], torch.stack([plans, gradients])[:, :count])
        assert room[:, count:].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_rows", [True, False])
def test_forward_of_other_shapes(shape: tuple[int, int], unit_rows: bool) -> None:
    for n_iters in (0, 30):
        check_forward(Problem(random_logits(*shape, 2.0), n_iters, unit_rows=unit_rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_of_narrow_types(dtype: torch.dtype) -> None:
    for shape in ((3, 4), *((lines, lines) for lines in LINES)):
        check_forward(Problem(random_logits(*shape, 3.0).to(dtype), 20))


def with_excluded_lines(logits: Tensor) -> Tensor:
    """Some entries -inf at random; in a quarter of the matrices row 1 too, in another column 2, in a third both."""
    holes = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    logits = logits.masked_fill(holes, -torch.inf)
    logits[0::4, 1, :] = -torch.inf
    logits[1::4, :, 2] = -torch.inf
    logits[2::4, 1, :] = -torch.inf
    logits[2::4, :, 2] = -torch.inf
    logits[5] = -torch.inf
    return logits


@pytest.mark.parametrize("lines", [4, 7, 8])
@pytest.mark.parametrize("n_iters", [0, 3, 40])
@pytest.mark.parametrize("unit_rows", [True, False])
def test_minus_infinity_excludes(n_iters: int, unit_rows: bool, lines: int) -> None:
    logits = with_excluded_lines(random_logits(lines, lines, 2.0))
    outputs = check_forward(Problem(logits, n_iters, unit_rows=unit_rows))
    assert (outputs.plan[logits == -torch.inf] == 0).all()
    assert (outputs.f[0::4, 1] == 0).all()
    assert (outputs.g[1::4, 2] == 0).all()


def test_mask_strides_and_temperatures() -> None:
    logits = random_logits(4, 3, 2.0).transpose(1, 2)
    mask = (with_excluded_lines(random_logits(4, 3, 1.0, 2)) != -torch.inf).transpose(1, 2)
    tau = torch.rand(BATCH, generator=torch.Generator().manual_seed(3)) + 0.3
    problem = Problem(logits, 20, temperature=tau, mask=mask)
    outputs = check_forward(problem)
    check_backward(problem)
    poisoned = replace(problem, logits=logits.masked_fill(~mask, torch.nan))
    assert torch.equal(forward(poisoned).plan, outputs.plan)

    wide = torch.full((BATCH, 3, 9), torch.nan)
    registers.sinkhorn_forward(problem, Outputs(wide[:, :, 1:8:2]))
    assert torch.equal(wide[:, :, 1:8:2], outputs.plan)
    assert wide[:, :, 0::2].isnan().all()


def test_packed_and_strided_agree() -> None:
    logits = random_logits(4, 4, 3.0)
    spread = torch.full((BATCH, 4, 8), torch.nan)
    spread[:, :, ::2] = logits
    packed, strided = (forward(Problem(x, 25)) for x in (logits, spread[:, :, ::2]))
    for name in ("plan", "residual", "f", "g", "sigma2"):
        assert torch.equal(getattr(packed, name), getattr(strided, name)), name
    grad_plan = random_logits(4, 4, 1.0, 4)
    assert torch.equal(backward(Problem(logits, 20), grad_plan), backward(Problem(spread[:, :, ::2], 20), grad_plan))


@pytest.mark.parametrize(("lines", "n_iters"), [(4, 40), (4, 100), (6, 40), (8, 40)])
def test_packed_matrices_without_support(lines: int, n_iters: int) -> None:
    """All rows but one have the last column alone: factors grow by lines - 1 in every sweep, and for ever."""
    logits = random_logits(lines, lines, 2.0)
    logits[:, 1:, :-1] = -torch.inf
    logits[:, 0, -1] = -torch.inf
    outputs = check_forward(Problem(logits, n_iters))
    assert outputs.residual is not None
    assert (outputs.residual > lines - 2.1).all()
    if lines == 6:
        check_backward(Problem(logits, n_iters))


@pytest.mark.parametrize("lines", [7, 8])
def test_counts_of_lines(lines: int) -> None:
    """Every number of rows and of columns, by exclusion, so that potentials drift."""
    logits = random_logits(lines, lines, 1.0)
    for b, (rows, cols) in enumerate(product(range(1, lines + 1), (1, 3, 5, 6, 7))):
        logits[b, rows:] = -torch.inf
        logits[b, :, cols:] = -torch.inf
    for unit_rows in (True, False):
        check_forward(Problem(logits, 33, unit_rows=unit_rows))


@pytest.mark.parametrize("lines", [4, 7, 8])
@pytest.mark.parametrize("n_iters", [0, 3, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_poisoned_matrix_stays_alone(n_iters: int, value: float, lines: int) -> None:
    clean = random_logits(lines, lines, 1.0)
    dirty = clean.clone()
    dirty[7, 2, 1] = value
    before, after = forward(Problem(clean, n_iters)), forward(Problem(dirty, n_iters))
    others = torch.arange(BATCH) != 7
    for name in ("plan", "residual") + ("sigma2",) * (lines == 4):
        assert getattr(after, name)[7].isnan().all(), name
        assert torch.equal(getattr(after, name)[others], getattr(before, name)[others]), name
    grad_plan = random_logits(lines, lines, 1.0, 4)
    before, after = (backward(Problem(x, n_iters), grad_plan) for x in (clean, dirty))
    assert after[7].isnan().all()
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("n_iters", [0, 1, 2, 20])
def test_gradient_of_packed_matrices(n_iters: int, lines: int) -> None:
    for std in (0.1, 4.0, 200.0):
        check_backward(Problem(square_logits(lines, std), n_iters, temperature=0.7))


@pytest.mark.parametrize("n_iters", [16, 17, 31, 32, 50])
def test_gradient_of_segments(n_iters: int) -> None:
    """K of more than 4 lines is made anew after 15 scaling sweeps."""
    for lines in (5, 8):
        check_backward(Problem(random_logits(lines, lines, 3.0), n_iters))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_rows", [True, False])
def test_gradient_of_other_shapes(shape: tuple[int, int], unit_rows: bool) -> None:
    check_backward(Problem(random_logits(*shape, 2.0), 6, unit_rows=unit_rows))


@pytest.mark.parametrize("lines", [4, 7, 8])
def test_gradient_past_excluded_lines(lines: int) -> None:
    logits = with_excluded_lines(random_logits(lines, lines, 2.0))
    for n_iters in (0, 1, 20):
        gradient = check_backward(Problem(logits, n_iters, unit_rows=n_iters == 20))
        assert (gradient[logits == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_narrow_types(dtype: torch.dtype) -> None:
    for lines in LINES:
        check_backward(Problem(random_logits(lines, lines, 2.0).to(dtype), 20))


def test_outputs_are_optional() -> None:
    problem = Problem(random_logits(4, 4, 2.0), 3)
    everything = forward(problem)
    plan, sigma2 = torch.full_like(problem.logits, torch.nan), torch.full((BATCH,), torch.nan)
    registers.sinkhorn_forward(problem, Outputs(plan))
    assert torch.equal(plan, everything.plan)
    registers.sinkhorn_forward(problem, Outputs(plan, sigma2=sigma2))
    assert torch.equal(sigma2, everything.sigma2)


def test_an_empty_batch_is_nothing_to_do() -> None:
    problem = Problem(torch.empty(0, 4, 4), 3)
    forward(problem)
    backward(problem, torch.empty(0, 4, 4))


def takes(problem: Problem, plan: Tensor | None = None, sigma2: Tensor | None = None) -> bool:
    return registers.supports_forward(problem, Outputs(problem.logits if plan is None else plan, sigma2=sigma2))


def test_what_is_supported() -> None:
    problem = Problem(torch.zeros(2, 4, 3), 100)
    gradients = Gradients(problem.logits)
    assert takes(problem)
    few = replace(problem, n_iters=20)
    assert not registers.supports_backward(problem, problem.logits, gradients)
    assert registers.supports_backward(few, problem.logits, gradients)
    assert not registers.supports_backward(few, problem.logits, replace(gradients, f0=problem.logits))
    eight = replace(problem, logits=torch.zeros(2, 8, 8))
    assert takes(eight)
    assert not takes(eight, plan=torch.zeros(8, 8, 2).permute(2, 0, 1))
    assert not takes(eight, sigma2=torch.zeros(2))
    assert registers.supports_backward(eight, eight.logits, Gradients(eight.logits))
    assert not registers.supports_backward(eight, torch.zeros(2, 1, 1).expand(2, 8, 8), Gradients(eight.logits))
    for other in (
        replace(problem, logits=torch.zeros(2, 5, 3)),
        replace(problem, logits=torch.zeros(2, 7, 8)),
        replace(eight, logits=torch.zeros(2, 8, 8).mT),
        replace(eight, logits=torch.zeros(129)[1:].view(2, 8, 8)),
        replace(problem, logits=torch.zeros(99)[1:].view(2, 7, 7)),
        replace(eight, mask=torch.ones(2, 8, 8, dtype=torch.bool)),
        replace(problem, logits=torch.zeros(2, 4, 3, dtype=torch.float64)),
        replace(problem, f0=torch.zeros(2, 4)),
        replace(problem, row_marginal=torch.ones(2, 4)),
        replace(problem, col_marginal=torch.ones(2, 3)),
        replace(problem, tol=0.0),
    ):
        assert not takes(other)


def test_configurations_are_distinct() -> None:
    labels = [c.label for c in registers.configurations() + registers_sigma2.configurations()]
    assert len(labels) == len(set(labels)) == 70


def check_sigma2(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> None:
    b, n, m = plan.shape
    compute = torch.promote_types(plan.dtype, torch.float32)
    value, u2, v2 = (torch.full(shape, torch.nan, dtype=compute) for shape in ((b,), (b, n), (b, m)))
    registers_sigma2.sigma2(plan, row, col, mask, value, u2, v2)

    def matrix(dtype: torch.dtype) -> Tensor:
        r, c = (None if x is None else x.to(dtype) for x in (row, col))
        return reference.deflated_plan(plan.to(dtype), r, c, mask)

    exact, own = (torch.linalg.matrix_norm(matrix(x), ord=2).double() for x in (torch.float64, compute))
    budget = 2 * (own - exact).abs().max() + (1e-14 if plan.dtype == torch.float64 else 1e-6)
    assert (value - exact).abs().max() <= budget
    rayleigh = torch.einsum("bi,bij,bj->b", u2.double(), matrix(torch.float64), v2.double())
    assert (rayleigh - exact).abs().max() <= budget
    for vector in (u2, v2):
        length = vector.norm(dim=1)
        assert (((length - 1).abs() < 1e-5) | ((length == 0) & (exact < 1e-6))).all()


@pytest.mark.parametrize("shape", [(4, 4), *SHAPES])
def test_sigma2_of_plans(shape: tuple[int, int]) -> None:
    n, m = shape
    for seed, std in enumerate((0.01, 1.0, 6.0)):
        check_sigma2(reference.sinkhorn(random_logits(n, m, std, seed)), None, None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_sigma2_of_other_types(dtype: torch.dtype) -> None:
    check_sigma2(reference.sinkhorn(random_logits(4, 4, 2.0).double()).to(dtype), None, None, None)


@pytest.mark.parametrize("given", ["row", "col", "both"])
def test_sigma2_with_marginals_and_mask(given: str) -> None:
    generator = torch.Generator().manual_seed(6)
    mask = torch.rand(BATCH, 4, 3, generator=generator) < 0.8
    row, col = (torch.rand(BATCH, size, generator=generator) + 0.1 for size in (4, 3))
    row[::5, 0] = 0
    col[::7, 1] = 0
    row, col = (row if given != "col" else None), (col if given != "row" else None)
    plan = torch.rand(BATCH, 3, 4, generator=generator).transpose(1, 2)
    check_sigma2(plan, row, col, mask)
    check_sigma2(plan.masked_fill(~mask, torch.nan), row, col, mask)


def test_sigma2_of_repeated_singular_values() -> None:
    plan = torch.eye(4)[torch.stack([torch.randperm(4) for _ in range(BATCH)])]
    check_sigma2(plan, None, None, None)
    check_sigma2(0.3 * plan + 0.7 / 4, None, None, None)


def test_sigma2_of_a_poisoned_plan_stays_alone() -> None:
    plan = reference.sinkhorn(random_logits(4, 4, 1.0))
    plan[3, 1, 2] = torch.nan
    plan[4, 1, 2] = torch.inf
    value, u2, v2 = torch.empty(BATCH), torch.empty(BATCH, 4), torch.empty(BATCH, 4)
    registers_sigma2.sigma2(plan, None, None, None, value, u2, v2)
    assert value.isnan().nonzero().flatten().tolist() == [3, 4]
