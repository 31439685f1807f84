"""Which entries take part, and the marginals that hold where none or one is given: one definition for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_entries(mask: Tensor | None, like: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
    """Entries that take part: not masked, and on no line whose marginal is zero."""
    valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.expand(like.shape)
    if row is not None:
        valid = valid & (row != 0).unsqueeze(-1)
    if col is not None:
        valid = valid & (col != 0).unsqueeze(-2)
    return valid


def excluded_entries(mask: Tensor | None, logits: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
    """Entries of logits that take no part: those at -inf, and those that are not valid."""
    below = logits.isneginf()
    return below if mask is row is col is None else below | ~valid_entries(mask, logits, row, col)


def lines_taking_part(logits: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> Tensor:
    """Entries whose lines take part, masked ones among them: what sigma2 of the plan is taken of."""
    valid = ~excluded_entries(mask, logits, row, col)
    return valid.any(-1, keepdim=True) & valid.any(-2, keepdim=True)


def marginals(valid: Tensor, row: Tensor | None, col: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both marginals, 0 on excluded lines: as given, else uniform with the other's total, else 1 for each row."""
    rows, cols = valid.any(-1).to(dtype), valid.any(-2).to(dtype)
    n_rows, n_cols = rows.sum(-1, keepdim=True).clamp(min=1), cols.sum(-1, keepdim=True).clamp(min=1)
    if row is not None:
        total = (row * rows).sum(-1, keepdim=True)
    else:
        total = rows.sum(-1, keepdim=True) if col is None else (col * cols).sum(-1, keepdim=True)
    r = total / n_rows if row is None else row
    c = total / n_cols if col is None else col
    return torch.where(rows > 0, r, 0.0), torch.where(cols > 0, c, 0.0)


def marginals_of(logits: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The marginals (r, c) that :func:`sinkhorn` uses for these logits, differentiable in those given."""
    valid = ~excluded_entries(mask, logits, row, col)
    return marginals(valid, row, col, torch.promote_types(logits.dtype, torch.float32))


def marginals_of_plan(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The marginals (r, c) that :func:`sigma2` takes a plan for."""
    return marginals(valid_entries(mask, plan, row, col), row, col, torch.promote_types(plan.dtype, torch.float32))
