"""Gradients of the attention operators, as (context, gradient) pairs for autograd; as :mod:`fastdsm._ops.gradients`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import composed
from .attention_operators import TENSORS
from .gradients import Calls, Gradients, padded, pulled, save, saved, second, through
from .problem import compute_dtype

_ENTRIES = 1 << 24  # of the logits' gradient, stored at once for the temperature's


def _context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    _, f, g, residual, sweeps = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residual, sweeps)
    save(ctx, inputs, f, g, sweeps)


def _gradient(calls: Calls, ctx: Any, grad_out: Tensor | None, *others: Tensor | None) -> Gradients:
    inputs, kept = saved(ctx)
    if grad_out is None and others[0] is None and others[1] is None:
        return (None,) * len(inputs)
    *inputs, _, _ = inputs
    query, key, value, bias = inputs[:4]
    if grad_out is None:
        grad_out = value.new_zeros((*query.shape[:3], value.shape[3]))
    # of the last sweep's potentials, the only ones that a caller sees
    given = (grad_out, *(None if x is None else x[:, :, -1].to(compute_dtype(query.dtype)) for x in others[:2]))
    needed = ctx.needs_input_grad
    if needed[5]:
        return padded(_with_temperature(calls, given, kept, inputs, needed[3]), [*inputs, None, None])
    with_bias = bias is not None and needed[3]
    found = calls.sinkhorn_attention_backward(*given, *kept, *inputs, with_bias)
    found = [*found[:3], found[3] if with_bias else None]
    cast = [None if x is None else x.to(y.dtype) for x, y in zip(found, (query, key, value, bias), strict=True)]
    return padded(cast, [*inputs, None, None])


def _with_temperature(
    calls: Calls, cotangents: Sequence[Tensor | None], kept: Sequence[Any], inputs: list[Any], with_bias: bool
) -> list[Tensor | None]:
    """Gradients of query, key, value, bias, (mask) and temperature: that is a sum of products with the gradient of the logits.

    These must be whole and unrounded, bias entry by entry: so many heads at a time that no more than ``_ENTRIES`` are stored.
    """
    query, key, value, bias, _, temperature = inputs[:6]
    seed, backend, wide = inputs[8], inputs[-1], temperature.dtype
    dtypes = [x.dtype for x in (query, key, value)]
    if dtypes[0] != wide and backend == "triton":
        # Tensor cores add up narrow products in their own way: with potentials of their logits, the line sums of these
        # would be off by an ulp of a logit, which more than doubles the error of that sum.
        given = [*(x.to(wide) for x in (query, key, value)), None if bias is None else bias.to(wide), *inputs[4:]]
        _, f, g, _, sweeps = calls.sinkhorn_attention(*given, False, True)
        kept = [f, g, sweeps]
    B, H, N, _ = query.shape
    G, M = key.shape[1:3]
    batches, groups = max(B, 1), G
    if bias is not None and seed is None:  # what is dropped depends on a head's place
        groups = min(max(_ENTRIES // max(H // G * N * M, 1), 1), G)
        batches = max(_ENTRIES // max(H * N * M, 1), 1)
    d_bias: Tensor | None = None
    rows = []
    for b in range(0, max(B, 1), batches):
        columns = []
        for g in range(0, G, groups):
            heads = _Heads(slice(b, b + batches), slice(g * H // G, (g + groups) * H // G), slice(g, g + groups))
            part = heads.of(inputs, wide)
            some = (None if x is None else heads.by_query(x).to(wide) for x in cotangents)
            found = calls.sinkhorn_attention_backward(*some, *map(heads.by_query, kept), *part, bias is not None)
            total = _product(found[0], part[0])
            if bias is not None:
                total = total + _product(found[3], part[3])
                if with_bias and batches >= B and groups >= G:
                    d_bias = found[3].sum_to_size(bias.shape)
                elif with_bias:  # in place, which is not for tensors of torch.vmap
                    d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if d_bias is None else d_bias
                    of_bias = heads.by_query(d_bias)
                    of_bias += found[3].sum_to_size(of_bias.shape)
            columns.append((*found[:3], total))
        rows.append([torch.cat(x, 1) for x in zip(*columns, strict=True)])
    *found, total = (torch.cat(x) for x in zip(*rows, strict=True))
    gradients: list[Tensor | None] = [x.to(dtype) for x, dtype in zip(found, dtypes, strict=True)]
    gradients += [d_bias if d_bias is None else d_bias.to(bias.dtype), None, (-total / temperature).to(wide)]
    return gradients


def _product(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum over the last two dimensions of a gradient times what it is of; where it is 0, x may be anything."""
    return (gradient * x.nan_to_num(0.0, 0.0, 0.0)).sum((-2, -1), dtype=torch.float64)


