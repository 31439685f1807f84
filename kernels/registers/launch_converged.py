"""Converged plans in the register family: launches of Newton's method and of the implicit gradient, up to 8x8.

Any cap on the steps and any tolerance; which matrices, and what the arguments mean, as in ``launch.py``.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import torch
import triton
from torch import Tensor

from fastdsm._ops.problem import Gradients, Outputs, Problem

from ..common.configuration import Configuration
from .implicit import _implicit_bwd_kernel
from .launch import (
    BLOCK,
    PACKED_LINES,
    TYPES,
    WARPS,
    described,
    fits,
    forward_configuration,
    forwards,
    inputs,
    is_packed,
    launch_forward,
    lines,
    serves_sigma2,
    strides,
)
from .newton import _newton_fwd_kernel

_NEWTON_BLOCK = 32  # a program steps until its slowest matrix is done: a warp decides without a barrier


def supports_forward(problem: Problem, outputs: Outputs) -> bool:
    """Whether :func:`newton_forward` takes this problem."""
    return fits(problem, outputs.plan) and serves_sigma2(problem, outputs)


def supports_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients) -> bool:
    """Whether :func:`implicit_backward` takes it."""
    return fits(problem, grad_plan, gradients.logits) and gradients.f0 is None


@functools.cache
def _forward(dtype: torch.dtype, lines: int, *which: bool) -> Configuration:
    # By itself ptxas stops at 168 registers to fit more programs, and spills for it.
    maxnreg = 255 if lines == 6 else None
    configuration = forward_configuration(_newton_fwd_kernel, "newton forward", _NEWTON_BLOCK, dtype, lines, *which)
    return replace(configuration, maxnreg=maxnreg)


@functools.cache
def _backward(dtype: torch.dtype, lines: int, packed: bool) -> Configuration:
    return Configuration(
        kernel=_implicit_bwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "grad_plan_ptr", "grad_logits_ptr"), TYPES[dtype])
        | dict.fromkeys(("temperature_ptr", "g_ptr"), "fp32")
        | {"mask_ptr": "u8"},
        constants={"BLOCK": BLOCK, "PACKED": packed, "LINES": lines},
        num_warps=WARPS,
        matrices=BLOCK,
        label=f"newton implicit backward registers {described(dtype, lines, packed)}",
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    sizes = [(4, False), (4, True), *((lines, True) for lines in PACKED_LINES)]
    backwards = [_backward(dtype, *which) for dtype, which in itertools.product(TYPES, sizes)]
    return [_forward(*which) for which in forwards()] + backwards


def newton_forward(problem: Problem, outputs: Outputs) -> None:
    """Write every given tensor of ``outputs``; for problems that :func:`supports_forward`."""
    launch_forward(_forward, problem, outputs, tol=problem.tol)


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients) -> None:
    """Write ``gradients.logits`` at the fixed point near the column potential ``g`` (B, m), from the cotangent ``grad_plan``.

    Any strides; for problems that :func:`supports_backward`.
    """
    configuration = _backward(problem.logits.dtype, lines(problem), is_packed(problem, grad_plan, gradients.logits))
    configuration.launch(
        triton.cdiv(problem.logits.shape[0], configuration.matrices),
        **inputs(problem),
        g_ptr=g,
        grad_plan_ptr=grad_plan,
        grad_logits_ptr=gradients.logits,
        g_stride_b=g.stride(0),
        g_stride_m=g.stride(1),
        **strides("grad_plan", grad_plan),
        **strides("grad_logits", gradients.logits),
    )
