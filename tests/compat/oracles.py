"""What origins compute that no package index has, from their published formulas: half steps one by one, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..half_steps import half_steps, log_plan


def log_projection(S: Tensor, half_step_count: int, first: str, row: Tensor | float = 1.0, col: Tensor | float = 1.0) -> Tensor:
    """log of the plan of S after so many normalisations to masses ``row`` and ``col``, of each line where they are numbers."""
    return log_plan(S, *potentials(S, half_step_count, first, row, col))


def potentials(
    S: Tensor, half_step_count: int, first: str, row: Tensor | float = 1.0, col: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """f and g of :func:`log_projection`."""
    rows = row if isinstance(row, Tensor) else torch.full(S.shape[:-1], row, dtype=torch.float64)
    columns = col if isinstance(col, Tensor) else torch.full((*S.shape[:-2], S.shape[-1]), col, dtype=torch.float64)
    return half_steps(S, half_step_count, first, row=rows, col=columns)


def assignments(scores: Tensor, temperature: float, sweeps: int) -> Tensor:
    """SwAV's and DINOv2's loop, on Q = exp(scores / temperature) (K, B): prototypes to 1 / K, samples to 1 / B, times B."""
    Q = (scores.double() / temperature).exp().mT
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(sweeps):
        Q = Q / (K * Q.sum(1, keepdim=True))
        Q = Q / (B * Q.sum(0, keepdim=True))
    return (Q * B).mT
