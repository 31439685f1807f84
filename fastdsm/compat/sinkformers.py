"""Sinkformers: the projection of their attention, counted in half steps.

Source: michaelsdr/sinkformers, ``vit-pytorch/vit_pytorch/sinkhorn.py`` and ``nlp-tutorial/text-classification-transformer/
sinkhorn.py``; arXiv 2110.11773.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._ops import arguments
from ..projection import sinkhorn
from ._shared import Convention

_PADDED = -9e8  # the origin, whose padded scores are -1e9, resets column potentials above 9e8


class SinkhornDistance(nn.Module):
    """The plan of scores c, of mass 1 in all: ``max_iter`` normalisations of rows and columns in turn, rows first.

    Args:
        eps: > 0, what scores are divided by.
        max_iter: half steps, >= 1: rows are exact after an odd number (the paper's 3, 5, 21), columns after an even one.
        reduction: "none", as nothing is reduced there.
        detach: False, as in the vision transformer, or True, as in the NLP encoder: there potentials of columns are constants
            in the gradient, and columns whose scores are all below -9e8, as masked_fill_(mask, -1e9) makes them, are padding,
            which takes no part. Give the NLP encoder's scores to no module without it: such columns would have their mass.

    forward(c), c (..., n, m) of float16, bfloat16, float32 or float64, gives (pi, C, U, V): the plan, -c, and the potentials U
    (..., n) and V (..., m), pi = exp((c + U + V) / eps). Differentiable. The origin stops where U changes by less than 1e-12;
    its masses are float32's in float64 too, 1e-8 off, and it is wrong for a single matrix (batch 1), which becomes n of them.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """

    def __init__(self, eps: float, max_iter: int, reduction: str = "none", *, detach: bool = False) -> None:
        super().__init__()
        arguments.check_choice(reduction, "reduction", ("none",))
        arguments.check_temperature(eps, "eps")
        self.eps, self.max_iter, self.reduction = eps, arguments.count_of(max_iter, "max_iter", 1), reduction
        self.detach = detach

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """pi, C, U and V of scores ``c``."""
        arguments.check_matrices(c, "c")
        n, m = c.shape[-2:]
        if self.detach:
            return self._detached(c)
        masses: dict[str, Any] = {"row_marginal": 1.0 / n, "col_marginal": 1.0 / m}
        plan, info = sinkhorn(c, temperature=self.eps, half_steps=self.max_iter, first="row", return_info=True, **masses)
        return plan, -c, self.eps * info.f, self.eps * info.g

    def _detached(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With constants for potentials of columns: one normalisation of rows has a gradient, from the last constant before it.

        Padding leaves columns a total of k / m, k of m being left, and rows one of 1: each column step after the first row step
        is relative to a mass which is so much larger here, where totals agree, and the rows follow.
        """
        n, m = c.shape[-2:]
        S = c.masked_fill(c <= _PADDED, -torch.inf)
        left = (~S.isneginf()).any(-2)
        masses: dict[str, Any] = {"row_marginal": 1.0 / n, "temperature": self.eps, "return_info": True}
        row_steps, ends_with_columns = (self.max_iter + 1) // 2, self.max_iter % 2 == 0
        before = c.new_zeros((*c.shape[:-2], m), dtype=torch.promote_types(c.dtype, torch.float32))
        with torch.no_grad():
            if row_steps > 1:
                _, info = sinkhorn(S, first="row", n_iters=row_steps - 1, **masses)
                before = info.g
        plan, rows = sinkhorn(S + self.eps * before.unsqueeze(-2), n_iters=0, **masses)
        excess = (m / left.sum(-1, keepdim=True).to(before)).log()
        f, g = rows.f, before
        if ends_with_columns:
            with torch.no_grad():
                _, info = sinkhorn(S, first="row", n_iters=1, f0=before, **masses)
                change = info.g - before - excess
            plan, g = plan * change.exp().unsqueeze(-2).to(plan.dtype), info.g - excess
        drift = (row_steps - 1) * excess
        g = torch.where(left, g - drift, 0.0)
        return plan.to(c.dtype), -c, self.eps * (f + drift), self.eps * g


CONVENTIONS = (
    Convention(
        "SinkhornDistance",
        "rows",
        "rows, odd; columns, even",
        "max_iter: a half step",
        "1/n | 1/m",
        "eps",
        "scores",
        "as given",
    ),
)
