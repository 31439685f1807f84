"""Converged plans in the register family: launches of Newton's method and of the implicit gradient, up to 4x4, and 8x8.

Any cap on the steps and any tolerance; which matrices, and what the arguments mean, as in ``registers.py``.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm.problem import Gradients, Outputs, Problem

from .configuration import Configuration
from .registers import (
    BLOCK,
    TYPES,
    WARPS,
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
from .registers_implicit import _implicit_bwd_kernel
from .registers_newton import _newton_fwd_kernel

_NEWTON_BLOCK = 32  # a program steps until its slowest matrix is done: a warp decides without a barrier


def supports_forward(problem: Problem, outputs: Outputs) -> bool:
    """Whether :func:`newton_forward` takes this problem."""
    return fits(problem, outputs.plan) and serves_sigma2(problem, outputs)


def supports_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients) -> bool:
    """Whether :func:`implicit_backward` takes it."""
    return fits(problem, grad_plan, gradients.logits) and gradients.f0 is None


@functools.cache
def _forward(*which: Any) -> Configuration:
    return forward_configuration(_newton_fwd_kernel, "newton forward", _NEWTON_BLOCK, *which)


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
        label=f"newton implicit backward registers {TYPES[dtype]}" + " 8x8" * (lines == 8) + " packed" * packed,
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    return [_forward(*which) for which in forwards()] + [
        _backward(dtype, *which) for dtype, which in itertools.product(TYPES, ((4, False), (4, True), (8, True)))
    ]


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
        **inputs(problem, torch.empty(1, dtype=torch.float32, device=problem.logits.device)),
        g_ptr=g,
        grad_plan_ptr=grad_plan,
        grad_logits_ptr=gradients.logits,
        g_stride_b=g.stride(0),
        g_stride_m=g.stride(1),
        **strides("grad_plan", grad_plan),
        **strides("grad_logits", gradients.logits),
    )
