"""Gradients of the operators, as (context, gradient) pairs for autograd.

First derivatives come from operators: ``sinkhorn_backward`` runs the exact adjoint, ``fixed_point_backward`` the implicit
one, ``sigma2_backward`` takes sigma2 as bilinear in its fixed vectors. All are themselves differentiable: their gradient is
autograd through the oracle, twice, so that double backward is right whatever enters the loss; sigma2's through a full SVD.

A gradient takes ``calls`` first: who makes the operators' calls it is made of. It is the same gradient whoever makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import pytorch, reference
from . import composed
from .marginals import lines_taking_part, marginals_of, marginals_of_plan, valid_entries
from .problem import compute_dtype

Gradients = tuple[Tensor | None, ...]


class Calls(Protocol):
    """The calls that gradients are made of, as of the operators of these names."""

    sinkhorn_backward: Callable[..., Any]
    sinkhorn_potentials_backward: Callable[..., Any]
    fixed_point_backward: Callable[..., Any]
    fixed_point_potentials_backward: Callable[..., Any]
    sigma2: Callable[..., Any]
    sigma2_backward: Callable[..., Any]
    sinkhorn_attention: Callable[..., Any]
    sinkhorn_attention_backward: Callable[..., Any]


_TENSORS = 6  # logits, temperature, f0, row_marginal, col_marginal, mask lead a projection's inputs


def save(ctx: Any, inputs: Sequence[Any], *extra: Tensor | None) -> None:
    """Keep an operator's inputs for its gradient, its tensors leading, and extra tensors."""
    count = 0
    while count < len(inputs) and (inputs[count] is None or isinstance(inputs[count], Tensor)):
        count += 1
    ctx.options = inputs[count:]
    ctx.save_for_backward(*inputs[:count], *extra)
    ctx.count = count


def saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor | None]]:
    """The inputs as they came, and the extra tensors."""
    tensors = ctx.saved_tensors
    return [*tensors[: ctx.count], *ctx.options], tensors[ctx.count :]


def padded(gradients: Sequence[Tensor | None], inputs: Sequence[Any]) -> Gradients:
    """One gradient for every input: None for those after the last given."""
    return (*gradients, *(None,) * (len(inputs) - len(gradients)))


