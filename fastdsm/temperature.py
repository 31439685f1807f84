"""The way out of the homogeneity trap: ``fastdsm.temperature_for_sigma2``.

"The Homogeneity Trap" (arXiv 2601.02080, by its abstract): the maximum-entropy bias of Sinkhorn drives plans to the uniform
one, sigma2 collapses, and with it what a stack of such layers can see. Sinkhorn's temperature is the knob that moves sigma2;
how to set it so that sigma2 has a wanted value, and the derivative of that setting, are derived here and in
:mod:`fastdsm._ops.temperature_search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import arguments
from ._ops.gradients import Gradients, padded, save, saved
from ._ops.operators import LIBRARY, implement
from ._ops.problem import compute_dtype
from ._ops.temperature_search import matrices_of, root_gradients, search

_INPUTS = (
    "Tensor logits, Tensor target, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, "
    "Tensor? needed, SymInt n_iters, str backend"
)
LIBRARY.define(f"temperature_for_sigma2({_INPUTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"temperature_for_sigma2_backward(Tensor grad, Tensor temperature, Tensor reached, {_INPUTS}) -> (Tensor, Tensor)"
)


def temperature_for_sigma2(
    logits: Tensor,
    target: float | Tensor,
    *,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    n_iters: int = 50,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Temperature at which the converged plan of each matrix has sigma2 = ``target``; the largest, if there are several.

    Args:
        logits: (..., n, m), float16, bfloat16, float32 or float64; -inf entries take no part. The search is in float64, but
            where kernels serve narrower logits of up to 64 lines: there it is one launch, in float32.
        target: in (0, 1), a float or a tensor broadcastable to the batch shape (...,), then differentiable.
        row_marginal, col_marginal, mask: as for :func:`fastdsm.sinkhorn`; constants here, so marginals must not require grad.
        n_iters: steps of Newton's method at most for one plan.
        backend: as for :func:`fastdsm.sinkhorn`, which makes the plans.

    Returns:
        temperature (...,), float32 (float64 for float64 logits), and reached (...,), bool. Where sigma2 comes within 1e-4 of
        the target nowhere, reached is False and the temperature NaN: logits that are constant along rows or columns (n = 1 or
        m = 1 among them) whose sigma2 is 0, ties between assignments, NaN or +inf in the matrix, a target outside (0, 1) on
        an accelerator, or a plan that n_iters steps leave unconverged. Two roots closer than a factor 1.28 may be passed
        over, and under a mask any root at which max |logits| / temperature is below atanh(target) / 16.

        Differentiable in logits and target, by the implicit function theorem at convergence; zero gradient where not reached,
        unbounded where sigma2's curve only touches the target. No second derivative, no torch.func.grad; torch.vmap runs a
        call per slice.

    Raises:
        TypeError, ValueError: with what was expected, what came and what to do.

    A truncated plan of this temperature has this sigma2 as far as it has converged: its error falls like sigma2^2 per sweep.
    The method is derived in :mod:`fastdsm._ops.temperature_search`; a matrix takes 10 (n = 4) to 17 (n = 64) plans on average,
    each from the last.
    """
    return temperature_where(
        None, logits, target, row_marginal=row_marginal, col_marginal=col_marginal, mask=mask, n_iters=n_iters, backend=backend
    )


def temperature_where(
    needed: Tensor | None,
    logits: Tensor,
    target: float | Tensor,
    *,
    row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None,
    mask: Tensor | None = None,
    n_iters: int = 50,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`temperature_for_sigma2` of the matrices that are ``needed`` (...,), bool, None for all; the rest not reached."""
    arguments.check_matrices(logits, "logits")
    batch, n, m = logits.shape[:-2], *logits.shape[-2:]
    wanted = arguments.sigma2_of(target, "target", logits)
    row = arguments.line_vector(row_marginal, "row_marginal", logits, n, "row")
    col = arguments.line_vector(col_marginal, "col_marginal", logits, m, "column")
    for x, name in ((row, "row_marginal"), (col, "col_marginal")):
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} must not require grad: the temperature has no gradient in it; pass {name}.detach()")
    arguments.check_marginals(row, col)
    arguments.check_count(n_iters, "n_iters")
    resolved = arguments.resolve_backend(backend, logits)
    tensors = (logits, wanted, row, col, arguments.mask_of(mask, logits), needed)
    flat = [x if x is None else x.reshape((math.prod(batch), *x.shape[len(batch) :])) for x in tensors]
    temperature, reached = torch.ops.fastdsm.temperature_for_sigma2(*flat, n_iters, resolved)
    return temperature.reshape(batch), reached.reshape(batch)


@implement("temperature_for_sigma2")
def _search(
    logits: Tensor,
    target: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    mask: Tensor | None,
    needed: Tensor | None,
    n_iters: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    matrices, rounding = matrices_of(logits, row, col, mask, n_iters, backend)
    temperature, reached = search(matrices, rounding, target.double(), needed, logits.dtype)
    return temperature.to(compute_dtype(logits.dtype)), reached


@implement("temperature_for_sigma2_backward")
def _backward(grad: Tensor, temperature: Tensor, reached: Tensor, logits: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    target, row, col, mask, _, *options = inputs
    matrices, _ = matrices_of(logits, row, col, mask, *options)
    d_logits, d_target = root_gradients(matrices, temperature, reached, grad)
    return d_logits.to(logits.dtype), d_target.to(target.dtype)


def _temperature_like(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch = logits.shape[:1]
    return logits.new_empty(batch, dtype=compute_dtype(logits.dtype)), logits.new_empty(batch, dtype=torch.bool)


def _gradients_like(grad: Tensor, temperature: Tensor, reached: Tensor, logits: Tensor, target: Tensor, *_: Any) -> Any:
    return logits.new_empty(logits.shape), target.new_empty(target.shape)


torch.library.register_fake("fastdsm::temperature_for_sigma2", _temperature_like, lib=LIBRARY)
torch.library.register_fake("fastdsm::temperature_for_sigma2_backward", _gradients_like, lib=LIBRARY)


def _context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    temperature, reached = output
    ctx.mark_non_differentiable(reached)
    save(ctx, inputs, temperature, reached)


def _gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> Gradients:
    inputs, (temperature, reached) = saved(ctx)
    if torch.is_grad_enabled():
        raise NotImplementedError("temperature_for_sigma2 has no second derivative; use backward without create_graph=True")
    return padded(torch.ops.fastdsm.temperature_for_sigma2_backward(grad.contiguous(), temperature, reached, *inputs), inputs)


torch.library.register_autograd("fastdsm::temperature_for_sigma2", _gradient, setup_context=_context, lib=LIBRARY)
