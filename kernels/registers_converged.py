"""Converged plans in the register family: launches of Newton's method and of the implicit gradient, up to 4x4.

Any cap on the steps and any tolerance; which matrices, and what the arguments mean, as in ``registers.py``.
"""

from __future__ import annotations

import functools
import itertools

import torch
import triton
from torch import Tensor

from fastdsm.problem import Gradients, Outputs, Problem

from .configuration import Configuration
from .registers import BLOCK, TYPES, WARPS, inputs, is_packed, is_small_and_plain, strides
from .registers_implicit import _implicit_bwd_kernel
from .registers_newton import _newton_fwd_kernel

_NEWTON_BLOCK, _NEWTON_WARPS = 32, 1  # a program steps until its slowest matrix is done: a warp decides without a barrier


def supports_forward(problem: Problem) -> bool:
    """Whether :func:`newton_forward` takes this problem."""
    return is_small_and_plain(problem)


def supports_backward(problem: Problem, with_lines: bool) -> bool:
    """Whether :func:`implicit_backward` takes it; ``with_lines``: if gradients of f0 and the marginals are wanted."""
    return is_small_and_plain(problem) and not with_lines


@functools.cache
def _forward(dtype: torch.dtype, packed: bool, with_info: bool, with_sigma2: bool) -> Configuration:
    return Configuration(
        kernel=_newton_fwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "plan_ptr"), TYPES[dtype])
        | dict.fromkeys(("temperature_ptr", "residual_ptr", "f_ptr", "g_ptr", "sigma2_ptr"), "fp32")
        | {"mask_ptr": "u8", "sweeps_ptr": "i32"},
        constants={"BLOCK": _NEWTON_BLOCK, "PACKED": packed, "WITH_INFO": with_info, "WITH_SIGMA2": with_sigma2},
        num_warps=_NEWTON_WARPS,
        matrices=_NEWTON_BLOCK,
        label=f"newton forward registers {TYPES[dtype]}" + " packed" * packed + " info" * with_info + " sigma2" * with_sigma2,
    )


@functools.cache
def _backward(dtype: torch.dtype, packed: bool) -> Configuration:
    return Configuration(
        kernel=_implicit_bwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "grad_plan_ptr", "grad_logits_ptr"), TYPES[dtype])
        | dict.fromkeys(("temperature_ptr", "g_ptr"), "fp32")
        | {"mask_ptr": "u8"},
        constants={"BLOCK": BLOCK, "PACKED": packed},
        num_warps=WARPS,
        matrices=BLOCK,
        label=f"newton implicit backward registers {TYPES[dtype]}" + " packed" * packed,
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    flags = (False, True)
    return [_forward(dtype, *rest) for dtype, *rest in itertools.product(TYPES, flags, flags, flags)] + [
        _backward(dtype, packed) for dtype, packed in itertools.product(TYPES, flags)
    ]


def newton_forward(problem: Problem, outputs: Outputs) -> None:
    """Write every given tensor of ``outputs``; for problems that :func:`supports_forward`."""
    with_info, with_sigma2 = outputs.f is not None, outputs.sigma2 is not None
    configuration = _forward(problem.logits.dtype, is_packed(problem, outputs.plan), with_info, with_sigma2)
    spare = torch.empty(1, dtype=torch.float32, device=problem.logits.device)
    configuration.launch(
        triton.cdiv(problem.logits.shape[0], configuration.matrices),
        **inputs(problem, spare),
        n_iters=problem.n_iters,
        tol=problem.tol,
        plan_ptr=outputs.plan,
        residual_ptr=outputs.residual if with_info else spare,
        sweeps_ptr=outputs.sweeps if with_info else spare.view(torch.int32),
        f_ptr=outputs.f if with_info else spare,
        g_ptr=outputs.g if with_info else spare,
        sigma2_ptr=outputs.sigma2 if with_sigma2 else spare,
        **strides("plan", outputs.plan),
    )


def implicit_backward(problem: Problem, grad_plan: Tensor, g: Tensor, gradients: Gradients) -> None:
    """Write ``gradients.logits`` at the fixed point near the column potential ``g`` (B, m), from the cotangent ``grad_plan``.

    Any strides; for problems that :func:`supports_backward`.
    """
    configuration = _backward(problem.logits.dtype, is_packed(problem, grad_plan, gradients.logits))
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
