"""Which kernels the public calls can launch: rows of the finite table, found by asking the launchers themselves.

Every operator of a call runs on uninitialised CPU tensors, once for each choice that options, strides and alignment can make,
with its launches recorded instead of made and a PyTorch path that does nothing. What a call launches depends on nothing else:
neither on values nor on the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .. import kernels
from ..kernels.attention import launch_short
from ..kernels.common.configuration import Configuration, recorded
from ..kernels.registers.backward import MAX_BACKWARD_SWEEPS
from ..kernels.stream import spectrum as stream_spectrum
from . import backends, newton  # transforms: it makes the operators complete
from .mixing import Mixing
from .problem import compute_dtype

Shape = tuple[int, int]
# A size for each choice that launchers make by it: of matrices, of an attention's lines, of its features.
MATRICES: tuple[Shape, ...] = (
    *((n, n) for n in (4, 5, 6, 7, 8, 16, 32, 64, 128, 256)),
    *((7, 8), (200, 40), (200, 104), (264, 200)),
    *((16, m) for m in (304, 1000, 2000, 4000, 8000, 9000)),
)
LINES: tuple[Shape, ...] = tuple((n, n) for n in (64, 100, 200, 400, 600))
FEATURES = (64, 128, 256)
STREAMS: tuple[Shape, ...] = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16))
CHANNELS = (64,)
_TOKENS = (1, 40, 70, 300)  # of an mHC layer, by which its product is cut

_BATCH = 2
_FEW, _MANY = 2, MAX_BACKWARD_SWEEPS + 1  # sweeps; the history of many does not fit into registers
_OPERATORS = torch.ops.fastdsm


def places(
    calls: Iterable[str] | None,
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[Shape] | None,
    features: Sequence[int] | None,
    target: str,
) -> list[int]:
    """Where in ``kernels.configurations()`` stands what the public calls of these names can launch on ``target``, "sm_90".

    calls: None for the whole table, whatever else is given. sizes: of matrices as they are passed, of attention (queries, keys)
    and of an mHC layer its streams, twice. features: of query, key and value, or of a stream. None for any.
    """
    table, of_its_kind = kernels.configurations(), f"{target[:-1]}0"
    found = table if calls is None else [_on(target, x) for x in _found(calls, dtypes, sizes, features)]
    return sorted({table.index(x) for x in found if of_its_kind in x.targets})


def _on(target: str, configuration: Configuration) -> Configuration:
    """What ``Configuration.on`` is on a device of that capability."""
    own = configuration.own
    return configuration if own is None or own.targets != (f"{target[:-1]}0",) else own


def _found(
    calls: Iterable[str], dtypes: Sequence[torch.dtype], sizes: Sequence[Shape] | None, features: Sequence[int] | None
) -> Iterable[Configuration]:
    path = SimpleNamespace(**dict.fromkeys(backends.pytorch.__all__, lambda *_: None))
    found: dict[int, Configuration] = {}
    with (
        patch.object(backends, "pytorch", path),
        patch.object(newton, "pytorch", path),
        patch.object(stream_spectrum, "_PASSES", 1),  # all passes are alike
        torch.no_grad(),
        recorded() as launches,
    ):
        for call, dtype in itertools.product(calls, dtypes):
            if call in ATTENTION:
                for shape, d in itertools.product(sizes or LINES, features or FEATURES):
                    ATTENTION[call](shape, d, dtype)
            elif call in LAYERS:
                for shape, channels in itertools.product(sizes or STREAMS, features or CHANNELS):
                    LAYERS[call](shape[0], channels, dtype)
            else:
                for shape in sizes or MATRICES:
                    PROJECTIONS[call](shape, dtype)
            found |= {id(launch.configuration): launch.configuration for launch in launches}
            launches.clear()
    return found.values()


def _layouts(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Matrices packed and not, aligned to 16 bytes and not, by rows and by columns."""
    n, m = shape
    by_columns = (torch.empty(_BATCH * n * m + i, dtype=dtype)[i:].view(_BATCH, m, n).mT for i in (0, 1))
    return [*(torch.empty(_BATCH * n * m + i, dtype=dtype)[i:].view(_BATCH, n, m) for i in (0, 1)), *by_columns]


