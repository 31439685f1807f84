"""The gradient of a converged plan's sigma2 in its logits, by one dense linear system per matrix.

P = exp(S + f 1^T + 1 g^T) with P 1 = r and P^T 1 = c. A change dS of the logits moves the potentials as well,

    dP = P * (dS + df 1^T + 1 dg^T),   [diag(r)  P; P^T  diag(c)] (df, dg) = -((P * dS) 1, (P * dS)^T 1),

because both marginals stay. With u, v the unit vectors of sigma2 and W = P * (u / sqrt(r)) (v / sqrt(c))^T, sigma2 changes by
the sum of W * (dS + df 1^T + 1 dg^T). The system is symmetric, so that its adjoint is itself:

    d sigma2 = <G, dS>,   G = W - P * (a 1^T + 1 b^T),   [diag(r)  P; P^T  diag(c)] (a, b) = (W 1, W^T 1).

a is eliminated, which leaves (diag(c) - P^T diag(1/r) P) b = W^T 1 - P^T (W 1 / r): the Laplacian of a weighted graph on
the columns. It is assembled from its off-diagonals; its null vector, b = 1 with a = -1, changes nothing in G. Derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigma2_gradient(plan: Tensor, u: Tensor, v: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """G (B, n, m) of a converged plan (B, n, m), its vectors u (B, n) and v (B, m), its marginals r and c (0: excluded)."""
    inverse_r = torch.where(r == 0, 0.0, 1.0 / r)
    left = u * inverse_r.sqrt()
    right = v * torch.where(c == 0, 0.0, 1.0 / c).sqrt()
    W = plan * left.unsqueeze(-1) * right.unsqueeze(-2)
    rows, cols = W.sum(-1), W.sum(-2)
    between = plan.mT @ (plan * inverse_r.unsqueeze(-1))
    weights = between - torch.diag_embed(between.diagonal(dim1=-2, dim2=-1))
    laplacian = torch.diag_embed(weights.sum(-1)) - weights
    # Each connected part of the graph has a null vector: one is filled in, a ridge at rounding level serves the others.
    size = c.amax(-1)[:, None, None]
    count = c.shape[-1]
    eye = torch.eye(count, dtype=c.dtype, device=c.device)
    laplacian = laplacian + size * (1.0 / count + count * torch.finfo(c.dtype).eps * eye)
    factor = torch.linalg.cholesky_ex(laplacian).L
    rhs = cols - (plan.mT @ (rows * inverse_r).unsqueeze(-1)).squeeze(-1)
    b = torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)
    a = (rows - (plan @ b.unsqueeze(-1)).squeeze(-1)) * inverse_r
    return W - plan * (a.unsqueeze(-1) + b.unsqueeze(-2))
