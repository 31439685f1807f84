"""The register family: projections of up to 4x4, float32 and narrower, one matrix in the registers of each thread.

Which problems it takes, the finite table of its kernels, and the calls that launch them. Forwards of any number of
sweeps; backwards of up to MAX_BACKWARD_SWEEPS, whose history has to fit in registers.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import triton
from torch import Tensor

from fastdsm.problem import Gradients, Outputs, Problem

from .configuration import Configuration
from .registers_backward import MAX_BACKWARD_SWEEPS, _sinkhorn_bwd_kernel
from .registers_forward import _sinkhorn_fwd_kernel

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
BLOCK, WARPS = 128, 4  # one matrix a thread; four warps let several programs share a multiprocessor's registers


def is_small_and_plain(problem: Problem) -> bool:
    """Up to 4x4, float32 or narrower, without marginals and without f0: the matrices of this family."""
    return (
        problem.logits.dtype in TYPES
        and min(problem.logits.shape[-2:]) >= 1
        and max(problem.logits.shape[-2:]) <= 4
        and problem.f0 is None
        and problem.row_marginal is None
        and problem.col_marginal is None
    )


def supports_forward(problem: Problem) -> bool:
    """Whether :func:`sinkhorn_forward` takes this problem."""
    return is_small_and_plain(problem) and problem.tol < 0


def supports_backward(problem: Problem, with_lines: bool) -> bool:
    """Whether :func:`sinkhorn_backward` takes it; ``with_lines``: if gradients of f0 and the marginals are wanted."""
    return supports_forward(problem) and problem.n_iters <= MAX_BACKWARD_SWEEPS and not with_lines


@functools.cache
def _forward(dtype: torch.dtype, packed: bool, with_info: bool, with_sigma2: bool) -> Configuration:
    return Configuration(
        kernel=_sinkhorn_fwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "plan_ptr"), TYPES[dtype])
        | dict.fromkeys(("temperature_ptr", "residual_ptr", "f_ptr", "g_ptr", "sigma2_ptr"), "fp32")
        | {"mask_ptr": "u8", "sweeps_ptr": "i32"},
        constants={"BLOCK": BLOCK, "PACKED": packed, "WITH_INFO": with_info, "WITH_SIGMA2": with_sigma2},
        num_warps=WARPS,
        matrices=BLOCK,
        label=f"sinkhorn forward registers {TYPES[dtype]}" + " packed" * packed + " info" * with_info + " sigma2" * with_sigma2,
    )


@functools.cache
def _backward(dtype: torch.dtype, packed: bool) -> Configuration:
    return Configuration(
        kernel=_sinkhorn_bwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "grad_plan_ptr", "grad_logits_ptr"), TYPES[dtype])
        | {"temperature_ptr": "fp32", "mask_ptr": "u8"},
        constants={"BLOCK": BLOCK, "PACKED": packed},
        num_warps=WARPS,
        matrices=BLOCK,
        label=f"sinkhorn backward registers {TYPES[dtype]}" + " packed" * packed,
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    flags = (False, True)
    return [_forward(dtype, *rest) for dtype, *rest in itertools.product(TYPES, flags, flags, flags)] + [
        _backward(dtype, packed) for dtype, packed in itertools.product(TYPES, flags)
    ]


def is_packed(problem: Problem, *others: Tensor) -> bool:
    """Whether every matrix is 4x4, unmasked, and 16 aligned values on end."""
    return problem.mask is None and all(
        x.shape[-2:] == (4, 4) and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (problem.logits, *others)
    )


def inputs(problem: Problem, spare: Tensor) -> dict[str, Tensor | int | float]:
    """Kernel arguments that describe matrices and temperature; ``spare`` stands in for what is absent and is never read."""
    logits, mask, temperature = problem.logits, problem.mask, problem.temperature
    if isinstance(temperature, Tensor):
        temperatures, stride, shared = temperature, temperature.stride(0), 1.0
    else:
        temperatures, stride, shared = spare.view(torch.float32), 0, temperature
    bits = spare.view(torch.uint8) if mask is None else mask.view(torch.uint8)
    return {
        "logits_ptr": logits,
        "mask_ptr": bits,
        "temperature_ptr": temperatures,
        "batch": logits.shape[0],
        "n": logits.shape[1],
        "m": logits.shape[2],
        **strides("logits", logits),
        **(strides("mask", bits) if mask is not None else dict.fromkeys(strides("mask", logits), 0)),
        "temperature_stride": stride,
        "scale": math.log2(math.e) / shared,
        "has_mask": int(mask is not None),
        "has_temperature": int(temperatures is temperature),
        "unit_rows": int(problem.unit_rows),
    }


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Kernel arguments that describe where the entries of ``x`` (B, n, m) lie."""
    return {f"{name}_stride_{axis}": step for axis, step in zip("bnm", x.stride(), strict=True)}


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> None:
    """Write every given tensor of ``outputs``; for problems that :func:`supports_forward`."""
    with_info, with_sigma2 = outputs.f is not None, outputs.sigma2 is not None
    configuration = _forward(problem.logits.dtype, is_packed(problem, outputs.plan), with_info, with_sigma2)
    spare = torch.empty(1, dtype=torch.float32, device=problem.logits.device)
    configuration.launch(
        triton.cdiv(problem.logits.shape[0], configuration.matrices),
        **inputs(problem, spare),
        n_iters=problem.n_iters,
        plan_ptr=outputs.plan,
        residual_ptr=outputs.residual if with_info else spare,
        sweeps_ptr=outputs.sweeps if with_info else spare.view(torch.int32),
        f_ptr=outputs.f if with_info else spare,
        g_ptr=outputs.g if with_info else spare,
        sigma2_ptr=outputs.sigma2 if with_sigma2 else spare,
        **strides("plan", outputs.plan),
    )


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None = None) -> None:
    """Write ``gradients.logits`` from the cotangent ``grad_plan`` of the plan, (B, n, m), any strides.

    For problems that :func:`supports_backward`; ``sweeps`` is ignored, as without tol each matrix makes n_iters.
    """
    configuration = _backward(problem.logits.dtype, is_packed(problem, grad_plan, gradients.logits))
    configuration.launch(
        triton.cdiv(problem.logits.shape[0], configuration.matrices),
        **inputs(problem, torch.empty(1, dtype=torch.float32, device=problem.logits.device)),
        n_iters=problem.n_iters,
        grad_plan_ptr=grad_plan,
        grad_logits_ptr=gradients.logits,
        **strides("grad_plan", grad_plan),
        **strides("grad_logits", gradients.logits),
    )
