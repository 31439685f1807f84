"""The tile family against the float64 oracle: plan, potentials, residual, sweeps and every gradient, for every option.

Runs in Triton's interpreter. The budget is twice the error of the oracle in the compute dtype plus a small floor, and
half an ulp where the output is narrower. Buffers hold NaN (or -7) before a launch, so an entry left unwritten shows.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from fastdsm import reference
from fastdsm._ops.marginals import marginals_of
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm._verify.sinkhorn import Case, Target, verify_case
from fastdsm.kernels.common import configuration
from fastdsm.kernels.tile import launch as tile

from ..tolerances import drift

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass(frozen=True)
class Result:
    """What a projection and its backward give; sweeps int32, the rest floating point."""

    plan: Tensor
    residual: Tensor
    sweeps: Tensor
    f: Tensor
    g: Tensor
    logits: Tensor
    f0: Tensor
    log_row: Tensor
    log_col: Tensor


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, -7 if dtype == torch.int32 else torch.nan, dtype=dtype)


def _outputs(problem: Problem) -> Outputs:
    (batch, n, m), inner = problem.logits.shape, problem.compute_dtype
    return Outputs(
        _poisoned(batch, n, m, dtype=problem.logits.dtype),
        _poisoned(batch, dtype=inner),
        _poisoned(batch, dtype=torch.int32),
        _poisoned(batch, n, dtype=inner),
        _poisoned(batch, m, dtype=inner),
    )


def _run(problem: Problem, cotangent: Tensor) -> Result:
    (batch, n, m), inner = problem.logits.shape, problem.compute_dtype
    outputs = _outputs(problem)
    tile.sinkhorn_forward(problem, outputs)
    gradients = Gradients(
        _poisoned(batch, n, m, dtype=problem.logits.dtype),
        _poisoned(batch, n, dtype=inner),
        _poisoned(batch, n, dtype=inner),
        _poisoned(batch, m, dtype=inner),
    )
    tile.sinkhorn_backward(problem, cotangent, gradients, outputs.sweeps if problem.tol >= 0 else None)
    info = (outputs.residual, outputs.sweeps, outputs.f, outputs.g)
    return Result(outputs.plan, *info, gradients.logits, gradients.f0, gradients.log_row, gradients.log_col)


def _marginals(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both marginals as the sweeps use them."""
    row, col = problem.row_marginal, problem.col_marginal
    if row is None and col is None and not problem.unit_rows:
        col = torch.ones(problem.logits.shape[0], problem.logits.shape[2], dtype=problem.compute_dtype)
    row, col = (None if x is None else x.to(dtype) for x in (row, col))
    return marginals_of(problem.logits.to(dtype), row, col, problem.mask)


