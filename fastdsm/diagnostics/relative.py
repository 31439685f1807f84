"""A plan relative to its marginals: the matrix whose singular values the diagnostics speak of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import arguments
from .._ops.marginals import marginals_of, valid_entries
from .._ops.problem import compute_dtype


class RelativePlan(NamedTuple):
    """N = diag(r)^-1/2 P diag(c)^-1/2 (..., n, m) and its trivial pair q (..., n), p (..., m), in float64; 0 on excluded lines.

    r, c: the marginals. dtype: of results, float64 for a float64 plan and float32 otherwise.
    """

    N: Tensor
    q: Tensor
    p: Tensor
    r: Tensor
    c: Tensor
    dtype: torch.dtype

    @property
    def trivial(self) -> Tensor:
        """Q p^T: N of the uniform coupling."""
        return self.q.unsqueeze(-1) * self.p.unsqueeze(-2)


def relative_plan(
    plan: Tensor, row_marginal: Tensor | None = None, col_marginal: Tensor | None = None, mask: Tensor | None = None
) -> RelativePlan:
    """Check the arguments, as those of :func:`fastdsm.sigma2`, and form N."""
    arguments.check_matrices(plan, "plan")
    row = arguments.line_vector(row_marginal, "row_marginal", plan, plan.shape[-2], "row")
    col = arguments.line_vector(col_marginal, "col_marginal", plan, plan.shape[-1], "column")
    mask = arguments.mask_of(mask, plan)
    col = arguments.equalised(row, col, mask, arguments.tolerance_of_totals(row_marginal, col_marginal))
    wide = plan.double()
    row, col = (None if x is None else x.double() for x in (row, col))
    valid = valid_entries(mask, wide, row, col)
    r, c = marginals_of(wide.detach(), row, col, mask)
    inverse_r, inverse_c = (torch.where(x != 0, x.where(x != 0, 1.0).rsqrt(), 0.0) for x in (r, c))
    N = wide.masked_fill(~valid, 0.0) * inverse_r.unsqueeze(-1) * inverse_c.unsqueeze(-2)
    q, p = (x.sqrt() / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt() for x in (r, c))
    return RelativePlan(N, q, p, r, c, compute_dtype(plan.dtype))
