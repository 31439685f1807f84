"""The second singular value of plans: ``fastdsm.sigma2`` and ``fastdsm.sigma2_bounds``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._ops import arguments, transforms
from .pytorch.spectrum import JACOBI_MAX_SIDE, METHODS


def sigma2(
    plan: Tensor,
    *,
    method: str = "auto",
    tol: float = 1e-4,
    max_iters: int | None = None,
    v0: Tensor | None = None,
    mask: Tensor | None = None,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    return_vectors: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Second singular value of a plan relative to its first: the norm of M, P with the trivial pair projected out.

    M = (I - q q^T) diag(r)^-1/2 P diag(c)^-1/2 (I - p p^T), q = sqrt(r / total), p = sqrt(c / total); for a square uniform
    plan M = (I - J) P (I - J). At convergence sigma2 lies in [0, 1] and its square is the rate of a Sinkhorn sweep. What
    passes through L such matrices loses detail at least by their product ("The Homogeneity Trap", arXiv 2601.02080).

    Args:
        plan: (..., n, m), non-negative, float16, bfloat16, float32 or float64, any strides.
        method: "auto" suits the size; "jacobi" (min(n, m) <= 8), "squaring" (fixed work, indifferent to gaps), "lanczos",
            "power" (cheap with ``v0`` from the step before, as in spectral normalisation).
        tol: relative accuracy aimed at, > 0. Where the plan requires grad it is squared: vectors err like its root.
        max_iters: steps at most (squarings, Lanczos or power steps, Jacobi sweeps); None: the method's own default.
        v0: (..., m), start of "power", which alone takes it.
        mask: bool, broadcastable to (..., n, m): lines without an entry take no part.
        row_marginal, col_marginal: (..., n) and (..., m), the marginals the plan was made for; default uniform.
        return_vectors: also return u2 (..., n) and v2 (..., m), unit vectors (not differentiable).
        backend: as for :func:`fastdsm.sinkhorn`; a named method always runs on the PyTorch path.

    Returns:
        (...,) float32 (float64 for float64): ||M v2||, the Rayleigh lower bound. Its gradient is u2 v2^T, scaled by the
        marginals; at multiplicity one element of the subdifferential.
    """
    arguments.check_matrices(plan, "plan")
    arguments.check_choice(method, "method", ("auto", *METHODS))
    if not tol > 0:
        raise ValueError(f"tol must be > 0, a relative accuracy such as 1e-4, got {tol}")
    if max_iters is not None:
        arguments.check_count(max_iters, "max_iters")
    if method == "jacobi" and min(plan.shape[-2:]) > JACOBI_MAX_SIDE:
        raise ValueError(
            f'method="jacobi" serves min(n, m) <= {JACOBI_MAX_SIDE}, got {tuple(plan.shape)}; use "squaring" or "auto"'
        )
    if v0 is not None and method != "power":
        raise ValueError(f'v0 is the start of method="power" alone, got method={method!r}; leave one of them out')
    resolved = arguments.resolve_backend(backend, plan)
    start = arguments.line_vector(v0, "v0", plan, plan.shape[-1], "column")
    row, col, mask = _lines(plan, row_marginal, col_marginal, mask)
    if resolved == "reference":
        if return_vectors:
            raise ValueError('backend="reference" gives no vectors; use return_vectors=False or another backend')
        return reference.sigma2(plan, row_marginal=row, col_marginal=col, mask=mask)
    count = math.prod(plan.shape[:-2])
    flat = [x if x is None else x.reshape((count, *x.shape[plan.dim() - 2 :])) for x in (plan, row, col, mask, start)]
    if plan.requires_grad and torch.is_grad_enabled():
        tol = tol * tol
    found = transforms.sigma2(*flat, method, tol, max_iters or 0, resolved)
    value, u, v = (x.reshape((*plan.shape[:-2], *x.shape[1:])) for x in found)
    return (value, u, v) if return_vectors else value


def sigma2_bounds(
    plan: Tensor,
    *,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Certified interval of :func:`sigma2`: lower <= sigma2 <= upper, each (...,); not differentiable.

    upper is ||(M^T M)^(2^k)||_F^(1 / 2^(k+1)), within the factor rank^(1 / 2^(k+2)) of sigma2 whatever the gaps; lower is
    the Rayleigh quotient of that power's largest column. Beyond 32 lines on a CPU: lower is ||M v|| of Lanczos' v, upper 1.0001
    times that, if a Cholesky factor of upper^2 I - M^T M exists (Rump, BIT 46, 2006). All allow for rounding.
    upper / lower <= 1.001 for n <= 64.
    Arguments and errors as for :func:`sigma2`.
    """
    arguments.check_matrices(plan, "plan")
    resolved = arguments.resolve_backend(backend, plan)
    row, col, mask = _lines(plan, row_marginal, col_marginal, mask)
    count = math.prod(plan.shape[:-2])
    flat = [x if x is None else x.detach().reshape((count, *x.shape[plan.dim() - 2 :])) for x in (plan, row, col, mask)]
    if resolved == "reference":
        lower = upper = reference.sigma2(plan.detach().double(), row_marginal=row, col_marginal=col, mask=mask)
    else:
        lower, upper = transforms.sigma2_bounds(*flat, resolved)
    return lower.reshape(plan.shape[:-2]), upper.reshape(plan.shape[:-2])


def _lines(
    plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    row = arguments.line_vector(row, "row_marginal", plan, plan.shape[-2], "row")
    col = arguments.line_vector(col, "col_marginal", plan, plan.shape[-1], "column")
    arguments.check_marginals(row, col)
    return row, col, arguments.mask_of(mask, plan)
