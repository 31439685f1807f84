"""The operators torch sees: ``torch.ops.fastdsm.*``, with fake kernels and a rule for vmap.

Tensors arrive validated and flattened: matrices (B, n, m), vectors (B, n) or (B, m), one entry per matrix (B,). One
operator per direction; the backward recomputes what it needs. Autocast leaves dtypes alone: the arithmetic inside is
float32 whatever comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .problem import Gradients, Outputs, Problem, compute_dtype

LIBRARY = torch.library.Library("fastdsm", "DEF")

# What every projection operator takes; the names are those of the public call.
_INPUTS = (
    "Tensor logits, Tensor? temperature, Tensor? f0, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, "
    "float scale, SymInt n_iters, bool columns_first, float tol, str backend"
)
LIBRARY.define(f"sinkhorn({_INPUTS}) -> Tensor")
LIBRARY.define(f"sinkhorn_info({_INPUTS}, bool with_sigma2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"sinkhorn_backward(Tensor grad_plan, Tensor? sweeps, bool lines, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"fixed_point({_INPUTS}, str solver, bool with_info, bool with_sigma2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"fixed_point_backward(Tensor grad_plan, Tensor f, Tensor g, bool lines, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sigma2(Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, Tensor? v0, str method, float tol, "
    "SymInt max_iters, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sigma2_bounds(Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, str backend) -> (Tensor, Tensor)"
)


def implement(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is operator ``name`` on the CPU and on CUDA."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
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


def _info_like(logits: Tensor, with_info: bool, with_sigma2: bool) -> tuple[Tensor, ...]:
    """Uninitialised (plan, residual, sweeps, f, g, sigma2); empty what is not asked for."""
    batch, n, m = logits.shape
    dtype = compute_dtype(logits.dtype)
    count = batch if with_info else 0
    return (
        logits.new_empty((batch, n, m)),
        logits.new_empty((count,), dtype=dtype),
        logits.new_empty((count,), dtype=torch.int32),
        logits.new_empty((count, n), dtype=dtype),
        logits.new_empty((count, m), dtype=dtype),
        logits.new_empty((batch if with_sigma2 else 0,), dtype=dtype),
    )


@implement("sinkhorn")
def _sinkhorn(logits: Tensor, *inputs: Any) -> Tensor:
    plan = logits.new_empty(logits.shape)
    *problem, backend = inputs
    columns_first = problem[-2]
    backends.sinkhorn_forward(_problem(logits, *problem), Outputs(plan if columns_first else plan.mT), backend)
    return plan


@implement("sinkhorn_info")
def _sinkhorn_info(logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *problem, with_sigma2 = inputs
    return _with_info(backends.sinkhorn_forward, True, with_sigma2, logits, *problem)


@implement("fixed_point")
def _fixed_point(logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *problem, solver, with_info, with_sigma2 = inputs
    forward = backends.newton_forward if solver == "newton" else backends.sinkhorn_forward
    return _with_info(forward, with_info, with_sigma2, logits, *problem)


def _with_info(
    forward: Callable[..., None], with_info: bool, with_sigma2: bool, logits: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *problem, backend = inputs
    plan, residual, sweeps, f, g, sigma2 = results = _info_like(logits, with_info, with_sigma2)
    plan, f, g = (plan, f, g) if problem[-2] else (plan.mT, g, f)
    wanted = sigma2 if with_sigma2 else None
    outputs = Outputs(plan, residual, sweeps, f, g, wanted) if with_info else Outputs(plan, sigma2=wanted)
    forward(_problem(logits, *problem), outputs, backend)
    return results


def _gradients_like(logits: Tensor, lines: bool, columns_first: bool) -> tuple[Tensor, ...]:
    batch, n, m = logits.shape
    dtype = compute_dtype(logits.dtype)
    shapes = [(batch, n if columns_first else m), (batch, n), (batch, m)] if lines else [(0,)] * 3
    return logits.new_empty(logits.shape), *(logits.new_empty(shape, dtype=dtype) for shape in shapes)


@implement("sinkhorn_backward")
def _sinkhorn_backward(
    grad_plan: Tensor, sweeps: Tensor | None, lines: bool, logits: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *problem, backend = inputs
    results, cotangent, gradients = _backward_of(grad_plan, lines, logits, problem[-2])
    backends.sinkhorn_backward(_problem(logits, *problem), cotangent, gradients, sweeps, backend)
    return results


@implement("fixed_point_backward")
def _fixed_point_backward(
    grad_plan: Tensor, f: Tensor, g: Tensor, lines: bool, logits: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    *problem, backend = inputs
    columns_first = problem[-2]
    results, cotangent, gradients = _backward_of(grad_plan, lines, logits, columns_first)
    first = g if columns_first else f  # of the two potentials the one that the other follows from
    backends.implicit_backward(_problem(logits, *problem), cotangent, first, gradients, backend)
    return results


def _backward_of(
    grad_plan: Tensor, lines: bool, logits: Tensor, columns_first: bool
) -> tuple[tuple[Tensor, ...], Tensor, Gradients]:
    """The outputs of a backward; the cotangent and the same outputs as the canonical problem has them."""
    d_logits, d_f0, d_row, d_col = results = _gradients_like(logits, lines, columns_first)
    target, rows, cols = d_logits, d_row, d_col
    if not columns_first:
        target, grad_plan, rows, cols = target.mT, grad_plan.mT, cols, rows
    return results, grad_plan, Gradients(target, d_f0, rows, cols) if lines else Gradients(target)


@implement("sigma2")
def _sigma2(plan: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    results = _vectors_like(plan)
    backends.sigma2(results, plan, *inputs)
    return results


def _vectors_like(plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, m = plan.shape
    value, u, v = (plan.new_empty(shape, dtype=compute_dtype(plan.dtype)) for shape in ((batch,), (batch, n), (batch, m)))
    return value, u, v


@implement("sigma2_bounds")
def _sigma2_bounds(plan: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    results = _bounds_like(plan)
    backends.sigma2_bounds(results, plan, *inputs)
    return results


def _bounds_like(plan: Tensor) -> tuple[Tensor, Tensor]:
    lower = plan.new_empty((plan.shape[0],), dtype=compute_dtype(plan.dtype))
    return lower, torch.empty_like(lower)


torch.library.register_fake("fastdsm::sinkhorn", lambda logits, *_: logits.new_empty(logits.shape), lib=LIBRARY)
torch.library.register_fake("fastdsm::sinkhorn_info", lambda logits, *inputs: _info_like(logits, True, inputs[-1]), lib=LIBRARY)
torch.library.register_fake(
    "fastdsm::sinkhorn_backward",
    lambda grad_plan, sweeps, lines, logits, *inputs: _gradients_like(logits, lines, inputs[-3]),
    lib=LIBRARY,
)
torch.library.register_fake("fastdsm::fixed_point", lambda logits, *inputs: _info_like(logits, *inputs[-2:]), lib=LIBRARY)
torch.library.register_fake(
    "fastdsm::fixed_point_backward",
    lambda grad_plan, f, g, lines, logits, *inputs: _gradients_like(logits, lines, inputs[-3]),
    lib=LIBRARY,
)
torch.library.register_fake("fastdsm::sigma2", lambda plan, *_: _vectors_like(plan), lib=LIBRARY)
torch.library.register_fake("fastdsm::sigma2_bounds", lambda plan, *_: _bounds_like(plan), lib=LIBRARY)


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


for _name in (
    "sinkhorn", "sinkhorn_info", "sinkhorn_backward", "fixed_point", "fixed_point_backward", "sigma2", "sigma2_bounds",
):  # fmt: skip
    torch.library.register_vmap(f"fastdsm::{_name}", _over_batch(getattr(torch.ops.fastdsm, _name).default), lib=LIBRARY)
