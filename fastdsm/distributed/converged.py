"""The fixed point of a matrix whose rows lie apart: Newton's method on the dual, and the implicit gradient.

With rows exact, f_i = log r_i - LSE_j(S_ij + g_j), the dual is a convex function of g alone, which every process has:

    phi(g) = sum_i r_i LSE_j(S_ij + g_j) - sum_j c_j g_j,   its gradient s - c,   its Hessian H = diag(s) - P^T diag(1 / r) P,

s the column sums. H d = c - s is solved by conjugate gradients; a step is halved until phi falls by a share of what its slope
promises, else a sweep is made in its place. The implicit gradient of the fixed point solves with the same matrix: T = P * dP,

    H beta = T^T 1 - P^T (T 1 / r),   alpha = (T 1 - P beta) / r,   dS = P * (dP - alpha_i - beta_j).

A product with H is one all-reduce of m numbers, phi one of one number. What decides is reduced, and alike on all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .collectives import reduced
from .rows import Problem, blocks, column_sums, columns_of, divided, entries, first_columns, log_row_sums, off, rows_of

_SWEEPS = 5  # first, and cheap beside a step
_STEPS_OF_GRADIENTS = 400
_HALVINGS = 8
_SLOPE = 1e-4  # of what phi is to fall by
_ACCURACY = 1e-2  # of a step's equation; of a gradient's:
_EXACT = 1e-11  # further on, what rounding has left along the null space would grow


def fixed_point(problem: Problem, given: Tensor | None, most: int, tol: float) -> tuple[Problem, Tensor, Tensor, int]:
    """The problem with masses of columns, f and g with rows exact, and steps, until all are there."""
    f, g = torch.zeros_like(problem.r), problem.S.new_zeros(problem.S.shape[0], problem.S.shape[2], dtype=torch.float64)
    g, c = first_columns(problem, f, given)
    problem = problem._replace(c=c)
    f = rows_of(problem.r, log_row_sums(problem, g))
    for done in range(1, most + 1):
        sums = reduced(column_sums(problem, f, g), "sum", problem.group)
        residual = off(sums, c).amax(1) if c.shape[1] else f.new_zeros(len(f))
        there = ~(residual > tol)  # NaN is not waited for
        if bool(there.all()) or done == most:
            break
        swept = columns_of(c, g, sums)
        g = swept if done < _SWEEPS else torch.where(there[:, None], g, _step(problem, f, g, sums, swept))
        f = rows_of(problem.r, log_row_sums(problem, g))
    return problem, f, g, done


def with_exact_columns(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """g, for plans whose columns are to be the exact side."""
    assert problem.c is not None
    sums = reduced(column_sums(problem, f, g), "sum", problem.group)
    return columns_of(problem.c, g, sums)


def _step(problem: Problem, f: Tensor, g: Tensor, sums: Tensor, swept: Tensor) -> Tensor:
    """g behind a step of Newton's, or ``swept`` where none goes down."""
    c = problem.c
    assert c is not None
    rest = (c - sums).where(c > 0, 0.0)
    d = solved(problem, f, g, sums, rest, _ACCURACY)
    slope = -(rest * d).sum(1)
    before, length = _dual(problem, g), torch.ones_like(slope)
    taken = torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(_HALVINGS):
        now = _dual(problem, g + length[:, None] * d)
        taken = now <= before + _SLOPE * length * slope + 1e-15 * before.abs()
        if bool(taken.all()):
            break
        length = torch.where(taken, length, length / 2)
    return torch.where(taken[:, None], g + length[:, None] * d, swept)


def _dual(problem: Problem, g: Tensor) -> Tensor:
    """phi (B,)."""
    assert problem.c is not None
    own = (problem.r * log_row_sums(problem, g)).sum(1)
    return reduced(own, "sum", problem.group) - (problem.c * g).sum(1)


def solved(problem: Problem, f: Tensor, g: Tensor, diagonal: Tensor, right: Tensor, accuracy: float) -> Tensor:
    """x with (diag - P^T diag(1 / r) P) x = right, orthogonal to 1 as all H x are, by conjugate gradients over the diagonal."""
    inverse = divided(torch.ones_like(diagonal), diagonal)
    x, rest = torch.zeros_like(right), _centred(right, diagonal)
    z = inverse * rest
    direction, square = z, (rest * z).sum(1)
    enough = square * accuracy**2
    for _ in range(min(_STEPS_OF_GRADIENTS, right.shape[1] + 10)):
        active = square > enough
        if not bool(active.any()):
            break
        image = diagonal * direction - reduced(_squared(problem, f, g, direction), "sum", problem.group)
        curvature = (direction * image).sum(1)
        active = active & (curvature > 1e-15 * (diagonal * direction.square()).sum(1))
        length = torch.where(active, square / curvature, 0.0)[:, None]
        x, rest = x + length * direction, _centred(rest - length * image, diagonal)
        z = inverse * rest
        new = torch.where(active, (rest * z).sum(1), 0.0)
        direction = z + torch.where(active, new / square, 0.0)[:, None] * direction
        square = new
    return x


def _centred(x: Tensor, diagonal: Tensor) -> Tensor:
    """Without a sum over columns that take part."""
    there = diagonal > 0
    mean = x.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    return (x - mean).where(there, 0.0)


def _squared(problem: Problem, f: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """P^T diag(1 / r) P x of this process's rows."""
    found = torch.zeros_like(x)
    for rows in blocks(problem.S):
        K = entries(problem, rows, f, g)
        found += (divided((K @ x.unsqueeze(2)).squeeze(2), problem.r[:, rows]).unsqueeze(1) @ K).squeeze(1)
    return found


def implicit(problem: Problem, f: Tensor, g: Tensor, d_plan: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (B, n) and beta (B, m)."""
    assert problem.c is not None
    of_rows, of_columns = torch.zeros_like(f), torch.zeros_like(g)
    for rows in blocks(problem.S):
        K = entries(problem, rows, f, g)
        terms = K * d_plan[:, rows].double()
        of_rows[:, rows] = terms.sum(2)
        of_columns += terms.sum(1) - (divided(of_rows[:, rows], problem.r[:, rows]).unsqueeze(1) @ K).squeeze(1)
    beta = solved(problem, f, g, problem.c, reduced(of_columns, "sum", problem.group), _EXACT)
    image = torch.zeros_like(f)
    for rows in blocks(problem.S):
        image[:, rows] = (entries(problem, rows, f, g) @ beta.unsqueeze(2)).squeeze(2)
    return divided(of_rows - image, problem.r), beta
