"""The stream kernels, interpreted, against the float64 oracle under the error policy of ``tolerances``.

They serve matrices beyond 256, but take any: the interpreter bears few rows, so most cases are small, in blocks smaller still.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastdsm
from benchmarks.static.launches import recorded
from benchmarks.static.report import identify
from fastdsm import kernels, reference
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm.kernels.stream import launch as stream

from ..tolerances import assert_within
from .test_panel import (
    check_backward,
    check_forward,
    empty_gradients,
    empty_outputs,
    logits_of,
    optioned,
    oracle,
    oracle_gradients,
)

SINGLE, DOUBLE = torch.float32, torch.float64


def check(problem: Problem) -> tuple[Outputs, Gradients]:
    """Both directions of ``problem`` against the oracle."""
    return check_forward(problem, stream), check_backward(problem, family=stream)


@pytest.fixture
def _few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wider than 256 are wide ones, walked in chunks."""
    monkeypatch.setattr(stream, "ROWS", {256: stream.ROWS[256]})


SIZES = [
    (1, 1, 1, 1.0, 2),
    (2, 3, 3, 1.0, 3),
    (1, 1, 300, 2.0, 1),
    (1, 40, 33, 5.0, 2),
    (1, 9, 264, 200.0, 3),
    (1, 9, 300, 3.0, 0),
]


@pytest.mark.parametrize(("batch", "n", "m", "std", "n_iters"), SIZES)
def test_every_size(batch: int, n: int, m: int, std: float, n_iters: int) -> None:
    check(Problem(logits_of(batch, n, m, std), n_iters))


def test_many_sweeps_of_large_logits() -> None:
    """Segments of the gradient follow one another; factors over all sweeps at once would leave float32."""
    check(Problem(logits_of(1, 3, 40, 30.0), 11))


def test_large_logits_are_rounded_alike_in_all_passes() -> None:
    """By 1e-4 next to a thousand, which is then a change of the logits: rows are exact, and columns converge, all the same."""
    problem = Problem(logits_of(2, 5, 6) + 1000.0 * torch.randn(2, 5, 1), 30)
    found = empty_outputs(problem)
    stream.sinkhorn_forward(problem, found)
    columns = found.plan.double().sum(-2) / (5 / 6)
    for off in ((found.plan.double().sum(-1) - 1.0).abs(), (columns - 1.0).abs(), found.residual):
        assert off is not None
        assert (off <= 16 * torch.finfo(SINGLE).eps).all()


def test_more_blocks_than_one_reduction_adds_at_once() -> None:
    check_forward(Problem(logits_of(1, 16 * 33, 3), 1), stream)


def test_a_matrix_that_no_other_family_takes() -> None:
    problem = Problem(logits_of(1, 4, 257, 2.0), 1)
    found = empty_outputs(problem)
    with recorded() as launches:
        assert kernels.sinkhorn_forward(problem, found)
    assert launches[0].configuration in stream.configurations()
    assert kernels.sinkhorn_forward(problem, found)
    truth, plain = (oracle(problem, dtype)[1] for dtype in (DOUBLE, SINGLE))
    assert_within(found.plan, truth.plan, plain.plan)


