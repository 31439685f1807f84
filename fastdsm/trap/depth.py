"""Depth: the energy of detail against the product of sigma2, on random logits and on a real transformer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diagnostics import depth_bound, product_sigma2
from ..projection import sinkhorn
from ..spectrum import sigma2
from .result import ACCENT, DARK, SECOND, Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPS = 2**-9  # half a bfloat16 unit: below it detail is gone from a bfloat16 number near 1
_FEATURES, _SIZE = 256, 64


def run(heads: Tensor) -> Result:
    """``heads``: the attention logits of a model, (layers, heads, n, n); each layer mixes by the mean of its heads' plans."""
    random = torch.randn(12, _SIZE, _SIZE, generator=torch.Generator().manual_seed(2))
    real = _converged(heads).mean(1)
    cases = {"random": decay(_converged(random)), "MiniLM": decay(real)}
    rows: list[tuple[float | str, ...]] = []
    for name, table in cases.items():
        rows += [(name, float(layer), *map(float, row)) for layer, row in enumerate(table, 1)]
    depths = []
    for name, table in cases.items():
        bound = number(depth_bound(table[:, 0], EPS))
        gone = next((str(layer) for layer, row in enumerate(table, 1) if row[3] <= EPS**2), f"beyond {len(table)}")
        limit = f"{bound:.0f}" if bound <= len(table) else f"beyond {len(table)}"
        depths.append(f"{name}: bound {limit}, measured {gone}")
    text = (
        "Detail is what is left of random features when their mean over the tokens is taken away; its energy is relative to "
        "the input's. It lies below the squared sigma2 of the product of layers, and that below the product of the squares, "
        f"at every depth. Layers until its amplitude must be below 2⁻⁹: {'; '.join(depths)}. The random stack is of normal "
        f"logits, n = {_SIZE}; MiniLM's layers are the means of their heads' converged Sinkhorn plans on n = {heads.shape[-1]} "
        "tokens of text, pure mixing without residual connections."
    )

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, table) in zip(axes, cases.items(), strict=True):
            layers = range(1, len(table) + 1)
            axis.plot(layers, table[:, 1], "--", color=SECOND, label="product of σ₂²")
            axis.plot(layers, table[:, 2], "-", color=ACCENT, label="σ₂² of the product")
            axis.plot(layers, table[:, 3], "o", color=DARK, label="measured detail energy")
            axis.set(yscale="log", xlabel="layer", ylabel="energy left", title=name)
            axis.legend(frameon=False)

    columns = ("stack", "layer", "sigma2", "product of sigma2²", "sigma2² of the product", "detail energy measured")
    return Result("depth", "Depth: detail against the product of sigma2", text, columns, rows, 2, draw)


def decay(plans: Tensor) -> Tensor:
    """(L, 4): each layer's sigma2, the product of squares so far, the product's own square, and the energy of detail left."""
    each = sigma2(plans)
    x = torch.randn(plans.shape[-1], _FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x - x.mean(0)
    start, left = x.square().sum(), []
    for plan in plans.double():
        x = plan @ x
        left.append((x - x.mean(0)).square().sum() / start)
    products = [product_sigma2(plans[: layer + 1]).double().square() for layer in range(len(plans))]
    return torch.stack([each.double(), each.double().square().cumprod(0), torch.stack(products), torch.stack(left)], 1)


def _converged(logits: Tensor) -> Tensor:
    plans = sinkhorn(logits, tol=1e-5, n_iters=300)
    return plans
