"""Converged plans in the tile family: launches of Newton's method, the implicit gradient and the search for a temperature.

Up to 64 lines, every option, but no float64; sigma2 takes a launch of its own, unless a temperature is searched by it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm._ops.problem import Gradients, Outputs, Problem

from ..common.configuration import Configuration
from ..common.operands import strides_of
from ..spectrum.squaring import SQUARINGS
from .implicit import _implicit_tile_bwd_kernel
from .launch import ELEMENTS, configuration_with_own, inputs, sinkhorn_forward, size_of, strides, uniform_scalings
from .newton import _newton_tile_fwd_kernel
from .temperature import _temperature_tile_fwd_kernel

# As in ``launch.py``: matrices of a program, rows and columns dealt out to lanes and warps, warps. Few matrices to a program,
# as it steps until its slowest one is done; one warp of 32 lines spills. Lanes decide by their own copies of a matrix's sums,
# which are to agree (``tests/execution/test_copies.py``): a thread has at least two rows and two columns, as a share that is
# one product the compiler would join to what comes from another lane (``rounded_product``).
_BLOCKS = {
    4: (8, 2, 2, 1),
    8: (4, 2, 4, 1),
    16: (1, 4, 8, 1),
    32: (1, 8, 8, 2),
    64: (1, 16, 16, 8),
}
# What Blackwell has instead, where those spill.
_BLACKWELL = {64: (1, 16, 32, 16)}
_SWEEPS = 32  # at most, in a launch of their own, before a step of Newton's
# Segments of scaling sweeps at most: those that take about as long as three of Newton's steps.
_SEGMENTS = {4: 2, 8: 8, 16: 16, 32: 24, 64: 24}


def _configuration(kernel: Any, dtype: torch.dtype, size: int, **constants: Any) -> Configuration:
    return configuration_with_own(kernel, dtype, size, _BLOCKS, "sm_100", _BLOCKS | _BLACKWELL, **constants)


_FORWARD = {
    (dtype, size): _configuration(_newton_tile_fwd_kernel, dtype, size, SEGMENTS=_SEGMENTS[size])
    for dtype in ELEMENTS
    for size in _BLOCKS
}
_BACKWARD = {
    (dtype, size): _configuration(_implicit_tile_bwd_kernel, dtype, size, SEGMENTS=_SEGMENTS[size])
    for dtype in ELEMENTS
    for size in _BLOCKS
}
_TEMPERATURE = {
    size: _configuration(
        _temperature_tile_fwd_kernel,
        torch.float32,
        size,
        SEGMENTS=_SEGMENTS[size],
        SQUARINGS=SQUARINGS[size],
    )
    for size in _BLOCKS
}


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    return [y for table in (_FORWARD, _BACKWARD, _TEMPERATURE) for x in table.values() for y in x.everywhere()]


def supports_forward(problem: Problem, with_sigma2: bool) -> bool:
    """Whether :func:`newton_forward` covers this size and dtype."""
    return not with_sigma2 and supports_backward(problem)


def supports_backward(problem: Problem) -> bool:
    """Whether :func:`implicit_backward` covers this size and dtype."""
    return (problem.logits.dtype, size_of(problem)) in _BACKWARD


def _launch(configuration: Configuration, problem: Problem, **arguments: Any) -> None:
    """With what the kernel takes of the family's inputs."""
    configuration = configuration.on(problem.logits.device)
    shared = {name: x for name, x in inputs(problem).items() if name in configuration.kernel.arg_names}
    configuration.launch(triton.cdiv(problem.logits.shape[0], configuration.matrices), **shared, **arguments)


def newton_forward(problem: Problem, outputs: Outputs) -> None:
    """Write every given tensor of ``outputs``; see :func:`supports_forward`."""
    continues = problem.n_iters > 1
    full = outputs
    if continues:
        full = outputs.with_info(problem)
        sinkhorn_forward(replace(problem, n_iters=_SWEEPS), full)
        problem = replace(problem, f0=full.f)
    _launch(
        _FORWARD[problem.logits.dtype, size_of(problem)],
        problem,
        plan_ptr=full.plan,
        **strides("plan_", full.plan),
        residual_ptr=full.residual,
        sweeps_ptr=full.sweeps,
        f_ptr=full.f,
        g_ptr=full.g,
        has_info=int(full.residual is not None),
        continues=int(continues),
        tol=problem.tol,
    )


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients) -> None:
    """Write ``gradients`` at the fixed point near the column potential ``g`` (B, m), from the cotangent ``grad_plan``.

    Any strides; see :func:`supports_backward`.
    """
    _launch(
        _BACKWARD[problem.logits.dtype, size_of(problem)],
        problem,
        g_ptr=g,
        g_stride_b=g.stride(0),
        g_stride_m=g.stride(1),
        grad_plan_ptr=grad_plan,
        **strides("grad_plan_", grad_plan),
        grad_logits_ptr=gradients.logits,
        **strides("grad_logits_", gradients.logits),
        grad_f0_ptr=gradients.f0,
        grad_row_ptr=gradients.log_row,
        grad_col_ptr=gradients.log_col,
        has_vectors=int(gradients.f0 is not None),
    )


def supports_temperature(logits: Tensor) -> bool:
    """Whether :func:`temperature_search` covers this size; min(n, m) > 0."""
    return min(logits.shape[1:]) > 0 and max(logits.shape[1:]) <= max(_TEMPERATURE)


def temperature_search(
    logits: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    target: Tensor,
    start: Tensor,
    n_iters: int,
    temperature: Tensor,
    reached: Tensor,
) -> None:
    """Write ``temperature`` (B,) and ``reached`` (B,), 0 or 1 as uint8; all else float32.

    logits: (B, n, m), any strides, -inf on excluded entries. row (B, n), col (B, m): None where uniform. start: (B,), log2 of
    the temperature to walk down from, NaN where nothing is searched. n_iters: steps of Newton's method at most for one plan.
    """
    configuration = _TEMPERATURE[max(4, triton.next_power_of_2(max(logits.shape[1:])))].on(logits.device)
    configuration.launch(
        triton.cdiv(logits.shape[0], configuration.matrices),
        logits_ptr=logits,
        row_ptr=row,
        col_ptr=col,
        target_ptr=target,
        start_ptr=start,
        temperature_ptr=temperature,
        reached_ptr=reached,
        batch=logits.shape[0],
        n=logits.shape[1],
        m=logits.shape[2],
        n_iters=n_iters,
        uniform_scalings=uniform_scalings(*logits.shape[1:]),
        **strides("", logits),
        **strides_of({"row": ("bn", row), "col": ("bm", col)}),
        has_row=int(row is not None),
        has_col=int(col is not None),
    )
