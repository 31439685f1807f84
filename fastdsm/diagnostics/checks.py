"""What the diagnostics check and convert alike."""

from __future__ import annotations

import torch
from torch import Tensor


def as_float64(value: float | Tensor) -> Tensor:
    """The value as a float64 tensor without a gradient."""
    return torch.as_tensor(value, dtype=torch.float64).detach()


def result_dtype(*values: float | Tensor) -> torch.dtype:
    """float64 where a float64 tensor is among the values, float32 otherwise."""
    wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in values)
    return torch.float64 if wide else torch.float32


def require(good: Tensor, message: str) -> None:
    """Raise ``message`` where a value on the CPU is bad; looking at those on a GPU would wait for it."""
    if good.device.type == "cpu" and not bool(good.all()):
        raise ValueError(message)


def require_nonnegative(sigma2: Tensor) -> None:
    """Refuse negative singular values; on a GPU the logarithm gives NaN."""
    if sigma2.device.type == "cpu" and bool((sigma2 < 0).any()):
        raise ValueError(f"sigma2 must be >= 0, got {sigma2.min().item()}; pass singular values, not eigenvalues")
