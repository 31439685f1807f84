"""Checks of the public calls' arguments: each error says what was expected, what came, and what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "torch", "reference")
_TOTAL_TOLERANCE = 1e-4


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_matrices(x: Tensor, name: str) -> None:
    """Float dtype and at least two dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, m), got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert with {name}.float()")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (..., n, m), got {_shape(x)}; a vector needs a second dimension")
    if 0 in x.shape[-2:]:
        raise ValueError(f"{name} must have n >= 1 and m >= 1, got {_shape(x)}")


def check_choice(value: str, name: str, allowed: Sequence[str]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_count(value: int, name: str) -> None:
    """A non-negative integer (symbolic ones pass)."""
    if isinstance(value, (bool, float)) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= 0, got {value!r} of type {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_tol(tol: float | None) -> None:
    """None, or a non-negative number."""
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be None or >= 0 (a relative residual such as 1e-6), got {tol}")


def line_vector(x: Tensor | None, name: str, like: Tensor, length: int, role: str) -> Tensor | None:
    """A potential or marginal as (*batch, length) in the compute dtype, checked and broadcast over the batch."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor of shape (..., {length}), got {_kind(x)}")
    check_device(x, name, like)
    if x.dim() < 1 or x.shape[-1] != length:
        raise ValueError(f"{name} must have shape (..., {length}), one entry per {role}, got {_shape(x)}")
    return broadcast(x, name, (*like.shape[:-2], length)).to(compute_dtype(like.dtype))


def broadcast(x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """``x.expand(shape)`` with an error that names the argument."""
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must be broadcastable to {tuple(shape)}, got {_shape(x)}") from None


def check_device(x: Tensor, name: str, like: Tensor) -> None:
    """On the device of the matrices."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of the matrices, {like.device}, got {x.device}; move one of them")


def mask_of(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask broadcast to the matrices' shape."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where an entry takes part, got {_kind(mask)}")
    check_device(mask, "mask", like)
    return broadcast(mask, "mask", tuple(like.shape))


def temperature_of(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """A positive float, or a tensor broadcast to the batch shape in the compute dtype."""
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"temperature must be a float or a tensor, got {type(temperature).__name__}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        return float(temperature)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be a floating-point tensor, got {temperature.dtype}")
    check_device(temperature, "temperature", like)
    _check_values(temperature > 0, temperature, "temperature must be > 0 everywhere")
    batch = tuple(like.shape[:-2])
    try:
        return temperature.expand(batch).to(compute_dtype(like.dtype))
    except RuntimeError:
        raise ValueError(
            f"temperature must be broadcastable to the batch shape {batch} (no trailing ones for n and m), "
            f"got {_shape(temperature)}"
        ) from None


def sigma2_of(target: float | Tensor, name: str, like: Tensor) -> Tensor:
    """A sigma2 in (0, 1) as (...,) in the compute dtype; values on an accelerator are not looked at."""
    batch = tuple(like.shape[:-2])
    if not isinstance(target, Tensor):
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise TypeError(f"{name} must be a float or a tensor, got {type(target).__name__}")
        if not 0 < target < 1:
            raise ValueError(f"{name} must lie in (0, 1), between the uniform plan and a permutation, got {target}")
        return torch.full(batch, target, dtype=compute_dtype(like.dtype), device=like.device)
    if not target.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {target.dtype}")
    check_device(target, name, like)
    _check_values((target > 0) & (target < 1), target, f"{name} must lie in (0, 1) everywhere")
    return broadcast(target, name, batch).to(compute_dtype(like.dtype))


def check_marginals(row: Tensor | None, col: Tensor | None) -> None:
    """Non-negative, and with the same total. Values on an accelerator are not looked at: it would stall the host."""
    for x, name in ((row, "row_marginal"), (col, "col_marginal")):
        if x is not None:
            _check_values(x >= 0, x, f"{name} must be >= 0 everywhere")
    if row is not None and col is not None:
        rows, cols = row.sum(-1), col.sum(-1)
        close = (rows - cols).abs() <= _TOTAL_TOLERANCE * torch.maximum(rows, cols)
        _check_values(
            close,
            rows - cols,
            f"row_marginal and col_marginal must have equal totals (to {_TOTAL_TOLERANCE:g} relative); scale one of them",
            "the difference is",
        )


def _check_values(good: Tensor, shown: Tensor, message: str, verb: str = "got") -> None:
    """Raise where a CPU value is bad; silent for values that cannot be read (accelerator, tracing, transforms)."""
    if good.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if isinstance(good, torch._subclasses.FakeTensor) or bool(good.all()):
        return
    worst = shown.masked_fill(good, 0.0).flatten()
    raise ValueError(f"{message}, {verb} {worst[worst != 0][:1].tolist() or [0.0]}".replace("[", "").replace("]", ""))


def resolve_backend(backend: str, x: Tensor) -> str:
    """The word to dispatch on: "triton", "torch" or "reference"; "triton" on a CPU tensor needs the interpreter."""
    check_choice(backend, "backend", BACKENDS)
    if backend == "auto":
        return "triton" if x.device.type == "cuda" else "torch"
    if backend == "triton" and x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            'backend="triton" needs a CUDA tensor, got one on cpu; use backend="auto", move the tensor with .cuda(), '
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    return backend


def _kind(x: object) -> str:
    return f"{x.dtype} of shape {_shape(x)}" if isinstance(x, Tensor) else type(x).__name__
