"""Sinkhorn on a matrix whose rows the processes of a group share: samples over ranks, or a matrix larger than a device.

Row sums are a process's own, column sums are reduced: one all-reduce of m numbers for every normalisation of the columns,
forward and backward, the first with the rows' total, and one maximum before it. Half steps, S = logits / temperature,

    g_j <- g_j + log c_j - log sum_i exp(S_ij + f_i + g_j)   (the first from the common maximum of its column),
    f_i <- log r_i - LSE_j(S_ij + g_j),

in float64, as potentials of float32 leave 1e-6 at logits of standard deviation 8; exponentials are made block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import arguments
from .collectives import reduced

_BLOCK = 1 << 20  # entries that are held in float64 at once
_TOTALS = 1e-4


class Problem(NamedTuple):
    """This process's logits S / scale (B, n, m), -inf where an entry takes no part; masses r (B, n), c (B, m), 0 of lines that
    take none; scale (B,)."""

    S: Tensor
    scale: Tensor
    r: Tensor
    c: Tensor | None
    group: Any


class Step(NamedTuple):
    """A half step of the columns or of the rows, and the potentials (B, n) and (B, m) behind it."""

    columns: bool
    f: Tensor
    g: Tensor


def blocks(S: Tensor) -> Iterator[slice]:
    """Rows that are made at once."""
    size = max(1, _BLOCK // max(1, S.shape[0] * S.shape[2]))
    for begin in range(0, S.shape[1], size):
        yield slice(begin, begin + size)


def entries(problem: Problem, rows: slice, f: Tensor, g: Tensor) -> Tensor:
    """exp(S + f + g) of these rows, in float64."""
    return (scaled(problem, rows) + f[:, rows, None]).add_(g[:, None, :]).exp_()


def scaled(problem: Problem, rows: slice) -> Tensor:
    """S of these rows."""
    return problem.S[:, rows].double() * problem.scale[:, None, None]


def column_sums(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """This process's (B, m)."""
    sums = f.new_zeros(problem.S.shape[0], problem.S.shape[2])
    for rows in blocks(problem.S):
        sums += entries(problem, rows, f, g).sum(1)
    return sums


def log_row_sums(problem: Problem, g: Tensor) -> Tensor:
    """(B, n), finite also of rows without an entry."""
    parts = [torch.logsumexp(scaled(problem, rows) + g[:, None, :], -1) for rows in blocks(problem.S)]
    found = torch.cat(parts, 1) if parts else problem.r
    return found.masked_fill(found == -torch.inf, 0.0)


def logs(masses: Tensor) -> Tensor:
    """0 of lines that take no part."""
    return torch.where(masses > 0, masses, 1.0).log()


def first_columns(problem: Problem, f: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """g behind the first half step of the columns, and c: ``given``, or uniform, with the total of all rows."""
    S = problem.S
    local = [(scaled(problem, rows) + f[:, rows, None]).amax(1) for rows in blocks(S)]
    top = torch.stack(local).amax(0) if local else S.new_full((S.shape[0], S.shape[2]), -torch.inf, dtype=torch.float64)
    top = reduced(top, "max", problem.group)
    there = top != -torch.inf
    top = top.where(there, 0.0)
    sums = torch.cat([column_sums(problem, f, -top), problem.r.sum(1, keepdim=True)], 1)
    sums = reduced(sums, "sum", problem.group)
    total, sums = sums[:, -1:], sums[:, :-1]
    c = of_total(there, given, total)
    return (logs(c) - sums.where(there, 1.0).log() - top).where(c > 0, 0.0), c


def of_total(there: Tensor, given: Tensor | None, total: Tensor) -> Tensor:
    """Masses of columns that are ``there``, scaled to the rows' total; ValueError, or NaN on a GPU, where theirs is another.

    What is wrong with the rows' is in their total, so that all processes raise or none does.
    """
    if arguments.may_read(total) and bool(total.isnan().any()):
        raise ValueError("row_marginal must be >= 0 everywhere, on all processes")
    if given is None:
        return there * (total / there.double().sum(1, keepdim=True))
    c = given * there
    ratio = total / c.sum(1, keepdim=True)
    same = ((ratio - 1).abs() <= _TOTALS) | (total == 0)
    if arguments.may_read(same) and not bool(same.all()):
        raise ValueError(
            f"row_marginal of all processes and col_marginal must have equal totals (to {_TOTALS:g} relative); scale one"
        )
    return c * torch.where(same, ratio, torch.nan)


def columns_of(c: Tensor, g: Tensor, sums: Tensor) -> Tensor:
    """g that gives columns, whose ``sums`` over all processes are of the g that was, their masses."""
    return (g + logs(c) - sums.where(c > 0, 1.0).log()).where(c > 0, 0.0)


def rows_of(r: Tensor, log_sums: Tensor) -> Tensor:
    """f that gives rows, of :func:`log_row_sums`, their masses."""
    return (logs(r) - log_sums).where(r > 0, 0.0)


def swept(
    problem: Problem, given: Tensor | None, f0: Tensor, first: bool, count: int, tol: float | None
) -> tuple[Problem, list[Step]]:
    """The problem with the masses of its columns, and half steps, of the columns first or of the rows, until all are there."""
    f, g = (f0, problem.S.new_zeros(f0.shape[0], problem.S.shape[2], dtype=torch.float64))
    if not first:
        f, g = torch.zeros_like(problem.r), f0
    steps, columns = [Step(first, f, g)], first
    for number in range(count):
        limit = tol if number >= 2 and columns == first else None
        if columns and problem.c is None:
            g, c = first_columns(problem, f, given)
            problem = problem._replace(c=c)
        elif columns:
            assert problem.c is not None
            sums = reduced(column_sums(problem, f, g), "sum", problem.group)
            if limit is not None and bool((off(sums, problem.c) <= limit).all()):
                break
            g = columns_of(problem.c, g, sums)
        else:
            sums = log_row_sums(problem, g)
            if limit is not None and bool((worst(off((sums + f).exp(), problem.r), problem.group) <= limit).all()):
                break
            f = rows_of(problem.r, sums)
        steps.append(Step(columns, f, g))
        columns = not columns
    return problem, steps


def off(sums: Tensor, masses: Tensor) -> Tensor:
    """|sum / mass - 1| of lines that take part."""
    return (divided(sums, masses) - 1).abs().where(masses > 0, 0.0)


def worst(x: Tensor, group: Any) -> Tensor:
    """The largest of every process's (B, n), of which one may have none."""
    return reduced(torch.cat([x, x.new_zeros(len(x), 1)], 1).amax(1), "max", group)


def divided(x: Tensor, masses: Tensor) -> Tensor:
    """0 of lines that take no part."""
    return torch.where(masses > 0, x / masses.where(masses > 0, 1.0), 0.0)
