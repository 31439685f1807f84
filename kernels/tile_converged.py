"""Converged plans in the tile family: launches of Newton's method and of the implicit gradient on up to 64 lines.

Every option, but no float64; sigma2 takes a launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm.problem import Gradients, Outputs, Problem

from .configuration import Configuration
from .tile import ELEMENTS, configuration_of, inputs, size_of, strides
from .tile_implicit import _implicit_tile_bwd_kernel
from .tile_newton import _newton_tile_fwd_kernel

# As in ``tile.py``: matrices of a program, rows and columns dealt out to lanes and warps, warps. Few matrices to a program, as
# it steps until its slowest one is done.
_BLOCKS = {
    4: (8, 1, 1, 1),
    8: (4, 2, 4, 1),
    16: (1, 4, 8, 1),
    32: (1, 8, 16, 4),
    64: (1, 16, 32, 16),
}
_FORWARD, _BACKWARD = (
    {(dtype, size): configuration_of(kernel, dtype, size, _BLOCKS) for dtype in ELEMENTS for size in _BLOCKS}
    for kernel in (_newton_tile_fwd_kernel, _implicit_tile_bwd_kernel)
)


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    return [*_FORWARD.values(), *_BACKWARD.values()]


def supports_forward(problem: Problem, with_sigma2: bool) -> bool:
    """Whether :func:`newton_forward` covers this size and dtype."""
    return not with_sigma2 and supports_backward(problem)


def supports_backward(problem: Problem) -> bool:
    """Whether :func:`implicit_backward` covers this size and dtype."""
    return (problem.logits.dtype, size_of(problem)) in _BACKWARD


def _launch(configuration: Configuration, problem: Problem, **arguments: Any) -> None:
    """With what the kernel takes of the family's inputs."""
    shared = {name: x for name, x in inputs(problem).items() if name in configuration.kernel.arg_names}
    configuration.launch(triton.cdiv(problem.logits.shape[0], configuration.matrices), **shared, **arguments)


def newton_forward(problem: Problem, outputs: Outputs) -> None:
    """Write every given tensor of ``outputs``; see :func:`supports_forward`."""
    has_info = outputs.residual is not None
    absent = torch.empty(1, dtype=problem.compute_dtype, device=problem.logits.device)
    _launch(
        _FORWARD[problem.logits.dtype, size_of(problem)],
        problem,
        plan_ptr=outputs.plan,
        **strides("plan_", outputs.plan),
        residual_ptr=outputs.residual if has_info else absent,
        sweeps_ptr=outputs.sweeps if has_info else absent.view(torch.int32),
        f_ptr=outputs.f if has_info else absent,
        g_ptr=outputs.g if has_info else absent,
        has_info=int(has_info),
        tol=problem.tol,
    )


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients) -> None:
    """Write ``gradients`` at the fixed point near the column potential ``g`` (B, m), from the cotangent ``grad_plan``.

    Any strides; see :func:`supports_backward`.
    """
    has_vectors = gradients.f0 is not None
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
        grad_f0_ptr=gradients.f0 if has_vectors else g,
        grad_row_ptr=gradients.log_row if has_vectors else g,
        grad_col_ptr=gradients.log_col if has_vectors else g,
        has_vectors=int(has_vectors),
    )
