"""``fastdsm.distributed.sinkhorn``: projection of a matrix whose rows the processes of a group share."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .._ops import arguments
from .._ops.problem import compute_dtype
from ..half_steps import count_of as counted
from ..results import SinkhornInfo, default_tol
from .collectives import Group, group_of, reduced
from .gradient import Rows
from .rows import Problem, column_sums, log_row_sums, of_total, off, worst


class _Options(TypedDict, total=False):
    """What the overloads share."""

    group: Group
    n_iters: int | None
    temperature: float | Tensor
    first: str
    tol: float | None
    f0: Tensor | None
    row_marginal: float | Tensor | None
    col_marginal: float | Tensor | None
    mask: Tensor | None
    solver: str
    grad: str | None
    half_steps: int | None


@overload
def sinkhorn(logits: Tensor, *, return_info: Literal[False] = ..., **options: Unpack[_Options]) -> Tensor: ...
@overload
def sinkhorn(logits: Tensor, *, return_info: Literal[True], **options: Unpack[_Options]) -> tuple[Tensor, SinkhornInfo]: ...
@overload
def sinkhorn(logits: Tensor, *, return_info: bool, **options: Unpack[_Options]) -> Tensor | tuple[Tensor, SinkhornInfo]: ...
def sinkhorn(
    logits: Tensor,
    *,
    group: Group = None,
    n_iters: int | None = None,
    temperature: float | Tensor = 1.0,
    first: str = "col",
    tol: float | None = None,
    f0: Tensor | None = None,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    mask: Tensor | None = None,
    solver: str = "sinkhorn",
    grad: str | None = None,
    half_steps: int | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """:func:`fastdsm.sinkhorn` of matrices whose rows lie apart: samples over ranks, or more rows than a device holds.

    A normalisation of the columns takes one all-reduce of m float64 numbers, and so does its adjoint; before the first there is
    one for a maximum. Nothing else is exchanged. Potentials are float64, memory is O(n_iters (n + m)) beside the rows.

    Args:
        logits: (..., n, m), this process's rows, from 0 on; m, the batch, the dtype and all options are the same on all.
        group: a ProcessGroup, None for the default one.
        n_iters, first, half_steps: as there, with "newton" steps at most.
        temperature: as there, the same on all processes.
        tol: as there, but all matrices go on until every one is there.
        f0: as there: (..., n) of this process's rows for "col", (..., m) for "row".
        row_marginal: of this process's rows; one below 0 is an error on every process, and NaN where values cannot be read
            or nothing is reduced (one half step of rows). col_marginal: of all columns, the same on all processes; it is
            scaled to the total of all rows. mask: of this process's rows.
        solver: "sinkhorn"; or "newton", the fixed point to ``tol`` (1e-6, 1e-12 for float64), by Newton's method on the dual of
            the columns, whose products are an all-reduce each; without f0. It serves logits up to a standard deviation of 8 in
            some 15 steps; of colder ones it may end with ``converged`` False.
        grad: as there, "unrolled" or, always with "newton", "implicit": one more system, solved by such products.
        return_info: also return a :class:`fastdsm.SinkhornInfo`, f of this process's rows; without gradients here.

    Returns:
        This process's rows of the plan, like logits. Gradients are exact, of the sum of all processes' losses, and of first
        order; those of a temperature, a col_marginal and an f0 of columns, which all share, are this process's share, to be
        added up.

    Raises:
        TypeError, ValueError: as there; RuntimeError without a group.

    Source: SwAV's distributed loop (arXiv 2006.09882, listing A), in the log domain, with its adjoint.
    """
    group = group_of(group)
    arguments.check_matrices(logits, "logits", 0)
    arguments.check_choice(first, "first", ("col", "row"))
    arguments.check_tol(tol)
    arguments.check_choice(solver, "solver", ("sinkhorn", "newton"))
    if grad is not None:
        arguments.check_choice(grad, "grad", ("unrolled", "implicit"))
    newton = solver == "newton"
    if newton and (grad == "unrolled" or f0 is not None):
        raise ValueError('solver="newton" has the implicit gradient and no f0; leave grad and f0 out')
    if half_steps is not None:
        count, columns = counted(half_steps, n_iters, solver, grad), first == "col"
    else:
        n_iters = arguments.count_of(20 if n_iters is None else n_iters, "n_iters", 1 if newton else 0)
        count, columns = (n_iters if newton else 2 * n_iters, first == "col") if n_iters else (1, first != "col")
    if newton and tol is None:
        tol = default_tol(compute_dtype(logits.dtype))
    *batch, n, m = logits.shape
    matrices = math.prod(batch)
    S = logits.to(compute_dtype(logits.dtype)).reshape(matrices, n, m)
    mask = arguments.mask_of(mask, logits)
    excluded = None if mask is None else ~mask.reshape(matrices, n, m)
    r, c = (
        None if x is None else _lines(x, name, logits, lines, role)
        for x, name, lines, role in ((row_marginal, "row_marginal", n, "row"), (col_marginal, "col_marginal", m, "column"))
    )
    if r is not None:
        r = r.where(r >= 0, torch.nan)
    arguments.check_marginals(None, c)
    for x, dim in ((r, 2), (c, 1)):
        if x is not None:
            nothing = (x == 0).unsqueeze(dim).expand_as(S)
            excluded = nothing if excluded is None else excluded | nothing
    if excluded is not None:
        S = S.masked_fill(excluded, -torch.inf)
    if r is not None:
        S = S.masked_fill(r.isnan().unsqueeze(2), torch.nan)  # which other processes have to learn of
    there = (-torch.inf < S).any(2) | S.isnan().any(2)
    r = there.double() if r is None else r * there
    scale = 1.0 / _temperature(temperature, logits)
    side, role = (n, "row") if columns else (m, "column")
    start = r.new_zeros(len(S), side) if f0 is None or n_iters == 0 else _lines(f0, "f0", logits, side, role)
    settings = (columns, count, tol, group, newton, newton or grad == "implicit")
    plan, f, g, c_used, done = Rows.apply(S, scale, r, c, start, settings)
    plan = plan.to(logits.dtype).reshape(logits.shape)
    if not return_info:
        return plan
    ends_with_rows = columns if newton else (count % 2 == 0) == columns
    with torch.no_grad():
        problem = Problem(S, scale, r, c_used, group)
        if ends_with_rows:
            sums = reduced(column_sums(problem, f, g), "sum", group)
            masses = c_used if newton or done > 1 else _columns(problem, c)
            residual = off(sums, masses).amax(1) if m else sums.new_zeros(len(sums))
        else:
            residual = worst(off((log_row_sums(problem, g) + f).exp(), r), group)
    converged = residual <= (default_tol(S.dtype) if tol is None else tol)
    counts = done if newton else done // 2 + done % 2 * (half_steps is not None)
    sweeps = torch.full_like(residual, counts, dtype=torch.int32)
    shape = torch.Size(batch)
    found = (residual.to(S.dtype), converged, sweeps, f.to(S.dtype), g.to(S.dtype))
    return plan, SinkhornInfo(*(x.reshape(shape + x.shape[1:]) for x in found))


def _columns(problem: Problem, given: Tensor | None) -> Tensor:
    """Masses of columns, where no half step has made them."""
    there = reduced((-torch.inf < problem.S).any(1).double(), "max", problem.group)
    total = reduced(problem.r.sum(1, keepdim=True), "sum", problem.group)
    return of_total(there > 0, given, total)


def _lines(x: Any, name: str, logits: Tensor, lines: int, role: str) -> Tensor:
    """(B, lines) in float64."""
    if not isinstance(x, Tensor):
        x = logits.new_full((lines,), float(x), dtype=torch.float64)
    vector = arguments.line_vector(x, name, logits, lines, role)
    assert vector is not None
    found: Tensor = vector.double().expand(*logits.shape[:-2], lines).reshape(math.prod(logits.shape[:-2]), lines)
    return found


def _temperature(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """(B,) in float64."""
    tau = arguments.temperature_of(temperature, logits)
    if not isinstance(tau, Tensor):
        tau = logits.new_tensor(float(tau), dtype=torch.float64)
    found: Tensor = tau.double().expand(logits.shape[:-2]).reshape(-1)
    return found
