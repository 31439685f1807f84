"""Checks of the public calls' arguments: each error says what was expected, what came, and what to do."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .marginals import valid_entries
from .problem import compute_dtype
from .sharded import are_unread

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "torch", "reference")
_TOTAL_TOLERANCE = 1e-4


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def check_matrices(x: Tensor, name: str, least: int = 1) -> None:
    """Dense, of a float dtype and at least two dimensions, with ``least`` rows and columns, 0 or 1."""
    check_floating(x, name, "(..., n, m)")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (..., n, m), got {_shape(x)}; a vector needs a second dimension")
    if least and 0 in x.shape[-2:]:
        raise ValueError(f"{name} must have n >= 1 and m >= 1, got {_shape(x)}")


def check_floating(x: Any, name: str, shape: object) -> None:
    """A dense tensor of a float dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert with {name}.float()")
    check_dense(x, name)


def check_dense(x: Tensor, name: str) -> None:
    """With memory of its own for every entry."""
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one; convert with to_dense() or to_padded_tensor()")


def check_choice(value: str, name: str, allowed: Sequence[str]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def count_of(value: Any, name: str, least: int = 0) -> int:
    """An integer of any integral type, as an int (symbolic ones pass)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= {least}, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def check_tol(tol: float | None) -> None:
    """None, or a non-negative number."""
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be None or >= 0 (a relative residual such as 1e-6), got {tol}")


def line_vector(x: Tensor | None, name: str, like: Tensor, length: int, role: str) -> Tensor | None:
    """A potential or marginal as (*batch, length) in the compute dtype, checked and broadcast over the batch."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        number = " or a number" if name.endswith("marginal") else ""
        raise TypeError(f"{name} must be a floating-point tensor of shape (..., {length}){number}, got {_kind(x)}")
    check_device(x, name, like)
    if x.dim() < 1 or x.shape[-1] != length:
        raise ValueError(f"{name} must have shape (..., {length}), one entry per {role}, got {_shape(x)}")
    return broadcast(x, name, (*like.shape[:-2], length)).to(compute_dtype(like.dtype))


def of_projection(tensors: tuple[Any, ...], first: str) -> tuple[Any, ...]:
    """A call's tensors, checked, in the shapes and dtypes that they stand for; a temperature may be a number."""
    logits, temperature, f0, row, col, mask = tensors
    n, m = logits.shape[-2:]
    side, role = (n, "row") if first == "col" else (m, "column")
    return (
        logits,
        temperature_of(temperature, logits),
        line_vector(f0, "f0", logits, side, role),
        line_vector(row, "row_marginal", logits, n, "row"),
        line_vector(col, "col_marginal", logits, m, "column"),
        mask_of(mask, logits),
    )


def marginals_of(row: Any, col: Any, matrices: Any) -> tuple[Any, Any]:
    """Numbers as the marginals (n,) and (m,) that they stand for, of each line; what else came as it is, to be checked."""
    if (row is None or isinstance(row, Tensor)) and (col is None or isinstance(col, Tensor)):
        return row, col
    if not isinstance(matrices, Tensor) or matrices.dim() < 2:
        return row, col

    def of_lines(x: Any, lines: int) -> Any:
        if isinstance(x, bool) or not isinstance(x, numbers.Real):
            return x
        return torch.full((lines,), float(x), dtype=compute_dtype(matrices.dtype), device=matrices.device)

    n, m = matrices.shape[-2:]
    return of_lines(row, n), of_lines(col, m)


Flattening = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def flattening(given: tuple[Any, ...], formed: tuple[Any, ...], batch: int) -> Flattening | None:
    """What brings tensors like those ``given`` to the shapes and dtypes of those ``formed``, ``batch`` dimensions made one.

    None where they are so already.
    """
    steps: list[tuple[Any, ...] | None] = []
    for x, y in zip(given, formed, strict=True):
        if not isinstance(y, Tensor):
            steps.append(None)
            continue
        flat = y.shape if batch == 1 else (math.prod(y.shape[:batch]), *y.shape[batch:])
        steps.append(None if (x.shape, x.dtype) == (flat, y.dtype) else (y.shape, y.dtype, flat))
    if not any(steps):
        return None

    def flatten(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([x if step is None else _formed(x, *step) for x, step in zip(tensors, steps, strict=True)])

    return flatten


def unflattened(results: Sequence[Any], batch: torch.Size) -> Sequence[Any]:
    """Results (B, ...) in the batch shape that was made one dimension; None stays."""
    if len(batch) == 1:
        return results
    return [x if x is None else x.reshape((*batch, *x.shape[1:])) for x in results]


def _formed(x: Tensor, shape: torch.Size, dtype: torch.dtype, flat: tuple[int, ...]) -> Tensor:
    return x.expand(shape).to(dtype).reshape(flat)


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


def check_temperature(temperature: Any, name: str = "temperature") -> None:
    """A positive number, of any real type."""
    if isinstance(temperature, bool) or not isinstance(temperature, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a float or a tensor, got {type(temperature).__name__}")
    value: Any = temperature
    if not value > 0 or value == math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {temperature}")


def check_temperatures(temperature: Tensor | None, name: str = "temperature") -> None:
    """Positive, as far as values can be looked at."""
    if temperature is not None and may_read(temperature) and not _least(temperature) > 0:
        raise _bad(temperature > 0, temperature, f"{name} must be > 0 everywhere")


def temperature_of(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """A positive float, or a tensor broadcast to the batch shape in the compute dtype."""
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
        return float(temperature)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be a floating-point tensor, got {temperature.dtype}")
    check_device(temperature, "temperature", like)
    check_temperatures(temperature)
    batch = tuple(like.shape[:-2])
    try:
        return temperature.expand(batch).to(compute_dtype(like.dtype))
    except RuntimeError:
        raise ValueError(
            f"temperature must be broadcastable to the batch shape {batch} (no trailing ones for n and m), "
            f"got {_shape(temperature)}"
        ) from None


def is_symbol(number: Any) -> bool:
    """Whether torch.compile has a number as a symbol, which as an operator's float would be a constant, compiled for anew.

    1, the usual default, may be that: with dynamic=True defaults are symbols too.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return not has_static_value(number) and number != 1.0


def filled(number: float, shape: Sequence[int], like: Tensor) -> Tensor:
    """A number as a tensor in the compute dtype. A product, since a fill with a symbol is one with a constant, too."""
    return torch.ones(shape, dtype=compute_dtype(like.dtype), device=like.device) * number


def check_sigma2(target: float | Tensor, name: str) -> None:
    """In (0, 1), as far as values can be looked at."""
    if not isinstance(target, Tensor):
        if not 0 < target < 1:
            raise ValueError(f"{name} must lie in (0, 1), between the uniform plan and a permutation, got {target}")
    elif may_read(target):
        good = (target > 0) & (target < 1)
        if not bool(good.all()):
            raise _bad(good, target, f"{name} must lie in (0, 1) everywhere")


def sigma2_of(target: float | Tensor, name: str, like: Tensor) -> float | Tensor:
    """A sigma2 in (0, 1), a float, or a tensor broadcast to the batch shape in the compute dtype."""
    if not isinstance(target, Tensor):
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise TypeError(f"{name} must be a float or a tensor, got {type(target).__name__}")
        check_sigma2(target, name)
        return target
    if not target.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {target.dtype}")
    check_device(target, name, like)
    check_sigma2(target, name)
    return broadcast(target, name, tuple(like.shape[:-2])).to(compute_dtype(like.dtype))


def check_marginals(row: Tensor | None, col: Tensor | None) -> None:
    """Non-negative. Values on an accelerator are not looked at: it would stall the host."""
    for x, name in ((row, "row_marginal"), (col, "col_marginal")):
        if x is not None and may_read(x) and not _least(x) >= 0:
            raise _bad(x >= 0, x, f"{name} must be >= 0 everywhere")


def tolerance_of_totals(row: Any, col: Any) -> float:
    """How far apart, relatively, the totals of marginals may be that came in these dtypes, in which they were rounded."""
    given = [x.dtype for x in (row, col) if isinstance(x, Tensor) and x.is_floating_point()]
    return max([_TOTAL_TOLERANCE, *(4 * torch.finfo(dtype).eps for dtype in given)])


def equalised(row: Tensor | None, col: Tensor | None, mask: Tensor | None, tolerance: float) -> Tensor | None:
    """``col`` scaled to the total of ``row``, each of the lines that a mask leaves, where both are given and non-negative.

    Totals further apart are an error where they can be read, else NaN.
    """
    if row is None or col is None:
        check_marginals(row, col)
        return col
    readable = may_read(row)
    if readable and not (_least(row) >= 0 and _least(col) >= 0):
        check_marginals(row, col)
    if not (row.numel() and col.numel()):
        return col
    rows, cols = row, col
    if mask is not None:
        valid = valid_entries(mask, mask, row, col)
        rows, cols = row.where(valid.any(-1), 0.0), col.where(valid.any(-2), 0.0)
    if torch.is_grad_enabled() and (row.requires_grad or col.requires_grad):
        rows, cols = rows.where(row != 0, 0.0), cols.where(col != 0, 0.0)  # a line that is excluded has no gradient
    total, other = rows.sum(-1, keepdim=True), cols.sum(-1, keepdim=True)
    ratio = total / other
    if readable:
        least, most = _values_of(ratio).aminmax()
        if abs(float(least) - 1.0) <= tolerance and abs(float(most) - 1.0) <= tolerance:
            return col * ratio
    close = (total - other).abs() <= tolerance * other
    if readable and not bool(close.all()):
        message = f"row_marginal and col_marginal must have equal totals (to {tolerance:g} relative); scale one of them"
        raise _bad(close.squeeze(-1), (total - other).squeeze(-1), message, "the difference is")
    tiny = torch.finfo(other.dtype).tiny  # marginals of nothing are nothing
    return col * torch.where(close, total / other.clamp(min=tiny), torch.nan)


def may_read(x: Tensor) -> bool:
    """Whether values can be read: not on an accelerator, in a trace or a transform, or of a part of a tensor."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not are_unread()
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(x, torch._subclasses.FakeTensor)
    )


def _least(x: Tensor) -> float:
    """The smallest value, NaN where one is; inf of none."""
    return float(_values_of(x).min()) if x.numel() else math.inf


def _values_of(x: Tensor) -> Tensor:
    """``x`` without a gradient."""
    return x.detach() if x.requires_grad else x


def _bad(good: Tensor, shown: Tensor, message: str, verb: str = "got") -> ValueError:
    """The error of values that are not good, with the first of them."""
    worst = shown.detach().masked_fill(good, 0.0).flatten()
    return ValueError(f"{message}, {verb} {worst[worst != 0][:1].tolist() or [0.0]}".replace("[", "").replace("]", ""))


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