def _oracle(problem: Problem, cotangent: Tensor, dtype: torch.dtype) -> Result:
    """The same by the reference in ``dtype``, gradients by autograd."""
    logits = problem.logits.to(dtype).requires_grad_()
    row, col = (x.requires_grad_() for x in _marginals(problem, dtype))
    f0 = torch.zeros_like(row) if problem.f0 is None else problem.f0.to(dtype)
    f0 = f0.detach().requires_grad_()
    temperature = problem.temperature
    plan, info = reference.swept(
        logits,
        n_iters=problem.n_iters,
        temperature=temperature.to(dtype) if isinstance(temperature, Tensor) else temperature,
        tol=problem.tol if problem.tol >= 0 else None,
        f0=f0,
        row_marginal=row,
        col_marginal=col,
        mask=problem.mask,
    )
    info = info._replace(f=info.f.detach(), g=info.g.detach())
    inputs = (logits, f0, row, col)
    grads = torch.autograd.grad(plan, inputs, cotangent.to(dtype), allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
    log_row, log_col = (x.detach() * grad for x, grad in zip((row, col), grads[2:], strict=True))
    return Result(plan.detach(), info.residual, info.sweeps, info.f, info.g, grads[0], grads[1], log_row, log_col)


def _assert_close(name: str, got: Tensor, usual: Tensor, truth: Tensor, unit: float, beyond: float) -> None:
    """``got`` errs at most twice as much as ``usual``, plus floor times ``unit`` and ``beyond``, for each matrix by itself."""
    got, usual, truth = (x.flatten(1) if x.ndim > 1 else x[:, None] for x in (got, usual, truth))
    assert torch.isfinite(truth).all()
    half_ulp = truth.abs() * torch.finfo(got.dtype).eps / 2 if got.dtype.itemsize == 2 else 0.0
    usual_error = (usual.double() - truth).abs().amax(1, keepdim=True)
    excess = (got.double() - truth).abs() - (2.0 * usual_error + FLOOR[usual.dtype] * unit + half_ulp + beyond)
    assert (excess <= 0).all(), f"{name}: {excess.max().item():.2e} beyond the budget, {usual_error.max().item():.2e}"


def _check(problem: Problem) -> Result:
    cotangent = torch.randn(problem.logits.shape).to(problem.logits.dtype)
    got = _run(problem, cotangent)
    usual = _oracle(problem, cotangent, problem.compute_dtype)
    truth = _oracle(problem, cotangent, torch.float64)
    assert torch.equal(got.sweeps, truth.sweeps)
    units = {"plan": 1.0, "residual": 1.0, "f": truth.f.abs().amax().item() + 1.0, "g": truth.g.abs().amax().item() + 1.0}
    units |= dict.fromkeys(("logits", "f0", "log_row", "log_col"), cotangent.abs().amax().item())
    beyond = {"f": drift(problem.n_iters), "g": drift(problem.n_iters)}
    for name, unit in units.items():
        _assert_close(name, getattr(got, name), getattr(usual, name), getattr(truth, name), unit, beyond.get(name, 0.0))
    return got


def _logits(batch: int, n: int, m: int, std: float | list[float] = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1000 * n + m)
    return (torch.randn(batch, n, m) * torch.as_tensor(std).view(-1, 1, 1)).to(dtype)


def _mask(batch: int, n: int, m: int) -> Tensor:
    """Random entries, but neither the first row nor the last column of matrix 0; the last matrix is all masked."""
    mask = torch.rand(batch, n, m) < 0.8
    mask[0, 0], mask[0, :, -1], mask[-1] = False, False, False
    return mask


def _weights(batch: int, lines: int, total: float) -> Tensor:
    """Uneven marginals, one of them zero where there are more than two."""
    weights = torch.rand(batch, lines) + 0.2
    if lines > 2:
        weights[:, 1] = 0.0
    return weights * (total / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("n", "m", "n_iters"),
    [
        (1, 1, 3),
        (1, 3, 2),
        (3, 1, 2),
        (3, 3, 20),
        (4, 4, 1),
        (4, 4, 60),
        (5, 7, 20),
        (8, 8, 33),
        (16, 3, 5),
        (16, 16, 20),
        (31, 20, 12),
    ],
)
def test_sizes(n: int, m: int, n_iters: int) -> None:
    _check(Problem(_logits(3, n, m, [0.1, 2.0, 20.0]), n_iters))


@pytest.mark.parametrize(("n", "m", "n_iters"), [(33, 64, 9)])
def test_large_tiles_cross_a_segment(n: int, m: int, n_iters: int) -> None:
    _check(Problem(_logits(1, n, m), n_iters))


def test_largest_tile_crosses_a_segment_forward() -> None:
    problem = Problem(_logits(1, 128, 70), 8)
    outputs = _outputs(problem)
    tile.sinkhorn_forward(problem, outputs)
    usual, truth = (reference.sinkhorn(problem.logits.to(dtype), n_iters=8) for dtype in (torch.float32, torch.float64))
    _assert_close("plan", outputs.plan, usual, truth, 1.0, 0.0)


def test_large_logits() -> None:
    _check(Problem(_logits(3, 7, 7, [200.0, 60.0, 20.0]), 20))


def test_rows_and_columns_that_are_both_far_below() -> None:
    """What the bases of a row and of a column come to is beyond either, and still on their grid."""
    rows, cols = (-1e9 * (torch.rand(20, 1, 1) + 0.5) * (torch.rand(20, *lines) + 4.0) / 4 for lines in ((9, 1), (1, 9)))
    rows[:, 0] = 0.0
    logits = rows + cols + 200 * torch.randn(20, 9, 9)
    problem = Problem(logits, 7)
    outputs = _outputs(problem)
    tile.sinkhorn_forward(problem, outputs)
    torch.testing.assert_close(outputs.plan.double(), reference.sinkhorn(logits.double(), n_iters=7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_of_16_bits(dtype: torch.dtype) -> None:
    """They are whole numbers, so plain PyTorch's sums are exact, and its budget has no room for rounding them."""
    records = verify_case(Case((2, 64, 64), dtype, 200.0), Target("triton", "cpu"))
    assert [record for record in records if not record.ok] == []


@pytest.mark.parametrize(("n", "m"), [(5, 6), (12, 9)])
def test_columns_of_a_gradient_sum_to_zero_whatever_the_potentials(n: int, m: int) -> None:
    """A number added to a column moves no plan. Whole logits, and a start whose columns are right: exponents do not round.

    Rows of next to no mass have potentials of -69, which do.
    """
    f0, near = (1000.0 * torch.randn(2, n)).round(), torch.randint(-2, 3, (2, n, m)).float()
    col, row = near.exp().sum(1), torch.rand(2, n) + 0.5
    row[:, ::2] *= 1e-30
    row *= col.sum(1, keepdim=True) / row.sum(1, keepdim=True)
    problem = Problem(near - f0[:, :, None], 1, f0=f0, row_marginal=row, col_marginal=col)
    found = _run(problem, torch.randn(2, n, m)).logits
    assert (found.double().sum(1).abs() <= 16 * torch.finfo(torch.float32).eps * found.abs().amax()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "n_iters"), [(4, 3, 20), (9, 12, 20)])
def test_dtypes(dtype: torch.dtype, n: int, m: int, n_iters: int) -> None:
    _check(Problem(_logits(2, n, m, dtype=dtype), n_iters))


@pytest.mark.parametrize(
    "names",
    [
        "mask",
        "row",
        "col",
        "row col",
        "row col mask",
        "f0 temperature",
        "columns mask",
        "tol row mask",
        "tol row col mask f0 temperature",
    ],
)
@pytest.mark.parametrize(("n", "m", "n_iters"), [(3, 4, 20), (9, 7, 14), (6, 5, 0)])
def test_options(names: str, n: int, m: int, n_iters: int) -> None:
    batch = 3
    logits = _logits(batch, n, m)
    options: dict[str, Any] = {
        "mask": {"mask": _mask(batch, n, m)},
        "row": {"row_marginal": _weights(batch, n, 2.0)},
        "col": {"col_marginal": _weights(batch, m, 2.0)},
        "f0": {"f0": torch.randn(batch, n) if n_iters else None},
        "temperature": {"temperature": torch.tensor([0.5, 1.0, 3.0])},
        "columns": {"unit_rows": False},
        "tol": {"tol": 0.02},
    }
    chosen = {key: value for name in names.split() for key, value in options[name].items()}
    _check(Problem(logits, n_iters, **chosen))


def test_entries_of_minus_infinity_are_excluded() -> None:
    logits = _logits(2, 4, 5)
    masked = logits.masked_fill(~_mask(2, 4, 5), -torch.inf)
    _check(Problem(masked, 7, temperature=0.7))


def test_tiny_marginals_make_every_sweep_a_log_sweep() -> None:
    row = torch.tensor([[1e-15, 0.5, 0.5], [0.2, 0.3, 0.5]])
    _check(Problem(_logits(2, 3, 3), 6, row_marginal=row))


def test_a_tiny_column_marginal_whose_line_has_one_entry() -> None:
    """Row 0 has no other entry, so that every sweep multiplies its factor by r / c: every sweep is a log sweep."""
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[:, 0] = torch.arange(5) == 2
    mask[:, 1:, 2] = False
    row, col = torch.full((2, 4), 0.25), torch.tensor([[0.3, 0.2, 1e-10, 0.3, 0.2]]).expand(2, 5)
    _check(Problem(_logits(2, 4, 5), 6, row_marginal=row, col_marginal=col, mask=mask))


@pytest.mark.parametrize(("n", "std"), [(4, [0.5, 1.0, 2.0, 3.0, 4.0]), (16, [0.5, 2.0, 3.0, 4.0, 5.0])])
def test_each_matrix_stops_by_itself(n: int, std: list[float]) -> None:
    got = _check(Problem(_logits(5, n, n, std), 70, tol=3e-3))
    assert len(set(got.sweeps.tolist())) > 2
    assert got.sweeps.min() < 45 // n.bit_length() < got.sweeps.max(), "stops on both sides of a segment boundary"


def test_tol_zero_never_stops_early_and_a_loose_one_stops_after_one_sweep() -> None:
    logits = _logits(2, 5, 5)
    assert _check(Problem(logits, 4, tol=0.0)).sweeps.tolist() == [4, 4]
    assert _check(Problem(logits, 4, tol=1e3)).sweeps.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("n_iters", "tol"), [(0, -1.0), (4, -1.0), (60, 1e-2)])
def test_nan_stays_in_its_matrix(bad: float, n_iters: int, tol: float) -> None:
    clean = _logits(3, 4, 5)
    broken = clean.clone()
    broken[1, 2, 3] = bad
    cotangent = torch.randn(3, 4, 5)
    expected, got = (_run(Problem(x, n_iters, tol=tol), cotangent) for x in (clean, broken))
    for name in Result.__dataclass_fields__:
        assert torch.equal(getattr(got, name)[::2], getattr(expected, name)[::2]), name
    assert got.plan[1].isnan().all()
    assert got.residual[1].isnan()
    assert got.sweeps[1] == n_iters


def test_what_lies_under_a_mask_is_never_used() -> None:
    logits, mask = _logits(3, 5, 4), _mask(3, 5, 4)
    cotangent = torch.randn(3, 5, 4)
    clean = _run(Problem(logits, 6, mask=mask), cotangent)
    hidden = _run(Problem(logits.masked_fill(~mask, torch.nan), 6, mask=mask), cotangent.masked_fill(~mask, torch.nan))
    for name in Result.__dataclass_fields__:
        assert torch.equal(getattr(hidden, name), getattr(clean, name)), name
    assert (hidden.logits[~mask] == 0).all()


def test_strides_are_followed() -> None:
    logits, cotangent = _logits(3, 6, 5), torch.randn(3, 6, 5)
    mask, f0, row, col = _mask(3, 6, 5), torch.randn(3, 6), _weights(3, 6, 2.0), _weights(3, 5, 2.0)
    problem = Problem(logits, 5, f0=f0, row_marginal=row, col_marginal=col, mask=mask)
    expected = _run(problem, cotangent)

    def spread(x: Tensor) -> Tensor:
        """The same values with every axis strided and reversed in memory order."""
        axes = tuple(reversed(range(x.ndim)))
        wide = torch.zeros([2 * size for size in reversed(x.shape)], dtype=x.dtype).permute(axes)
        view = wide[tuple(slice(None, None, 2) for _ in axes)]
        return view.copy_(x)

    operands = {"logits": logits, "f0": f0, "row_marginal": row, "col_marginal": col, "mask": mask}
    strided = replace(problem, **{name: spread(x) for name, x in operands.items()})
    outputs = Outputs(spread(torch.full_like(logits, torch.nan)))
    gradients = Gradients(spread(torch.full_like(logits, torch.nan)))
    tile.sinkhorn_forward(strided, outputs)
    tile.sinkhorn_backward(strided, spread(cotangent), gradients, None)
    assert torch.equal(outputs.plan, expected.plan)
    assert torch.equal(gradients.logits, expected.logits)


def test_expanded_vectors() -> None:
    col, temperature = torch.tensor([[0.5, 1.0, 1.5]]).expand(3, 3), torch.tensor([0.7]).expand(3)
    _check(Problem(_logits(3, 4, 3), 6, col_marginal=col, temperature=temperature))


@pytest.mark.parametrize("n_iters", [3, 25])
def test_a_program_walks_over_many_blocks(n_iters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "_PROGRAMS_PER_SM", 2)
    _check(Problem(_logits(9, 10, 9, [0.5, 1.0, 3.0] * 3), n_iters, tol=0.05))


def test_long_histories_run_in_fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "HISTORY_BYTES", 1)
    _check(Problem(_logits(5, 9, 9), 4))


