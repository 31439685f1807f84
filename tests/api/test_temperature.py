"""temperature_for_sigma2 against Newton's method in float64, and its gradient against autograd through thousands of sweeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastdsm
from benchmarks.converged import converged_sigma2, sigma2_curve
from fastdsm import reference


def uniform(shape: tuple[int, ...], low: float = 0.05, high: float = 0.95) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * (high - low) + low


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(200, 2, 2), (200, 4, 4), (40, 3, 7), (40, 9, 5), (20, 16, 16), (4, 40, 40)])
def test_hits_the_target(shape: tuple[int, ...], scale: float) -> None:
    logits = torch.randn(shape, dtype=torch.float64) * scale + 1e2 * torch.randn(shape[0], shape[1], 1, dtype=torch.float64)
    # Plans of 3 x 7 or 9 x 5 have to split mass, so that no temperature brings every one of them near 1.
    target = uniform(shape[:1], high=0.95 if shape[1] == shape[2] else 0.6)
    temperature, reached = fastdsm.temperature_for_sigma2(logits, target)
    assert reached.all()
    torch.testing.assert_close(converged_sigma2(logits, temperature), target, atol=1e-5, rtol=0.0)


def test_what_sinkhorn_makes_of_it() -> None:
    logits = torch.randn(2, 3, 6, 6)
    temperature, reached = fastdsm.temperature_for_sigma2(logits, 0.7)
    assert temperature.dtype == torch.float32
    assert temperature.shape == reached.shape == (2, 3)
    found = fastdsm.sinkhorn_sigma2(logits, temperature=temperature, n_iters=60)
    torch.testing.assert_close(found.sigma2, torch.full((2, 3), 0.7), atol=2e-4, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_searched_in_float64(dtype: torch.dtype) -> None:
    logits = (100 * torch.randn(50, 5, 5)).to(dtype)
    wide, _ = fastdsm.temperature_for_sigma2(logits.double(), 0.4)
    narrow, _ = fastdsm.temperature_for_sigma2(logits, torch.tensor(0.4, dtype=torch.float64))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0.0)


def test_the_largest_root_of_a_curve_that_turns() -> None:
    logits = torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(4)).double()[112:113]
    grid = torch.logspace(1, -2.5, 400, dtype=torch.float64)[:, None]
    curve = sigma2_curve(logits, grid)[:, 0]
    target = 0.735
    crossings = (curve >= target).int().diff().abs().sum()
    assert crossings >= 2  # the premise: it rises above, and falls below again
    temperature, reached = fastdsm.temperature_for_sigma2(logits, target)
    first = int((curve >= target).int().argmax())
    assert reached.item()
    assert grid[first].item() <= temperature.item() <= grid[first - 1].item()


def test_unreachable_targets_are_flagged_and_touch_no_neighbour() -> None:
    normal = torch.randn(5, 5)
    rank_one = torch.arange(5.0)[:, None] - torch.arange(5.0).square()
    tied = torch.eye(5).roll(1, 0) + torch.eye(5)  # the assignments' plans tend to (I + shift) / 2: sigma2 = cos(pi / 5)
    broken, infinite = normal.clone(), normal.clone()
    broken[0, 0], infinite[1, 2] = math.nan, math.inf
    logits = torch.stack([normal, torch.full((5, 5), 3.0), rank_one, tied, broken, infinite, normal])
    temperature, reached = fastdsm.temperature_for_sigma2(logits, 0.9)
    assert reached.tolist() == [True, False, False, False, False, False, True]
    assert torch.equal(temperature.isnan(), ~reached)
    alone, _ = fastdsm.temperature_for_sigma2(normal, 0.9)
    assert temperature[0] == temperature[6] == alone
    below = math.cos(math.pi / 5) - 0.01
    assert fastdsm.temperature_for_sigma2(tied, below)[1].item()
    for shape in ((1, 1), (1, 4), (4, 1)):
        assert not fastdsm.temperature_for_sigma2(torch.randn(3, *shape), 0.5)[1].any()


def test_plans_that_too_few_steps_leave_unconverged_reach_nothing() -> None:
    """One step is one sweep: sigma2 of what it leaves has the target somewhere, of plans far from converged."""
    logits = 3 * torch.randn(40, 4, 4, dtype=torch.float64)
    found, reached = fastdsm.temperature_for_sigma2(logits, 0.9, n_iters=1)
    assert not reached.any()
    assert found.isnan().all()
    assert fastdsm.temperature_for_sigma2(logits, 0.9)[1].all()


def test_empty_batches_and_strides() -> None:
    temperature, reached = fastdsm.temperature_for_sigma2(torch.randn(0, 4, 4), 0.5)
    assert temperature.shape == reached.shape == (0,)
    logits = torch.randn(4, 3, 5)
    found = fastdsm.temperature_for_sigma2(logits.permute(1, 2, 0), 0.5)[0]
    torch.testing.assert_close(found, fastdsm.temperature_for_sigma2(logits.permute(1, 2, 0).contiguous(), 0.5)[0])


def masked_problem(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    logits = torch.randn(12, 5, 6, dtype=torch.float64)
    if kind == "mask":
        mask = torch.rand(12, 5, 6) > 0.15
        mask[:, torch.arange(5), torch.arange(5)] = True
        mask[:, :, 5] = False  # a column that takes no part
        mask[:, 0] |= torch.arange(6) < 5
        mask[:, :, 0] = True
        return logits, {"mask": mask}
    row, col = torch.rand(12, 5, dtype=torch.float64) + 0.3, torch.rand(12, 6, dtype=torch.float64) + 0.3
    return logits, {"row_marginal": row, "col_marginal": col * row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True)}


@pytest.mark.parametrize("kind", ["mask", "marginals"])
def test_masks_and_marginals(kind: str) -> None:
    logits, options = masked_problem(kind)
    temperature, reached = fastdsm.temperature_for_sigma2(logits, 0.6, **options)
    assert reached.sum() >= 10
    chosen = {name: x[reached] for name, x in options.items()}
    plan = reference.sinkhorn(logits[reached], temperature=temperature[reached], n_iters=400, **chosen)
    assert (reference.sigma2(plan, **chosen) - 0.6).abs().max() < 1e-5


def test_totals_of_marginals_need_not_agree_to_the_last_bit() -> None:
    logits, options = masked_problem("marginals")
    known = fastdsm.temperature_for_sigma2(logits, 0.6, **options)
    assert known[1].sum() >= 10
    options["col_marginal"] *= 1 + 1e-6  # as far apart as float32 leaves them
    found = fastdsm.temperature_for_sigma2(logits, 0.6, **options)
    assert torch.equal(found[1], known[1])
    # Scaled back they are the same numbers to an ulp, and the search repeats its steps.
    torch.testing.assert_close(found[0], known[0], rtol=1e-12, atol=0, equal_nan=True)


def with_infinities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with -inf in places, a line and a matrix among them, and the mask of the rest."""
    mask = torch.ones_like(logits, dtype=torch.bool)
    mask[0, 0, 1], mask[1, 2], mask[2, :, 0], mask[3] = False, False, False, False
    return logits.masked_fill(~mask, -math.inf), mask


