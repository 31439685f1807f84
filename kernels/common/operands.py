"""Arguments of kernels that several families spell alike. What is absent is None, its strides 0: no kernel reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

OF_TEMPERATURE = {"scale": math.log2(math.e), "inverse_temperature": 1.0}
"""Arguments that are a number over the temperature that all matrices share, and decide nothing else."""


def strides_of(given: Mapping[str, tuple[str, Tensor | None]]) -> dict[str, int]:
    """Stride arguments by name: of each axis of a tensor, such as {"row": ("bn", row_marginal)}."""
    return {
        f"{name}_stride_{axis}": 0 if x is None else x.stride(dim)
        for name, (axes, x) in given.items()
        for dim, axis in enumerate(axes)
    }


def scale_of(temperature: float | Tensor) -> float:
    """log2(e) over a temperature that all matrices share; of a tensor, log2(e)."""
    return OF_TEMPERATURE["scale"] / (1.0 if isinstance(temperature, Tensor) else float(temperature))


def inverse_of(temperature: float | Tensor) -> float:
    """1 over a temperature that all matrices share; of a tensor, 1."""
    return 1.0 / (1.0 if isinstance(temperature, Tensor) else float(temperature))
