"""The operators torch sees: ``torch.ops.fastdsm.*``, with fake kernels, autograd, and a rule for vmap.

Tensors arrive validated and flattened: matrices (B, n, m), vectors (B, n) or (B, m), one entry per matrix (B,). One
operator per direction; the backward recomputes what it needs. Under create_graph the backward runs the oracle's formula,
which autograd can differentiate again. Autocast leaves dtypes alone: the arithmetic inside is float32 whatever comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .problem import Gradients, Outputs, Problem, compute_dtype

_LIBRARY = torch.library.Library("fastdsm", "DEF")

# What every projection operator takes; the names are those of the public call.
_INPUTS = (
    "Tensor logits, Tensor? temperature, Tensor? f0, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, "
    "float scale, SymInt n_iters, bool columns_first, float tol, str backend"
)
_TENSORS = 6  # of these inputs, the tensors, first
_LIBRARY.define(f"sinkhorn({_INPUTS}) -> Tensor")
_LIBRARY.define(f"sinkhorn_info({_INPUTS}, bool with_sigma2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"sinkhorn_backward(Tensor grad_plan, Tensor? sweeps, bool lines, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "sigma2(Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, Tensor? v0, str method, float tol, "
    "SymInt max_iters, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "sigma2_bounds(Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, str backend)"
    " -> (Tensor, Tensor)"
)


def _implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        return function

    return register


def _problem(
    logits: Tensor,
    temperature: Tensor | None,
    f0: Tensor | None,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    scale: float,
    n_iters: int,
    columns_first: bool,
    tol: float,
) -> Problem:
    """Canonical form: a projection that ends with columns is the transposed one that ends with rows."""
    if not columns_first:
        logits, mask = logits.mT, None if mask is None else mask.mT
        row_marginal, col_marginal = col_marginal, row_marginal
    return Problem(
        logits=logits,
        n_iters=n_iters,
        temperature=scale if temperature is None else temperature,
        f0=f0 if n_iters > 0 else None,
        row_marginal=row_marginal,
        col_marginal=col_marginal,
        unit_rows=columns_first,
        mask=mask,
        tol=tol,
    )


def _info_like(logits: Tensor, with_sigma2: bool) -> tuple[Tensor, ...]:
    """Uninitialised (plan, residual, sweeps, f, g, sigma2); sigma2 empty when not asked for."""
    batch, n, m = logits.shape
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty((batch, n, m)),
        logits.new_empty((batch,), dtype=dtype),
        logits.new_empty((batch,), dtype=torch.int32),
        logits.new_empty((batch, n), dtype=dtype),
        logits.new_empty((batch, m), dtype=dtype),
        logits.new_empty((batch if with_sigma2 else 0,), dtype=dtype),
    )


@_implement("sinkhorn")
def _sinkhorn(logits: Tensor, *inputs: Any) -> Tensor:
    plan = logits.new_empty(logits.shape)
    *arguments, columns_first, tol, backend = inputs
    problem = _problem(logits, *arguments, columns_first, tol)
    backends.sinkhorn_forward(problem, Outputs(plan if columns_first else plan.mT), backend)
    return plan


@_implement("sinkhorn_info")
def _sinkhorn_info(logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *arguments, columns_first, tol, backend, with_sigma2 = inputs
    plan, residual, sweeps, f, g, sigma2 = results = _info_like(logits, with_sigma2)
    wanted = sigma2 if with_sigma2 else None
    if columns_first:
        outputs = Outputs(plan, residual, sweeps, f, g, wanted)
    else:
        outputs = Outputs(plan.mT, residual, sweeps, g, f, wanted)
    backends.sinkhorn_forward(_problem(logits, *arguments, columns_first, tol), outputs, backend)
    return results


def _gradients_like(logits: Tensor, lines: bool, columns_first: bool) -> tuple[Tensor, ...]:
    batch, n, m = logits.shape
    dtype = compute_dtype(logits.dtype)
    shapes = [(batch, n if columns_first else m), (batch, n), (batch, m)] if lines else [(0,)] * 3
    return logits.new_empty(logits.shape), *(logits.new_empty(shape, dtype=dtype) for shape in shapes)


@_implement("sinkhorn_backward")
def _sinkhorn_backward(
    grad_plan: Tensor, sweeps: Tensor | None, lines: bool, logits: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *arguments, columns_first, tol, backend = inputs
    d_logits, d_f0, d_row, d_col = results = _gradients_like(logits, lines, columns_first)
    target, cotangent, rows, cols = d_logits, grad_plan, d_row, d_col
    if not columns_first:
        target, cotangent, rows, cols = target.mT, cotangent.mT, cols, rows
    gradients = Gradients(target, d_f0, rows, cols) if lines else Gradients(target)
    problem = _problem(logits, *arguments, columns_first, tol)
    backends.sinkhorn_backward(problem, cotangent, gradients, sweeps, backend)
    return results


@_implement("sigma2")
def _sigma2(plan: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    results = _vectors_like(plan)
    backends.sigma2(plan, *inputs, *results)
    return results


def _vectors_like(plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, m = plan.shape
    value, u, v = (plan.new_empty(shape, dtype=compute_dtype(plan.dtype)) for shape in ((batch,), (batch, n), (batch, m)))
    return value, u, v


@_implement("sigma2_bounds")
def _sigma2_bounds(plan: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    lower, upper = _bounds_like(plan)
    backends.sigma2_bounds(plan, *inputs, lower, upper)
    return lower, upper


def _bounds_like(plan: Tensor) -> tuple[Tensor, Tensor]:
    lower = plan.new_empty((plan.shape[0],), dtype=compute_dtype(plan.dtype))
    return lower, torch.empty_like(lower)


torch.library.register_fake("fastdsm::sinkhorn", lambda logits, *_: logits.new_empty(logits.shape), lib=_LIBRARY)
torch.library.register_fake(
    "fastdsm::sinkhorn_info", lambda logits, *inputs: _info_like(logits, inputs[-1]), lib=_LIBRARY
)
torch.library.register_fake(
    "fastdsm::sinkhorn_backward",
    lambda grad_plan, sweeps, lines, logits, *inputs: _gradients_like(logits, lines, inputs[-3]),
    lib=_LIBRARY,
)
torch.library.register_fake("fastdsm::sigma2", lambda plan, *_: _vectors_like(plan), lib=_LIBRARY)
torch.library.register_fake("fastdsm::sigma2_bounds", lambda plan, *_: _bounds_like(plan), lib=_LIBRARY)


def _over_batch(operator: Any) -> Callable[..., Any]:
    """vmap's rule: the new dimension joins the batch of matrices, and leaves it again."""

    def rule(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def join(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.reshape(size * x.shape[1], *x.shape[2:])

        def leave(x: Tensor) -> Tensor:
            return x.reshape(size, x.shape[0] // size, *x.shape[1:])

        results = operator(*(join(x, dim) for x, dim in zip(inputs, in_dims, strict=True)))
        if isinstance(results, Tensor):
            return leave(results), 0
        return tuple(map(leave, results)), (0,) * len(results)

    return rule


for _name in ("sinkhorn", "sinkhorn_info", "sinkhorn_backward", "sigma2", "sigma2_bounds"):
    torch.library.register_vmap(
        f"fastdsm::{_name}", _over_batch(getattr(torch.ops.fastdsm, _name).default), lib=_LIBRARY
    )


def _keywords(inputs: Sequence[Any]) -> dict[str, Any]:
    """The oracle's keywords for a projection operator's inputs after ``logits``."""
    temperature, f0, row_marginal, col_marginal, mask, scale, n_iters, columns_first, tol = inputs[:9]
    return {
        "temperature": scale if temperature is None else temperature,
        "f0": f0,
        "row_marginal": row_marginal,
        "col_marginal": col_marginal,
        "mask": mask,
        "n_iters": n_iters,
        "first": "col" if columns_first else "row",
        "tol": tol if tol >= 0 else None,
    }


def _projection_gradients(
    ctx: Any, grad_plan: Tensor, sweeps: Tensor | None, inputs: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients of (logits, temperature, f0, row_marginal, col_marginal, mask) by the operator."""
    logits, temperature, _, row, col, mask = inputs[:_TENSORS]
    lines = any(ctx.needs_input_grad[2:5])
    d_logits, d_f0, d_log_row, d_log_col = torch.ops.fastdsm.sinkhorn_backward(grad_plan, sweeps, lines, *inputs)
    gradients: list[Tensor | None] = [d_logits] + [None] * (_TENSORS - 1)
    if ctx.needs_input_grad[1]:
        product = torch.where(d_logits == 0, 0.0, d_logits.to(temperature.dtype) * logits)
        gradients[1] = -product.sum((-2, -1)) / temperature
    if ctx.needs_input_grad[2]:
        gradients[2] = d_f0
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        valid = reference.valid_entries(mask, logits, row, col) & (logits != -torch.inf)
        gradients[3] = _marginal_gradient(row, d_log_row, None if col is not None else d_log_col, valid.any(-1))
        gradients[4] = _marginal_gradient(col, d_log_col, None if row is not None else d_log_row, valid.any(-2))
    return gradients


def _marginal_gradient(x: Tensor | None, own: Tensor, other: Tensor | None, valid: Tensor) -> Tensor | None:
    """From d log x to d x; where the other marginal is uniform it has x's total, and its gradient comes through that."""
    if x is None:
        return None
    gradient = torch.where(x == 0, 0.0, own / x.masked_fill(x == 0, 1.0))
    if other is None:
        return gradient
    total = torch.where(valid, x, 0.0).sum(-1, keepdim=True)
    return gradient + torch.where(valid, other.sum(-1, keepdim=True) / total, 0.0)


def _differentiable(
    ctx: Any, function: Callable[..., Any], inputs: Sequence[Any], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd through the oracle."""
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    with torch.enable_grad():
        outputs = function(*inputs)
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad]


def _save(ctx: Any, inputs: Sequence[Any], *extra: Tensor | None) -> None:
    tensors = sum(x is None or isinstance(x, Tensor) for x in inputs)
    ctx.save_for_backward(*inputs[:tensors], *extra)
    ctx.options, ctx.tensors = tuple(inputs[tensors:]), tensors


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    saved = ctx.saved_tensors
    return (*saved[: ctx.tensors], *ctx.options), saved[ctx.tensors :]


def _padded(gradients: list[Tensor | None], inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    return tuple(gradients) + (None,) * (len(inputs) - len(gradients))


def _sinkhorn_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _save(ctx, inputs)


def _sinkhorn_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, _ = _saved(ctx)
    if torch.is_grad_enabled():
        oracle = lambda logits, *rest: reference.sinkhorn(logits, **_keywords(rest))  # noqa: E731
        return tuple(_differentiable(ctx, oracle, inputs, [grad]))
    return _padded(_projection_gradients(ctx, grad, None, inputs), inputs)


def _info_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    plan, residual, sweeps, f, g, sigma2 = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residual, sweeps, f, g)
    with_sigma2 = inputs[-1]
    if not with_sigma2:
        ctx.mark_non_differentiable(sigma2)
    _save(ctx, inputs, sweeps, plan if with_sigma2 else None)


def _info_gradient(
    ctx: Any, grad_plan: Tensor | None, *gradients_of_rest: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_sigma2 = gradients_of_rest[-1]
    inputs, (sweeps, plan) = _saved(ctx)
    if grad_plan is None and grad_sigma2 is None:
        return (None,) * len(inputs)
    if torch.is_grad_enabled():
        return tuple(_differentiable(ctx, _oracle_of_info(grad_plan, grad_sigma2), inputs, _given(grad_plan, grad_sigma2)))
    *projection, with_sigma2 = inputs
    d_row = d_col = None
    if grad_sigma2 is not None:
        d_plan, d_row, d_col = _sigma2_gradients(ctx, plan, projection, grad_sigma2)
        grad_plan = d_plan if grad_plan is None else grad_plan + d_plan
    tol = projection[-2]
    found = _projection_gradients(ctx, grad_plan, sweeps if tol >= 0 else None, projection)
    for index, extra in ((3, d_row), (4, d_col)):
        if extra is not None and ctx.needs_input_grad[index]:
            found[index] = found[index] + extra
    return _padded(found, inputs)


def _given(*cotangents: Tensor | None) -> list[Tensor]:
    return [x for x in cotangents if x is not None]


def _oracle_of_info(grad_plan: Tensor | None, grad_sigma2: Tensor | None) -> Callable[..., list[Tensor]]:
    """The oracle's (plan, sigma2), of these the ones with a cotangent."""

    def oracle(logits: Tensor, *rest: Any) -> list[Tensor]:
        found = reference.sinkhorn_sigma2(logits, **_keywords(rest))
        return [x for x, grad in ((found.plan, grad_plan), (found.sigma2, grad_sigma2)) if grad is not None]

    return oracle


def _sigma2_gradients(
    ctx: Any, plan: Tensor, projection: Sequence[Any], grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of sigma2 as a function of plan and marginals, u2 and v2 held fixed (the envelope theorem)."""
    logits, _, _, row, col, mask = projection[:_TENSORS]
    valid = reference.valid_entries(mask, logits, row, col) & (logits != -torch.inf)
    lines = valid.any(-1, keepdim=True) & valid.any(-2, keepdim=True)
    backend = projection[-1]
    _, u, v = torch.ops.fastdsm.sigma2(plan, row, col, lines, None, "auto", 1e-6, 0, backend)
    return sigma2_gradients(plan, row, col, lines, u, v, grad, ctx.needs_input_grad[3:5])


def sigma2_gradients(
    plan: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    mask: Tensor | None,
    u: Tensor,
    v: Tensor,
    grad: Tensor,
    marginals: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of u2^T M(plan, r, c) v2 with u2, v2 constant."""
    leaves = [x if x is None else x.detach() for x in (plan, row, col)]
    needed = [True, *marginals]
    with torch.enable_grad():
        leaves = [x if x is None else x.requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
        matrix = reference.deflated_plan(leaves[0], leaves[1], leaves[2], mask)
        value = torch.einsum("bn,bnm,bm->b", u, matrix, v)
    wanted = [x for x, need in zip(leaves, needed, strict=True) if x is not None and need]
    found = iter(torch.autograd.grad(value, wanted, grad, allow_unused=True))
    d_plan, d_row, d_col = (next(found) if x is not None and need else None for x, need in zip(leaves, needed, strict=True))
    assert d_plan is not None
    return d_plan, d_row, d_col


def _sigma2_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    _, u, v = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(u, v)
    _save(ctx, inputs, u, v)


def _sigma2_gradient(
    ctx: Any, grad: Tensor | None, grad_u: Tensor | None, grad_v: Tensor | None
) -> tuple[Tensor | None, ...]:
    inputs, (u, v) = _saved(ctx)
    if grad is None:
        return (None,) * len(inputs)
    plan, row, col, mask = inputs[:4]
    if torch.is_grad_enabled():

        def oracle(plan: Tensor, row: Tensor | None, col: Tensor | None, mask: Tensor | None, *_: Any) -> Tensor:
            return reference.sigma2(plan, row_marginal=row, col_marginal=col, mask=mask)

        return tuple(_differentiable(ctx, oracle, inputs, [grad]))
    return _padded(list(sigma2_gradients(plan, row, col, mask, u, v, grad, ctx.needs_input_grad[1:3])), inputs)


_AUTOGRAD = {
    "sinkhorn": (_sinkhorn_context, _sinkhorn_gradient),
    "sinkhorn_info": (_info_context, _info_gradient),
    "sigma2": (_sigma2_context, _sigma2_gradient),
}
for _name, (_context, _gradient) in _AUTOGRAD.items():
    torch.library.register_autograd(f"fastdsm::{_name}", _gradient, setup_context=_context, lib=_LIBRARY)
