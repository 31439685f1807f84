"""Who computes: the Triton kernels where one serves the problem, else the PyTorch path."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import pytorch
from .problem import Gradients, Outputs, Problem


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