def test_minus_infinity_is_a_mask() -> None:
    logits = torch.randn(6, 4, 4, dtype=torch.float64)
    infinite, mask = with_infinities(logits)
    masked = fastdsm.temperature_for_sigma2(logits, 0.5, mask=mask)
    found = fastdsm.temperature_for_sigma2(infinite, 0.5)
    assert found[1][[0, 4, 5]].all()
    assert not found[1][3]
    for x, y in zip(found, masked, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "kind", ["float64", "float32", "bfloat16", "infinities", "poison", "mask", "marginals", "no matrix", "batches"]
)
def test_without_a_gradient_as_with_one(kind: str) -> None:
    """Past the operator and its tensor of targets it is the same search."""
    shape = {"no matrix": (0, 4, 4), "batches": (2, 3, 3, 4)}.get(kind, (6, 4, 4))
    logits = torch.randn(shape, dtype=getattr(torch, kind, torch.float32))
    options: dict[str, Tensor] = {}
    if kind in ("mask", "marginals"):
        logits, options = masked_problem(kind)
    elif kind == "infinities":
        logits, _ = with_infinities(logits)
    elif kind == "poison":
        logits[1, 0, 0], logits[3, 1, 2] = math.nan, math.inf
    known, there = fastdsm.temperature_for_sigma2(logits.clone().requires_grad_(), 0.6, **options)
    targets = (0.6, torch.full(shape[:-2] if not options else (12,), 0.6))
    for _ in range(2):  # the second time as decided the first time
        for target in targets:
            found, reached = fastdsm.temperature_for_sigma2(logits, target, **options)
            assert torch.equal(reached, there)
            torch.testing.assert_close(found, known.detach(), rtol=1e-5, atol=0, equal_nan=True)
    assert reached.any() or kind == "no matrix"


