"""The operators torch sees: ``torch.ops.fastdsm.*``, with fake kernels and a rule for vmap.

Tensors arrive validated and flattened: matrices (B, n, m), vectors (B, n) or (B, m), one entry per matrix (B,). One
operator per direction; the backward recomputes what it needs. How they run is ``runs.py``. Autocast leaves dtypes alone: the
arithmetic inside is float32 whatever comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import pytorch
from .problem import compute_dtype
from .runs import Backward, Bounds, Forms, Forward, Run, Sigma2, Tensors, run_of

LIBRARY = torch.library.Library("fastdsm", "DEF")

# What every projection operator takes; the names are those of the public call. Tensors lead every operator's inputs.
_INPUTS = (
    "Tensor logits, Tensor? temperature, Tensor? f0, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, "
    "float scale, SymInt n_iters, bool columns_first, float tol, str backend"
)
LIBRARY.define(f"sinkhorn({_INPUTS}) -> Tensor")
LIBRARY.define(f"sinkhorn_info({_INPUTS}, bool with_sigma2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"sinkhorn_backward(Tensor grad_plan, Tensor? sweeps, {_INPUTS}, bool lines) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"fixed_point({_INPUTS}, str solver, bool with_info, bool with_sigma2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"fixed_point_backward(Tensor grad_plan, Tensor f, Tensor g, {_INPUTS}, bool lines) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"sinkhorn_potentials_backward(Tensor grad_plan, Tensor grad_f, Tensor grad_g, Tensor? sweeps, {_INPUTS}, bool lines) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"fixed_point_potentials_backward(Tensor grad_plan, Tensor grad_f, Tensor grad_g, Tensor f, Tensor g, {_INPUTS}, "
    "bool lines) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sigma2(Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, Tensor? v0, str method, float tol, "
    "SymInt max_iters, str backend) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sigma2_backward(Tensor grad, Tensor u, Tensor v, Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, "
    "bool lines) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "sigma2_bounds(Tensor plan, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, str backend) -> (Tensor, Tensor)"
)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each operator does on the CPU and on CUDA; None for a result that was not asked for.

``run``, or else the ``forms`` of the operator's tensors, is passed where it is known.
"""


