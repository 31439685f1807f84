"""Triton kernels and their launchers, by family; each call says whether a kernel served it.

``registers``: up to 4x4, or packed to 8x8, a matrix per thread; ``registers_converged``: converged ones, implicit gradients.
``tile``: matrices that stay on chip; ``tile_converged``: converged ones of up to 64 lines, and the temperature of a sigma2.
``panel``: up to 256, logits re-read from L2 inside the launch. ``stream``: larger ones, one read per sweep. ``spectrum``:
sigma2 of given plans, ``stream_spectrum``: that of larger ones. Nothing here validates or differentiates.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Gradients, Outputs, Problem
from . import (
    attention,
    panel,
    registers,
    registers_converged,
    registers_sigma2,
    spectrum,
    stream,
    stream_spectrum,
    tile,
    tile_converged,
)
from .configuration import Configuration

__all__ = [
    "configurations",
    "implicit_backward",
    "newton_forward",
    "sigma2",
    "sigma2_bounds",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "temperature_search",
]


def configurations() -> list[Configuration]:
    """Every kernel that can be launched: the finite table."""
    families = (registers, registers_converged, registers_sigma2, tile, tile_converged, panel, stream, spectrum, attention)
    return [x for family in families for x in family.configurations()]


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> bool:
    """Fill ``outputs``, in one launch up to 256; false where no kernel serves the problem."""
    if registers.supports_forward(problem, outputs):
        registers.sinkhorn_forward(problem, outputs)
    elif tile.supports_forward(problem, outputs.sigma2 is not None):
        tile.sinkhorn_forward(problem, outputs)
    elif panel.supports(problem):
        panel.sinkhorn_forward(problem, outputs)
    elif stream.supports(problem) and outputs.sigma2 is None:
        stream.sinkhorn_forward(problem, outputs)
    else:
        return False
    return True


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None) -> bool:
    """Fill ``gradients``, in one launch up to 256; false where no kernel serves the problem."""
    if registers.supports_backward(problem, grad_plan, gradients):
        registers.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    elif tile.supports_backward(problem):
        tile.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    elif panel.supports(problem):
        panel.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    elif stream.supports(problem):
        stream.sinkhorn_backward(problem, grad_plan, gradients, sweeps)
    else:
        return False
    return True


def newton_forward(problem: Problem, outputs: Outputs) -> bool:
    """Fill ``outputs`` by Newton's method, in one or two launches, up to 64; false where no kernel serves the problem."""
    if registers_converged.supports_forward(problem, outputs):
        registers_converged.newton_forward(problem, outputs)
    elif tile_converged.supports_forward(problem, outputs.sigma2 is not None):
        tile_converged.newton_forward(problem, outputs)
    else:
        return False
    return True


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients) -> bool:
    """Fill ``gradients`` of the fixed point near ``g``, in one launch, up to 64; false where no kernel serves the problem."""
    if registers_converged.supports_backward(problem, grad_plan, gradients):
        registers_converged.implicit_backward(problem, grad_plan, g, gradients)
    elif tile_converged.supports_backward(problem):
        tile_converged.implicit_backward(problem, grad_plan, g, gradients)
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
    if registers_sigma2.supports(plan):
        registers_sigma2.sigma2(plan, row_marginal, col_marginal, mask, value, u2, v2)
    elif spectrum.supports(plan):
        spectrum.sigma2(plan, row_marginal, col_marginal, mask, value, u2, v2, tol)
    elif stream_spectrum.supports(plan):
        stream_spectrum.sigma2(plan, row_marginal, col_marginal, mask, value, u2, v2, tol)
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
    if not spectrum.supports(plan):
        return False
    spectrum.sigma2_bounds(plan, row_marginal, col_marginal, mask, lower, upper)
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
    if not tile_converged.supports_temperature(logits):
        return False
    tile_converged.temperature_search(logits, row_marginal, col_marginal, target, start, n_iters, temperature, reached)
    return True
