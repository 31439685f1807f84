"""How a batch of matrices lies in memory, and in what a path with few calls reads and fills it."""

from __future__ import annotations

import torch
from torch import Tensor


def by_columns(x: Tensor) -> bool:
    """Whether (B, n, m) lies column by column, as the transposed problem of ``first="row"`` does."""
    _, down, across = x.stride()
    return down < across


def loaded(x: Tensor, dtype: torch.dtype, temperature: float = 1.0) -> Tensor:
    """Compute x / temperature in ``dtype``: x itself if it is that."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if temperature == 1.0 else x / temperature


def home(target: Tensor, dtype: torch.dtype) -> Tensor:
    """``target`` if ``dtype`` can be computed there, else what is to be copied to it.

    Nothing that is not contiguous can be: torch's softmaxes would fill it in the wrong order, without a word.
    """
    return target if target.dtype == dtype and target.is_contiguous() else torch.empty(target.shape, dtype=dtype)
