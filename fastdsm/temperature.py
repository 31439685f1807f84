"""The way out of the homogeneity trap: ``fastdsm.temperature_for_sigma2``.

"The Homogeneity Trap" (arXiv 2601.02080, by its abstract): the maximum-entropy bias of Sinkhorn drives plans to the uniform
one, sigma2 collapses, and with it what a stack of such layers can see. Sinkhorn's temperature is the knob that moves sigma2;
how to set it so that sigma2 has a wanted value, and the derivative of that setting, are derived here and in
:mod:`fastdsm._ops.temperature_search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ._ops import arguments, composed, sharded
from ._ops.gradients import Gradients, padded, save, saved, through
from ._ops.operators import LIBRARY, implement
from ._ops.plain import KeptCalls
from ._ops.problem import compute_dtype
from ._ops.runs import TemperatureSearch, run_of
from ._ops.temperature_search import matrices_of, near_root, root_gradients, search
from ._ops.transforms import Call, backward_may_follow

_INPUTS = (
    "Tensor logits, Tensor target, Tensor? row_marginal, Tensor? col_marginal, Tensor? mask, "
    "Tensor? needed, SymInt n_iters, str backend"
)
LIBRARY.define(f"temperature_for_sigma2({_INPUTS}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"temperature_for_sigma2_backward(Tensor grad, Tensor temperature, Tensor reached, {_INPUTS}) -> (Tensor, Tensor)"
)


@sharded.by_shards("logits", target=0, row_marginal=1, col_marginal=1, mask=2)
def temperature_for_sigma2(
    logits: Tensor,
    target: float | Tensor,
    *,
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
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

        Differentiable in logits and target, twice and in either mode, by the implicit function theorem at convergence; zero
        gradient where not reached, unbounded where sigma2's curve only touches the target. torch.vmap runs a call per slice.

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
    row_marginal: float | Tensor | None = None,
    col_marginal: float | Tensor | None = None,
    mask: Tensor | None = None,
    n_iters: int = 50,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`temperature_for_sigma2` of the matrices that are ``needed`` (...,), bool, None for all; the rest not reached."""
    row_marginal, col_marginal = arguments.marginals_of(row_marginal, col_marginal, logits)
    tensors = (logits, target, row_marginal, col_marginal, mask, needed)
    found: tuple[Tensor, Tensor] = _called(tensors, (n_iters, backend))
    return found


class _Call:
    """A call whose arguments have the right forms: how they come to the operator, (B, n, m) and (B,), and its results back."""

    def __init__(self, tensors: tuple[Any, ...], n_iters: int, backend: str) -> None:
        logits, target, row, col, mask, needed = tensors
        arguments.check_matrices(logits, "logits")
        n_iters = arguments.count_of(n_iters, "n_iters")
        n, m = logits.shape[-2:]
        formed = (
            logits,
            arguments.sigma2_of(target, "target", logits),
            arguments.line_vector(row, "row_marginal", logits, n, "row"),
            arguments.line_vector(col, "col_marginal", logits, m, "column"),
            arguments.mask_of(mask, logits),
            needed,
        )
        self.batch = logits.shape[:-2]
        self.tolerance = arguments.tolerance_of_totals(row, col)
        self.flatten = arguments.flattening(tensors, formed, len(self.batch))
        self.options = n_iters, arguments.resolve_backend(backend, logits)
        self.run: TemperatureSearch | None = None

    def __call__(self, tensors: tuple[Any, ...], plain: bool) -> tuple[Tensor, Tensor]:
        """The results for ``tensors`` of the form that was looked at; ``plain``: they and the thread are."""
        arguments.check_sigma2(tensors[1], "target")
        for x, name in ((tensors[2], "row_marginal"), (tensors[3], "col_marginal")):
            if x is not None and x.requires_grad:
                raise ValueError(f"{name} must not require grad: the temperature has no gradient in it; pass {name}.detach()")
        if self.flatten is not None:
            tensors = self.flatten(tensors)
        logits, target, row, col, mask, needed = tensors
        tensors = logits, target, row, arguments.equalised(row, col, mask, self.tolerance), mask, needed
        if plain and not backward_may_follow(tensors):
            if self.run is None:
                self.run = TemperatureSearch(tensors[0], *self.options)
            temperature, reached = _search(*tensors, *self.options, run=self.run)
        else:
            logits, target, *rest = tensors
            if not isinstance(target, Tensor):
                target = arguments.filled(target, logits.shape[:1], logits)
            temperature, reached = _differentiable(logits, target, *rest, *self.options)
        temperature, reached = arguments.unflattened((temperature, reached), self.batch)
        return temperature, reached


_called = KeptCalls(_Call)


@implement("temperature_for_sigma2")
def _search(
    logits: Tensor,
    target: float | Tensor,
    row: Tensor | None,
    col: Tensor | None,
    mask: Tensor | None,
    needed: Tensor | None,
    n_iters: int,
    backend: str,
    run: TemperatureSearch | None = None,
) -> tuple[Tensor, Tensor]:
    if run is None:
        assert isinstance(target, Tensor)
        tensors = logits, target, row, col, mask, needed
        run = cast(TemperatureSearch, run_of(TemperatureSearch, logits, tensors, None, n_iters, backend))
    matrices, reach = matrices_of(logits, row, col, mask, n_iters, backend)
    return search(matrices, reach, target, needed, compute_dtype(logits.dtype), run)


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


def _gradient(calls: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> Gradients:
    found: Any
    inputs, found = saved(ctx)
    if torch.is_grad_enabled():
        return through(partial(near_root, *found), inputs, ctx.needs_input_grad[: len(inputs)], grad)
    return padded(torch.ops.fastdsm.temperature_for_sigma2_backward(grad.contiguous(), *found, *inputs), inputs)


def _composed(*inputs: Any) -> tuple[Tensor, Tensor]:
    temperature, reached = composed.without_tangents("temperature_for_sigma2", *inputs)
    return near_root(temperature, reached, *inputs), reached


_differentiable = Call("temperature_for_sigma2", by_form=False, rules=(_context, _gradient, _composed))
