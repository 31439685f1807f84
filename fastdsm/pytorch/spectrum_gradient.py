"""The gradient of sigma2 with fixed singular vectors u and v.

sigma2 = u^T M v = a^T P b, where the projections and the scaling of M are taken to the vectors,

    a = diag(r)^-1/2 (u - q q^T u) = diag(r)^-1/2 u - (sqrt(r)^T u / R) 1,   q = sqrt(r / R),   R = sum r,

and b likewise of v and c. So dP = a b^T. With w = P b, and as sqrt(r)^T u is 0 but for rounding,

    d log r_i = r_i dsigma2 / dr_i = -1/2 u_i (r_i^-1/2 w_i + r_i^1/2 W / R),   W = 1^T w,

and d log c likewise with P^T a.
"""

from __future__ import annotations

from torch import Tensor

from .._ops.marginals import marginals, valid_entries

Slopes = tuple[Tensor, Tensor, Tensor]


def sigma2_backward(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    lines: bool,
) -> Slopes:
    """Gradients of plans (B, n, m), of log r (B, n) and of log c (B, m), the marginals in use; these empty without ``lines``.

    grad (B,), u (B, n) and v (B, m) in the compute dtype.
    """
    valid = valid_entries(mask, plan, row_marginal, col_marginal)
    r, c = marginals(valid, row_marginal, col_marginal, u.dtype)
    a, b = _of_plan(u, r), _of_plan(v, c)
    d_plan = (a * grad.unsqueeze(-1)).unsqueeze(-1) * b.unsqueeze(-2)
    d_plan = d_plan.masked_fill_(~valid, 0.0).to(plan.dtype)
    if not lines:
        return d_plan, r.new_empty((0,)), c.new_empty((0,))
    P = plan.to(u.dtype).masked_fill(~valid, 0.0)
    of_rows = _of_marginal(u, r, (P @ b.unsqueeze(-1)).squeeze(-1))
    of_cols = _of_marginal(v, c, (P.mT @ a.unsqueeze(-1)).squeeze(-1))
    return d_plan, of_rows * grad.unsqueeze(-1), of_cols * grad.unsqueeze(-1)


def _of_plan(x: Tensor, marginal: Tensor) -> Tensor:
    """a of u and r, b of v and c."""
    root, total = _roots(marginal)
    shared = (marginal.sqrt() * x).sum(-1, keepdim=True)
    return (x / root - shared / total).masked_fill(marginal == 0, 0.0)


def _of_marginal(x: Tensor, marginal: Tensor, image: Tensor) -> Tensor:
    """d log r of u, r and w, d log c of v, c and P^T a."""
    root, total = _roots(marginal)
    return (-0.5 * x * (image / root + root * image.sum(-1, keepdim=True) / total)).masked_fill(marginal == 0, 0.0)


def _roots(marginal: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(r), 1 where r is 0, and R, likewise."""
    total = marginal.sum(-1, keepdim=True)
    return marginal.masked_fill(marginal == 0, 1.0).sqrt(), total.masked_fill(total == 0, 1.0)
