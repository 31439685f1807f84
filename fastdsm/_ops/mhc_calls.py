"""Calls of the mHC layer's operators, and their gradients.

First derivatives come from the operators' backwards; where these are to be differentiated again, where an input carries a
tangent and inside ``torch.func`` a call is the oracle's composition of torch's operations, in the dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import mhc as oracle
from . import mhc_operators
from .gradients import Gradients, padded, save, saved, through
from .mixing import Mixing
from .operators import IMPLEMENTATIONS
from .plain import has_tangents, is_plain, thread_is_plain

Results = tuple[Any, ...]


class Call:
    """A call of ``torch.ops.fastdsm.<name>``, whose first ``tensors`` inputs are tensors, or of its composition."""

    def __init__(self, name: str, tensors: int, composed: Callable[..., Any], context: Any, gradient: Any) -> None:
        self._operator = getattr(torch.ops.fastdsm, name).default
        self._tensors, self._composed = tensors, composed
        lib = mhc_operators.LIBRARY
        torch.library.register_autograd(f"fastdsm::{name}", gradient, setup_context=context, lib=lib)

    def __call__(self, *inputs: Any) -> Any:
        """The operator's results."""
        if torch._C._are_functorch_transforms_active() or has_tangents(inputs[: self._tensors]):
            return self._composed(*inputs)
        return self._operator(*inputs)


def _composed_sweeps(logits: Tensor, *options: Any) -> Tensor:
    return oracle.sweeps_with_eps(logits, *options).to(logits.dtype)


def _composed_pre(X: Tensor, fn: Tensor, scale: Tensor, base: Tensor, given: Tensor | None, *options: Any) -> Results:
    mixing = Mixing(*options[:-1])
    found = oracle.mixes(X, fn, mixing.norm_eps)
    pre, post, comb = oracle.split(found, scale, base, X.shape[1], mixing)
    info = oracle.spectrum(comb) if mixing.spectrum and comb is not None else None
    return oracle.collapse(X, pre if given is None else given).to(X.dtype), pre, post, comb, info


def _composed_post(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, backend: str) -> Tensor:
    return oracle.post(x, X, weights, comb).to(X.dtype)


def _composed_post_pre(x: Tensor, X: Tensor, weights: Tensor, comb: Tensor, *inputs: Any) -> Results:
    mixed = _composed_post(x, X, weights, comb, "")
    return mixed, *_composed_pre(mixed, *inputs)


def _again(composed: Callable[..., Any], ctx: Any, inputs: list[Any], cotangents: Results) -> Gradients:
    """Gradients that are themselves differentiable."""
    where = [i for i, grad in enumerate(cotangents) if grad is not None]

    def some(*inputs: Any) -> Results:
        found = composed(*inputs)
        found = (found,) if isinstance(found, Tensor) else found
        return tuple(found[i] for i in where)

    return through(some, inputs, ctx.needs_input_grad, tuple(cotangents[i] for i in where))


def _wanted(ctx: Any, gradients: Any, inputs: list[Any]) -> Gradients:
    """Of the gradients those that are asked for, and None for what is no tensor."""
    wanted = [x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=False)]
    return padded(wanted, inputs)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    save(ctx, inputs)


def _pre_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[-2:])
    save(ctx, inputs, output[-1])


def _post_pre_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[-2:])
    save(ctx, inputs, output[0], output[-1])


def _sweeps_gradient(ctx: Any, grad: Tensor | None) -> Gradients:
    inputs, _ = saved(ctx)
    if grad is None:
        return (None,) * len(inputs)
    if torch.is_grad_enabled():
        return _again(_composed_sweeps, ctx, inputs, (grad,))
    return padded([torch.ops.fastdsm.sinkhorn_with_eps_backward(grad, *inputs)], inputs)


def _pre_gradient(ctx: Any, *cotangents: Tensor | None) -> Gradients:
    inputs, (sums,) = saved(ctx)
    if all(x is None for x in cotangents[:4]):
        return (None,) * len(inputs)
    if torch.is_grad_enabled():
        return _again(_composed_pre, ctx, inputs, cotangents[:4])
    return _wanted(ctx, torch.ops.fastdsm.mhc_pre_backward(*cotangents[:4], None, sums, *inputs), inputs)


def _post_gradient(ctx: Any, grad: Tensor | None) -> Gradients:
    inputs, _ = saved(ctx)
    if grad is None:
        return (None,) * len(inputs)
    if torch.is_grad_enabled():
        return _again(_composed_post, ctx, inputs, (grad,))
    return _wanted(ctx, torch.ops.fastdsm.mhc_post_backward(grad, *inputs), inputs)


def _post_pre_gradient(ctx: Any, d_mixed: Tensor | None, *cotangents: Tensor | None) -> Gradients:
    inputs, (mixed, sums) = saved(ctx)
    of_pre = cotangents[:4]
    if d_mixed is None and all(x is None for x in of_pre):
        return (None,) * len(inputs)
    if torch.is_grad_enabled():
        return _again(_composed_post_pre, ctx, inputs, (d_mixed, *of_pre))
    of_parameters: Any = (None,) * 4
    if any(x is not None for x in of_pre):
        d_mixed, *of_parameters = torch.ops.fastdsm.mhc_pre_backward(*of_pre, d_mixed, sums, mixed, *inputs[4:])
    of_post = torch.ops.fastdsm.mhc_post_backward(d_mixed, *inputs[:4], inputs[-1])
    return _wanted(ctx, (*of_post, *of_parameters), inputs)


class _PreThrough(torch.autograd.Function):
    """pre whose streams come out again, so that what comes back for them is added where their gradient is made."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *found, _info, sums = IMPLEMENTATIONS["mhc_pre"](*inputs)
        ctx.set_materialize_grads(False)
        save(ctx, inputs, sums)
        return *found, inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
        inputs, (sums,) = saved(ctx)
        *of_pre, add = cotangents
        if all(x is None for x in of_pre):
            return padded([add], inputs)
        if torch.is_grad_enabled():
            return _again(lambda *inputs: (*_composed_pre(*inputs)[:4], inputs[0]), ctx, inputs, cotangents)
        return _wanted(ctx, torch.ops.fastdsm.mhc_pre_backward(*of_pre, add, sums, *inputs), inputs)


def pre_through(*inputs: Any) -> Results:
    """h, pre, post and comb, as :data:`pre`, and the streams, to be used in place of those that came in."""
    if torch.is_grad_enabled() and inputs[0].requires_grad and thread_is_plain() and all(map(is_plain, inputs[:4])):
        found: Results = _PreThrough.apply(*inputs)
        return found
    return *pre(*inputs)[:4], inputs[0]


sweeps_with_eps = Call("sinkhorn_with_eps", 1, _composed_sweeps, _context, _sweeps_gradient)
pre = Call("mhc_pre", 5, _composed_pre, _pre_context, _pre_gradient)
post = Call("mhc_post", 4, _composed_post, _context, _post_gradient)
post_pre = Call("mhc_post_pre", 8, _composed_post_pre, _post_pre_context, _post_pre_gradient)
pre_out = torch.ops.fastdsm.mhc_pre_out.default
post_out = torch.ops.fastdsm.mhc_post_out.default
post_pre_out = torch.ops.fastdsm.mhc_post_pre_out.default
