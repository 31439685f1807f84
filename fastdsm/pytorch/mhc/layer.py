"""The mHC layer on the PyTorch path: pre and post with their gradients, of tokens X (T, n, C), one row of T.

Products are made in the dtype of the arithmetic; streams of 16 bits are widened piece by piece. What a backward keeps of pre is
its sums, (D + 1) a token: mixes are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._ops.mixing import Mixing
from ..._ops.problem import compute_dtype
from ...reference.mhc import spectrum
from .mixes import mixes, mixes_backward, pre_alone

_PIECE = 1 << 18  # entries of streams that are widened at once


def pre(
    X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, mixing: Mixing, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """h (T, C), pre, post, comb, info (T, n + 2), and the sums (T, D + 1); post, comb and info None of a head.

    fn (D, n C), scale, base in the dtype of the arithmetic. given (T, n): what h is collapsed by in place of pre.
    """
    n, width = X.shape[1], X.shape[1] * X.shape[2]

    def summed(where: slice) -> tuple[Tensor]:
        flat = _wide(X[where]).reshape(-1, width)
        sums = fn.new_empty(len(flat), len(base) + 1)
        sums[:, :-1] = flat @ fn.mT
        sums[:, -1] = torch.linalg.vector_norm(flat, dim=1).square_()
        return (sums,)

    (sums,) = _joined(summed, X)
    found = mixes(sums, scale, base, width, n, mixing)
    weights = found.pre if given is None else given

    def collapsed(where: slice) -> tuple[Tensor]:
        return ((weights[where].unsqueeze(1) @ _wide(X[where])).squeeze(1).to(X.dtype),)

    info = spectrum(found.comb) if mixing.spectrum and found.comb is not None else None
    return *_joined(collapsed, X), found.pre, found.post, found.comb, info, sums


def pre_backward(
    d_h: Tensor | None, d_pre: Tensor | None, d_post: Tensor | None, d_comb: Tensor | None,
    X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sums: Tensor, mixing: Mixing,
    given: Tensor | None = None, add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients in X, fn, scale, base and ``given``; ``add`` (T, n, C): another gradient in X, for the sum of both."""
    n, width = X.shape[1], X.shape[1] * X.shape[2]
    weights = d_weights = None
    if d_h is not None:
        (d_weights,) = _joined(lambda where: (_products(d_h[where], X[where]),), X)
        weights = given
        if given is None:
            weights = pre_alone(sums, scale, base, width, n, mixing)
            d_pre = d_weights if d_pre is None else d_pre + d_weights
    slopes = mixes_backward(d_pre, d_post, d_comb, sums, scale, base, width, n, mixing)
    d_fn = torch.zeros_like(fn)

    def gradient(where: slice) -> tuple[Tensor]:
        flat = _wide(X[where]).reshape(-1, width)
        d_fn.addmm_(slopes.sums[where].mT, flat)
        of_sums = slopes.sums[where]
        grad = of_sums @ fn if add is None else torch.addmm(_wide(add[where]).reshape(-1, width), of_sums, fn)
        grad = grad.addcmul_(flat, slopes.factor[where]).view(-1, *X.shape[1:])
        if d_h is not None and weights is not None:
            grad.addcmul_(weights[where].unsqueeze(2), _wide(d_h[where]).unsqueeze(1))
        return (grad.to(X.dtype),)

    (d_X,) = _joined(gradient, X)
    return d_X, d_fn, slopes.scale, slopes.base, None if given is None else d_weights


def post(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor) -> Tensor:
    """X'_new = weights_new x + sum_old comb[old, new] X_old, (T, n, C)."""

    def mixed(where: slice) -> tuple[Tensor]:
        written = weights[where].unsqueeze(2) * _wide(x[where]).unsqueeze(1)
        return (written.baddbmm_(comb[where].mT, _wide(X[where])).to(X.dtype),)

    return _joined(mixed, X)[0]


def post_backward(
    d_mixed: Tensor, x: Tensor, X: Tensor, weights: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in x, X, the weights and comb."""

    def gradients(where: slice) -> tuple[Tensor, ...]:
        grad = _wide(d_mixed[where])
        d_x = (weights[where].unsqueeze(1) @ grad).squeeze(1)
        return d_x.to(x.dtype), (comb[where] @ grad).to(X.dtype), _products(x[where], grad), _wide(X[where]) @ grad.mT

    d_x, d_X, d_weights, d_comb = _joined(gradients, X)
    return d_x, d_X, d_weights, d_comb


def _products(x: Tensor, streams: Tensor) -> Tensor:
    """<x, X_i> of x (T, C) with each stream, (T, n)."""
    return (_wide(x).unsqueeze(1) @ _wide(streams).mT).squeeze(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _joined(function: Callable[[slice], tuple[Tensor, ...]], X: Tensor) -> tuple[Any, ...]:
    """The results of all tokens: at once where nothing is widened, else piece by piece."""
    tokens, n, channels = X.shape
    size = max(1, _PIECE // (n * channels))
    if X.dtype == compute_dtype(X.dtype) or tokens <= size:
        return function(slice(0, tokens))
    pieces = [function(slice(begin, begin + size)) for begin in range(0, tokens, size)]
    return tuple(map(torch.cat, zip(*pieces, strict=True)))
