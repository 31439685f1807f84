"""The ways with few calls for few matrices: values and gradients under the policy, on both sides of every threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastdsm
from fastdsm import reference
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm.pytorch import Tape, few, projection, scalings, sinkhorn_backward, sinkhorn_forward, softmaxes

from ..tolerances import assert_within

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = ((1, 1), (3, 3), (4, 4), (16, 16), (64, 64), (3, 5), (7, 12))


def both(call: Callable[..., Any], logits: Tensor, cotangent: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Plan and gradient."""
    leaf = logits.detach().requires_grad_()
    plan = call(leaf, **options)
    (slope,) = torch.autograd.grad(plan, leaf, cotangent)
    return plan.detach(), slope


def check(logits: Tensor, cotangent: Tensor, **options: Any) -> None:
    """Plan and gradient of the public call within budget of the oracle's."""
    judge(both(fastdsm.sinkhorn, logits, cotangent, **options), logits, cotangent, **options)


def judge(found: tuple[Tensor, Tensor], logits: Tensor, cotangent: Tensor, **options: Any) -> None:
    """A plan and a gradient within budget of the oracle's."""
    truth, plain = (
        both(reference.sinkhorn, logits.to(dtype), cotangent.to(dtype), **options) for dtype in (torch.float64, torch.float32)
    )
    assert_within(found[0], truth[0], plain[0])
    assert_within(found[1], truth[1], plain[1], cotangent=cotangent)


FORWARD, BACKWARD, TAPED = (few._PRODUCTS_FORWARD,), (few._PRODUCTS_BACKWARD,), (few._PRODUCTS_TAPED, few._MOST_TAPED)


def ways(batch: int, n: int, m: int, kind: tuple[int, ...]) -> list[str]:
    """The modules that serve a batch, the first choice first."""
    return [way.__name__.rpartition(".")[2] for way in few._ways(Problem(torch.zeros(batch, n, m), 20), *kind)]


