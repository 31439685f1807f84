"""Who computes the mHC layer: the Triton kernels where they serve, else the PyTorch path."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..pytorch import mhc
from .mixing import Mixing


def sweeps_with_eps(logits: Tensor, n_iters: int, columns_first: bool, eps: float, floored: bool, backend: str) -> Tensor:
    """H of (B, n, m) logits."""
    return mhc.sweeps_with_eps(logits, n_iters, columns_first, eps, floored)


def sweeps_with_eps_backward(grad_plan: Tensor, logits: Tensor, *options: Any) -> Tensor:
    """Its gradient."""
    return mhc.sweeps_with_eps_backward(grad_plan, logits, *options[:-1])


def pre(X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, mixing: Mixing, given: Tensor | None, backend: str) -> Any:
    """h, pre, post, comb and sums."""
    return mhc.pre(X, fn, scale, base, mixing, given)


def pre_backward(*inputs: Any) -> Any:
    """Gradients in X, fn, scale, base and given."""
    return mhc.pre_backward(*inputs[:-1])


def post(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, backend: str) -> Tensor:
    """X'."""
    return mhc.post(x, X, weights, comb)


def post_backward(*inputs: Any) -> Any:
    """Gradients in x, X, the weights and comb."""
    return mhc.post_backward(*inputs[:-1])


def post_pre(
    x: Tensor, X: Tensor, weights: Tensor, comb: Tensor,
    fn: Tensor, scale: Tensor, base: Tensor, mixing: Mixing, given: Tensor | None, backend: str,
) -> Any:  # fmt: skip
    """X' and all of :func:`pre` of it."""
    mixed = post(x, X, weights, comb, backend)
    return mixed, *pre(mixed, fn, scale, base, mixing, given, backend)
