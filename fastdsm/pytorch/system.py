"""Fixed points of Sinkhorn's sweeps as a system of equations in the column potential, on one piece of a batch.

For a column potential g the rows are made exact, f_i = log r_i - LSE_j(S_ij + g_j), P = exp(S + f + g); wanted is g with P^T
1 = c. That is the minimum of the convex (dual) objective

    h(g) = sum_i r_i LSE_j(S_ij + g_j) - sum_j c_j g_j,   grad h = P^T 1 - c,   Hessian H = diag(P^T 1) - P^T diag(1/r) P.

Fine potentials. In float32 a potential of size 30 cannot be set more closely than 2e-6, and no more closely can the column
sums. So g = base + fine with |fine| <= 1/2: the exponentials are of S + base, whose rounding is that of logits next to those
given, and exp(fine) is a factor of its own, good to a unit in the last place whatever the size of g.

Units. Marginals are divided by the largest r of their matrix: the thresholds of the solver are then free of their scale. What
totals differ by (they may, by 1e-4) is spread over the columns: c is aimed at times sum r / sum c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._ops.problem import Problem
from .chunk import load, marginals
from .layout import BatchFirst, BatchLast, Layout
from .sweeps import log_of

LANES_MAX_SIDE = 6  # beyond, factors are faster than elimination on lanes: measured 1.8 times slower at 4, 1.1 faster at 7
_PIECE_ENTRIES = 1 << 18  # of a piece on a CPU: the cache bears the dozen vectors and matrices of a step
_FINE_MAX = 0.5
_ROUNDING = 4.0  # units


@dataclass(frozen=True)
class System:
    """A piece of the batch. S is -inf where excluded; r, c, aim are 0 on excluded lines, where the indicators are 1.

    ``unit`` (1, B) or (B, 1): what r and c were divided by. ``poisoned`` (B,): NaN or +inf among the logits; S is 0 there.
    """

    at: Layout
    S: Tensor
    r: Tensor
    c: Tensor
    aim: Tensor
    spare_rows: Tensor
    spare_cols: Tensor
    unit: Tensor
    poisoned: Tensor

    def take(self, index: Tensor) -> System:
        """Some of the matrices."""
        fields = ("S", "r", "c", "aim", "spare_rows", "spare_cols", "unit")
        taken = {name: getattr(self, name).index_select(self.at.batch, index) for name in fields}
        return replace(self, **taken, poisoned=self.poisoned[index])

    @property
    def rounding(self) -> float:
        """Share of c by which column sums are known: no smaller weight can be told from none."""
        return _ROUNDING * torch.finfo(self.S.dtype).eps

    @property
    def inverse_r(self) -> Tensor:
        """1 / r, 0 on excluded rows."""
        return (1.0 - self.spare_rows) / (self.r + self.spare_rows)

    def column_step(self, f: Tensor) -> Tensor:
        """The potential g = log c - LSE_i(S + f), in the log domain."""
        at = self.at
        shifted = self.S + at.down(f)
        top = shifted.amax(at.rows).clamp_(min=torch.finfo(shifted.dtype).min)
        sums = at.sums(shifted.sub_(at.across(top)).exp_(), at.rows)
        return torch.where(self.c == 0, 0.0, log_of(self.c) - (sums + self.spare_cols).log() - top)

    def at_potential(self, base: Tensor, fine: Tensor) -> Point:
        """The plan with exact rows at column potential base + fine."""
        at = self.at
        P = self.S + at.across(base)
        top = P.amax(at.cols).clamp_(min=torch.finfo(P.dtype).min)
        P = P.sub_(at.down(top)).exp_().mul_(at.across(fine.exp()))
        sums = at.sums(P, at.cols).add_(self.spare_rows)
        P.mul_(at.down(self.r / sums))
        col_sums = at.sums(P, at.rows)
        error = ((col_sums + self.spare_cols) / (self.c + self.spare_cols) - 1.0).abs_().amax(at.line)
        log_sums = sums.log_().add_(top)
        objective = at.sums(self.r * log_sums, at.line) - at.sums(self.aim * (base + fine), at.line)
        return Point(P, col_sums, log_sums, objective, error)


@dataclass(frozen=True)
class Point:
    """What a column potential leads to: P, P^T 1, the rows' log-sum-exp, h (B,), and the residual (B,)."""

    P: Tensor
    col_sums: Tensor
    log_sums: Tensor
    objective: Tensor
    residual: Tensor


def fold(base: Tensor, fine: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
    """The same potential with \\|fine\\| <= 1/2, the base left alone where that holds already."""
    large = fine.abs().amax(at.line, keepdim=True) > _FINE_MAX
    return torch.where(large, base + fine, base), torch.where(large, 0.0, fine)


def pieces(problem: Problem, dtype: torch.dtype) -> Iterator[tuple[slice, System]]:
    """The batch cut up and loaded in ``dtype``; on an accelerator it is one piece."""
    batch, n, m = problem.logits.shape
    at: Layout = BatchLast if max(n, m) <= LANES_MAX_SIDE else BatchFirst
    count = math.ceil(batch * n * m / _PIECE_ENTRIES) if problem.logits.device.type == "cpu" else 1
    size = math.ceil(batch / max(count, 1))
    for start in range(0, batch, max(size, 1)):
        where = slice(start, min(start + size, batch))
        yield where, _system(problem.part(where).map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x), at)


def _system(problem: Problem, at: Layout) -> System:
    S = load(problem, at, lambda shape: at.buffer(problem.logits.new_empty(shape.numel()), shape))
    r, c, spare_rows, spare_cols = marginals(S, problem, at)
    poisoned = ~(S.amax((at.rows, at.cols)) < torch.inf)
    S = S.masked_fill(at.whole(poisoned), 0.0)
    unit = r.amax(at.line, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    r, c = r / unit, c / unit
    rows, cols = at.sums(r, at.line), at.sums(c, at.line)
    aim = c * at.scalar(rows / torch.where(cols > 0, cols, 1.0))
    return System(at, S, r, c, aim, spare_rows, spare_cols, unit, poisoned)