def _inputs(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Inputs of a projection's operators: every layout, then one option after the other."""
    n, m = shape
    row, col = (torch.empty(_BATCH, lines, dtype=compute_dtype(dtype)) for lines in shape)
    mask = torch.empty(_BATCH, n, m, dtype=torch.bool)
    layouts = _layouts(shape, dtype)
    for columns_first in (True, False):
        for logits in layouts:
            yield logits, None, None, None, None, None, 1.0, _FEW, columns_first, -1.0, "triton"
        for logits in layouts[:2]:
            f0 = row if columns_first else col
            yield logits, None, f0, row, col, None, 1.0, _FEW, columns_first, -1.0, "triton"
            yield logits, None, None, None, None, mask, 1.0, _FEW, columns_first, -1.0, "triton"
            yield logits, None, None, None, None, None, 1.0, _FEW, columns_first, 1e-3, "triton"
            yield logits, None, None, None, None, None, 1.0, _MANY, columns_first, -1.0, "triton"


def _forward(shape: Shape, dtype: torch.dtype, with_sigma2: bool) -> None:
    for inputs in _inputs(shape, dtype):
        if not with_sigma2:
            _OPERATORS.sinkhorn(*inputs)
        _OPERATORS.sinkhorn_info(*inputs, with_sigma2)
        for solver, with_info in itertools.product(("sinkhorn", "newton"), (False, True)):
            _OPERATORS.fixed_point(*inputs, solver, with_info, with_sigma2)


def _backward(shape: Shape, dtype: torch.dtype) -> None:
    """In the dtype of the logits, and in that of a temperature, if it is differentiated."""
    for wide in {dtype, compute_dtype(dtype)}:
        f, g = (torch.empty(_BATCH, lines, dtype=compute_dtype(dtype)) for lines in shape)
        for inputs, cotangent, lines in itertools.product(_inputs(shape, wide), _layouts(shape, wide), (False, True)):
            _OPERATORS.sinkhorn_backward(cotangent, None, *inputs, lines)
            _OPERATORS.fixed_point_backward(cotangent, f, g, *inputs, lines)


def _sinkhorn(shape: Shape, dtype: torch.dtype) -> None:
    _forward(shape, dtype, False)
    _backward(shape, dtype)


def _sinkhorn_sigma2(shape: Shape, dtype: torch.dtype) -> None:
    """In the dtype of the logits, and where a gradient is to come in float32 instead of 16 bits."""
    wide = compute_dtype(dtype)
    for x in {dtype, wide}:
        _forward(shape, x, True)
    _backward(shape, dtype)
    _sigma2(shape, wide)


def _sigma2(shape: Shape, dtype: torch.dtype) -> None:
    for plan in _layouts(shape, dtype):
        _OPERATORS.sigma2(plan, None, None, None, None, "auto", 1e-4, 0, "triton")


def _sigma2_bounds(shape: Shape, dtype: torch.dtype) -> None:
    for plan in _layouts(shape, dtype):
        _OPERATORS.sigma2_bounds(plan, None, None, None, "triton")


def _temperature(shape: Shape, dtype: torch.dtype) -> None:
    """One launch in float32, or converged plans in float64, of which gradients are made anyway."""
    logits, numbers = torch.empty(_BATCH, *shape), torch.empty(_BATCH)
    kernels.temperature_search(logits, None, None, numbers, numbers, 50, numbers, numbers.byte())
    _sinkhorn(shape, torch.float64)
    _sigma2(shape, torch.float64)


def _attention_inputs(shape: Shape, d: int, dtype: torch.dtype, value: Tensor) -> Iterator[tuple[Any, ...]]:
    """Inputs of the operators of attention, with float32 multiplied in either way."""
    query, key = (torch.empty(1, 1, lines, d, dtype=dtype) for lines in shape)
    biases, seed = (None, torch.empty(1, 1, *shape, dtype=dtype)), torch.empty(1, dtype=torch.int64)
    precision = torch.get_float32_matmul_precision()
    options = itertools.product(("highest", "high"), biases, (0.0, 0.1), (0, 1, 3), (True, False), (False, True))
    for multiplied, bias, p, n_iters, columns_first, implicit in options:
        torch.set_float32_matmul_precision(multiplied)
        yield (
            query, key, value, bias, None, None, None, None, seed if p > 0 else None,
            1.0, 1.0, n_iters, columns_first, -1.0, p, implicit, "triton",
        )  # fmt: skip
    torch.set_float32_matmul_precision(precision)


def _attend(shape: Shape, d: int, dtype: torch.dtype, value: Tensor) -> None:
    """Attention and its gradients, in its own dtype and in that of a temperature, if it is differentiated; where a target has
    no launches for heads of few lines, too."""
    for short in (launch_short.serves, lambda *_: False):
        with patch.object(launch_short, "serves", short):
            for wide in {dtype, compute_dtype(dtype)}:
                for inputs in _attention_inputs(shape, d, wide, value if wide == dtype else value.to(wide)):
                    _OPERATORS.sinkhorn_attention(*inputs, True, False)
                    out, f, g, _, sweeps = _OPERATORS.sinkhorn_attention(*inputs, True, True)
                    _OPERATORS.sinkhorn_attention_backward(out, None, None, f, g, sweeps, *inputs, True)


def _sinkhorn_attention(shape: Shape, d: int, dtype: torch.dtype) -> None:
    _attend(shape, d, dtype, torch.empty(1, 1, shape[1], d, dtype=dtype))


def _sinkhorn_attention_sigma2(shape: Shape, d: int, dtype: torch.dtype) -> None:
    """Its gradient is that of an attention whose value is the singular vector."""
    vector = torch.empty(1, 1, shape[1], 1, dtype=compute_dtype(dtype))
    for inputs in _attention_inputs(shape, d, dtype, vector):
        _OPERATORS.sinkhorn_attention_sigma2(*inputs, 1e-4, 2, True)
    _attend(shape, d, dtype, vector)


def _streams(n: int, channels: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Streams X, and x behind a branch, of token counts that are cut differently, aligned to 16 bytes and not."""
    for tokens, offset in itertools.product(_TOKENS, (0, 1)):
        X = torch.empty(tokens * n * channels + offset, dtype=dtype)[offset:].view(tokens, n, channels)
        yield X, torch.empty(tokens, channels, dtype=dtype)


def _layer(X: Tensor, head: bool) -> tuple[Any, ...]:
    """fn, scale and base."""
    n, channels = X.shape[1:]
    rows, wide = n if head else n * (n + 2), compute_dtype(X.dtype)
    shapes = (rows, n * channels), (1 if head else 3,), (rows,)
    return tuple(torch.empty(shape, dtype=wide) for shape in shapes)


def _weights(X: Tensor) -> tuple[Tensor, Tensor]:
    """post and comb."""
    tokens, n, _ = X.shape
    wide = compute_dtype(X.dtype)
    return torch.empty(tokens, n, dtype=wide), torch.empty(tokens, n, n, dtype=wide)


def _mhc_pre(n: int, channels: int, dtype: torch.dtype, head: bool = False) -> None:
    for X, x in _streams(n, channels, dtype):
        for spectrum in (False,) if head else (True, False):
            inputs = (X, *_layer(X, head), None, *Mixing(spectrum=spectrum), "triton")
            _, pre, post, comb, _, sums = _OPERATORS.mhc_pre(*inputs)
        _OPERATORS.mhc_pre_backward(x, pre, post, comb, None, sums, *inputs)


def _mhc_head(n: int, channels: int, dtype: torch.dtype) -> None:
    _mhc_pre(n, channels, dtype, head=True)


def _mhc_post(n: int, channels: int, dtype: torch.dtype) -> None:
    for X, x in _streams(n, channels, dtype):
        mixed = _OPERATORS.mhc_post(x, X, *_weights(X), "triton")
        _OPERATORS.mhc_post_backward(mixed, x, X, *_weights(X), "triton")


def _mhc_post_pre(n: int, channels: int, dtype: torch.dtype) -> None:
    _mhc_pre(n, channels, dtype)
    _mhc_post(n, channels, dtype)
    for X, x in _streams(n, channels, dtype):
        for given in (None, _weights(X)[0]):
            _OPERATORS.mhc_post_pre(x, X, *_weights(X), *_layer(X, False), given, *Mixing(), "triton")


PROJECTIONS: dict[str, Callable[[Shape, torch.dtype], None]] = {
    "sinkhorn": _sinkhorn,
    "sinkhorn_sigma2": _sinkhorn_sigma2,
    "sigma2": _sigma2,
    "sigma2_bounds": _sigma2_bounds,
    "temperature_for_sigma2": _temperature,
}
ATTENTION: dict[str, Callable[[Shape, int, torch.dtype], None]] = {
    "sinkhorn_attention": _sinkhorn_attention,
    "sinkhorn_attention_sigma2": _sinkhorn_attention_sigma2,
}
LAYERS: dict[str, Callable[[int, int, torch.dtype], None]] = {
    "mhc_pre": _mhc_pre,
    "mhc_post": _mhc_post,
    "mhc_post_pre": _mhc_post_pre,
    "mhc_head": _mhc_head,
}
