"""Plans with exact marginals from plans that nearly have them: ``fastdsm.round_to_birkhoff``.

Altschuler, Weed and Rigollet (NeurIPS 2017), algorithm 2. With x_i = min(r_i / (P 1)_i, 1) and P' = diag(x) P, then
y_j = min(c_j / (P'^T 1)_j, 1) and P'' = P' diag(y), no line of P'' exceeds its marginal; a = r - P'' 1 and b = c - P''^T 1 are
what is missing, both of sum s, and P'' + a b^T / s has the marginals r and c. Their lemma 7: at most
2 (|P 1 - r|_1 + |P^T 1 - c|_1) is moved, in the sum of absolute values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import arguments, sharded
from ._ops.marginals import marginals, valid_entries
from ._ops.problem import compute_dtype


@sharded.by_shards("plan", row_marginal=1, col_marginal=1, mask=2)
def round_to_birkhoff(
    plan: Tensor,
    *,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Nearby plan whose marginals are exact up to rounding, where a projection has stopped short of them.

    Args:
        plan: (..., n, m), >= 0, float16, bfloat16, float32 or float64, any strides, n >= 1 and m >= 1; computed in float32
            (float64 for float64). NaN or inf make their matrix NaN at most.
        row_marginal: (..., n), >= 0, or a number; default 1 per row that takes part. A zero excludes its row.
        col_marginal: (..., m), likewise; default uniform with the rows' total. Given with ``row_marginal`` it is scaled to
            that one's total, as for :func:`fastdsm.sinkhorn`.
        mask: bool, broadcastable to (..., n, m), True where an entry takes part. What lies under it is never used. A line
            without any entry left is zero. Masked entries of other lines may receive some of what is missing: plans of a
            given pattern with these marginals need not exist.

    Returns:
        Like plan, in its dtype (16-bit results have marginals as exact as 16-bit entries can). At most twice the sum of the
        absolute errors of its marginals is moved, in the sum of absolute values; a plan with exact marginals is returned as
        it is. Differentiable in plan and marginals, to any order; where a line's sum equals its marginal the function has
        a kink, and the gradient is that of the side without excess. Never aliases ``plan``.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    Source: Altschuler, Weed and Rigollet, Near-linear time approximation algorithms for optimal transport via Sinkhorn
    iteration (NeurIPS 2017), algorithm 2.
    """
    arguments.check_matrices(plan, "plan")
    row, col = arguments.marginals_of(row_marginal, col_marginal, plan)
    tolerance = arguments.tolerance_of_totals(row, col)
    row = arguments.line_vector(row, "row_marginal", plan, plan.shape[-2], "row")
    col = arguments.line_vector(col, "col_marginal", plan, plan.shape[-1], "column")
    mask = arguments.mask_of(mask, plan)
    col = arguments.equalised(row, col, mask, tolerance)
    P, r, c = _entries_and_marginals(plan, row, col, mask)
    P = P * _reduction(P.sum(-1, keepdim=True), r)
    P = P * _reduction(P.sum(-2, keepdim=True), c)
    rows, cols = (r - P.sum(-1, keepdim=True)).clamp(min=0.0), (c - P.sum(-2, keepdim=True)).clamp(min=0.0)
    # Where nothing is missing every row's part of it is 0, over 1.
    share = rows / torch.threshold(rows.sum(-2, keepdim=True), 0.0, 1.0)
    return torch.addcmul(P, share, cols).to(plan.dtype)


def _entries_and_marginals(
    plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, float | Tensor, float | Tensor]:
    """The plan in the compute dtype, 0 where no part is taken, and its marginals: numbers, or (..., n, 1) and (..., 1, m)."""
    dtype = compute_dtype(plan.dtype)
    if row is None and col is None and mask is None:
        n, m = plan.shape[-2:]
        return plan.to(dtype), 1.0, n / m
    valid = valid_entries(mask, plan, row, col)
    r, c = marginals(valid, row, col, dtype)
    return plan.masked_fill(~valid, 0.0).to(dtype), r.unsqueeze(-1), c.unsqueeze(-2)


def _reduction(sums: Tensor, marginal: float | Tensor) -> Tensor:
    """min(marginal / sums, 1), whose gradient is that of 1 where both are equal; of an empty line any number.

    Sums are divided by a number first, which makes 1 or less of that number in any rounding.
    """
    if isinstance(marginal, Tensor):
        return marginal / torch.threshold(torch.where(sums > marginal, sums, marginal), 0.0, 1.0)
    return torch.threshold(sums if marginal == 1 else sums / marginal, 1.0, 1.0).reciprocal()