@pytest.mark.usefixtures("_few_columns")
def test_wide_rows() -> None:
    """Two chunks of columns, two groups of rows."""
    check(Problem(logits_of(1, 5, 2100, 30.0), 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [24, 21])
def test_narrow_dtypes(dtype: torch.dtype, m: int) -> None:
    problem = Problem(logits_of(1, 5, m, 3.0, dtype), 2, temperature=0.7)
    assert stream.aligned(problem.logits) == (m == 24)
    check(problem)


@pytest.mark.parametrize(
    ("option", "n_iters"),
    [
        ("everything", 0),
        ("everything", 3),
        ("row marginal", 2),
        ("column marginal", 2),
        ("extreme marginals", 4),
        ("unit columns", 1),
        ("masked unit columns", 2),
        ("-inf", 2),
    ],
)
def test_options(option: str, n_iters: int) -> None:
    check(optioned(option, 8, 11, n_iters))


def test_tol_stops_each_matrix_by_itself() -> None:
    logits = torch.stack([logits_of(1, 5, 5, std)[0] for std in (0.1, 0.5, 20.0)])
    problem = Problem(logits, 6, tol=1e-3)
    found = check_forward(problem, stream)
    assert found.sweeps is not None
    first, second, third = found.sweeps.tolist()
    assert first < second < third == 6
    check_backward(problem, sweeps=found.sweeps, family=stream)


@pytest.mark.parametrize(("poison", "n_iters"), [(torch.nan, 0), (torch.inf, 2)])
def test_poison_stays_in_its_matrix(poison: float, n_iters: int) -> None:
    logits, grad_plan = logits_of(3, 8, 9, 3.0), torch.randn(3, 8, 9)
    mask = torch.rand(3, 8, 9) < 0.8
    mask[0, 0, 0], mask[1, 7, 7] = False, True
    poisoned = logits.clone()
    poisoned[0, 0, 0] = poisoned[1, 7, 7] = poison
    results = []
    for values in (logits, poisoned):
        problem = Problem(values, n_iters, mask=mask)
        outputs, gradients = empty_outputs(problem), empty_gradients(problem)
        stream.sinkhorn_forward(problem, outputs)
        stream.sinkhorn_backward(problem, grad_plan, gradients, None)
        results.append([outputs.plan, outputs.residual, outputs.f, outputs.g, *vars(gradients).values()])
    for clean, touched in zip(*results, strict=True):
        assert torch.equal(clean[[0, 2]], touched[[0, 2]])
        assert touched[1].isnan().all()


def test_what_is_excluded_is_never_used() -> None:
    problem = optioned("everything", 8, 11, 2)
    row, col, f0 = problem.row_marginal, problem.col_marginal, problem.f0
    assert problem.mask is not None
    assert row is not None
    assert col is not None
    assert f0 is not None
    used = problem.mask & (row != 0).unsqueeze(-1) & (col != 0).unsqueeze(-2)
    assert not used.all(-1).any()
    grad_plan = torch.randn(2, 8, 11)
    dirty = replace(
        problem,
        logits=problem.logits.masked_fill(~used, torch.nan),
        f0=f0.masked_fill(~used.any(-1), torch.nan),
    )
    results = []
    for some, cotangent in ((problem, grad_plan), (dirty, grad_plan.masked_fill(~used, torch.nan))):
        outputs, gradients = empty_outputs(some), empty_gradients(some)
        stream.sinkhorn_forward(some, outputs)
        stream.sinkhorn_backward(some, cotangent, gradients, None)
        results.append([outputs.plan, *vars(gradients).values()])
    for clean, touched in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, touched)
    for gradient, excluded in zip(results[0][1:4], (~used, ~used.any(-1), ~used.any(-1)), strict=True):
        assert (gradient[excluded] == 0).all()


@pytest.mark.parametrize("n_iters", [0, 1])
def test_nothing_takes_part(n_iters: int) -> None:
    problem = Problem(logits_of(1, 5, 9), n_iters, mask=torch.zeros(1, 5, 9, dtype=torch.bool))
    outputs, gradients = empty_outputs(problem), empty_gradients(problem)
    stream.sinkhorn_forward(problem, outputs)
    stream.sinkhorn_backward(problem, torch.randn(1, 5, 9), gradients, None)
    for value in (outputs.plan, outputs.residual, outputs.f, outputs.g, *vars(gradients).values()):
        assert (value == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_transposed(masked: bool) -> None:
    """A problem that ends with columns comes as its transpose: nothing has contiguous rows."""
    problem = Problem(
        torch.randn(2, 36, 12).mT,
        2,
        temperature=torch.tensor([1.5, 0.0, 0.5])[::2],
        row_marginal=torch.rand(1, 1).add(0.5).expand(2, 12),
        mask=(torch.rand(12, 1) < 0.9).expand(2, 12, 36) if masked else None,
    )
    outputs = replace(empty_outputs(problem), plan=torch.full((2, 36, 12), torch.nan).mT)
    stream.sinkhorn_forward(problem, outputs)
    truth, plain = (oracle(problem, dtype)[1] for dtype in (DOUBLE, SINGLE))
    assert_within(outputs.plan, truth.plan, plain.plan)
    grad_plan, target = torch.randn(2, 36, 12).mT, torch.full((2, 36, 12), torch.nan).mT
    stream.sinkhorn_backward(problem, grad_plan, Gradients(target), None)
    check_gradient(problem, grad_plan, target)


def check_gradient(problem: Problem, grad_plan: Tensor, found: Tensor) -> None:
    exact, usual = (oracle_gradients(problem, grad_plan, dtype)[0] for dtype in (DOUBLE, SINGLE))
    assert exact is not None
    assert usual is not None
    assert_within(found, exact, usual, cotangent=grad_plan)


def test_any_strides() -> None:
    problem = Problem(torch.randn(1, 14, 80)[:, ::2, 1:66:3], 1)
    buffer = torch.full((1, 7, 99), torch.nan)
    stream.sinkhorn_forward(problem, Outputs(buffer[:, :, 33:99:3]))
    truth, plain = (oracle(problem, dtype)[1] for dtype in (DOUBLE, SINGLE))
    assert_within(buffer[:, :, 33:99:3], truth.plan, plain.plan)
    assert buffer[:, :, :33].isnan().all()
    assert buffer[:, :, 34:99:3].isnan().all()
    grad_plan, buffer = torch.randn(22).expand(1, 7, 22), torch.full((1, 14, 22), torch.nan)
    stream.sinkhorn_backward(problem, grad_plan, Gradients(buffer[:, ::2]), None)
    check_gradient(problem, grad_plan, buffer[:, ::2])
    assert buffer[:, 1::2].isnan().all()


@pytest.mark.parametrize("n_iters", [0, 2])
def test_strided_marginals_and_starts(n_iters: int) -> None:
    """Every other entry of wider ones, one of them zero, whose matrices lie further apart than they need."""
    row, col = torch.rand(2, 14) + 0.2, torch.rand(2, 18) + 0.2
    row[0, 4], col[1, 7] = 0.0, 0.0
    row, col = row[:, ::2], col[:, 1::2]
    col.mul_(row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True))
    f0 = torch.randn(2, 21)[:, ::3] if n_iters else None
    check(Problem(logits_of(2, 7, 9, 2.0), n_iters, row_marginal=row, col_marginal=col, f0=f0))


