"""Few matrices on a CPU, where the number of calls decides: which of the ways with few calls serves which of them.

A way serves matrices whose logits lie within a range of its own; what is left goes the next, and last the general path. Which
way a matrix goes depends on it and on the batch's shape, never on its neighbours: where only some are in range, all go both
ways, and of each matrix that result is kept which is its own. NaN, infinite and excluded logits are in no range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops.problem import Problem
from . import scalings, softmaxes

# Up to how many nats between a matrix' logits, and the function: of logits, sweeps, temperature, sum of a row, dtype of the
# arithmetic, for a backward the cotangent, and what is to be filled.
_Way = tuple[float, Callable[..., None]]

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
# (64, 64, 64) takes 1110 and 2780, on the general path 1570 and 3590, whose pieces bound the memory beyond.
_MOST_BY_PRODUCTS = 1 << 18


def forward(problem: Problem, plan: Tensor, general: Callable[[], None]) -> None:
    """Fill ``plan``, by ``general`` what no way here serves."""
    if ways := _ways(problem, (softmaxes.forward, scalings.forward), _PRODUCTS_FORWARD):
        _serve(ways, _inputs(problem), plan, general)
    else:
        general()


def backward(problem: Problem, grad_plan: Tensor, d_logits: Tensor, general: Callable[[], None]) -> None:
    """Fill ``d_logits``, likewise."""
    if ways := _ways(problem, (softmaxes.backward, scalings.backward), _PRODUCTS_BACKWARD):
        _serve(ways, (*_inputs(problem), grad_plan), d_logits, general)
    else:
        general()


def _ways(problem: Problem, functions: tuple[Callable[..., None], Callable[..., None]], products: int) -> list[_Way]:
    """The ways for a batch of this shape and with these options, the fastest first; by products from so many entries."""
    logits = problem.logits
    entries = logits.numel()
    if (
        not 0 < entries <= _MOST_BY_PRODUCTS
        or not 1 <= problem.n_iters <= _MOST_SWEEPS
        or not logits.is_cpu
        or problem.tol >= 0.0
        or not isinstance(problem.temperature, float)
        or not (problem.mask is problem.f0 is problem.row_marginal is problem.col_marginal is None)
    ):
        return []
    _, n, m = logits.shape
    side = n if n > m else m
    most = _MOST_OF_8_LINES if side <= 8 else _MOST_OF_16_LINES if side <= _SMALL_SIDE else _MOST_BY_SOFTMAXES
    by_softmaxes, by_products = functions
    ways = [(softmaxes.RANGE, by_softmaxes)] if entries <= most else []
    if side > _SMALL_SIDE and entries >= products:
        ways.insert(0, (scalings.RANGE, by_products))
    return ways


def _inputs(problem: Problem) -> tuple[Any, ...]:
    """What ways take."""
    _, n, m = problem.logits.shape
    row = 1.0 if problem.unit_rows else m / n
    return problem.logits, problem.n_iters, problem.temperature, row, problem.compute_dtype


def _serve(ways: list[_Way], inputs: tuple[Any, ...], target: Tensor, general: Callable[[], None]) -> None:
    """Fill ``target``, each matrix by the first of the ``ways`` that it is in range of, or by ``general``."""
    if not ways:
        return general()
    logits, _, temperature, *_ = inputs
    (most, way), *others = ways
    with torch._C._AutoDispatchBelowAutograd():  # nothing here is differentiated, and a tenth of every call is saved
        within = _within(logits, most * temperature)
        if within is True:
            return way(*inputs, target)
        _serve(others, inputs, target, general)
        if within is not False:
            some = torch.empty_like(target)
            way(*inputs, some)
            target.copy_(torch.where(within.view(-1, 1, 1), some, target))


def _within(logits: Tensor, most: float) -> Tensor | bool:
    """Whether the logits of matrices differ by at most ``most``: of all, of none, or of which (B,)."""
    least, largest = torch.aminmax(logits)
    if largest.item() - least.item() <= most:
        return True
    if len(logits) == 1:
        return False
    within = logits.amax((1, 2)).double() - logits.amin((1, 2)).double() <= most
    count = int(within.sum())
    return within if 0 < count < len(within) else count > 0
