"""Converged plans by Newton's method in float64, independent of fastdsm's sweeps: an oracle for what holds at convergence.

The dual F(g) = sum_j g_j c_j - sum_i r_i log sum_j exp(S_ij + g_j) is concave. With P row-normalised for the current g its
gradient is c - P^T 1 and its Hessian -(diag(P^T 1) - P^T diag(1/r) P), so d g solves the Laplacian system; steps that do
not raise F are halved. Uniform marginals.
"""

from __future__ import annotations

import torch
from torch import Tensor


def newton_plan(S: Tensor, g: Tensor | None = None, steps: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """(plan, g, residual) of logits S (B, n, m), from column potential g (B, m): rows sum to 1, columns to n / m."""
    S = S.double()
    B, n, m = S.shape
    g = S.new_zeros((B, m)) if g is None else g
    eye = torch.eye(m, dtype=S.dtype)

    def dual(g: Tensor) -> Tensor:
        return g.sum(-1) * n / m - (S + g[:, None]).logsumexp(-1).sum(-1)

    for _ in range(steps):
        P = (S + g[:, None]).softmax(-1)
        error = n / m - P.sum(-2)
        if bool((error.abs().amax(-1) * m / n <= 1e-11).all()):
            break
        between = P.mT @ P
        between = between - torch.diag_embed(between.diagonal(dim1=-2, dim2=-1))
        H = torch.diag_embed(between.sum(-1)) - between + n / m**2 + 1e-14 * eye
        d = torch.linalg.solve_ex(H, error).result.nan_to_num()
        d = d * (10.0 / d.abs().amax(-1, keepdim=True).clamp(min=10.0))
        # Near the optimum the dual's differences are rounding: there a full step is right.
        near = error.abs().amax(-1) * m / n < 1e-3
        value, length = dual(g), torch.ones(B, 1, dtype=S.dtype)
        for _ in range(30):
            worse = (dual(g + length * d) < value) & ~near
            if not bool(worse.any()):
                break
            length = torch.where(worse[:, None], length / 2, length)
        g = g + length * d
    P = (S + g[:, None]).softmax(-1)
    return P, g, (P.sum(-2) * m / n - 1).abs().amax(-1)


def sigma2_curve(logits: Tensor, temperatures: Tensor) -> Tensor:
    """sigma2 (K, B), by an SVD, of the converged plans of logits (B, n, m) at temperatures (K, B), largest first.

    Each plan starts the next; NaN where Newton did not converge.
    """
    n, m = logits.shape[-2:]
    logits = logits.double() - logits.double().mean(-1, keepdim=True)
    dual, values = logits.new_zeros((len(logits), m)), []
    for tau in temperatures.unbind():
        plan, g, residual = newton_plan(logits / tau[:, None, None], dual / tau[:, None])
        dual = (g * tau[:, None]).nan_to_num()
        singular = torch.linalg.svdvals(plan * (m / n) ** 0.5)
        value = singular[:, 1] if min(n, m) > 1 else torch.zeros_like(singular[:, 0])
        values.append(value.masked_fill(~(residual <= 1e-8), torch.nan))
    return torch.stack(values)


def converged_sigma2(logits: Tensor, temperature: Tensor) -> Tensor:
    """sigma2 (B,) of the converged plans of logits (B, n, m) / temperature (B,), approached from above in factors of two."""
    spread = (logits.double() - logits.double().mean(-1, keepdim=True)).abs().amax((-2, -1))
    halvings = (spread / temperature).log2().clamp(min=0.0).max().ceil() if len(logits) else torch.zeros(())
    powers = 2.0 ** torch.arange(int(halvings), -1, -1, dtype=torch.float64)
    return sigma2_curve(logits, torch.minimum(temperature * powers[:, None], torch.maximum(spread, temperature)))[-1]
