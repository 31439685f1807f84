"""Sinkhorn's half steps one by one in float64: the definition that sweeps, and calls that count them, are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def half_steps(
    S: Tensor, count: int, first: str, f0: Tensor | None = None, row: Tensor | None = None, col: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """f and g after ``count`` normalisations of one side after the other from ``first`` on; -inf in S takes an entry out."""
    S = S.double()
    valid = -torch.inf != S
    r, c = valid.any(-1).double(), valid.any(-2).double()
    if row is not None and col is not None:
        r, c = row.double(), col.double()
    else:
        c = c * (r.sum(-1, keepdim=True) / c.sum(-1, keepdim=True))
    nothing = S.masked_fill(~valid, 0.0) * 0.0  # constants that autograd knows
    f, g = nothing.sum(-1), nothing.sum(-2)
    if f0 is not None:
        f, g = (
            (f + torch.where(r > 0, f0.double(), 0.0), g) if first == "col" else (f, g + torch.where(c > 0, f0.double(), 0.0))
        )

    def normalised(mass: Tensor, exponents: Tensor, dim: int) -> Tensor:
        log_sums = torch.where(exponents == -torch.inf, -1e300, exponents).logsumexp(dim)
        return torch.where(mass > 0, mass.where(mass > 0, 1.0).log() - log_sums, 0.0)

    for k in range(count):
        if (first == "col") == (k % 2 == 0):
            g = normalised(c, S + f.unsqueeze(-1), -2)
        else:
            f = normalised(r, S + g.unsqueeze(-2), -1)
    return f, g


def log_plan(S: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """S + f + g."""
    return S.double() + f.unsqueeze(-1) + g.unsqueeze(-2)
