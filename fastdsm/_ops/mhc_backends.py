"""Who computes the mHC layer: the Triton kernels where they serve, else the PyTorch path."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..pytorch import mhc
from .mixing import Mixing


def _launch(backend: str, X: Tensor) -> ModuleType | None:
    """The kernels' calls, if they serve streams X (T, n, C)."""
    if backend != "triton" or X.dtype == torch.float64 or X.shape[0] == 0:
        return None
    from ..kernels.mhc import launch

    return launch


def _on_end(x: Tensor) -> Tensor:
    """With a unit last stride, as kernels read streams."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _into(out: Tensor | None, x: Tensor) -> Tensor:
    return x if out is None else out.copy_(x)


def pre(
    X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, mixing: Mixing, given: Tensor | None, backend: str,
    out: Tensor | None = None,
) -> Any:  # fmt: skip
    """h, pre, post, comb, info and sums; h in ``out`` if that is given."""
    launch = _launch(backend, X)
    if launch is None:
        h, *others = mhc.pre(X, fn, scale, base, mixing, given)
        return _into(out, h), *others
    return launch.pre(_on_end(X), fn, scale, base, mixing, given, out)


def pre_backward(
    d_h: Tensor | None, d_pre: Tensor | None, d_post: Tensor | None, d_comb: Tensor | None,
    X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sums: Tensor, mixing: Mixing,
    given: Tensor | None, add: Tensor | None, backend: str,
) -> Any:  # fmt: skip
    """Gradients in X, fn, scale, base and given."""
    launch = _launch(backend, X)
    if launch is None:
        return mhc.pre_backward(d_h, d_pre, d_post, d_comb, X, fn, scale, base, sums, mixing, given, add)
    d_h = X.new_zeros((X.shape[0], X.shape[2])) if d_h is None else _on_end(d_h)
    d_pre, d_post, d_comb = (None if x is None else x.contiguous() for x in (d_pre, d_post, d_comb))
    add = None if add is None else _on_end(add)
    return launch.pre_backward(d_h, d_pre, d_post, d_comb, _on_end(X), fn, scale, base, sums, mixing, given, add)


def post(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, backend: str, out: Tensor | None = None) -> Tensor:
    """X', in ``out`` if that is given."""
    launch = _launch(backend, X)
    if launch is None:
        return _into(out, mhc.post(x, X, weights, comb))
    mixed: Tensor = launch.post(_on_end(x), _on_end(X), weights.contiguous(), comb.contiguous(), out)
    return mixed


def post_backward(d_mixed: Tensor, x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, backend: str) -> Any:
    """Gradients in x, X, the weights and comb."""
    launch = _launch(backend, X)
    if launch is None:
        return mhc.post_backward(d_mixed, x, X, weights, comb)
    return launch.post_backward(_on_end(d_mixed), _on_end(x), _on_end(X), weights.contiguous(), comb.contiguous())


def post_pre(
    x: Tensor, X: Tensor, weights: Tensor, comb: Tensor,
    fn: Tensor, scale: Tensor, base: Tensor, mixing: Mixing, given: Tensor | None, backend: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> Any:  # fmt: skip
    """X' and all of :func:`pre` of it, X' and h in ``out`` if that is given."""
    launch = _launch(backend, X)
    if launch is None:
        mixed = post(x, X, weights, comb, backend, out[0] if out else None)
        return mixed, *pre(mixed, fn, scale, base, mixing, given, backend, out[1] if out else None)
    written = _on_end(x), _on_end(X), weights.contiguous(), comb.contiguous()
    return launch.post_pre(*written, fn, scale, base, mixing, given, out)
