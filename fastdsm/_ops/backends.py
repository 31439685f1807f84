"""Who computes: the Triton kernels where one serves the problem, else the PyTorch path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import pytorch
from ..pytorch.spectrum import DEFAULT_TOL
from . import newton
from .problem import Attention, Dropout, Gradients, Outputs, Problem
from .streamed import gradient as streamed_gradient
from .streamed import spectrum as streamed_spectrum
from .streamed import sweeps as streamed


def _kernels(backend: str) -> ModuleType | None:
    if backend != "triton":
        return None
    from .. import kernels

    return kernels


def prepared(
    serve: Callable[[ModuleType], bool], matrices: Tensor, inputs: Mapping[str, Tensor | None], results: Sequence[Tensor | None]
) -> Any:
    """The launches by which kernels ``serve`` a call, to be made again for others of its form; None where that is not all.

    inputs: by the names that kernels have for them.
    """
    from .. import kernels
    from ..kernels.common.prepared import Prepared

    if not kernels.on_chip(matrices) or kernels.recording():
        return None
    with kernels.recorded() as launches:
        served = serve(kernels)
    return Prepared(launches, inputs, results) if served and launches else None


def sinkhorn_forward(problem: Problem, outputs: Outputs, backend: str) -> None:
    """Fill ``outputs``."""
    kernels = _kernels(backend)
    if kernels is None or not _by_kernels(kernels.sinkhorn_forward, problem, outputs):
        pytorch.sinkhorn_forward(problem, outputs)


def _by_kernels(forward: Callable[[Problem, Outputs], bool], problem: Problem, outputs: Outputs) -> bool:
    """Whether ``forward`` served the problem: plan and sigma2 at once, or else the plan, and sigma2 from it."""
    if forward(problem, outputs):
        return True
    if outputs.sigma2 is None:
        return False
    logits = problem.logits.to(problem.compute_dtype)
    plan = outputs.plan if outputs.plan.dtype == logits.dtype else torch.empty_like(logits)
    if not forward(replace(problem, logits=logits), replace(outputs, plan=plan, sigma2=None)):
        return False
    taking_part = logits != -torch.inf
    if problem.mask is not None:
        taking_part &= problem.mask
    given = plan, problem.row_marginal, problem.col_marginal, taking_part
    if problem.row_marginal is None and problem.col_marginal is None and not problem.unit_rows:
        given = plan.mT, None, None, taking_part.mT  # the side whose lines have mass 1 comes first
    u, v = (plan.new_empty(given[0].shape[0], lines) for lines in given[0].shape[1:])
    sigma2((outputs.sigma2, u, v), *given, None, "auto", DEFAULT_TOL, 0, "triton")
    if plan is not outputs.plan:
        outputs.plan.copy_(plan)
    return True


def temperature_search(backend: str, *arguments: Any) -> bool:
    """Whether a kernel served :func:`fastdsm.kernels.temperature_search` of these arguments."""
    kernels = _kernels(backend)
    return kernels is not None and kernels.temperature_search(*arguments)


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None, backend: str) -> None:
    """Fill ``gradients``."""
    kernels = _kernels(backend)
    if kernels is None or not kernels.sinkhorn_backward(problem, grad_plan, gradients, sweeps):
        pytorch.sinkhorn_backward(problem, grad_plan, gradients, sweeps)


def newton_forward(problem: Problem, outputs: Outputs, backend: str) -> None:
    """Fill ``outputs``."""
    kernels = _kernels(backend)
    if kernels is None or not _by_kernels(kernels.newton_forward, problem, outputs):
        newton.newton_forward(problem, outputs, partial(sinkhorn_forward, backend=backend))


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients, backend: str) -> None:
    """Fill ``gradients``."""
    kernels = _kernels(backend)
    if kernels is None or not kernels.implicit_backward(problem, grad_plan, g, gradients):
        pytorch.implicit_backward(problem, grad_plan, g, gradients)


def sigma2(
    results: tuple[Tensor, Tensor, Tensor],
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    v0: Tensor | None,
    method: str,
    tol: float,
    max_iters: int,
    backend: str,
) -> None:
    """Fill ``results``: value (B,), u (B, n), v (B, m)."""
    kernels = _kernels(backend)
    if kernels is not None and method == "auto" and kernels.sigma2(plan, row_marginal, col_marginal, mask, tol, *results):
        return
    pytorch.sigma2(plan, row_marginal, col_marginal, mask, v0, method, tol, max_iters, *results)


def sigma2_bounds(
    results: tuple[Tensor, Tensor],
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> None:
    """Fill ``results``: lower and upper (B,)."""
    kernels = _kernels(backend)
    if kernels is None or not kernels.sigma2_bounds(plan, row_marginal, col_marginal, mask, *results):
        pytorch.sigma2_bounds(plan, row_marginal, col_marginal, mask, *results)


def _without_logits(problem: Attention) -> bool:
    return problem.query.numel() == 0 or problem.key.numel() == 0


def _attention_kernels(problem: Attention, backend: str) -> Any:
    """The passes of the kernels, if they serve the problem."""
    kernels = _kernels(backend)
    return kernels.attention.launch if kernels is not None and kernels.attention.launch.supports(problem) else None


def attention_passes(problem: Attention, backend: str) -> streamed.Passes:
    """The kernels' passes, or PyTorch's, block by block."""
    kernels = _attention_kernels(problem, backend)
    if kernels is not None:
        found: streamed.Passes = kernels
        return found
    from ..pytorch import passes

    return passes


def short(query: Tensor, key: Tensor, value: Tensor, entries: bool, implicit: bool, saving: bool, backend: str) -> bool:
    """Whether heads are served by launches that hold all their logits. entries: there is a bias, a mask or dropout."""
    served: bool = not implicit and backend == "triton" and short_launches().serves(query, key, value, entries, saving)
    return served


def short_launches() -> Any:
    """Forward and backward of heads that are :func:`short`."""
    kernels = _kernels("triton")
    assert kernels is not None
    return kernels.attention.launch_short


def attention_forward(
    problem: Attention,
    value: Tensor,
    sweeps: streamed.Sweeps,
    dropout: Dropout | None,
    out: Tensor,
    state: streamed.State,
    residual: bool,
    backend: str,
) -> None:
    """Fill ``out`` and ``state``; without logits there is nothing but zeros."""
    if _without_logits(problem):
        for x in (out, state.f, state.g, state.residual, state.sweeps):
            x.zero_()
        return
    kernels = _attention_kernels(problem, backend)
    if kernels is not None:
        streamed.attention_forward(kernels, problem, value, sweeps, dropout, out, state, residual)
    else:
        pytorch.attention_forward(problem, value, sweeps, dropout, out, state, residual)


def attention_backward(
    problem: Attention,
    value: Tensor,
    sweeps: streamed.Sweeps,
    dropout: Dropout | None,
    given: streamed_gradient.Cotangents,
    state: streamed.State,
    gradients: streamed_gradient.AttentionGradients,
    implicit: bool,
    backend: str,
) -> None:
    """Fill ``gradients``."""
    if _without_logits(problem):
        for x in (gradients.query, gradients.key, gradients.value, gradients.bias):
            if x is not None:
                x.zero_()
        return
    kernels = _attention_kernels(problem, backend)
    if kernels is not None:
        streamed_gradient.attention_backward(kernels, problem, value, sweeps, dropout, given, state, gradients, implicit)
    else:
        pytorch.attention_backward(problem, value, sweeps, dropout, given, state, gradients, implicit)


def attention_sigma2(
    problem: Attention,
    sweeps: streamed.Sweeps,
    accuracy: streamed_spectrum.Accuracy,
    found: streamed_spectrum.Spectrum,
    backend: str,
) -> None:
    """Fill ``found``; without logits there is nothing but zeros."""
    if _without_logits(problem):
        for x in vars(found).values():
            x.zero_()
        return
    kernels = _attention_kernels(problem, backend)
    if kernels is not None:
        streamed_spectrum.attention_sigma2(kernels, problem, sweeps, accuracy, found)
    else:
        pytorch.attention_sigma2(problem, sweeps, accuracy, found)
