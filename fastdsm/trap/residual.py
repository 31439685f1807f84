"""Residual connections: contraction against its bound, and stagnation at the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..diagnostics import product_sigma2, residual_contraction, stagnation_index
from ..projection import sinkhorn
from ..spectrum import sigma2
from .result import ACCENT, DARK, SECOND, Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _LAYERS = 64, 24
_WEIGHTS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)


def run() -> Result:
    """R = (1 - a) I + a P for weights a from identity to pure mixing."""
    logits = torch.randn(_LAYERS, _SIZE, _SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plans = sinkhorn(logits, tol=1e-9, n_iters=500)
    each = sigma2(plans)
    eye = torch.eye(_SIZE, dtype=torch.float64)
    rows = []
    for a in _WEIGHTS:
        layers = (1 - a) * eye + a * plans
        measured = sigma2(layers)
        bound = residual_contraction(each, a)
        stack, whole = number(product_sigma2(layers)), number(bound.prod())
        rows.append((a, number(measured.mean()), number(bound.mean()), number(stagnation_index(each.mean(), a)), stack, whole))
    text = (
        f"{_LAYERS} layers R = (1 − a) I + a P of random plans of size {_SIZE} (mean sigma2 {each.mean():.2f}). sigma2(R) "
        "stays below 1 − a + a sigma2(P). At small a the stack keeps its detail because it stands still: the stagnation index "
        "a sigma2 / (1 − a) is near 0, and the plans add nothing; at a = 1 it is pure mixing, and detail is gone. Both ends "
        "are failures."
    )

    def draw(axes: Sequence[Axes]) -> None:
        a, measured, bound, index, stack, whole = (list(x) for x in zip(*rows, strict=True))
        axes[0].plot(a, bound, "--", color=SECOND, label="bound 1 − a + a σ₂")
        axes[0].plot(a, measured, "o", color=DARK, label="measured σ₂ of a layer")
        axes[0].plot(a, [min(x, 1.2) for x in index], "-", color=ACCENT, label="stagnation index")
        axes[0].set(xlabel="weight a of the plan", ylim=(0, 1.2))
        axes[0].legend(frameon=False)
        axes[1].plot(a, whole, "--", color=SECOND, label="product of the bounds")
        axes[1].plot(a, stack, "o", color=DARK, label="measured σ₂ of the stack")
        axes[1].set(yscale="log", xlabel="weight a of the plan", ylabel=f"σ₂ of {_LAYERS} layers")
        axes[1].legend(frameon=False)

    columns = ("a", "sigma2(R) measured", "bound", "stagnation index", "sigma2 of the stack", "product of bounds")
    return Result("residual", "Residual connections: contraction and stagnation", text, columns, rows, 2, draw)
