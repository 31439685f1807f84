"""The search for a temperature in one launch, interpreted: the same roots as the PyTorch path's search in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastdsm
from benchmarks.converged import converged_sigma2
from fastdsm._ops import temperature_search

NEAR = 1e-4  # relative: both searches end 3e-6 apart in sigma2 at most, whose slope over log temperature is 0.03 and more here


@pytest.fixture(autouse=True)
def _one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the float64 comparison may take plan after plan."""
    plans = temperature_search.converged_plans

    def guarded(matrices: temperature_search.Matrices, *rest: Tensor) -> temperature_search.Converged:
        assert matrices.backend == "torch"
        return plans(matrices, *rest)

    monkeypatch.setattr(temperature_search, "converged_plans", guarded)


def both(logits: Tensor, target: Tensor | float, **options: Tensor) -> tuple[Tensor, Tensor]:
    """The temperatures of the launch, where reached, after they were found to be those of the search plan by plan."""
    found, reached = fastdsm.temperature_for_sigma2(logits, target, backend="triton", **options)
    known, there = fastdsm.temperature_for_sigma2(logits, target, backend="torch", **options)
    assert reached.tolist() == there.tolist()
    assert torch.equal(found.isnan(), ~reached)
    torch.testing.assert_close(found, known, rtol=NEAR, atol=0, equal_nan=True)
    return found, reached


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((8, 4, 4), 1e-3), ((8, 4, 4), 30.0), ((4, 2, 2), 1.0), ((3, 3, 7), 1.0), ((2, 9, 5), 1.0), ((1, 20, 20), 1.0)],
)
def test_roots_are_those_of_the_search_plan_by_plan(shape: tuple[int, ...], scale: float) -> None:
    logits = scale * torch.randn(shape) + 10 * torch.randn(shape[0], shape[1], 1)
    target = torch.rand(shape[:1]) * 0.55 + 0.05
    found, reached = both(logits, target)
    assert reached.all()
    sigma2 = converged_sigma2(logits.double(), found.double())
    torch.testing.assert_close(sigma2, target.double(), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits(dtype: torch.dtype) -> None:
    _, reached = both((3 * torch.randn(6, 5, 5)).to(dtype), 0.5)
    assert reached.all()


def test_what_cannot_be_reached_touches_no_neighbour() -> None:
    normal = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    broken, infinite = normal.clone(), normal.clone()
    broken[0, 0], infinite[1, 2] = torch.nan, torch.inf
    tied = torch.eye(3).roll(1, 0) + torch.eye(3)
    logits = torch.stack([normal, torch.full((3, 3), 3.0), tied, broken, infinite, normal])
    found, reached = fastdsm.temperature_for_sigma2(logits, 0.9, n_iters=20, backend="triton")
    assert reached.tolist() == [True, False, False, False, False, True]
    assert torch.equal(found.isnan(), ~reached)
    assert found[0] == found[-1]
    assert found[0] == fastdsm.temperature_for_sigma2(normal, 0.9, n_iters=20, backend="triton")[0]


def test_plans_that_too_few_steps_leave_unconverged_reach_nothing() -> None:
    """At sigma2 = 0.98 one step, of sweeps alone, is far from enough, wherever sigma2 of what they leave has the target."""
    logits = 3 * torch.randn(4, 3, 3)
    found, reached = fastdsm.temperature_for_sigma2(logits, 0.98, n_iters=1, backend="triton")
    assert not reached.any()
    assert found.isnan().all()
    assert fastdsm.temperature_for_sigma2(logits, 0.98, backend="torch")[1].all()


def test_a_curve_that_turns() -> None:
    """Under this mask sigma2 falls from 0.63 to 0.58 before it rises to 1: the largest root is where it falls."""
    logits = torch.tensor([[[9, 10, 13, -2], [-4, 43, 14, 2], [-7, -13, -2, 5], [1, -14, 13, 5]]]) / 10
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, :2], mask[1, 0] = False, False
    found, reached = both(logits, 0.61, mask=mask)
    assert reached.all()
    temperatures = torch.tensor([16.0, 8.0, 3.7, 2.0])
    plans = fastdsm.sinkhorn(logits.expand(4, 4, 4), temperature=temperatures, mask=mask, solver="newton")
    highest, high, lowest, low = fastdsm.sigma2(plans, tol=1e-7).tolist()
    assert highest > 0.61 > high > lowest
    assert low > 0.61
    assert 8.0 < found.item() < 16.0


def test_masks_and_marginals() -> None:
    logits = torch.randn(3, 3, 4)
    mask = torch.rand(3, 3, 4) > 0.15
    mask[:, :, 0] = True
    mask[:, 0] |= torch.arange(4) < 3
    mask[:, :, 3] = False  # a column that takes no part
    assert both(logits, 0.5, mask=mask)[1].any()
    row, col = torch.rand(3, 3) + 0.3, torch.rand(3, 4) + 0.3
    col = col * row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True)
    assert both(logits, 0.5, row_marginal=row, col_marginal=col)[1].any()


def test_strides_and_an_empty_batch() -> None:
    logits = torch.randn(4, 3, 5)
    both(logits.permute(1, 2, 0), 0.4)
    assert fastdsm.temperature_for_sigma2(torch.randn(0, 4, 4), 0.5, backend="triton")[0].shape == (0,)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_without_a_gradient_as_with_one(dtype: torch.dtype, calls: int) -> None:
    """Launches prepared once serve other logits of their form, which may have -inf in places."""
    for call in range(calls):
        logits = torch.randn(2, 3, 3).to(dtype)
        if call == 1:
            logits[1, 0, 1] = -torch.inf
        known, there = fastdsm.temperature_for_sigma2(logits.clone().requires_grad_(), 0.4, n_iters=20, backend="triton")
        found, reached = fastdsm.temperature_for_sigma2(logits, 0.4, n_iters=20, backend="triton")
        assert reached.dtype == torch.bool
        assert reached[0]
        assert torch.equal(reached, there)
        torch.testing.assert_close(found, known.detach(), rtol=NEAR, atol=0, equal_nan=True)


def test_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the derivative is that of plans in float64, two of them
    logits, target = torch.randn(4, 4, 4), torch.full((4,), 0.5)
    gradients = []
    for backend in ("triton", "torch"):
        inputs = logits.clone().requires_grad_(), target.clone().requires_grad_()
        temperature, _ = fastdsm.temperature_for_sigma2(*inputs, backend=backend)
        gradients.append(torch.autograd.grad(temperature.sum(), inputs))
    for found, known in zip(*gradients, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-5)


def test_float64_is_searched_plan_by_plan() -> None:
    logits = torch.randn(2, 4, 4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        fastdsm.temperature_for_sigma2(logits, 0.5, backend="triton")