def test_what_is_looked_at_in_every_call() -> None:
    logits, row = torch.randn(2, 4, 4), torch.ones(4)
    target = torch.full((2,), 0.5)
    fastdsm.temperature_for_sigma2(logits, 0.5, row_marginal=row)
    fastdsm.temperature_for_sigma2(logits, target)
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\), between"):
        fastdsm.temperature_for_sigma2(logits, 1.5, row_marginal=row)
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\) everywhere"):
        fastdsm.temperature_for_sigma2(logits, target + 0.5)
    with pytest.raises(ValueError, match="row_marginal must be >= 0"):
        fastdsm.temperature_for_sigma2(logits, 0.5, row_marginal=-row)
    with pytest.raises(ValueError, match="row_marginal must not require grad"):
        fastdsm.temperature_for_sigma2(logits, 0.5, row_marginal=row.clone().requires_grad_())


def by_autograd(logits: Tensor, temperature: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
    """d tau / d logits and d tau / d target of sigma2(logits, tau) = target, from derivatives of a long unrolled loop."""
    L, tau = logits.clone().requires_grad_(), temperature.clone().requires_grad_()
    plan = reference.sinkhorn(L, temperature=tau, n_iters=300, **options)
    d_logits, d_tau = torch.autograd.grad(reference.sigma2(plan, **options).sum(), (L, tau))
    return -d_logits / d_tau[:, None, None], 1 / d_tau


@pytest.mark.parametrize("kind", ["square", "wide", "mask", "marginals"])
def test_gradient(kind: str) -> None:
    logits = torch.randn(12, *((4, 4) if kind == "square" else (4, 7)), dtype=torch.float64)
    options: dict[str, Tensor] = {}
    if kind in ("mask", "marginals"):
        logits, options = masked_problem(kind)
    target = uniform((12,), 0.45, 0.75)
    leaves = logits.clone().requires_grad_(), target.clone().requires_grad_()
    temperature, reached = fastdsm.temperature_for_sigma2(*leaves, **options)
    cotangent = torch.where(reached, torch.randn(12, dtype=torch.float64), 0.0)
    found = torch.autograd.grad(temperature, leaves, cotangent)
    assert reached.sum() >= 10
    chosen = {name: x[reached] for name, x in options.items()}
    truth = by_autograd(logits[reached], temperature[reached].detach(), **chosen)
    weight = cotangent[reached]
    torch.testing.assert_close(found[0][reached], truth[0] * weight[:, None, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][reached], truth[1] * weight, rtol=1e-4, atol=1e-5)
    assert (found[0][~reached] == 0).all()


def test_temperature_scales_with_the_logits() -> None:
    """Euler: tau is homogeneous of degree 1, so <d tau / d logits, logits> = tau."""
    logits = (50 * torch.randn(20, 12, 12)).requires_grad_()
    temperature, _ = fastdsm.temperature_for_sigma2(logits, 0.8)
    (d,) = torch.autograd.grad(temperature.sum(), logits)
    torch.testing.assert_close((d * logits).sum((-2, -1)), temperature, rtol=1e-4, atol=0.0)


def test_gradient_where_nothing_is_reached_is_zero() -> None:
    logits = torch.stack([torch.randn(4, 4), torch.ones(4, 4)]).requires_grad_()
    target = torch.full((2,), 0.5, requires_grad=True)
    temperature, reached = fastdsm.temperature_for_sigma2(logits, target)
    d_logits, d_target = torch.autograd.grad(torch.where(reached, temperature, 1.0).sum(), (logits, target))
    assert d_logits[0].abs().max() > 0
    assert (d_logits[1] == 0).all()
    assert d_target[1] == 0


def test_derivatives_in_either_mode_and_of_second_order() -> None:
    """Along a line in logits and target, against differences of roots that secants find with the oracle."""
    x, direction = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    target, change = torch.tensor([[0.5, 0.6], [0.3, -0.2]], dtype=torch.float64)

    def line(s: Any) -> Tensor:
        return fastdsm.temperature_for_sigma2(x + s * direction, target + s * change)[0]

    def root(s: float) -> Tensor:
        a = line(0.0)
        b = 1.001 * a
        for _ in range(8):
            at_a, at_b = (
                reference.sinkhorn_sigma2(x + s * direction, temperature=t, n_iters=300).sigma2 - target - s * change
                for t in (a, b)
            )
            a, b = b, torch.where(at_a == at_b, b, b - at_b * (b - a) / (at_b - at_a))
        return b

    h = 1e-3
    low, middle, high = map(root, (-h, 0.0, h))
    first, second = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
    at = torch.zeros((), dtype=torch.float64)
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    with forward_ad.dual_level():
        moved = forward_ad.make_dual(at, torch.ones_like(at))
        torch.testing.assert_close(forward_ad.unpack_dual(line(moved)).tangent, first, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(jacrev(line)(at), first, rtol=1e-5, atol=0.0)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            torch.testing.assert_close(outer(inner(line))(at), second, rtol=1e-4, atol=0.0)


def test_compiles_and_checks() -> None:
    logits = torch.randn(3, 4, 4, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        temperature, reached = fastdsm.temperature_for_sigma2(x, 0.6)
        return fastdsm.sinkhorn(x, temperature=torch.where(reached, temperature, 1.0)).square().sum()

    (eager,) = torch.autograd.grad(loss(logits), logits)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(logits), logits)
    torch.testing.assert_close(compiled, eager)
    inputs = (logits, torch.full((3,), 0.5), None, None, None, None, 200, "torch")
    torch.library.opcheck(torch.ops.fastdsm.temperature_for_sigma2.default, inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastdsm.temperature_for_sigma2(x, 1.0), ValueError, r"target must lie in \(0, 1\).*got 1.0"),
        (lambda x: fastdsm.temperature_for_sigma2(x, "0.5"), TypeError, "target must be a float or a tensor, got str"),
        (lambda x: fastdsm.temperature_for_sigma2(x, torch.tensor([0.5, 0.0])), ValueError, r"target must lie in \(0, 1\)"),
        (
            lambda x: fastdsm.temperature_for_sigma2(x, torch.full((3,), 0.5)),
            ValueError,
            r"broadcastable to \(2,\), got \(3,\)",
        ),
        (lambda x: fastdsm.temperature_for_sigma2(x, torch.tensor([1])), TypeError, "floating-point tensor, got torch.int64"),
        (lambda x: fastdsm.temperature_for_sigma2(x[0, 0], 0.5), ValueError, r"must have shape \(\.\.\., n, m\)"),
        (lambda x: fastdsm.temperature_for_sigma2(x, 0.5, n_iters=-1), ValueError, "n_iters must be >= 0"),
        (
            lambda x: fastdsm.temperature_for_sigma2(x, 0.5, row_marginal=torch.ones(4, requires_grad=True)),
            ValueError,
            "row_marginal must not require grad",
        ),
    ],
)
def test_bad_arguments(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 4, 4))  # type: ignore[operator]
