"""``out=``: buffers that the layer's calls write their large results to, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops.plain import has_tangents


def check_buffer(out: Any, name: str, shape: tuple[int, ...], like: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
    """``out``, contiguous, of this shape beside the streams ``like``, where no gradient is asked for and no input lies."""
    tensors = [x for x in inputs if x is not None]
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(out).__name__}")
    if tuple(out.shape) != shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(
            f"{name} must have shape {shape}, {like.dtype} on {like.device}, as residual says, "
            f"got {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {out.stride()}")
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (out, *tensors))
    if wanted or has_tangents(tensors) or torch._C._are_functorch_transforms_active():
        raise ValueError(f"{name} is for inference: no gradient passes through a buffer; use torch.no_grad() or leave it out")
    if not torch.compiler.is_compiling() and any(_overlap(out, x) for x in tensors):
        raise ValueError(f"{name} must not share memory with what is read: one program would write over what another reads")
    return out


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the spans of two tensors in memory meet."""
    (x_first, x_last), (y_first, y_last) = _span(x), _span(y)
    return x.device == y.device and x_first < y_last and y_first < x_last


def _span(x: Tensor) -> tuple[int, int]:
    if x.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()
