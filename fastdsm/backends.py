"""Who computes: the Triton kernels where one serves the problem, else the PyTorch path."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from . import pytorch, streamed, streamed_spectrum
from .problem import Attention, Dropout, Gradients, Outputs, Problem


def _kernels(backend: str) -> ModuleType | None:
    if backend != "triton":
        return None
    from . import kernels

    return kernels


def sinkhorn_forward(problem: Problem, outputs: Outputs, backend: str) -> None:
    """Fill ``outputs``."""
    kernels = _kernels(backend)
    if kernels is None or not kernels.sinkhorn_forward(problem, outputs):
        pytorch.sinkhorn_forward(problem, outputs)


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None, backend: str) -> None:
    """Fill ``gradients``."""
    kernels = _kernels(backend)
    if kernels is None or not kernels.sinkhorn_backward(problem, grad_plan, gradients, sweeps):
        pytorch.sinkhorn_backward(problem, grad_plan, gradients, sweeps)


def newton_forward(problem: Problem, outputs: Outputs, backend: str) -> None:
    """Fill ``outputs``."""
    kernels = _kernels(backend)
    if kernels is None or not kernels.newton_forward(problem, outputs):
        pytorch.newton_forward(problem, outputs)


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
    return kernels.attention if kernels is not None and kernels.attention.supports(problem) else None


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
    grad_out: Tensor,
    state: streamed.State,
    gradients: streamed.AttentionGradients,
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
        streamed.attention_backward(kernels, problem, value, sweeps, dropout, grad_out, state, gradients, implicit)
    else:
        pytorch.attention_backward(problem, value, sweeps, dropout, grad_out, state, gradients, implicit)


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