def through(function: Callable[..., Any], inputs: Sequence[Any], needed: Sequence[bool], cotangents: Any) -> Gradients:
    """Gradients of ``function`` of the inputs by autograd, themselves differentiable."""
    where = [i for i, (x, need) in enumerate(zip(inputs, needed, strict=True)) if need and isinstance(x, Tensor)]

    def of_needed(*values: Tensor) -> Any:
        full = list(inputs)
        for i, value in zip(where, values, strict=True):
            full[i] = value
        return function(*full)

    pull = torch.func.vjp(of_needed, *(inputs[i] for i in where))[1]
    found = dict(zip(where, pull(cotangents), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def _oracle_keywords(options: Sequence[Any]) -> dict[str, Any]:
    scale, n_iters, columns_first, tol = options[:4]
    return {
        "temperature": scale,
        "n_iters": n_iters,
        "first": "col" if columns_first else "row",
        "tol": tol if tol >= 0 else None,
    }


def _oracle_backward(grad_plan: Tensor, sweeps: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """What ``sinkhorn_backward`` returns, from the oracle."""
    return _oracle_potentials_backward(grad_plan, None, None, sweeps, *inputs)


def _oracle_potentials_backward(
    grad_plan: Tensor, grad_f: Tensor | None, grad_g: Tensor | None, sweeps: Tensor | None, *inputs: Any
) -> tuple[Tensor, ...]:
    """What ``sinkhorn_potentials_backward`` returns, from the oracle."""
    logits, temperature, f0, row, col, mask, *options, lines = inputs
    keywords = _oracle_keywords(options)
    if temperature is not None:
        keywords["temperature"] = temperature
    r, c = marginals_of(logits, row, col, mask)
    side = r if keywords["first"] == "col" else c
    start = torch.zeros_like(side) if f0 is None else f0

    def found(logits: Tensor, f0: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan, info = reference.swept(logits, f0=f0, row_marginal=r, col_marginal=c, mask=mask, **keywords)
        return plan, info.f, info.g

    return _by_line(lines, r, c, *pulled(found, (logits, start, r, c), (grad_plan, grad_f, grad_g)))


def pulled(function: Callable[..., Any], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Any:
    """Gradients of a function of several results; a cotangent that is None is zero."""
    found, pull, *_ = torch.func.vjp(function, *inputs)
    return pull(tuple(torch.zeros_like(x) if y is None else y.to(x.dtype) for x, y in zip(found, cotangents, strict=True)))


def _oracle_fixed_point_backward(grad_plan: Tensor, f: Tensor, g: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """What ``fixed_point_backward`` returns, from the oracle."""
    return _oracle_fixed_point_potentials_backward(grad_plan, None, None, f, g, *inputs)


def _oracle_fixed_point_potentials_backward(
    grad_plan: Tensor, grad_f: Tensor | None, grad_g: Tensor | None, f: Tensor, g: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    """What ``fixed_point_potentials_backward`` returns, from the oracle in float64: forced zeros make potentials large."""
    given, *vectors, mask, scale, _, columns_first, _, _, lines = inputs
    temperature, _, row, col = (x if x is None else x.double() for x in vectors)
    logits = given.double()
    first = "col" if columns_first else "row"
    r, c = marginals_of(logits, row, col, mask)

    def found(logits: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference.near_fixed_point(logits, f, g, scale if temperature is None else temperature, first, r, c, mask)

    d_logits, d_r, d_c = pulled(found, (logits, r, c), (grad_plan, grad_f, grad_g))
    d_logits, *by_line = _by_line(lines, r, c, d_logits, torch.zeros_like(r if columns_first else c), d_r, d_c)
    return d_logits.to(given.dtype), *(x.to(compute_dtype(given.dtype)) for x in by_line)


def _oracle_sigma2_backward(grad: Tensor, u: Tensor, v: Tensor, plan: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """What ``sigma2_backward`` returns, from the oracle, whose vectors are its own."""
    row, col, mask, lines = inputs
    r, c = marginals_of_plan(plan, row, col, mask)

    def found(plan: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor]:
        return (reference.sigma2(plan, row_marginal=r, col_marginal=c, mask=mask),)

    d_plan, d_r, d_c = pulled(found, (plan, r, c), (grad,))
    return (d_plan, d_r * r, d_c * c) if lines else (d_plan, *(x.new_empty((0,)) for x in (r, c)))


def _composed_sigma2_backward(grad: Tensor, u: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """``sigma2_backward`` as a composition: the oracle's, but linear in ``grad`` with the vectors that were found."""
    fixed: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in (u, v, *inputs)]
    found, own = pytorch.sigma2_backward(grad, *fixed), _oracle_sigma2_backward(grad, *fixed)
    return tuple(x + (y - z) for x, y, z in zip(_oracle_sigma2_backward(grad, u, v, *inputs), found, own, strict=True))


def _by_line(lines: bool, r: Tensor, c: Tensor, d_logits: Tensor, d_f0: Tensor, d_r: Tensor, d_c: Tensor) -> tuple[Tensor, ...]:
    """A backward's outputs: those by line are those of log r and log c, or empty where not asked for."""
    if not lines:
        return (d_logits, *(x.new_empty((0,)) for x in (d_f0, d_r, d_c)))
    return d_logits, d_f0, d_r * r, d_c * c


def _backward_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
    save(ctx, inputs)


def second(oracle: Callable[..., Any]) -> Callable[..., Gradients]:
    """The gradient of a backward that is ``oracle``'s."""

    def gradient(calls: Calls, ctx: Any, *cotangents: Tensor) -> Gradients:
        inputs, _ = saved(ctx)
        return through(oracle, inputs, ctx.needs_input_grad[: len(inputs)], cotangents)

    return gradient


Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def _projection(needed: Sequence[bool], grad_plan: Tensor, backward: Backward, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of logits, temperature, f0 and the marginals by ``backward``: (grad_plan, lines, *inputs) to the operator's."""
    logits, temperature, f0, row, col, mask = inputs[:_TENSORS]
    dtype = logits.dtype
    if needed[1]:
        # Its gradient is a sum of products with d_logits, far larger than what is left of them: d_logits must not have been
        # rounded to 16 bits before, and where float64 is cheap not to 32 either.
        wide = torch.float64 if logits.device.type == "cpu" else temperature.dtype
        logits, grad_plan = logits.to(wide), grad_plan.to(wide)
        vectors = (x if x is None else x.to(wide) for x in inputs[1 : _TENSORS - 1])
        inputs = (logits, *vectors, *inputs[_TENSORS - 1 :])
    d_logits, d_f0, d_log_row, d_log_col = backward(grad_plan, any(needed[2:5]), *inputs)
    gradients: list[Tensor | None] = [d_logits.to(dtype), None, d_f0.to(f0.dtype) if needed[2] else None, None, None]
    if needed[1]:
        product = d_logits * logits.nan_to_num(0.0, 0.0, 0.0)  # anything may lie where d_logits is 0
        gradients[1] = (-product.sum((-2, -1), dtype=torch.float64) / temperature).to(temperature.dtype)
    if needed[3] or needed[4]:
        valid = valid_entries(mask, logits, row, col) & (logits != -torch.inf)
        d_log_row, d_log_col = (x.to(compute_dtype(dtype)) for x in (d_log_row, d_log_col))
        gradients[3] = _of_marginal(row, d_log_row, None if col is not None else d_log_col, valid.any(-1))
        gradients[4] = _of_marginal(col, d_log_col, None if row is not None else d_log_row, valid.any(-2))
    return gradients


def _of_marginal(x: Tensor | None, own: Tensor, other: Tensor | None, valid: Tensor) -> Tensor | None:
    """From d log x to d x; where the other marginal is uniform it has x's total, and its gradient comes through that."""
    if x is None:
        return None
    gradient = torch.where(x == 0, 0.0, own / x.masked_fill(x == 0, 1.0))
    if other is None:
        return gradient
    total = torch.where(valid, x, 0.0).sum(-1, keepdim=True)
    return gradient + torch.where(valid, other.sum(-1, keepdim=True) / total, 0.0)


def _unrolled(calls: Calls, sweeps: Tensor | None, of_potentials: Sequence[Tensor | None] = ()) -> Backward:
    """The adjoint of the sweeps done, with cotangents of f and g where there are any."""
    if not any(x is not None for x in of_potentials):
        return lambda grad_plan, lines, *inputs: calls.sinkhorn_backward(grad_plan, sweeps, *inputs, lines)
    return lambda grad_plan, lines, *inputs: calls.sinkhorn_potentials_backward(
        grad_plan, *_whole(of_potentials, inputs[0]), sweeps, *inputs, lines
    )


def _implicit(calls: Calls, f: Tensor, g: Tensor, of_potentials: Sequence[Tensor | None]) -> Backward:
    """The adjoint of the fixed point at these potentials, likewise."""
    if not any(x is not None for x in of_potentials):
        return lambda grad_plan, lines, *inputs: calls.fixed_point_backward(grad_plan, f, g, *inputs, lines)
    return lambda grad_plan, lines, *inputs: calls.fixed_point_potentials_backward(
        grad_plan, *_whole(of_potentials, inputs[0]), f, g, *inputs, lines
    )


def _whole(of_potentials: Sequence[Tensor | None], logits: Tensor) -> Iterator[Tensor]:
    """Cotangents of f (B, n) and g (B, m) in the compute dtype; zeros where there is none."""
    batch, *sides = logits.shape
    dtype = compute_dtype(logits.dtype)
    for x, side in zip(of_potentials, sides, strict=True):
        yield logits.new_zeros((batch, side), dtype=dtype) if x is None else x.to(dtype)


def _sinkhorn_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    save(ctx, inputs)


def of_projection(needed: Sequence[bool], grad: Tensor, backward: Backward, inputs: Sequence[Any]) -> Gradients:
    """Of a plan alone. ``backward``: (grad_plan, lines, *inputs) to what ``sinkhorn_backward`` returns."""
    return padded(_projection(needed, grad, backward, inputs), inputs)


def _sinkhorn_gradient(calls: Calls, ctx: Any, grad: Tensor) -> Gradients:
    inputs, _ = saved(ctx)
    return of_projection(ctx.needs_input_grad, grad, _unrolled(calls, None), inputs)


def _info_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    plan, _, sweeps, *_ = output
    _mark(ctx, inputs, output)
    save(ctx, inputs, sweeps, plan)


def _mark(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    """Of a plan's companions potentials have a gradient, sigma2 where it was asked for, residual and sweeps none."""
    _, residual, sweeps, _, _, sigma2 = output
    with_sigma2 = inputs[-1]
    ctx.set_materialize_grads(False)
    fixed = (residual, sweeps) if with_sigma2 else (residual, sweeps, sigma2)
    ctx.mark_non_differentiable(*[x for x in fixed if x is not None])


def _info_gradient(calls: Calls, ctx: Any, *cotangents: Tensor | None) -> Gradients:
    inputs, (sweeps, plan) = saved(ctx)
    *projection, _ = inputs
    tol = projection[-2]
    backward = _unrolled(calls, sweeps if tol >= 0 else None, cotangents[3:5])
    return _all(calls, ctx, inputs, projection, plan, backward, cotangents)


def _fixed_point_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    plan, _, _, f, g, _ = output
    _mark(ctx, inputs, output)
    save(ctx, inputs, f, g, plan)


def _fixed_point_gradient(calls: Calls, ctx: Any, *cotangents: Tensor | None) -> Gradients:
    inputs, (f, g, plan) = saved(ctx)
    assert f is not None
    assert g is not None
    *projection, _, _, _ = inputs
    return _all(calls, ctx, inputs, projection, plan, _implicit(calls, f, g, cotangents[3:5]), cotangents)


def _all(
    calls: Calls,
    ctx: Any,
    inputs: Sequence[Any],
    projection: Sequence[Any],
    plan: Tensor | None,
    backward: Backward,
    cotangents: Sequence[Tensor | None],
) -> Gradients:
    """Gradients of a plan, its potentials (``backward``'s) and its sigma2 in the projection's inputs."""
    if all(x is None for x in cotangents):
        return (None,) * len(inputs)
    grad_plan, *_, grad_sigma2 = cotangents
    backend = projection[-1]
    needed, d_row, d_col = ctx.needs_input_grad, None, None
    if grad_sigma2 is not None:
        logits, _, _, row, col, mask = projection[:_TENSORS]
        lines = lines_taking_part(logits, row, col, mask)
        _, u, v = calls.sigma2(plan, row, col, lines, None, "auto", 1e-8, 0, backend)
        d_plan, d_row, d_col = _of_sigma2(calls, grad_sigma2, u, v, (plan, row, col, lines), needed[3:5])
        grad_plan = d_plan if grad_plan is None else grad_plan + d_plan
    if grad_plan is None:
        grad_plan = torch.zeros_like(projection[0])
    found = _projection(needed, grad_plan, backward, projection)
    for index, extra in ((3, d_row), (4, d_col)):
        known = found[index]
        if extra is not None and known is not None:
            found[index] = known + extra
    return padded(found, inputs)


def _of_sigma2(
    calls: Calls,
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of sigma2 of (plan, row, col, mask) in the plan and, where ``needed``, in the marginals that were given."""
    plan, row, col, mask = leaves
    assert plan is not None
    d_plan, d_log_row, d_log_col = calls.sigma2_backward(grad, u, v, plan, row, col, mask, any(needed))
    if not any(needed):
        return d_plan, None, None
    valid = valid_entries(mask, plan, row, col)
    d_row = _of_marginal(row, d_log_row, None if col is not None else d_log_col, valid.any(-1))
    d_col = _of_marginal(col, d_log_col, None if row is not None else d_log_row, valid.any(-2))
    return d_plan, d_row, d_col


def _sigma2_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    _, u, v = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(u, v)
    save(ctx, inputs, u, v)


def _sigma2_gradient(calls: Calls, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Gradients:
    inputs, (u, v) = saved(ctx)
    if grad is None:
        return (None,) * len(inputs)
    assert u is not None
    assert v is not None
    return padded(_of_sigma2(calls, grad, u, v, inputs[:4], ctx.needs_input_grad[1:3]), inputs)


_SECOND: dict[str, Callable[..., Any]] = {
    "sinkhorn_backward": _oracle_backward,
    "sinkhorn_potentials_backward": _oracle_potentials_backward,
    "fixed_point_backward": _oracle_fixed_point_backward,
    "fixed_point_potentials_backward": _oracle_fixed_point_potentials_backward,
}
AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "sinkhorn": (_sinkhorn_context, _sinkhorn_gradient, composed.sinkhorn),
    "sinkhorn_info": (_info_context, _info_gradient, composed.sinkhorn_info),
    "fixed_point": (_fixed_point_context, _fixed_point_gradient, composed.fixed_point),
    "sigma2": (_sigma2_context, _sigma2_gradient, composed.sigma2),
    **{name: (_backward_context, second(oracle), oracle) for name, oracle in _SECOND.items()},
    "sigma2_backward": (_backward_context, second(_oracle_sigma2_backward), _composed_sigma2_backward),
}
"""Context, gradient, and the operator as a composition (``composed.py``)."""
