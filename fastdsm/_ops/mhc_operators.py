"""The operators of the mHC layer torch sees, with fake kernels; as :mod:`fastdsm._ops.operators`.

Tensors arrive validated, tokens in one row: streams X (T, n, C), x and h (T, C) in one dtype; all others in the dtype of the
arithmetic, fn (D, n C), scale (3,) or of a head (1,), base (D,), weights (T, n), comb (T, n, n) as [old, new]. Results that
there are not have no entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pytorch.mhc import sweeps_with_eps, sweeps_with_eps_backward
from . import mhc_backends as backends
from .mixing import Mixing
from .operators import LIBRARY, implement

_MIXING = (
    "SymInt n_iters, bool columns_first, float sinkhorn_eps, bool floored, float pre_eps, float post_mult, float norm_eps, "
    "bool transposed, bool spectrum, str backend"
)
_SWEEPS = "Tensor logits, SymInt n_iters, bool columns_first, float eps, bool floored"
_LAYER = "Tensor fn, Tensor scale, Tensor base, Tensor? given"
LIBRARY.define(f"sinkhorn_with_eps({_SWEEPS}) -> Tensor")
LIBRARY.define(f"sinkhorn_with_eps_backward(Tensor grad_plan, {_SWEEPS}) -> Tensor")
LIBRARY.define(f"mhc_pre(Tensor X, {_LAYER}, {_MIXING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "mhc_pre_backward(Tensor? d_h, Tensor? d_pre, Tensor? d_post, Tensor? d_comb, Tensor? add, Tensor sums, Tensor X, "
    f"{_LAYER}, {_MIXING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("mhc_post(Tensor x, Tensor X, Tensor weights, Tensor comb, str backend) -> Tensor")
LIBRARY.define(
    "mhc_post_backward(Tensor d_mixed, Tensor x, Tensor X, Tensor weights, Tensor comb, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"mhc_post_pre(Tensor x, Tensor X, Tensor weights, Tensor comb, {_LAYER}, {_MIXING}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Into buffers, without gradients; what is not in a buffer is returned, without the sums.
_RETURNED = "(Tensor, Tensor, Tensor, Tensor)"
LIBRARY.define(f"mhc_pre_out(Tensor X, {_LAYER}, {_MIXING}, Tensor(a!) out) -> {_RETURNED}")
LIBRARY.define("mhc_post_out(Tensor x, Tensor X, Tensor weights, Tensor comb, str backend, Tensor(a!) out) -> ()")
LIBRARY.define(
    f"mhc_post_pre_out(Tensor x, Tensor X, Tensor weights, Tensor comb, {_LAYER}, {_MIXING}, Tensor(a!) out, Tensor(b!) h) "
    f"-> {_RETURNED}"
)


def _pre_like(X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, given: Any, *options: Any) -> tuple[Tensor, ...]:
    """Uninitialised h, pre, post, comb, info and sums."""
    tokens, n, channels = X.shape
    count = tokens if len(scale) == 3 else 0
    known = count if Mixing(*options[:-1]).spectrum else 0
    shapes = ((tokens, n), (count, n), (count, n, n), (known, n + 2), (tokens, base.shape[0] + 1))
    return X.new_empty((tokens, channels)), *(fn.new_empty(shape) for shape in shapes)


def _pre_backward_like(
    d_h: Any, d_pre: Any, d_post: Any, d_comb: Any, add: Any, sums: Tensor, X: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *parameters, given = inputs[:4]
    return X.new_empty(X.shape), *map(torch.empty_like, parameters), sums.new_empty(0 if given is None else given.shape)


def _post_backward_like(d_mixed: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors[:4])


def _post_pre_like(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return X.new_empty(X.shape), *_pre_like(X, *inputs)


def _pre_out_like(*inputs: Any) -> tuple[Tensor, ...]:
    return _pre_like(*inputs[:-1])[1:-1]


def _post_pre_out_like(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _pre_like(X, *inputs[:-2])[1:-1]


@implement("sinkhorn_with_eps")
def _sinkhorn_with_eps(*inputs: Any) -> Tensor:
    return sweeps_with_eps(*inputs)


@implement("sinkhorn_with_eps_backward")
def _sinkhorn_with_eps_backward(*inputs: Any) -> Tensor:
    return sweeps_with_eps_backward(*inputs)


@implement("mhc_pre", _pre_like)
def _mhc_pre(X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, given: Tensor | None, *options: Any) -> Any:
    *mixing, backend = options
    return backends.pre(X, fn, scale, base, Mixing(*mixing), given, backend)


@implement("mhc_pre_backward", _pre_backward_like)
def _mhc_pre_backward(
    d_h: Tensor | None, d_pre: Tensor | None, d_post: Tensor | None, d_comb: Tensor | None, add: Tensor | None,
    sums: Tensor, X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, given: Tensor | None, *options: Any,
) -> Any:  # fmt: skip
    *mixing, backend = options
    head = len(scale) == 1  # whose post and comb have no entries
    cotangents = (d_h, d_pre, None, None) if head else (d_h, d_pre, d_post, d_comb)
    return backends.pre_backward(*cotangents, X, fn, scale, base, sums, Mixing(*mixing), given, add, backend)


@implement("mhc_post")
def _mhc_post(*inputs: Any) -> Tensor:
    return backends.post(*inputs)


@implement("mhc_post_backward")
def _mhc_post_backward(*inputs: Any) -> Any:
    return backends.post_backward(*inputs)


@implement("mhc_post_pre", _post_pre_like)
def _mhc_post_pre(
    x: Tensor, X: Tensor, weights: Tensor, comb: Tensor,
    fn: Tensor, scale: Tensor, base: Tensor, given: Tensor | None, *options: Any,
) -> Any:  # fmt: skip
    *mixing, backend = options
    return backends.post_pre(x, X, weights, comb, fn, scale, base, Mixing(*mixing), given, backend)


@implement("mhc_pre_out", _pre_out_like)
def _mhc_pre_out(X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, given: Tensor | None, *options: Any) -> Any:
    *mixing, backend, out = options
    return backends.pre(X, fn, scale, base, Mixing(*mixing), given, backend, out)[1:-1]


@implement("mhc_post_out")
def _mhc_post_out(*inputs: Any) -> None:
    backends.post(*inputs)


@implement("mhc_post_pre_out", _post_pre_out_like)
def _mhc_post_pre_out(
    x: Tensor, X: Tensor, weights: Tensor, comb: Tensor,
    fn: Tensor, scale: Tensor, base: Tensor, given: Tensor | None, *options: Any,
) -> Any:  # fmt: skip
    *mixing, backend, out, h = options
    return backends.post_pre(x, X, weights, comb, fn, scale, base, Mixing(*mixing), given, backend, (out, h))[2:-1]


def _like(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "sinkhorn_with_eps": _like,
    "sinkhorn_with_eps_backward": _like,
    "mhc_pre": _pre_like,
    "mhc_pre_backward": _pre_backward_like,
    "mhc_post": lambda x, X, *_: X.new_empty(X.shape),
    "mhc_post_backward": _post_backward_like,
    "mhc_post_pre": _post_pre_like,
    "mhc_pre_out": _pre_out_like,
    "mhc_post_out": lambda *inputs: None,
    "mhc_post_pre_out": _post_pre_out_like,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fastdsm::{_name}", _fake, lib=LIBRARY)