@pytest.mark.parametrize(
    ("n", "m", "options"), [(4, 4, {}), (7, 5, {"unit_rows": False}), (9, 9, {"row_marginal": _weights(2, 9, 3.0)})]
)
def test_sigma2(n: int, m: int, options: dict[str, Any]) -> None:
    problem = Problem(_logits(2, n, m, [0.5, 3.0]), 9, **options)
    outputs = replace(_outputs(problem), sigma2=_poisoned(2, dtype=torch.float32))
    tile.sinkhorn_forward(problem, outputs)
    row, col = _marginals(problem, torch.float64)
    truth = reference.sigma2(outputs.plan.double(), row_marginal=row, col_marginal=col)
    assert torch.allclose(outputs.sigma2.double(), truth, rtol=2e-4, atol=1e-6)


def test_empty_batch() -> None:
    problem = Problem(torch.empty(0, 4, 4), 3)
    tile.sinkhorn_forward(problem, Outputs(torch.empty(0, 4, 4)))
    tile.sinkhorn_backward(problem, torch.empty(0, 4, 4), Gradients(torch.empty(0, 4, 4)), None)


def test_what_is_supported() -> None:
    assert tile.supports_forward(Problem(torch.empty(1, 3, 128), 1), False)
    assert not tile.supports_forward(Problem(torch.empty(1, 3, 128), 1), True)
    assert not tile.supports_forward(Problem(torch.empty(1, 129, 1), 1), False)
    assert tile.supports_backward(Problem(torch.empty(1, 64, 3), 1))
    assert not tile.supports_backward(Problem(torch.empty(1, 65, 1), 1))
    assert not tile.supports_forward(Problem(torch.empty(1, 4, 4, dtype=torch.float64), 1), False)