@pytest.mark.parametrize("std", [1.0, 5.0, 30.0, 200.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("first", ["col", "row"])
def test_values_and_gradients(first: str, size: tuple[int, int], std: float) -> None:
    for batch in (1, 2, 5, 40) if size[0] < 64 else (1, 2):
        check(torch.randn(batch, *size) * std, torch.randn(batch, *size), first=first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (24, 40)], ids=str)
@pytest.mark.parametrize("n_iters", [1, 2, 20, 100])
def test_dtypes_and_numbers_of_sweeps(n_iters: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    for batch in (1, 6):
        logits = torch.randn(batch, *size).to(dtype)
        check(logits, torch.randn_like(logits), n_iters=n_iters, temperature=0.6)


@pytest.mark.parametrize("std", [1.0, 3.5, 20.0])
@pytest.mark.parametrize(("batch", "n", "m"), [(1, 4, 6), (3, 16, 16), (40, 16, 16), (3, 40, 24), (5, 24, 24)])
def test_any_strides(batch: int, n: int, m: int, std: float) -> None:
    block = torch.randn(2 * batch, m, 3 * n) * std
    for logits in (block[::2, :, ::3].mT, block[:batch, :, :n].mT.contiguous(), block[:1, :, :n].mT.expand(batch, n, m)):
        for cotangent in (torch.randn(m, batch, n).permute(1, 2, 0), torch.randn(()).expand(batch, n, m)):
            for first in ("col", "row"):
                check(logits, cotangent, first=first)


@pytest.mark.parametrize(("batch", "n", "m"), [(1, 4, 4), (3, 4, 4), (2, 16, 16), (1, 24, 40), (3, 40, 24)])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0)], ids=str)
def test_results_are_filled_as_they_lie(order: tuple[int, int, int], batch: int, n: int, m: int) -> None:
    """Logits row by row and column by column, results in any order of dimensions."""
    logits, cotangent = torch.randn(batch, n, m), torch.randn(batch, n, m)
    shape = [(batch, n, m)[k] for k in order]
    back = [order.index(k) for k in range(3)]
    for lying in (logits, logits.mT.contiguous().mT):
        plan, slope = (torch.full(shape, torch.nan).permute(back) for _ in range(2))
        sinkhorn_forward(Problem(lying, 20), Outputs(plan))
        sinkhorn_backward(Problem(lying, 20), cotangent, Gradients(slope), None)
        judge((plan, slope), logits, cotangent)


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_who_serves_on_both_sides_of_the_thresholds(kind: tuple[int, ...]) -> None:
    (products,) = kind
    assert ways(2048, 4, 4, kind) == ["softmaxes"]
    assert ways(2049, 4, 4, kind) == []
    assert ways(64, 16, 16, kind) == ["softmaxes"]
    assert ways(65, 16, 16, kind) == []
    assert ways(1, 17, (products - 1) // 17, kind) == ["softmaxes"]
    assert ways(1, 17, products // 17 + 1, kind) == ["scalings", "softmaxes"]
    assert ways(17, 64, 64, kind) == ["scalings"]


def test_who_records_on_both_sides_of_the_thresholds() -> None:
    assert ways(4096, 4, 4, TAPED) == ["softmaxes"]
    assert ways(4097, 4, 4, TAPED) == []
    assert ways(2, 64, 64, TAPED) == ["softmaxes"]
    assert ways(1, 17, 482, TAPED) == ["scalings", "softmaxes"]
    assert ways(17, 64, 64, TAPED) == ["scalings"]


@pytest.mark.parametrize(
    ("batch", "n", "m"),
    [(2048, 4, 4), (4096, 4, 4), (64, 16, 16), (256, 16, 16), (1, 32, 63), (1, 64, 64), (2, 64, 64), (16, 64, 64)],
)
@pytest.mark.parametrize("std", [1.0, 3.5])
def test_both_sides_of_a_threshold_are_right(std: float, batch: int, n: int, m: int) -> None:
    for count in (batch, batch + 1):
        check(torch.randn(count, n, m) * std, torch.randn(count, n, m))


@pytest.mark.parametrize(
    ("n_iters", "given"),
    [
        (20, {"mask": torch.ones(2, 4, 4, dtype=torch.bool)}),
        (20, {"row_marginal": torch.ones(2, 4)}),
        (20, {"col_marginal": torch.ones(2, 4)}),
        (20, {"temperature": torch.ones(2)}),
        (20, {"tol": 0.0}),
        (20, {"f0": torch.zeros(2, 4)}),
        (0, {}),
        (129, {}),
    ],
)
def test_what_is_not_plain_is_left_to_the_general_path(n_iters: int, given: dict[str, Any]) -> None:
    asked: list[None] = []
    few.forward(Problem(torch.zeros(2, 4, 4), n_iters, **given), torch.empty(2, 4, 4), lambda: asked.append(None))
    assert asked == [None]
    few.forward(Problem(torch.zeros(2, 4, 4), 20), torch.empty(2, 4, 4), lambda: asked.append(None))
    assert asked == [None]


@pytest.mark.parametrize(("batch", "n"), [(1, 4), (7, 4), (7, 16), (40, 16), (3, 24), (9, 64)])
@pytest.mark.parametrize("kind", ["nan", "inf", "excluded entry", "excluded line", "1e4", "std 200"])
def test_what_a_matrix_is_touches_no_neighbour(kind: str, batch: int, n: int) -> None:
    """Every matrix is right, and the others keep every bit."""
    logits, cotangent = torch.randn(batch, n, n), torch.randn(batch, n, n)
    clean = both(fastdsm.sinkhorn, logits, cotangent)
    odd, which = logits.clone(), batch // 2
    if kind in ("nan", "inf"):
        odd[which, 1, 2] = float(kind)
    elif kind == "excluded entry":
        odd[which, 1, 2] = -torch.inf
    elif kind == "excluded line":
        odd[which, 1] = -torch.inf
    elif kind == "1e4":
        odd[which] += 1e4 * torch.randn(n)
    else:
        odd[which] *= 200.0
    found = both(fastdsm.sinkhorn, odd, cotangent)
    others = torch.arange(batch) != which
    for ours, before in zip(found, clean, strict=True):
        assert torch.equal(ours[others], before[others])
    if kind in ("nan", "inf"):
        assert bool(found[0][which].isnan().all())
    else:
        judge(found, odd, cotangent)


def test_matrices_at_different_offsets_are_in_range() -> None:
    logits, plan = torch.randn(3, 4, 4) + torch.tensor([0.0, 1e4, -1e6])[:, None, None], torch.empty(3, 4, 4)
    few.forward(Problem(logits, 20), plan, lambda: pytest.fail("nothing was left"))
    truth, plain = (reference.sinkhorn(logits.to(dtype)) for dtype in (torch.float64, torch.float32))
    assert isinstance(truth, Tensor)
    assert isinstance(plain, Tensor)
    assert_within(plan, truth, plain)


@pytest.mark.parametrize("n", [4, 16, 64])
def test_three_ways_in_one_batch(n: int) -> None:
    """Tame, within the range of softmaxes, and beyond, each as in a batch of its like."""
    logits, cotangent = torch.randn(3, n, n), torch.randn(3, n, n)
    mixed = logits * torch.tensor([1.0, 3.5, 300.0])[:, None, None]
    found = both(fastdsm.sinkhorn, mixed, cotangent)
    for k, scale in enumerate((1.0, 3.5, 300.0)):
        alike = both(fastdsm.sinkhorn, logits * scale, cotangent)
        assert all(torch.equal(x[k], y[k]) for x, y in zip(found, alike, strict=True))
    check(mixed, cotangent)


def test_products_leave_wild_matrices_beside_tame_ones() -> None:
    """Columns that one row alone would fill: in the one K of products float32 has nothing else for them."""
    logits = torch.randn(3, 64, 64)
    logits[1, 1:, :60] -= 100.0
    check(logits, torch.randn(3, 64, 64))


@pytest.mark.parametrize("gap", [25.0, 45.0, 100.0])
@pytest.mark.parametrize("n", [4, 8, 16])
def test_next_to_no_support(n: int, gap: float) -> None:
    """Columns that one row alone fills, until sweeps have raised the others by as many nats."""
    logits = torch.randn(20, n, n)
    logits[:, 1:, : max(n // 4, 2)] -= gap
    check(logits, torch.randn(20, n, n), n_iters=128)


@pytest.mark.parametrize(("batch", "n"), [(1, 4), (5, 16), (3, 64)])
def test_a_second_call_gives_the_same(batch: int, n: int) -> None:
    logits, cotangent = torch.randn(batch, n, n), torch.randn(batch, n, n)
    kept = logits.clone()
    found, again = (both(fastdsm.sinkhorn, logits, cotangent) for _ in range(2))
    assert torch.equal(logits, kept)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize(("batch", "n"), [(1, 4), (5, 16), (3, 64)])
def test_what_else_is_asked_changes_the_plan_by_rounding_alone(batch: int, n: int) -> None:
    logits = torch.randn(batch, n, n)
    truth, plain = (reference.sinkhorn(logits.to(dtype)) for dtype in (torch.float64, torch.float32))
    assert isinstance(truth, Tensor)
    assert isinstance(plain, Tensor)
    for plan in (
        fastdsm.sinkhorn(logits),
        fastdsm.sinkhorn(logits, return_info=True)[0],
        fastdsm.sinkhorn_sigma2(logits).plan,
    ):
        assert_within(plan, truth, plain)


@pytest.mark.parametrize("way", [softmaxes, scalings])
def test_a_way_gives_what_the_general_path_gives(way: Any) -> None:
    logits, cotangent = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    ours, finished, slope, plan, d_logits = (torch.empty_like(logits) for _ in range(5))
    way.forward(logits, 20, 0.7, 1.5, torch.float64, ours)
    recorded = way.record(logits, 20, 0.7, 1.5, torch.float64)
    way.finish(recorded, 1.5, torch.float64, finished)
    assert torch.equal(finished, ours)
    kept = [x.clone() for x in recorded.tensors]
    for _ in range(2):
        way.adjoint(recorded, 0.7, 1.5, torch.float64, cotangent, slope)
    assert all(torch.equal(x, y) for x, y in zip(recorded.tensors, kept, strict=True))
    problem = Problem(logits, 20, 0.7, unit_rows=False, row_marginal=torch.full((6, 7), 1.5, dtype=torch.float64))
    projection._forward_by_parts(problem, Outputs(plan))
    projection._backward_by_parts(problem, cotangent, Gradients(d_logits), None)
    torch.testing.assert_close(ours, plan)
    torch.testing.assert_close(slope, d_logits)


TAPES = [(1, 4, 4), (7, 4, 4), (9, 16, 16), (2, 64, 64), (4, 64, 64), (3, 40, 24)]


def gradient(x: Tensor, cotangent: Tensor, **options: Any) -> Tensor:
    """Of the public call."""
    return both(fastdsm.sinkhorn, x, cotangent, **options)[1]


def recorded_ways(x: Tensor) -> list[str]:
    """What a forward of x with a gradient to come leaves on its tape."""
    tape = Tape()
    sinkhorn_forward(Problem(x, 20), Outputs(torch.empty_like(x)), tape)
    return [part.way.__name__.rpartition(".")[2] for part in tape]


def test_a_backward_starts_from_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not make the sweeps again."""
    leaf, cotangent = torch.randn(3, 4, 4).requires_grad_(), torch.randn(3, 4, 4)
    plan = fastdsm.sinkhorn(leaf)
    assert isinstance(plan, Tensor)
    expected = gradient(leaf, cotangent)
    monkeypatch.setattr(softmaxes, "record", lambda *_: pytest.fail("the sweeps were made again"))
    assert torch.equal(torch.autograd.grad(plan, leaf, cotangent)[0], expected)


def test_each_matrix_is_on_the_tape_of_its_way() -> None:
    x = torch.randn(4, 64, 64)
    assert recorded_ways(x) == ["scalings"]
    assert recorded_ways(3.5 * x) == ["softmaxes"]
    assert recorded_ways(300.0 * x) == []
    assert recorded_ways(x * torch.tensor([1.0, 3.5, 300.0, 1.0])[:, None, None]) == ["scalings", "softmaxes"]
    assert recorded_ways(torch.full((2, 4, 4), torch.nan)) == []


@pytest.mark.parametrize("shape", TAPES, ids=str)
@pytest.mark.parametrize("first", ["col", "row"])
def test_a_second_backward_of_one_graph(first: str, shape: tuple[int, int, int]) -> None:
    leaf, cotangent = torch.randn(shape).requires_grad_(), torch.randn(shape)
    plan = fastdsm.sinkhorn(leaf, first=first)
    assert isinstance(plan, Tensor)
    slopes = [torch.autograd.grad(plan, leaf, c, retain_graph=True)[0] for c in (cotangent, 2.0 * cotangent, cotangent)]
    assert torch.equal(slopes[0], slopes[2])
    torch.testing.assert_close(slopes[1], 2.0 * slopes[0])


@pytest.mark.parametrize("shape", TAPES, ids=str)
def test_what_changes_between_forward_and_backward(shape: tuple[int, int, int]) -> None:
    """The plan, the number of threads, the strides of what autograd gives back; the logits may not."""
    logits, cotangent = torch.randn(shape[0], shape[2], shape[1]).mT, torch.randn(shape)
    expected = gradient(logits, cotangent)
    leaf = logits.clone().requires_grad_()
    assert leaf.stride() == logits.stride()
    threads = torch.get_num_threads()

    def elsewhere(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype).copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda x: x):
        plan = fastdsm.sinkhorn(leaf)
    assert isinstance(plan, Tensor)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        (slope,) = torch.autograd.grad(plan, leaf, cotangent)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
    plan = fastdsm.sinkhorn(leaf)
    assert isinstance(plan, Tensor)
    plan.mul_(2.0)
    torch.testing.assert_close(torch.autograd.grad(plan, leaf, cotangent)[0], 2.0 * expected, rtol=1e-4, atol=1e-6)
    plan = fastdsm.sinkhorn(leaf)
    with torch.no_grad():
        leaf += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(plan, leaf, cotangent)


@pytest.mark.parametrize("shape", TAPES, ids=str)
def test_other_derivatives_of_a_plan_with_a_tape(shape: tuple[int, int, int]) -> None:
    """Cotangents in a batch, checkpoints, and a derivative of the gradient."""
    logits, cotangents = torch.randn(shape), torch.randn(2, *shape)
    expected = torch.stack([gradient(logits, c) for c in cotangents])
    leaf = logits.clone().requires_grad_()
    (batched,) = torch.autograd.grad(fastdsm.sinkhorn(leaf), leaf, cotangents, is_grads_batched=True)
    torch.testing.assert_close(batched, expected, rtol=1e-4, atol=1e-6)
    for reentrant in (True, False):
        plan = checkpoint(fastdsm.sinkhorn, leaf, use_reentrant=reentrant)
        plan.backward(cotangents[0])
        torch.testing.assert_close(leaf.grad, expected[0], rtol=1e-4, atol=1e-6)
        leaf.grad = None
    slopes = []
    for function in (fastdsm.sinkhorn, reference.sinkhorn):
        wide = logits[:2].double().requires_grad_()
        (first,) = torch.autograd.grad(function(wide), wide, cotangents[0, :2].double(), create_graph=True)
        slopes += torch.autograd.grad((first**2).sum(), wide)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("two_threads")
def test_with_two_threads() -> None:
    for shape in ((1, 4, 4), (6, 4, 4), (1, 16, 16), (2, 64, 64)):
        for first in ("col", "row"):
            check(torch.randn(shape), torch.randn(shape), first=first)