@dataclass(frozen=True)
class _Heads:
    """Some heads of some of the batch."""

    batch: slice
    heads: slice
    groups: slice

    def by_query(self, x: Tensor) -> Tensor:
        """The part of x (B, H, ...), of which B and H may be 1 for all."""
        batch, heads = (
            index if size > 1 else slice(None) for index, size in zip((self.batch, self.heads), x.shape, strict=False)
        )
        return x[batch, heads]

    def of(self, inputs: list[Any], wide: torch.dtype) -> list[Any]:
        """The operator's inputs for these heads in the dtype ``wide``, the bias with an entry for each logit."""
        query, key, value, bias, mask, temperature, *paddings, seed = inputs[:9]
        query, temperature = self.by_query(query).to(wide), self.by_query(temperature)
        key, value = (x[self.batch, self.groups].to(wide) for x in (key, value))
        if bias is not None:
            shape = (*query.shape[:3], key.shape[2])
            bias = self.by_query(bias).expand(shape).to(wide)
        mask = None if mask is None else self.by_query(mask)
        return [
            query,
            key,
            value,
            bias,
            mask,
            temperature,
            *(x if x is None else x[self.batch] for x in paddings),
            seed,
            *inputs[9:],
        ]


def _oracle_backward(
    grad_out: Tensor, grad_f: Tensor | None, grad_g: Tensor | None, f: Tensor, g: Tensor, sweeps: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    """What ``sinkhorn_attention_backward`` returns, from the oracle."""
    query, key, value, bias, *others, with_bias = inputs

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        out, f, g, *_ = composed.sinkhorn_attention(query, key, value, bias, *others, False, True)
        return out, f.squeeze(2), g.squeeze(2)

    leaves = (query, key, value) if bias is None else (query, key, value, bias)
    gradients = pulled(attention, leaves, (grad_out, grad_f, grad_g))
    return (*gradients[:3], gradients[3] if with_bias else query.new_empty((0,)))


def _backward_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        ctx.mark_non_differentiable(output[3])
    save(ctx, inputs)


def _sigma2_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    _, u, v, upper = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(u, v, upper)
    save(ctx, inputs, u, v)


def _sigma2_gradient(calls: Calls, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Gradients:
    """Of u^T P v with fixed vectors, matrix-free; of the stored matrices' singular value where graphs go on."""
    inputs, (u, v) = saved(ctx)
    if grad is None:
        return (None,) * len(inputs)
    assert u is not None
    assert v is not None
    options, stored = inputs[TENSORS:], torch.is_grad_enabled()

    def value(query: Tensor, key: Tensor, *others: Any) -> Any:
        if stored:
            return composed.sinkhorn_attention_sigma2(query, key, *others, *options)[0]
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:  # what query heads that share a key head add to its gradient must not have been rounded to 16 bits
            query, key = query.to(v.dtype), key.to(v.dtype).repeat_interleave(repeats, dim=1)
        out = calls.sinkhorn_attention(query, key, v.unsqueeze(-1), *others[1:], *options[:-3], False, True)[0]
        return (out.squeeze(-1) * u).sum(-1)

    needed = [need and at != 2 for at, need in enumerate(ctx.needs_input_grad[:TENSORS])]
    return padded(through(value, inputs[:TENSORS], needed, grad), inputs)


AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "sinkhorn_attention": (_context, _gradient, composed.sinkhorn_attention),
    "sinkhorn_attention_backward": (_backward_context, second(_oracle_backward), _oracle_backward),
    "sinkhorn_attention_sigma2": (_sigma2_context, _sigma2_gradient, composed.sinkhorn_attention_sigma2),
}
