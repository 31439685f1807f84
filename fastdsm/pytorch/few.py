"""Few matrices on a CPU, where the number of calls decides: which of the ways with few calls serves which of them.

A way serves matrices whose logits lie within a range of its own; what is left goes the next, and last the general path. Which
way a matrix goes depends on it and on the batch's shape, never on its neighbours: where only some are in range, all go both
ways, and of each matrix that result is kept which is its own. NaN, infinite and excluded logits are in no range.

Where a gradient is to come, a forward leaves its sweeps on a tape: half sweeps as they are, up to ``_MOST_TAPED`` bytes, or
vectors alone. Another way may then be the fastest, and a plan differ in its last bits from the one without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops.problem import Problem
from . import scalings, softmaxes
from .tape import Part, Tape, Within

# softmaxes or scalings: reach, up to how many nats between a matrix' logits it serves, and its functions.
_Way = Any

_MOST_SWEEPS = softmaxes.MOST_SWEEPS
# What follows are entries of a batch, and beside it microseconds of 20 sweeps in float32, forward and backward, on one core.
# To 16 lines softmaxes are faster than products whatever the batch: (16, 16, 16) takes 110 and 210, by products 165 and 330.
_SMALL_SIDE = 16
# (2048, 4, 4) takes 620 and 1400, on the general path 910 and 1830; twice as many 1280 and 2920, there 920 and 2450.
_MOST_OF_8_LINES = 1 << 15
# (64, 16, 16) takes 270 and 520, on the general path 410 and 900; twice as many 500 and 1280, there 420 and 1270.
_MOST_OF_16_LINES = 1 << 14
# (1, 32, 32) takes 46, by products 59; (2, 32, 32) 65 either way; (1, 64, 64) 86, by products 67.
_PRODUCTS_FORWARD = 2048
# (1, 64, 64) takes 165, by products 200; (2, 64, 64) 280, by products 230.
_PRODUCTS_BACKWARD = 4097
# Wild (16, 64, 64) takes 930 and 1940, on the general path 1230 and 2530; twice as many 2340 and 6460, there 2060 and 4070.
_MOST_BY_SOFTMAXES = 1 << 16
# What a tape of all half sweeps may take, in bytes, then microseconds of forward and backward together, beside those of the
# general path: (256, 16, 16) takes just that and 2850, there 2940; twice as many 6970 and 4280.
_MOST_TAPED = 10 << 20
# (2, 64, 64) takes 510, by products 630; (4, 48, 48) 435 and 420; (16, 32, 32) 735 and 495; (8, 64, 64) 1220 and 610.
_PRODUCTS_TAPED = 8193
# From so many entries two passes are faster than torch.aminmax: (4096, 64) 26 and 41, (64, 64) 2.8 and 1.6.
_MANY = 1 << 15
# (64, 64, 64) takes 1110 and 2780, on the general path 1570 and 3590, whose pieces bound the memory beyond.
_MOST_BY_PRODUCTS = 1 << 18


def forward(problem: Problem, plan: Tensor, general: Callable[[], None], tape: Tape | None = None) -> None:
    """Fill ``plan``, by ``general`` what no way here serves; leave on ``tape`` what :func:`backward` can start from."""
    if not _serves(problem):
        return general()
    inputs = _inputs(problem)

    def within(way: _Way) -> Within:
        return _within(problem.logits, _reach(way, problem) * inputs[2])

    def fill(way: _Way, within: Within, target: Tensor) -> None:
        if tape is None:
            return way.forward(*inputs, target)
        recorded = way.record(*inputs)
        way.finish(recorded, *inputs[3:], target)
        tape.insert(0, Part(way, within, recorded))  # a way fills what is left of those before it, after those behind it

    limits = (_PRODUCTS_FORWARD,) if tape is None else (_PRODUCTS_TAPED, _MOST_TAPED)
    _serve(_ways(problem, *limits), within, fill, plan, general)


def backward(
    problem: Problem, grad_plan: Tensor, d_logits: Tensor, general: Callable[[], None], tape: Tape | None = None
) -> None:
    """Fill ``d_logits``, likewise; without a tape the sweeps are made again."""
    if not _serves(problem):
        return general()
    inputs, parts = _inputs(problem), {part.way: part for part in tape or ()}

    def within(way: _Way) -> Within:
        if parts:
            return parts[way].within
        return _within(problem.logits, _reach(way, problem) * inputs[2])

    def fill(way: _Way, within: Within, target: Tensor) -> None:
        recorded = parts[way].recorded if parts else way.record(*inputs)
        way.adjoint(recorded, *inputs[2:], grad_plan, target)

    _serve(list(parts) or _ways(problem, _PRODUCTS_BACKWARD), within, fill, d_logits, general)


def _serves(problem: Problem) -> bool:
    """Whether there is a way with these options."""
    return (
        0 < problem.logits.numel() <= _MOST_BY_PRODUCTS
        and 1 <= problem.n_iters <= _MOST_SWEEPS
        and problem.logits.is_cpu
        and problem.tol < 0.0
        and isinstance(problem.temperature, float)
        and problem.mask is problem.f0 is problem.row_marginal is problem.col_marginal is None
    )


def _ways(problem: Problem, products: int, most_bytes: int | None = None) -> list[_Way]:
    """The ways for a batch of this shape, the fastest first: by products from so many entries.

    most_bytes: of a tape of softmaxes, where one is made.
    """
    _, n, m = problem.logits.shape
    entries, side = problem.logits.numel(), n if n > m else m
    if most_bytes is None:
        most = _MOST_OF_8_LINES if side <= 8 else _MOST_OF_16_LINES if side <= _SMALL_SIDE else _MOST_BY_SOFTMAXES
    else:
        most = most_bytes // (2 * problem.n_iters * problem.compute_dtype.itemsize)
    ways: list[_Way] = [softmaxes] if entries <= most else []
    if side > _SMALL_SIDE and entries >= products:
        ways.insert(0, scalings)
    return ways


def _reach(way: _Way, problem: Problem) -> float:
    """Within how many nats a way serves matrices."""
    nats: float = way.reach(problem.n_iters, *problem.logits.shape[1:], problem.compute_dtype)
    return nats


def _inputs(problem: Problem) -> tuple[Any, ...]:
    """What a way records from; sum of a row and dtype of the arithmetic, the last two, it finishes with."""
    _, n, m = problem.logits.shape
    row = 1.0 if problem.unit_rows else m / n
    return problem.logits, problem.n_iters, problem.temperature, row, problem.compute_dtype


def _serve(
    ways: list[_Way],
    within: Callable[[_Way], Within],
    fill: Callable[[_Way, Within, Tensor], None],
    target: Tensor,
    general: Callable[[], None],
) -> None:
    """Fill ``target``, each matrix by the first of the ``ways`` that it is in range of, or by ``general``."""
    if not ways:
        return general()
    way, *others = ways
    with torch._C._AutoDispatchBelowAutograd():  # nothing here is differentiated, and a tenth of every call is saved
        served = within(way)
        if served is True:
            return fill(way, served, target)
        _serve(others, within, fill, target, general)
        if served is not False:
            some = torch.empty_like(target)
            fill(way, served, some)
            target.copy_(torch.where(served.view(-1, 1, 1), some, target))


def _within(logits: Tensor, most: float) -> Within:
    """Whether the logits of matrices differ by at most ``most``: of all, of none, or of which (B,)."""
    least, largest = torch.aminmax(logits) if logits.numel() < _MANY else (logits.amin(), logits.amax())
    if largest.item() - least.item() <= most:
        return True
    if len(logits) == 1:
        return False
    within = logits.amax((1, 2)).double() - logits.amin((1, 2)).double() <= most
    count = int(within.sum())
    return within if 0 < count < len(within) else count > 0
