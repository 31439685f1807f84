"""Gradients of the attention operators, as (context, gradient) pairs for autograd; as :mod:`fastdsm._ops.gradients`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .gradients import Calls, Gradients, padded, save, saved, through
from .masks import lowered


def _context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    _, f, g, residual, sweeps = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(f, g, residual, sweeps)
    save(ctx, inputs, f, g, sweeps)


def _gradient(calls: Calls, ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> Gradients:
    inputs, kept = saved(ctx)
    if grad_out is None:
        return (None,) * len(inputs)
    *inputs, _, _ = inputs
    needed = ctx.needs_input_grad
    query, key, value, bias, _, temperature = inputs[:6]
    bias_shape = None if bias is None else bias.shape
    dtypes = [None if x is None else x.dtype for x in (query, key, value, bias)]
    if needed[5]:
        # Its gradient sums the products of bias and query with theirs, which must therefore be whole and unrounded.
        shape = (*query.shape[:3], key.shape[2])
        query, key, value, grad_out = (x.to(temperature.dtype) for x in (query, key, value, grad_out))
        bias = None if bias is None else lowered(bias).expand(shape).to(temperature.dtype)
        inputs = [query, key, value, bias, *inputs[4:]]
        if dtypes[0] != query.dtype and inputs[-1] == "triton":
            # Tensor cores add up narrow products in their own way: with potentials of their logits, the line sums of these
            # would be off by an ulp of a logit, which more than doubles the error of that sum.
            _, f, g, _, sweeps = calls.sinkhorn_attention(*inputs, False, True)
            kept = [f, g, sweeps]
    with_bias = bias is not None and (needed[3] or needed[5])
    results = calls.sinkhorn_attention_backward(grad_out, *kept, *inputs, with_bias)
    d_query, d_key, d_value, d_bias = results
    found: list[Tensor | None] = [d_query, d_key, d_value, d_bias if needed[3] else None]
    if needed[5]:
        total = (d_query * query).sum((-2, -1), dtype=torch.float64)
        if bias is not None:
            total = total + torch.where(d_bias == 0, 0.0, d_bias * bias).sum((-2, -1), dtype=torch.float64)
        found += [None, (-total / temperature).to(temperature.dtype)]
        if needed[3]:
            found[3] = d_bias.sum_to_size(bias_shape)
    cast = [None if x is None else x.to(dtype) for x, dtype in zip(found, dtypes, strict=False)]
    return padded([*cast, *found[4:]], [*inputs, None, None])


def _oracle_backward(grad_out: Tensor, f: Tensor, g: Tensor, sweeps: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """What ``sinkhorn_attention_backward`` returns, from the oracle."""
    query, key, value, bias, mask, temperature, query_padding, key_padding, seed, scale, tau, n_iters, *others = inputs
    columns_first, tol, _, implicit, _, with_bias = others
    if seed is not None or tol >= 0 or implicit:
        raise NotImplementedError(
            "sinkhorn_attention has a second derivative for dropout_p=0, tol=None and the unrolled gradient; otherwise use "
            'backend="reference"'
        )

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        found = reference.sinkhorn_attention(
            query,
            key,
            value,
            mask if bias is None else bias,
            scale=scale,
            key_padding_mask=key_padding,
            query_padding_mask=query_padding,
            temperature=tau if temperature is None else temperature,
            n_iters=n_iters,
            first="col" if columns_first else "row",
        )
        assert isinstance(found, Tensor)
        return found

    leaves = (query, key, value) if bias is None else (query, key, value, bias)
    pull = torch.func.vjp(lambda *x: attention(*x, *(None,) * (4 - len(x))), *leaves)[1]
    gradients = pull(grad_out.to(value.dtype))
    d_bias = gradients[3] if with_bias else query.new_empty((0,))
    return (*gradients[:3], d_bias)


def _backward_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        ctx.mark_non_differentiable(output[3])
    save(ctx, inputs)


def _backward_gradient(calls: Calls, ctx: Any, *cotangents: Tensor) -> Gradients:
    inputs, _ = saved(ctx)
    return through(_oracle_backward, inputs, ctx.needs_input_grad[: len(inputs)], cotangents)


AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sinkhorn_attention": (_context, _gradient),
    "sinkhorn_attention_backward": (_backward_context, _backward_gradient),
}
