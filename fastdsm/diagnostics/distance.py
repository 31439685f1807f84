"""How far a plan is from its marginals, from the uniform plan and from the identity.

Symbols as in :mod:`fastdsm.diagnostics.entropy`: N, q, p. For an exact plan N p = q and N^T q = p. What a truncated one adds
to that stands in the leak,

    leak = max(||(I - q q^T) N p||, ||(I - p p^T) N^T q||),

the largest part of the mean direction that one application takes out of it. With rows exact and uniform marginals it is
||P^T 1 - c||_2 / sqrt(n), and by Weyl's inequality no singular value of P is further than that from {1, sigma_i(M)}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import arguments
from .._ops.problem import compute_dtype
from .entropy import chi2
from .relative import relative_plan


def residual(
    plan: Tensor, *, row_marginal: Tensor | None = None, col_marginal: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Largest relative error of a row or column sum: max of abs(sum / marginal - 1) over both sides, computed in float64.

    Args:
        plan: (..., n, m), floating point. row_marginal, col_marginal, mask: as for :func:`fastdsm.sigma2`.

    Returns:
        (...,), float32, or float64 for float64; no gradient. 0 where no line takes part.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sigma2`.

    :class:`fastdsm.SinkhornInfo` has that of the side which is not exact by construction.
    """
    found = relative_plan(plan.detach() if isinstance(plan, Tensor) else plan, row_marginal, col_marginal, mask)
    P = found.N * found.r.sqrt().unsqueeze(-1) * found.c.sqrt().unsqueeze(-2)
    worst = []
    for sums, marginal in ((P.sum(-1), found.r), (P.sum(-2), found.c)):
        error = (sums / marginal.where(marginal != 0, 1.0) - 1).abs()
        worst.append(torch.where(marginal != 0, error, 0.0).amax(-1))
    return torch.maximum(*worst).detach().to(found.dtype)


def leak(
    plan: Tensor, *, row_marginal: Tensor | None = None, col_marginal: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """How far the plan maps the mean direction out of itself, forward or backward; defined in the module's docstring.

    Arguments, dtype and errors as for :func:`residual`; (...,), differentiable where it is not 0. 0 for an exact plan.
    """
    found = relative_plan(plan, row_marginal, col_marginal, mask)
    image = (found.N * found.p.unsqueeze(-2)).sum(-1)
    adjoint = (found.N * found.q.unsqueeze(-1)).sum(-2)
    out = image - found.q * (image * found.q).sum(-1, keepdim=True)
    back = adjoint - found.p * (adjoint * found.p).sum(-1, keepdim=True)
    return torch.maximum(out.norm(dim=-1), back.norm(dim=-1)).to(found.dtype)


def distance_to_uniform(
    plan: Tensor, *, row_marginal: Tensor | None = None, col_marginal: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """sqrt(chi2 / (min(n, m) - 1)): 0 for the uniform plan, 1 for a permutation; the root mean square of sigma_2, sigma_3, ...

    Arguments, dtype and errors as for :func:`fastdsm.diagnostics.chi2`; n and m count all lines; 0 where min(n, m) = 1.
    """
    return _root(chi2(plan, row_marginal=row_marginal, col_marginal=col_marginal, mask=mask) / max(min(plan.shape[-2:]) - 1, 1))


def distance_to_identity(plan: Tensor) -> Tensor:
    """||P - I||_F / sqrt(n - 1) of square plans: 0 for the identity, 1 for the uniform plan, up to sqrt(2 n / (n - 1)).

    Args:
        plan: (..., n, n), floating point; n = 1 gives 0 for the plan 1.

    Returns:
        (...,), float32, or float64 for float64 (computed in float64); differentiable where it is not 0.

    Raises:
        TypeError, ValueError: no floating-point tensor, or not square.
    """
    arguments.check_matrices(plan, "plan")
    n, m = plan.shape[-2:]
    if n != m:
        raise ValueError(f"plan must be square, (..., n, n), to have a distance to the identity, got {tuple(plan.shape)}")
    difference = plan.double() - torch.eye(n, dtype=torch.float64, device=plan.device)
    return _root(difference.square().sum((-2, -1)) / max(n - 1, 1)).to(compute_dtype(plan.dtype))


def _root(x: Tensor) -> Tensor:
    """sqrt(x), whose gradient at 0, where a distance has a kink, is 0."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0.0 * x)
