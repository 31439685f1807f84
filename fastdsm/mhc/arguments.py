"""Checks of the layer's arguments, by their roles: what was expected, what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.arguments import DTYPES, check_dense
from .._ops.problem import compute_dtype

MOST_STREAMS = 16


def check_floating(x: Any, name: str, shape: object) -> None:
    """A dense tensor of a floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    check_dense(x, name)


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
    check_floating(x, name, shape)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, {meaning}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of the streams, {like.device}, got {x.device}")
    wide: Tensor = x.to(compute_dtype(like.dtype)).contiguous()
    return wide


def of_tokens(x: Any, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., *shape), a value for each of the tokens of ``like`` (..., n, C), as (T, *shape)."""
    whole = (*like.shape[:-2], *shape)
    check_floating(x, name, whole)
    if tuple(x.shape) != whole:
        raise ValueError(f"{name} must have shape {whole}, as residual has {tuple(like.shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of the streams, {like.device}, got {x.device}")
    flat: Tensor = x.to(dtype).reshape(-1, *shape)
    return flat
