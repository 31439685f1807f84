"""``fastdsm.distributed.sigma2``: the second singular value of a plan whose rows the processes of a group share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._ops import arguments
from .._ops.problem import compute_dtype
from .collectives import Group, group_of, reduced


@torch.no_grad()
def sigma2(plan: Tensor, *, group: Group = None, tol: float = 1e-4, max_iters: int = 64) -> Tensor:
    """:func:`fastdsm.sigma2` of square plans, uniform marginals, from this process's rows of them; no gradient.

    Lanczos on M^T M with full reorthogonalisation, M = (I - J) P (I - J) and J the matrix of 1 / n, from a fixed start: one
    all-reduce of m float64 numbers for every step, one before.

    Args:
        plan: (..., n, m), this process's rows; those of all processes together are m.
        group: a ProcessGroup, None for the default one.
        tol: relative accuracy aimed at, by the residual of the largest Ritz value; > 0.
        max_iters: steps at most, >= 1.

    Returns:
        (...,), float32 (float64 for float64), alike on all processes: a lower bound up to rounding.

    Raises:
        TypeError, ValueError: with what was expected and what came; RuntimeError without a group.
    """
    group = group_of(group)
    arguments.check_matrices(plan, "plan", 0)
    if not tol > 0:
        raise ValueError(f"tol must be > 0, a relative accuracy such as 1e-4, got {tol}")
    steps = arguments.count_of(max_iters, "max_iters", 1)
    *batch, n, m = plan.shape
    P = plan.double().reshape(math.prod(batch), n, m)
    rows = float(reduced(torch.tensor([float(n)], dtype=torch.float64, device=plan.device), "sum", group))
    if rows != m:
        raise ValueError(f"plan must be square over all processes, got {rows:g} rows in all of {m} columns")
    sums = reduced(P.sum(1), "sum", group)

    def applied(v: Tensor) -> Tensor:
        """M^T M v, of v orthogonal to 1."""
        image = (P @ v.unsqueeze(2)).squeeze(2)
        found = reduced((image.unsqueeze(1) @ P).squeeze(1), "sum", group)
        found = found - sums * ((sums * v).sum(1, keepdim=True) / m)  # what lies along J on the left
        return found - found.mean(1, keepdim=True)

    return _largest(applied, P, min(steps, m), tol).sqrt().to(compute_dtype(plan.dtype)).reshape(batch)


def _largest(applied: Callable[[Tensor], Tensor], P: Tensor, steps: int, tol: float) -> Tensor:
    """The largest eigenvalue (B,) of what is applied, positive semidefinite, to vectors orthogonal to 1."""
    matrices, m = P.shape[0], P.shape[2]
    start = torch.randn(m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(P.device)
    v = _unit((start - start.mean()).expand(matrices, m))
    basis = P.new_zeros(matrices, 0, m)
    T = P.new_zeros(matrices, steps, steps)
    value = P.new_zeros(matrices)
    for k in range(steps):
        basis = torch.cat([basis, v.unsqueeze(1)], 1)
        w = applied(v)
        T[:, k, k] = (w * v).sum(1)
        for _ in range(2):
            w = w - ((basis @ w.unsqueeze(2)).mT @ basis).squeeze(1)
        rest = w.norm(dim=1)
        values, vectors = torch.linalg.eigh(T[:, : k + 1, : k + 1].nan_to_num())
        value = values[:, -1].clamp(min=0.0)
        if k + 1 == steps or bool((rest * vectors[:, -1, -1].abs() <= tol * value).all()):
            break
        T[:, k, k + 1] = T[:, k + 1, k] = rest
        v = _unit(w)
    return torch.where(T.isnan().any(2).any(1), torch.nan, value)  # T is of all rows


def _unit(x: Tensor) -> Tensor:
    """Over its norm; 0 stays 0."""
    size = x.norm(dim=1, keepdim=True)
    return torch.where(size > 0, x / size.where(size > 0, 1.0), 0.0)
