"""Entropy and chi2 of plans: what they say of sigma2, and what they do not.

With N = diag(r)^-1/2 P diag(c)^-1/2, whose leading singular pair is q = sqrt(r / total), p = sqrt(c / total) with value 1,

    chi2 = ||N - q p^T||_F^2 = sum of sigma_i^2 over i >= 2

for a converged plan, so that chi2 / (min(n, m) - 1) <= sigma2^2 <= min(1, chi2). For a square uniform plan
chi2 = ||P||_F^2 - 1 = sum_i exp(-H2(row_i)) - 1, H2 the Renyi-2 entropy. Shannon's says less: 1 (+) J_(n-1) has normalised
entropy near 1 and sigma2 = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .relative import relative_plan


def entropy(plan: Tensor, order: int = 1, normalized: bool = True) -> Tensor:
    """Mean entropy of the rows of ``plan``, each row taken as a distribution over the columns.

    Args:
        plan: (..., n, m), floating point, entries >= 0. Rows are divided by their sums first, so that a plan of any
            marginals serves; a row of zeros (fully masked) takes no part in the mean.
        order: 1 for Shannon, ``-sum_j p_j log p_j``; 2 for Renyi-2, ``-log sum_j p_j^2``.
        normalized: divide by log m, the entropy of the uniform row, so that the result lies in [0, 1]; m counts all
            columns, and m = 1 gives 1.

    Returns:
        (...,), float32, or float64 for float64; differentiable, with zero gradient where an entry is 0. NaN where every
        row is zero.

    Raises:
        TypeError: ``plan`` is no floating-point tensor.
        ValueError: ``plan`` has fewer than two dimensions, or ``order`` is neither 1 nor 2.

    High entropy is no proxy for a small sigma2: 1 (+) J_(n-1) has normalised entropy near 1 and sigma2 = 1. What does
    hold, for a converged square plan: sum_i exp(-H2(row_i)) = ||P||_F^2 = 1 + sum of sigma_i^2 over i >= 2.
    """
    if not isinstance(plan, Tensor) or not plan.dtype.is_floating_point:
        kind = plan.dtype if isinstance(plan, Tensor) else type(plan).__name__
        raise TypeError(f"plan must be a floating-point tensor, got {kind}; convert it with plan.float()")
    if plan.dim() < 2:
        raise ValueError(f"plan must have shape (..., n, m), got {tuple(plan.shape)}; add the missing dimensions")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (Shannon) or 2 (Renyi-2), got {order!r}; choose one of these")
    plan = plan.to(torch.promote_types(plan.dtype, torch.float32))
    sums = plan.sum(-1, keepdim=True)
    used = sums != 0
    p = plan / sums.where(used, 1.0)
    if order == 1:
        rows = -(p * p.where(p != 0, 1.0).log()).sum(-1, keepdim=True)
    else:
        rows = -p.square().sum(-1, keepdim=True).where(used, 1.0).log()
    mean = rows.where(used, 0.0).sum((-2, -1)) / used.sum((-2, -1))
    if not normalized:
        return mean
    m = plan.shape[-1]
    return mean / math.log(m) if m > 1 else mean + 1.0


def chi2(
    plan: Tensor, *, row_marginal: Tensor | None = None, col_marginal: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Squared distance of a plan from the uniform coupling: the sum of all sigma_i^2, i >= 2, of a converged plan.

    chi2 = ||N - q p^T||_F^2 as derived in the module's docstring: Pearson's chi-squared divided by the total mass, and
    (m / n) ||P||_F^2 - 1 for uniform marginals, without that formula's cancellation.

    Args:
        plan: (..., n, m), floating point. row_marginal, col_marginal, mask: as for :func:`fastdsm.sigma2`.

    Returns:
        (...,), float32, or float64 for float64 (computed in float64); differentiable. A converged plan's lies in
        [0, min(n, m) - 1].

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sigma2`.
    """
    found = relative_plan(plan, row_marginal, col_marginal, mask)
    return (found.N - found.trivial).square().sum((-2, -1)).to(found.dtype)
