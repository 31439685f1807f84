"""The way out: the same network with sigma2 held at a floor keeps its detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..nn import SinkhornProjection
from .depth import decay
from .result import ACCENT, DARK, SECOND, THIRD, Result, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _LAYERS, _TEMPERATURE, _SWEEPS = 32, 12, 1.5, 300
_FLOORS = (None, 0.5, 0.9, 0.99)


def run() -> Result:
    """A stack of random logits, free and with sigma2 of every layer held at a floor by its temperature."""
    logits = torch.randn(_LAYERS, _SIZE, _SIZE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for floor in _FLOORS:
        layer = SinkhornProjection(_SWEEPS, _TEMPERATURE, tol=1e-8, sigma2_floor=floor)
        found["no floor" if floor is None else f"floor {floor}"] = decay(layer(logits))
    rows = [
        (name, number(x[:, 0].min()), number(x[:, 0].max()), number(x[-1, 1]), number(x[-1, 2]), number(x[-1, 3]))
        for name, x in found.items()
    ]
    text = (
        f"{_LAYERS} layers of random logits of size {_SIZE} at temperature {_TEMPERATURE}, the same logits in every row; "
        "SpectralFloor lowers the temperature of each layer to where its sigma2 is the floor. Measured is the energy of detail "
        f"of random features behind the last layer: {rows[0][-1]:.1e} without a floor, {rows[-1][-1]:.1e} with the highest. "
        "The floor holds for each layer; the product keeps less than its power, because the leading directions of different "
        "layers do not align."
    )

    def draw(axes: Sequence[Axes]) -> None:
        for (name, x), colour in zip(found.items(), (DARK, SECOND, ACCENT, THIRD), strict=True):
            layers = range(1, len(x) + 1)
            axes[0].plot(layers, x[:, 3], "o-", color=colour, label=name, markersize=4)
            axes[1].plot(layers, x[:, 1], "--", color=colour, linewidth=1)
            axes[1].plot(layers, x[:, 2], "o-", color=colour, label=name, markersize=4)
        axes[0].set(yscale="log", xlabel="layer", ylabel="detail energy left, measured")
        axes[1].set(yscale="log", xlabel="layer", ylabel="σ₂² of the product (dashed: product of σ₂²)")
        axes[0].legend(frameon=False)

    columns = ("network", "least sigma2", "largest", "product of sigma2²", "sigma2² of the product", "detail energy measured")
    return Result("floor", "The way out: sigma2 held at a floor", text, columns, rows, 2, draw)
