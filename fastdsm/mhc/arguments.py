"""Checks of the layer's arguments, by their roles: what was expected, what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.arguments import check_floating
from .._ops.mixing import MOST_STREAMS
from .._ops.problem import compute_dtype


def streams_of(residual: Tensor, mhc_mult: int | None = None) -> tuple[int, int]:
    """n and C."""
    check_floating(residual, "residual", "(..., n, C)")
    if residual.dim() < 2 or residual.shape[-1] < 1 or not 1 <= residual.shape[-2] <= MOST_STREAMS:
        raise ValueError(
            f"residual must have shape (..., n, C) with 1 to {MOST_STREAMS} streams n and C >= 1, got {tuple(residual.shape)}"
        )
    n, channels = residual.shape[-2:]
    if mhc_mult is not None and mhc_mult != n:
        raise ValueError(f"residual must have mhc_mult={mhc_mult} streams, (..., {mhc_mult}, C), got {tuple(residual.shape)}")
    return n, channels


def parameter(x: Any, name: str, shape: tuple[int, ...], like: Tensor, meaning: str) -> Tensor:
    """In the dtype of the arithmetic, on end."""
    _check(x, name, shape, like, meaning)
    wide: Tensor = x.to(compute_dtype(like.dtype)).contiguous()
    return wide


def weighted(fn: Tensor, norm_weight: Any, like: Tensor) -> Tensor:
    """fn (D, n C) of streams that a weight of their norm (n C,), if there is one, multiplies."""
    if norm_weight is None:
        return fn
    n, channels = like.shape[-2:]
    return fn * parameter(norm_weight, "norm_weight", (n * channels,), like, f"for n={n}, C={channels}")


def of_tokens(x: Any, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., *shape), a value for each of the tokens of ``like`` (..., n, C), as (T, *shape)."""
    _check(x, name, (*like.shape[:-2], *shape), like, f"as residual has {tuple(like.shape)}")
    flat: Tensor = x.to(dtype).reshape(-1, *shape)
    return flat


def _check(x: Any, name: str, shape: tuple[int, ...], like: Tensor, meaning: str) -> None:
    """A tensor of this shape beside the streams."""
    check_floating(x, name, shape)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, {meaning}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of the streams, {like.device}, got {x.device}")
