"""The register kernels of converged plans, interpreted: Newton's method and the implicit gradient against float64.

Budgets are those ``fastdsm._verify.newton`` derives: what a residual of tol and logits off by their rounding leave open.
Every output starts as NaN.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastdsm
from benchmarks.static.launches import recorded
from fastdsm import pytorch, reference
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm._verify.sinkhorn import gradient_size, half_ulp
from fastdsm.kernels.registers import launch_converged as registers_converged
from fastdsm.results import SinkhornSpectrum

from .test_registers import LINES, empty_outputs, with_excluded_lines

SHAPES = [(1, 1), (1, 4), (2, 2), (3, 4), (4, 3), (4, 1)]
BATCH = 32  # one program
TOL = 1e-6
EPS = torch.finfo(torch.float32).eps
BLACKWELL = os.environ.get("PTX_TARGET") == "sm_100"  # what is executed, see ``benchmarks.execution.plugin``


def assert_variants_agree(found: Tensor, known: Tensor) -> None:
    """To the last bit; not so on Blackwell, where this is not promised.

    There the compiler packs two products and sums into one ``fma.rn.f32x2``, and which it contracts is another matter in each
    variant of a kernel (with and without info, packed and strided): they differ in the last place, and by a step where a
    residual lies at the tolerance.
    """
    if not BLACKWELL:
        assert torch.equal(found, known)
    elif found.dtype == torch.int32:
        assert ((found - known).abs() <= 1).all()
    else:
        torch.testing.assert_close(found, known, atol=3 * TOL, rtol=3 * TOL)


def random_logits(n: int, m: int, std: float, seed: int = 0) -> Tensor:
    return std * torch.randn(BATCH, n, m, generator=torch.Generator().manual_seed(seed))


def newton(problem: Problem) -> Outputs:
    outputs = empty_outputs(problem)
    assert registers_converged.supports_forward(problem, outputs)
    registers_converged.newton_forward(problem, outputs)
    return outputs


def on_pytorch(problem: Problem) -> Outputs:
    """From where the kernel starts as well: its first step, unless it is the last, is three sweeps."""
    if problem.n_iters > 1:
        swept = empty_outputs(problem)
        pytorch.sinkhorn_forward(replace(problem, n_iters=2, tol=-1.0), swept)
        problem = replace(problem, f0=swept.f)
    outputs = empty_outputs(problem)
    pytorch.newton_forward(problem, outputs)
    return outputs


def implicit(problem: Problem, grad_plan: Tensor, g: Tensor) -> Tensor:
    gradients = Gradients(torch.full_like(problem.logits, torch.nan))
    assert registers_converged.supports_backward(problem, grad_plan, gradients)
    registers_converged.implicit_backward(problem, grad_plan, g, gradients)
    return gradients.logits


def oracle(problem: Problem, logits: Tensor) -> SinkhornSpectrum:
    tau = problem.temperature.double() if isinstance(problem.temperature, Tensor) else problem.temperature
    per_column = None if problem.unit_rows else torch.ones(logits.shape[0], logits.shape[2], dtype=torch.float64)
    return reference.sinkhorn_sigma2(
        logits, n_iters=100, temperature=tau, mask=problem.mask, col_marginal=per_column, solver="newton", tol=1e-11
    )


def solved(logits: Tensor) -> Tensor:
    """Where the oracle's plan really has its marginals: its own residual passes over a column that has become empty."""
    valid = logits != -torch.inf
    rows, cols = valid.any(2).sum(1), valid.any(1)
    wanted = cols * (rows / cols.sum(1).clamp(min=1)).double()[:, None]
    return ((oracle(Problem(logits, 1), logits.double()).plan.sum(1) - wanted).abs() < 1e-6).all(1)


def amplified(problem: Problem, truth: SinkhornSpectrum) -> tuple[Tensor, Tensor]:
    """How far potentials may be off, (B, 1, 1), and by how much a system of the plan's condition amplifies that again."""
    tau = torch.as_tensor(problem.temperature, dtype=torch.float64).reshape(-1, 1, 1)
    valid = problem.logits != -torch.inf if problem.mask is None else problem.mask & (problem.logits != -torch.inf)
    size = (problem.logits.double() / tau).masked_fill(~valid, 0.0).abs().amax((1, 2), keepdim=True)
    gap = (1 - truth.sigma2.square()).clamp(min=1e-9)[:, None, None]
    return (TOL + 2 * EPS * size) / gap, 1 / gap


