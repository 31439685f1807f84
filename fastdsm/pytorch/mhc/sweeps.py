"""Sweeps in which eps is added to every sum that divides, and as a rule to the first softmax: DeepSeek's mHC and its kind.

A half sweep, x'_ij = x_ij / (sum_i x_ij + eps), has in logarithms the adjoint of a logarithm of a softmax,

    d log x_ij = d log x'_ij - x'_ij sum_i d log x'_ij,

whatever eps is, so that a backward needs the x' of every half sweep and nothing else. The batch is the vector lane: matrices
(n, m, B), in pieces that no operation of torch shares between threads, whose half sweeps stay in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 14  # entries; beyond twice that torch shares operations, at the price of several of these


def sweeps_with_eps(logits: Tensor, n_iters: int, columns_first: bool, eps: float, floored: bool) -> Tensor:
    """H (B, n, m) like logits, in float32 or float64; n_iters >= 1, eps > 0."""
    plan = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for piece in _pieces(logits):
        x = _first(logits[piece], columns_first, eps, floored)
        sums, more = _sums_like(x, columns_first), x.new_tensor(eps)
        for half in range(1, 2 * n_iters):
            side = half % 2
            torch.sum(x, _axis(side, columns_first), keepdim=True, out=sums[side])
            x *= sums[side].add_(more).reciprocal_()
        plan[piece] = x.permute(2, 0, 1)
    return plan


def sweeps_with_eps_backward(
    grad_plan: Tensor, logits: Tensor, n_iters: int, columns_first: bool, eps: float, floored: bool
) -> Tensor:
    """The gradient (B, n, m) in logits, through every sweep."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for piece in _pieces(logits):
        first = _first(logits[piece], columns_first, eps, floored)
        tape, sums = first.new_empty(2 * n_iters - 1, *first.shape), _sums_like(first, columns_first)
        more = first.new_tensor(eps)  # as a number it would be made a tensor of every time
        x = first
        for half in range(1, 2 * n_iters):
            side = half % 2
            torch.sum(x, _axis(side, columns_first), keepdim=True, out=sums[side])
            x = torch.mul(x, sums[side].add_(more).reciprocal_(), out=tape[half - 1])
        D = torch.mul(grad_plan[piece].permute(1, 2, 0), x, out=torch.empty_like(x))
        for half in range(2 * n_iters - 1, 0, -1):
            side = half % 2
            torch.sum(D, _axis(side, columns_first), keepdim=True, out=sums[side])
            D.addcmul_(tape[half - 1], sums[side], value=-1.0)
        softmax = first
        if floored:  # the first side's softmax is first - eps, known to all its digits
            softmax = _lanes(logits[piece]).softmax(_axis(0, columns_first))
            D *= softmax / first
        torch.sum(D, _axis(0, columns_first), keepdim=True, out=sums[0])
        D.addcmul_(softmax, sums[0], value=-1.0)
        grad[piece] = D.permute(2, 0, 1)
    return grad


def _pieces(logits: Tensor) -> list[slice]:
    batch, n, m = logits.shape
    size = max(1, _PIECE // (n * m))
    return [slice(begin, begin + size) for begin in range(0, batch, size)]


def _lanes(x: Tensor) -> Tensor:
    """(B, n, m) as (n, m, B)."""
    return x.permute(1, 2, 0).contiguous()


def _axis(side: int, columns_first: bool) -> int:
    """What is summed over for side 0, the first, or 1: columns are summed over rows."""
    return int((side == 0) != columns_first)


def _first(logits: Tensor, columns_first: bool, eps: float, floored: bool) -> Tensor:
    """x (n, m, B) after the first half sweep."""
    x, axis = _lanes(logits), _axis(0, columns_first)
    if floored:
        return x.softmax(axis).add_(eps)
    x = (x - x.amax(axis, keepdim=True)).exp_()
    return x.div_(x.sum(axis, keepdim=True).add_(eps))


def _sums_like(x: Tensor, columns_first: bool) -> tuple[Tensor, Tensor]:
    """Room for the sums of either side."""
    n, m, batch = x.shape
    across, down = x.new_empty(n, 1, batch), x.new_empty(1, m, batch)
    return (down, across) if columns_first else (across, down)