def implement(
    name: str, absent: Callable[..., Sequence[Tensor]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is operator ``name`` on the CPU and on CUDA.

    absent: of the operator's inputs, empty results, which an operator returns where the function returns None.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        IMPLEMENTATIONS[name] = function

        def filled(*inputs: Any) -> Any:
            results = function(*inputs)
            if results is None or isinstance(results, Tensor) or all(isinstance(x, Tensor) for x in results):
                return results
            assert absent is not None
            return tuple(y if x is None else x for x, y in zip(results, absent(*inputs), strict=True))

        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, filled, key)
        return function

    return register


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


def _gradients_like(logits: Tensor, lines: bool, columns_first: bool) -> tuple[Tensor, ...]:
    batch, n, m = logits.shape
    dtype = compute_dtype(logits.dtype)
    shapes = [(batch, n if columns_first else m), (batch, n), (batch, m)] if lines else [(0,)] * 3
    return logits.new_empty(logits.shape), *(logits.new_empty(shape, dtype=dtype) for shape in shapes)


def _no_info(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _info_like(logits[:0], False, False)


def _no_vectors(grad_plan: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _gradients_like(grad_plan[:0].to(compute_dtype(grad_plan.dtype)), False, True)


@implement("sinkhorn")
def _sinkhorn(*inputs: Any, run: Run | None = None, forms: Forms = None) -> Tensor:
    tensors = inputs[:6]
    run = run or run_of(Forward, tensors[0], tensors, forms, *inputs[7:])
    plan = run(tensors, inputs[6])[0]
    assert plan is not None
    return plan


@implement("sinkhorn_info", _no_info)
def _sinkhorn_info(*inputs: Any, run: Run | None = None, forms: Forms = None) -> Tensors:
    tensors = inputs[:6]
    run = run or run_of(Forward, tensors[0], tensors, forms, *inputs[7:-1], "sinkhorn", True, inputs[-1])
    return run(tensors, inputs[6])


@implement("fixed_point", _no_info)
def _fixed_point(*inputs: Any, run: Run | None = None, forms: Forms = None) -> Tensors:
    tensors = inputs[:6]
    run = run or run_of(Forward, tensors[0], tensors, forms, *inputs[7:])
    return run(tensors, inputs[6])


@implement("sinkhorn_backward", _no_vectors)
def _sinkhorn_backward(*inputs: Any, run: Run | None = None, forms: Forms = None) -> Tensors:
    tensors, (scale, *options, lines) = inputs[:8], inputs[8:]
    run = run or run_of(Backward, tensors[2], tensors, forms, False, lines, *options)
    return run(tensors, scale)


@implement("fixed_point_backward", _no_vectors)
def _fixed_point_backward(
    grad_plan: Tensor, f: Tensor, g: Tensor, *inputs: Any, run: Run | None = None, forms: Forms = None
) -> Tensors:
    tensors, (scale, *options, lines) = _from_potential(grad_plan, f, g, *inputs), inputs[6:]
    run = run or run_of(Backward, inputs[0], tensors, forms, True, lines, *options)
    return run(tensors, scale)


def _from_potential(grad_plan: Tensor, f: Tensor, g: Tensor, *inputs: Any) -> Tensors:
    """An implicit backward's tensors: of the potentials the one that the other follows from."""
    columns_first = inputs[8]
    return (grad_plan, g if columns_first else f, *inputs[:6])


@implement("sinkhorn_potentials_backward", _no_vectors)
def _sinkhorn_potentials_backward(
    grad_plan: Tensor, grad_f: Tensor, grad_g: Tensor, sweeps: Tensor | None, *inputs: Any
) -> Tensors:
    scale, *options, lines = inputs[6:]
    run = Backward(inputs[0], False, lines, *options)
    return run.with_potentials((grad_plan, sweeps, *inputs[:6]), scale, grad_f, grad_g)


@implement("fixed_point_potentials_backward", _no_vectors)
def _fixed_point_potentials_backward(
    grad_plan: Tensor, grad_f: Tensor, grad_g: Tensor, f: Tensor, g: Tensor, *inputs: Any
) -> Tensors:
    scale, *options, lines = inputs[6:]
    run = Backward(inputs[0], True, lines, *options)
    return run.with_potentials(_from_potential(grad_plan, f, g, *inputs), scale, grad_f, grad_g)


@implement("sigma2")
def _sigma2(*inputs: Any, run: Run | None = None, forms: Forms = None) -> Tensors:
    run = run or run_of(Sigma2, inputs[0], inputs[:5], forms, *inputs[5:])
    return run(inputs[:5])


def _vectors_like(plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, m = plan.shape
    value, u, v = (plan.new_empty(shape, dtype=compute_dtype(plan.dtype)) for shape in ((batch,), (batch, n), (batch, m)))
    return value, u, v


@implement("sigma2_backward")
def _sigma2_backward(*inputs: Any) -> Tensors:
    return pytorch.sigma2_backward(*inputs)


def _slopes_like(grad: Tensor, u: Tensor, v: Tensor, plan: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return plan.new_empty(plan.shape), *(x.new_empty(x.shape if inputs[-1] else (0,)) for x in (u, v))


@implement("sigma2_bounds")
def _sigma2_bounds(*inputs: Any, forms: Forms = None) -> Tensors:
    return run_of(Bounds, inputs[0], inputs[:4], forms, *inputs[4:])(inputs[:4])


def _bounds_like(plan: Tensor) -> tuple[Tensor, Tensor]:
    lower = plan.new_empty((plan.shape[0],), dtype=compute_dtype(plan.dtype))
    return lower, torch.empty_like(lower)


torch.library.register_fake("fastdsm::sinkhorn", lambda logits, *_: logits.new_empty(logits.shape), lib=LIBRARY)
torch.library.register_fake("fastdsm::sinkhorn_info", lambda logits, *inputs: _info_like(logits, True, inputs[-1]), lib=LIBRARY)
torch.library.register_fake(
    "fastdsm::sinkhorn_backward",
    lambda grad_plan, sweeps, logits, *inputs: _gradients_like(logits, inputs[-1], inputs[-4]),
    lib=LIBRARY,
)
torch.library.register_fake("fastdsm::fixed_point", lambda logits, *inputs: _info_like(logits, *inputs[-2:]), lib=LIBRARY)
torch.library.register_fake(
    "fastdsm::fixed_point_backward",
    lambda grad_plan, f, g, logits, *inputs: _gradients_like(logits, inputs[-1], inputs[-4]),
    lib=LIBRARY,
)
torch.library.register_fake(
    "fastdsm::sinkhorn_potentials_backward",
    lambda grad_plan, grad_f, grad_g, sweeps, logits, *inputs: _gradients_like(logits, inputs[-1], inputs[-4]),
    lib=LIBRARY,
)
torch.library.register_fake(
    "fastdsm::fixed_point_potentials_backward",
    lambda grad_plan, grad_f, grad_g, f, g, logits, *inputs: _gradients_like(logits, inputs[-1], inputs[-4]),
    lib=LIBRARY,
)
torch.library.register_fake("fastdsm::sigma2", lambda plan, *_: _vectors_like(plan), lib=LIBRARY)
torch.library.register_fake("fastdsm::sigma2_backward", _slopes_like, lib=LIBRARY)
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
    "sinkhorn", "sinkhorn_info", "sinkhorn_backward", "sinkhorn_potentials_backward", "fixed_point", "fixed_point_backward",
    "fixed_point_potentials_backward", "sigma2", "sigma2_backward", "sigma2_bounds",
):  # fmt: skip
    torch.library.register_vmap(f"fastdsm::{_name}", _over_batch(getattr(torch.ops.fastdsm, _name).default), lib=LIBRARY)
