"""Triton kernels and their launchers, a folder a family; each call says whether a kernel served it.

Which family serves what, and the files of each: ``README.md``. Nothing here validates or differentiates, and nothing here
imports the PyTorch path or the oracle.
"""

from __future__ import annotations

from torch import Tensor

from .._ops.problem import Gradients, Outputs, Problem
from . import attention, mhc, panel, registers, spectrum, stream, tile
from .common.configuration import Configuration, recorded, recording

__all__ = [
    "configurations",
    "implicit_backward",
    "newton_forward",
    "on_chip",
    "recorded",
    "recording",
    "sigma2",
    "sigma2_bounds",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "temperature_search",
]


def configurations() -> list[Configuration]:
    """Every kernel that can be launched: the finite table."""
    families = (
        registers.launch,
        registers.launch_converged,
        registers.sigma2,
        tile.launch,
        tile.launch_converged,
        panel.launch,
        stream.launch,
        spectrum.launch,
        attention.launch,
        attention.launch_short,
        mhc.launch,
    )
    return [x for family in families for x in family.configurations()]


def on_chip(matrices: Tensor) -> bool:
    """Whether a matrix stays on chip, so that a call that kernels serve is launches and nothing else between them."""
    return max(matrices.shape[-2:]) <= panel.launch.BLOCKS_M[-1]


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> bool:
    """Fill ``outputs``, in one launch up to 256; false where no kernel serves the problem."""
    if registers.launch.supports_forward(problem, outputs):
        registers.launch.sinkhorn_forward(problem, outputs)
    elif tile.launch.supports_forward(problem, outputs.sigma2 is not None):
        tile.launch.sinkhorn_forward(problem, outputs)
    elif panel.launch.supports(problem):
        panel.launch.sinkhorn_forward(problem, outputs)
    elif stream.launch.supports(problem) and outputs.sigma2 is None:
        stream.launch.sinkhorn_forward(problem, outputs)
    else:
        return False
    return True


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None) -> bool:
    """Fill ``gradients``, in one launch up to 256; false where no kernel serves the problem."""
    if registers.launch.supports_backward(problem, grad_plan, gradients):
        registers.launch.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    elif tile.launch.supports_backward(problem):
        tile.launch.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    elif panel.launch.supports(problem):
        panel.launch.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    elif stream.launch.supports(problem):
        stream.launch.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    else:
        return False
    return True


def newton_forward(problem: Problem, outputs: Outputs) -> bool:
    """Fill ``outputs`` by Newton's method, in one or two launches, up to 64; false where no kernel serves the problem."""
    if registers.launch_converged.supports_forward(problem, outputs):
        registers.launch_converged.newton_forward(problem, outputs)
    elif tile.launch_converged.supports_forward(problem, outputs.sigma2 is not None):
        tile.launch_converged.newton_forward(problem, outputs)
    else:
        return False
    return True


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients) -> bool:
    """Fill ``gradients`` of the fixed point near ``g``, in one launch, up to 64; false where no kernel serves the problem."""
    if registers.launch_converged.supports_backward(problem, grad_plan, gradients):
        registers.launch_converged.implicit_backward(problem, grad_plan, g, gradients)
    elif tile.launch_converged.supports_backward(problem):
        tile.launch_converged.implicit_backward(problem, grad_plan, g, gradients)
    else:
        return False
    return True


def sigma2(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    tol: float,
    value: Tensor,
    u2: Tensor,
    v2: Tensor,
) -> bool:
    """Fill ``value``, ``u2``, ``v2``, to a relative ``tol`` where the kernel iterates; false where none serves the plan."""
    if registers.sigma2.supports(plan):
        registers.sigma2.sigma2(plan, row_marginal, col_marginal, mask, value, u2, v2)
    elif spectrum.launch.supports(plan):
        spectrum.launch.sigma2(plan, row_marginal, col_marginal, mask, value, u2, v2, tol)
    elif stream.spectrum.supports(plan):
        stream.spectrum.sigma2(plan, row_marginal, col_marginal, mask, value, u2, v2, tol)
    else:
        return False
    return True


def sigma2_bounds(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    lower: Tensor,
    upper: Tensor,
) -> bool:
    """Fill ``lower`` and ``upper``; false where no kernel serves the plan."""
    if not spectrum.launch.supports(plan):
        return False
    spectrum.launch.sigma2_bounds(plan, row_marginal, col_marginal, mask, lower, upper)
    return True


def temperature_search(
    logits: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    target: Tensor,
    start: Tensor,
    n_iters: int,
    temperature: Tensor,
    reached: Tensor,
) -> bool:
    """Fill ``temperature`` and ``reached``, in one launch up to 64; false where no kernel serves matrices of this size."""
    if not tile.launch_converged.supports_temperature(logits):
        return False
    tile.launch_converged.temperature_search(logits, row_marginal, col_marginal, target, start, n_iters, temperature, reached)
    return True
