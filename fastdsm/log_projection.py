"""The logarithm of a Sinkhorn projection: ``fastdsm.log_sinkhorn``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import arguments, sharded
from ._ops.marginals import excluded_entries
from ._ops.problem import compute_dtype
from .projection import sinkhorn

_FROM_PLAN = 2.0**-20  # larger entries are known to float32's relative accuracy, better than sums of large potentials


@sharded.by_shards("logits", temperature=0, f0=1, row_marginal=1, col_marginal=1, mask=2)
def log_sinkhorn(
    logits: Tensor,
    *,
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
    backend: str = "auto",
) -> Tensor:
    """log P of the plan P of :func:`sinkhorn`: right, and with its gradient, where P underflows.

    log P = logits / temperature + f + g, whose rows (``first="col"``) are log-probabilities: the negative log-likelihood of
    a matching is the sum of -log P over its entries. Of a plan that is formed first, entries below 1e-38 are 0, their
    logarithm -inf and its gradient NaN.

    Args:
        logits: (..., n, m) as for :func:`sinkhorn`, and so are all other arguments.

    Returns:
        (..., n, m) in the logits' dtype, -inf where an entry takes no part; NaN for a matrix with NaN or +inf. A float16
        result is -inf, too, below -65504. Differentiable in logits, temperature, f0 and marginals, in arithmetic of float32
        (float64 for float64) that is rounded once; what a cotangent says of entries that take no part is ignored.

    Raises:
        TypeError, ValueError: as :func:`sinkhorn`.

    Source: log-domain optimal transport, as in SuperGlue (arXiv 1911.11763), section 3.2.
    """
    arguments.check_matrices(logits, "logits", 0)
    row_marginal, col_marginal = arguments.marginals_of(row_marginal, col_marginal, logits)
    wide = logits.to(compute_dtype(logits.dtype))
    plan, info = sinkhorn(
        wide, n_iters=n_iters, temperature=temperature, first=first, tol=tol, f0=f0, row_marginal=row_marginal, mask=mask,
        col_marginal=col_marginal, solver=solver, grad=grad, half_steps=half_steps, return_info=True, backend=backend,
    )  # fmt: skip
    tensors = (wide, temperature, None, row_marginal, col_marginal, mask)
    _, temperature, _, row, col, mask = arguments.of_projection(tensors, first)
    excluded = excluded_entries(mask, wide, row, col)
    scale = temperature[..., None, None] if isinstance(temperature, Tensor) else temperature
    found = wide.masked_fill(excluded, 0.0) / scale + info.f.unsqueeze(-1) + info.g.unsqueeze(-2)
    plan = plan.detach()
    better = torch.where(plan > _FROM_PLAN, plan.log(), found.detach())
    found = found + (better - found.detach())
    return found.masked_fill(excluded, -torch.inf).to(logits.dtype)