def check(problem: Problem) -> Outputs:
    """Forward and gradient, of matrices with support."""
    outputs, leaf = newton(problem), problem.logits.double().requires_grad_()
    truth = oracle(problem, leaf)
    assert (truth.residual < 1e-9).all(), "not a case for this check"
    dtype = problem.logits.dtype
    moved, condition = amplified(problem, truth)
    allowed = 2 * moved * truth.plan.sum(-1).amax(-1)[:, None, None] + half_ulp(truth.plan, dtype) * (dtype != torch.float32)
    assert ((outputs.plan.double() - truth.plan).abs() <= allowed).all()
    assert (outputs.residual <= TOL).all()
    if outputs.sigma2 is not None:
        assert ((outputs.sigma2 - truth.sigma2).abs() <= 4 * moved[:, 0, 0] + TOL).all()
    tau = torch.as_tensor(problem.temperature, dtype=torch.float32).reshape(-1, 1, 1)
    logits = problem.logits.float() / tau
    logits = logits if problem.mask is None else logits.masked_fill(~problem.mask, -torch.inf)
    rebuilt = (logits.double() + outputs.f[:, :, None] + outputs.g[:, None, :]).exp()
    rounded = 4 * EPS * (1 + outputs.f.abs().amax(1) + outputs.g.abs().amax(1))[:, None, None]
    assert ((outputs.plan - rebuilt).abs() <= rounded + half_ulp(rebuilt, dtype) * (dtype != torch.float32)).all()

    grad_plan = torch.randn(problem.logits.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = implicit(problem, grad_plan, outputs.g)
    (exact,) = torch.autograd.grad(truth.plan, leaf, grad_plan.double())
    allowed = moved * condition * gradient_size(exact, grad_plan) + half_ulp(exact, dtype) * (dtype != torch.float32)
    assert ((found.double() - exact).abs() <= allowed).all()
    return outputs


packed_sizes = pytest.mark.parametrize("lines", LINES)


@packed_sizes
@pytest.mark.parametrize("std", [0.1, 1.0, 4.0, 8.0, 100.0])
def test_packed_matrices(std: float, lines: int) -> None:
    logits = random_logits(lines, lines, std)
    if std == 100.0:  # the oracle's own safeguard is a plainer one
        logits = logits[solved(logits)]
        assert len(logits) > BATCH / 2
    check(Problem(logits, 60, tol=TOL))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_rows", [True, False])
def test_other_shapes(shape: tuple[int, int], unit_rows: bool) -> None:
    check(Problem(random_logits(*shape, 2.0 if unit_rows else 6.0), 40, unit_rows=unit_rows, tol=TOL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype) -> None:
    for shape in ((3, 4), *((lines, lines) for lines in LINES)):
        check(Problem(random_logits(*shape, 3.0).to(dtype), 30, tol=TOL))


@pytest.mark.parametrize("lines", [4, 5, 6, 8])
def test_steps_are_those_of_the_pytorch_path(lines: int, as_kernels_step: None) -> None:
    """Same method, same safeguard, same plan. Rounding may turn the last comparison with tol, hence a step more or less.

    Seldom it turns two: of 320 matrices of 7 lines one, of 8 lines another, which this seed has at 7.
    """
    for std, n_iters in ((4.0, 30), (100.0 if lines == 4 else 12.0, 60)):
        problem = Problem(random_logits(lines, lines, std, seed=3), n_iters, tol=TOL)
        found, known = newton(problem), on_pytorch(problem)
        assert found.sweeps.max() > 5
        assert (found.residual <= TOL).all()
        assert ((found.sweeps - known.sweeps).abs() <= 1).all()
        assert (found.sweeps == known.sweeps).double().mean() > 0.75
        torch.testing.assert_close(found.plan, known.plan, atol=3e-6, rtol=0)


@pytest.mark.parametrize("n_iters", [0, 1, 2, 20])
def test_number_of_steps(n_iters: int) -> None:
    cases = [((4, 4), True), ((3, 4), False), ((4, 2), True)]
    if n_iters != 2:  # one step: of 8 lines it is as far off as the ground, which Cholesky factors take into account otherwise
        cases.append(((8, 8), False))
    for shape, unit_rows in cases:
        problem = Problem(random_logits(*shape, 2.0), n_iters, unit_rows=unit_rows, tol=TOL)
        found, known = newton(problem), on_pytorch(problem)
        assert_variants_agree(found.sweeps, known.sweeps)
        assert found.sweeps.max() <= n_iters
        for outputs in (found, known):  # potentials are known but for a constant
            center = outputs.g.mean(1, keepdim=True) * (n_iters > 1)
            outputs.f.add_(center)
            outputs.g.sub_(center)
        # Two runs that stop within their tolerance may stop on either side of the limit.
        apart = 2 * amplified(problem, oracle(problem, problem.logits.double()))[0].flatten() * (n_iters == 20)
        for name in ("plan", "residual", "f", "g") + ("sigma2",) * (max(shape) <= 4):
            x, y = getattr(found, name).double(), getattr(known, name).double()
            allowed = 3e-6 * (1 + y.abs()) + apart.view(-1, *(1,) * (y.dim() - 1))
            assert ((x - y).abs() <= allowed).all(), name


@packed_sizes
def test_rows_far_below_the_others(lines: int) -> None:
    """A matrix has the same plan whatever is added to a row, and its neighbours keep every bit of theirs."""
    logits = random_logits(lines, lines, 2.0)
    shifted = logits.clone()
    shifted[::3, 2] -= 300.0
    shifted[1::3, 1] += 40.0
    before, after = newton(Problem(logits, 20, tol=TOL)), check(Problem(shifted, 20, tol=TOL))
    assert torch.equal(after.plan[2::3], before.plan[2::3])
    assert torch.equal(after.f[2::3], before.f[2::3])
    moved = amplified(Problem(shifted, 20), oracle(Problem(shifted, 20), shifted.double()))[0]
    assert ((after.plan - before.plan).abs() <= 2 * moved).all()


def test_first_sweeps_save_the_slowest_of_a_program_a_step() -> None:
    logits = 2 * torch.randn(16 * BATCH, 4, 4, generator=torch.Generator().manual_seed(0))
    problem = Problem(logits, 20, tol=TOL)
    bare = empty_outputs(problem)
    pytorch.newton_forward(problem, bare)
    longest = [outputs.sweeps.view(-1, BATCH).amax(1).double().mean() for outputs in (newton(problem), bare)]
    assert 4 < longest[0] < longest[1] - 0.75


@packed_sizes
def test_tolerance_is_that_of_each_matrix(lines: int) -> None:
    logits = random_logits(lines, lines, 4.0)
    tight, loose = (newton(Problem(logits, 30, tol=tol)) for tol in (1e-6, 1e-2))
    assert (loose.residual <= 1e-2).all()
    assert (loose.residual > 1e-6).any()
    assert (loose.sweeps <= tight.sweeps).all()
    assert (loose.sweeps < tight.sweeps).any()
    assert (newton(Problem(logits, 7)).sweeps == 7).all()  # without tol every step is made


def test_masks_and_excluded_lines() -> None:
    holes = torch.rand(BATCH, 4, 4, generator=torch.Generator().manual_seed(8)) < 0.15
    logits = with_excluded_lines(random_logits(4, 4, 2.0)).masked_fill(holes, -torch.inf)
    support = solved(logits)
    assert 10 < support.sum() < BATCH
    assert torch.equal(newton(Problem(logits, 20, tol=TOL)).residual <= TOL, support)
    outputs = check(Problem(logits[support], 20, tol=TOL))
    assert (outputs.plan[logits[support] == -torch.inf] == 0).all()

    tau = torch.rand(BATCH, generator=torch.Generator().manual_seed(3)) + 0.3
    mask = (logits != -torch.inf).mT
    strided = random_logits(4, 4, 2.0, 7).mT.contiguous().mT
    problem = Problem(strided[support], 20, temperature=tau[support], mask=mask[support], tol=TOL)
    outputs = check(problem)
    hidden = problem.logits.masked_fill(~mask[support], torch.nan)
    poisoned = replace(problem, logits=hidden)
    assert torch.equal(newton(poisoned).plan, outputs.plan)
    cotangent = random_logits(4, 4, 1.0, 9)[support]
    unseen = cotangent.masked_fill(~mask[support], torch.nan)
    assert torch.equal(implicit(poisoned, unseen, outputs.g), implicit(problem, cotangent, outputs.g))


@packed_sizes
def test_excluded_lines_of_packed_matrices(lines: int) -> None:
    logits = with_excluded_lines(random_logits(lines, lines, 2.0))[:BATCH]
    support = solved(logits)
    assert support.sum() > 10
    outputs = check(Problem(logits[support], 20, tol=TOL))
    assert (outputs.plan[logits[support] == -torch.inf] == 0).all()


@packed_sizes
def test_potentials_keep_the_mean_of_columns_that_take_part(lines: int) -> None:
    """They are known but for a constant; the oracle's steps, too, leave the mean of g where the first column step put it."""
    logits = random_logits(lines, lines, 2.0)
    logits[::2, :, 0] = -torch.inf
    problem = Problem(logits, 20, tol=TOL)
    found, truth = newton(problem), oracle(problem, logits.double())
    allowed = 2 * amplified(problem, truth)[0].squeeze(-1)
    assert ((found.g - truth.g).abs() <= allowed).all()
    assert ((found.f - truth.f).abs() <= allowed).all()


@packed_sizes
def test_without_support_everything_stays_finite_and_is_flagged(lines: int) -> None:
    logits = random_logits(lines, lines, 2.0)
    logits[:, 1:, :2] = -torch.inf  # two columns that only row 0 can fill
    problem = Problem(logits, 25, tol=TOL)
    outputs = newton(problem)
    assert (outputs.residual > 0.1).all()
    assert (outputs.sweeps == 25).all()
    for name in ("plan", "residual", "f", "g") + ("sigma2",) * (lines == 4):
        assert getattr(outputs, name).isfinite().all(), name
    torch.testing.assert_close(outputs.plan.sum(-1), torch.ones(BATCH, lines))
    assert implicit(problem, random_logits(lines, lines, 1.0, 4), outputs.g).isfinite().all()


@packed_sizes
def test_rows_of_small_gradients_sum_to_zero(lines: int) -> None:
    """Close to a permutation the gradient is 1e-5 of its cotangent, and so is what may be left of a row's sum."""
    problem = Problem(14 * torch.eye(lines) + random_logits(lines, lines, 0.5), 30, tol=TOL)
    found = implicit(problem, random_logits(lines, lines, 1.0, 4), newton(problem).g)
    size = found.abs().amax(-1)
    assert (size > 0).all()
    assert size.max() < 1e-4
    assert (found.double().sum(-1).abs() <= 4 * EPS * size).all()


@packed_sizes
def test_a_poisoned_matrix_stays_alone(lines: int) -> None:
    clean = random_logits(lines, lines, 3.0)
    dirty = clean.clone()
    dirty[7, 2, 1], dirty[9, 0, 3] = torch.nan, torch.inf
    bad = torch.zeros(BATCH, dtype=torch.bool)
    bad[7] = bad[9] = True
    for n_iters in (0, 20):
        before, after = (newton(Problem(x, n_iters, tol=TOL)) for x in (clean, dirty))
        for name in ("plan", "residual") + ("sigma2",) * (lines == 4):
            assert getattr(after, name)[bad].isnan().all(), name
            assert torch.equal(getattr(after, name)[~bad], getattr(before, name)[~bad]), name
    grad_plan = random_logits(lines, lines, 1.0, 4)
    first, second = (implicit(Problem(x, 20), grad_plan, before.g) for x in (clean, dirty))
    assert second[bad].isnan().all()
    assert torch.equal(second[~bad], first[~bad])


def test_packed_and_strided_agree() -> None:
    logits = random_logits(4, 4, 3.0)
    spread = torch.full((BATCH, 4, 8), torch.nan)
    spread[:, :, ::2] = logits
    packed, strided = (newton(Problem(x, 25, tol=TOL)) for x in (logits, spread[:, :, ::2]))
    for name in ("plan", "residual", "sweeps", "f", "g", "sigma2"):
        assert_variants_agree(getattr(packed, name), getattr(strided, name))
    grad_plan = random_logits(4, 4, 1.0, 4)
    expected = implicit(Problem(logits, 20), grad_plan, packed.g)
    assert_variants_agree(implicit(Problem(spread[:, :, ::2], 20), grad_plan, packed.g.mT.contiguous().mT), expected)
    alone = torch.full_like(logits, torch.nan)
    registers_converged.newton_forward(Problem(logits, 25, tol=TOL), Outputs(alone))
    assert_variants_agree(alone, packed.plan)


def test_an_empty_batch_is_nothing_to_do() -> None:
    problem = Problem(torch.empty(0, 4, 4), 3)
    newton(problem)
    implicit(problem, torch.empty(0, 4, 4), torch.empty(0, 4))


@pytest.mark.parametrize("first", ["col", "row"])
def test_public_calls_use_the_kernels(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise AssertionError("the PyTorch path was taken")

    logits, cotangent = random_logits(3, 4, 3.0), random_logits(3, 4, 1.0, 4)
    temperature = torch.rand(BATCH, generator=torch.Generator().manual_seed(3)) + 0.5
    expected, found = [], []
    for backend, results in (("torch", expected), ("triton", found)):
        leaf = logits.clone().requires_grad_()
        with monkeypatch.context() as patched:
            if backend == "triton":
                patched.setattr(pytorch, "newton_forward", unreachable)
                patched.setattr(pytorch, "implicit_backward", unreachable)
            plan = fastdsm.sinkhorn(leaf, solver="newton", temperature=temperature, first=first, backend=backend)
            results += [plan.detach(), torch.autograd.grad(plan, leaf, cotangent)[0]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_is_supported() -> None:
    problem = Problem(torch.zeros(2, 4, 3), 100, tol=TOL)
    eight = replace(problem, logits=torch.zeros(2, 8, 8))
    strided = torch.zeros(2, 1, 1).expand(2, 8, 8)
    outputs, gradients = empty_outputs(problem), Gradients(problem.logits)
    assert registers_converged.supports_forward(problem, outputs)
    assert registers_converged.supports_backward(problem, problem.logits, gradients)
    assert not registers_converged.supports_backward(problem, problem.logits, replace(gradients, f0=problem.logits))
    assert registers_converged.supports_forward(eight, empty_outputs(eight))
    assert not registers_converged.supports_forward(eight, Outputs(eight.logits, sigma2=torch.zeros(2)))
    assert registers_converged.supports_backward(eight, eight.logits, Gradients(eight.logits))
    assert not registers_converged.supports_backward(eight, strided, Gradients(eight.logits))
    for other in (
        replace(problem, logits=torch.zeros(2, 5, 3)),
        replace(problem, logits=torch.zeros(2, 4, 3, dtype=torch.float64)),
        replace(problem, f0=torch.zeros(2, 4)),
        replace(problem, row_marginal=torch.ones(2, 4)),
        replace(problem, col_marginal=torch.ones(2, 3)),
    ):
        assert not registers_converged.supports_forward(other, empty_outputs(other))
        assert not registers_converged.supports_backward(other, other.logits, Gradients(other.logits))


def test_configurations_are_distinct() -> None:
    labels = [c.label for c in registers_converged.configurations()]
    assert len(labels) == len(set(labels)) == 66


@pytest.mark.parametrize("first", ["col", "row"])
def test_what_nobody_asked_for_is_not_written(first: str) -> None:
    logits = torch.randn(5, 4, 4)
    options = {"solver": "newton", "first": first, "backend": "triton"}
    plans = []
    for leaf, return_info in ((logits, False), (logits, True), (logits.clone().requires_grad_(), False)):
        with recorded() as launches:  # and not made
            fastdsm.sinkhorn(leaf, return_info=return_info, **options)
        found = fastdsm.sinkhorn(leaf, return_info=return_info, **options)
        plans.append(found[0] if return_info else found.detach())
        (launch,) = launches
        assert launch.configuration.constants["WITH_INFO"] == (return_info or leaf.requires_grad)
    assert_variants_agree(plans[0], plans[1])
    assert_variants_agree(plans[0], plans[2])