def test_runs_agree_to_the_bit_whatever_else_is_asked_for() -> None:
    problem = optioned("everything", 18, 11, 1)
    outputs, gradients = empty_outputs(problem), empty_gradients(problem)
    bare, bare_gradients = Outputs(empty_outputs(problem).plan), Gradients(empty_gradients(problem).logits)
    grad_plan = torch.randn(2, 18, 11)
    for some_outputs, some_gradients in ((outputs, gradients), (bare, bare_gradients)):
        stream.sinkhorn_forward(problem, some_outputs)
        stream.sinkhorn_backward(problem, grad_plan, some_gradients, None)
    assert torch.equal(bare.plan, outputs.plan)
    assert torch.equal(bare_gradients.logits, gradients.logits)


@pytest.mark.parametrize(("dtype", "first"), [(SINGLE, "col"), (torch.bfloat16, "row")])
def test_sigma2_comes_from_the_plan_of_these_kernels(dtype: torch.dtype, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform and given marginals, excluded lines and entries; the PyTorch path projects nothing."""

    def unreachable(*_: object) -> None:
        raise AssertionError("the PyTorch path was taken")

    logits = logits_of(2, 12, 300, 2.0).to(dtype)
    logits[0, 3], logits[1, :, 7:90] = -torch.inf, -torch.inf
    mask = torch.rand(logits.shape) < 0.9
    monkeypatch.setattr("fastdsm.pytorch.sinkhorn_forward", unreachable)
    for options in ({}, {"mask": mask}, {"col_marginal": torch.rand(300) + 0.5, "mask": mask}):
        found = fastdsm.sinkhorn_sigma2(logits, n_iters=3, first=first, backend="triton", **options)
        wide = {k: x.double() if x.is_floating_point() else x for k, x in options.items()}
        truth = reference.sinkhorn_sigma2(logits.double(), n_iters=3, first=first, **wide)
        torch.testing.assert_close(found.sigma2.double(), truth.sigma2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.plan.double(), truth.plan, rtol=2**-8 if dtype != SINGLE else 1e-5, atol=1e-6)


def test_empty_batch() -> None:
    problem = Problem(torch.empty(0, 300, 40), 3)
    with recorded() as launches:
        stream.sinkhorn_forward(problem, empty_outputs(problem))
        stream.sinkhorn_backward(problem, torch.empty(0, 300, 40), empty_gradients(problem), None)
    assert all(launch.programs == 0 for launch in launches)


def test_support_and_table() -> None:
    assert stream.supports(Problem(torch.empty(1, 40_000, 32_768, device="meta"), 1))
    assert not stream.supports(Problem(torch.empty(1, 3, 32_769, device="meta"), 1))
    assert not stream.supports(Problem(torch.empty(1, 3, 300, dtype=DOUBLE), 1))
    table = stream.configurations()
    assert len(table) == len({(c.kernel.fn.__name__, c.label) for c in table})
    for configuration in table:
        assert set(configuration.constants) | set(configuration.signature()) == set(configuration.kernel.arg_names)


@pytest.mark.parametrize("shape", [(1, 300, 257), (3, 2, 300), (2, 300, 1), (1, 5, 9000), (1, 70_000, 512)])
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_launches_are_of_the_table_and_of_the_promised_number(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Three for the first column step, two for a sweep, one for the plan; the backward: the sweeps again, then the adjoint."""
    table = {identify(configuration) for configuration in kernels.configurations()}
    problem = Problem(torch.empty(shape, dtype=dtype), 5)
    with recorded() as forward:
        kernels.sinkhorn_forward(problem, empty_outputs(problem))
    with recorded() as backward:
        kernels.sinkhorn_backward(problem, problem.logits, empty_gradients(problem), None)
    assert len(forward) == 3 + 2 * 5 + 1
    assert len(backward) == 3 + 2 * 5 + 2 + (2 * 5 - 1) + 1
    assert all(identify(launch.configuration) in table for launch in (*forward, *backward))
    for launch in (*forward, *backward):
        if "lines" in launch.configuration.kernel.arg_names:
            assert launch.arguments["blocks"] <= 256
            assert launch.arguments["lines"] % launch.configuration.constants["ROWS"] == 0
