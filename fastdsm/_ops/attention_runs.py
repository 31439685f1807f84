"""Attention of heads that fit on chip, decided once for each form of its tensors and each set of options; as ``runs.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import backends
from .problem import Attention, Dropout, attention_of, compute_dtype, dropout_of
from .runs import Run, Tensors
from .streamed.gradient import AttentionGradients, Cotangents
from .streamed.sweeps import State, Sweeps

Options = tuple[float, float, int, bool, float, float, bool, str]
"""Scale, temperature, sweeps, whether columns come first, tol, the dropout, whether the gradient is implicit, backend."""


def _named(columns_first: bool, value: str) -> tuple[str, ...]:
    """Of an attention's operands the names that kernels have for them."""
    sides = ("operands.line", "operands.stream")[:: 1 if columns_first else -1]
    return *sides, value, "bias", "mask", "operands.temperature", "query_padding", "key_padding", "seed"


class _Short(Run):
    """``inputs`` end with query, key, value, bias, mask, temperature, query_padding, key_padding and seed."""

    def __init__(self, like: Tensor, results: Any, options: Options) -> None:
        super().__init__(like, results, options[-1])
        self._options = options

    def problem(self, inputs: Tensors) -> tuple[Attention, Tensor, Sweeps, Dropout | None]:
        """What is attended, value, sweeps, and what is dropped."""
        query, key, value, bias, mask, temperature, query_padding, key_padding, seed = inputs
        scale, tau, n_iters, columns_first, tol, p, _, _ = self._options
        assert query is not None
        assert key is not None
        assert value is not None
        problem = attention_of(query, key, value, bias, mask, temperature, query_padding, key_padding, scale, tau)
        return problem, value, Sweeps(n_iters, columns_first, tol), dropout_of(seed, p)

    def _serves(self, kernels: Any, inputs: Tensors, *others: Tensor | None) -> bool:
        """Whether the launches are all there is to do: nothing is copied, or added up, before or after them."""
        query, key, value, bias, mask, temperature, query_padding, key_padding, _ = inputs
        assert query is not None
        assert key is not None
        if any(x is not None for x in (bias, mask, query_padding, key_padding)) or query.shape[1] != key.shape[1]:
            return False
        packed = temperature is None or temperature.is_contiguous()
        whole = all(kernels.attention.operands.whole_lines(x) is x for x in (query, key, value, *others))
        return packed and whole


class ShortForward(_Short):
    """out, f, g, residual and sweeps."""

    def __init__(self, query: Tensor, M: int, e: int, options: Options) -> None:
        (B, H, N, _), wide = query.shape, torch.float64
        potentials = ((B, H, 1, N), wide), ((B, H, 1, M), wide)
        info = ((B, H), compute_dtype(query.dtype)), ((B, H), torch.int32)
        super().__init__(query, [((B, H, N, e), query.dtype), *potentials, *info], options)

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        out, *state = cast("tuple[Tensor, ...]", results)
        backends.short_launches().forward(*self.problem(inputs), out, State(*state))

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        if not self._serves(kernels, inputs):
            return False
        self._run(inputs, scale, results)
        return True

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        return dict(zip(_named(self._options[3], "x"), inputs, strict=True))


class ShortBackward(_Short):
    """Gradients of query, key, value and, where one is wanted, bias, of (grad_out, grad_f, grad_g, sweeps, ...)."""

    def __init__(self, query: Tensor, like: Sequence[tuple[tuple[int, ...], torch.dtype]], options: Options) -> None:
        super().__init__(query, [*like, *[None] * (4 - len(like))], options)

    def _run(self, inputs: Tensors, scale: float, results: Tensors) -> None:
        grad_out, grad_f, grad_g, done, *operands = inputs
        d_query, d_key, d_value, d_bias = results
        assert grad_out is not None
        assert done is not None
        assert d_query is not None
        assert d_key is not None
        assert d_value is not None
        cotangents, gradients = Cotangents(grad_out, grad_f, grad_g), AttentionGradients(d_query, d_key, d_value, d_bias)
        backends.short_launches().backward(*self.problem(tuple(operands)), cotangents, done, gradients)

    def _served(self, kernels: Any, inputs: Tensors, scale: float, results: Tensors) -> bool:
        packed = all(x is None or x.is_contiguous() for x in inputs[1:4])
        if results[3] is not None or not packed or not self._serves(kernels, inputs[4:], inputs[0]):
            return False
        self._run(inputs, scale, results)
        return True

    def named(self, inputs: Tensors) -> Mapping[str, Tensor | None]:
        given = ("line_v", "line_df", "stream_df", "sweeps"), ("stream_v", "stream_df", "line_df", "sweeps")
        columns_first = self._options[3]
        names = *given[not columns_first], *_named(columns_first, "stream_v" if columns_first else "line_v")
        return dict(zip(names, inputs, strict=True))
