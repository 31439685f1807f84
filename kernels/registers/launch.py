"""The register family: projections of up to 8x8, float32 and narrower, a matrix in the registers of each thread.

Which problems it takes, the finite table of its kernels, and the calls that launch them. Matrices of up to 4x4 may have any
shape, mask and strides; larger ones are square and packed. Any number of sweeps, but for backwards of up to 4x4:
MAX_BACKWARD_SWEEPS, whose history has to fit in registers. That of larger ones lies in memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm._ops.problem import Gradients, Outputs, Problem

from ..common.configuration import Configuration, history_programs
from ..common.operands import scale_of
from .backward import MAX_BACKWARD_SWEEPS, _sinkhorn_bwd_kernel
from .forward import _sinkhorn_fwd_kernel
from .history import _sinkhorn_history_bwd_kernel
from .sweeps import SWEEPS_OF_8

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PROGRAMS_PER_SM = 2  # that keep a history: as many as its registers let run
PACKED_LINES = (5, 6, 7, 8)  # beyond the 4 to which smaller matrices are padded
_WIDE_BLOCK = 32  # of 144 registers a thread, 14 warps fit where three programs of four do
# By lines and with info: as few registers as spill on no target. By itself ptxas takes more, and fewer programs fit.
_REGISTERS = {(6, False): 96, (6, True): 112, (7, False): 120, (7, True): 144, (8, False): 144, (8, True): 176}
_STRIDED_INFO_REGISTERS = 168
BLOCK, WARPS = 128, 4  # one matrix a thread; four warps let several programs share a multiprocessor's registers


def fits(problem: Problem, *others: Tensor) -> bool:
    """Whether a thread holds a matrix: float32 or narrower, no marginals or f0; up to 4x4, or packed as ``others``, to 8x8."""
    n, m = problem.logits.shape[-2:]
    return (
        problem.logits.dtype in TYPES
        and min(n, m) >= 1
        and (max(n, m) <= 4 or (n in PACKED_LINES and is_packed(problem, *others)))
        and problem.f0 is None
        and problem.row_marginal is None
        and problem.col_marginal is None
    )


def supports_forward(problem: Problem, outputs: Outputs) -> bool:
    """Whether :func:`sinkhorn_forward` takes this problem."""
    return fits(problem, outputs.plan) and problem.tol < 0 and serves_sigma2(problem, outputs)


def serves_sigma2(problem: Problem, outputs: Outputs) -> bool:
    """Whether there is a sigma2 beside such plans, if one is wanted."""
    return outputs.sigma2 is None or lines(problem) == 4


def supports_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients) -> bool:
    """Whether :func:`sinkhorn_backward` takes it."""
    few = problem.n_iters <= MAX_BACKWARD_SWEEPS or lines(problem) > 4
    return fits(problem, grad_plan, gradients.logits) and few and problem.tol < 0 and gradients.f0 is None


def lines(problem: Problem) -> int:
    """Lines of the matrix that a thread holds."""
    return max(4, *problem.logits.shape[-2:])


def is_packed(problem: Problem, *others: Tensor) -> bool:
    """Whether every matrix is full, unmasked, and its values on end, the first one aligned to 16 bytes."""
    size = lines(problem)
    return problem.mask is None and all(
        x.shape[-2:] == (size, size) and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (problem.logits, *others)
    )


def forwards() -> list[tuple[Any, ...]]:
    """Types, lines, and whether packed, with info and with sigma2, of the forwards there are."""
    flags = (False, True)
    four = [(dtype, 4, *rest) for dtype, *rest in itertools.product(TYPES, flags, flags, flags)]
    return four + [(dtype, lines, True, info, False) for dtype, lines, info in itertools.product(TYPES, PACKED_LINES, flags)]


def forward_configuration(
    kernel: Any, name: str, block: int, dtype: torch.dtype, lines: int, packed: bool, with_info: bool, with_sigma2: bool
) -> Configuration:
    """That of a forward, a matrix a thread."""
    return Configuration(
        kernel=kernel,
        pointers=dict.fromkeys(("logits_ptr", "plan_ptr"), TYPES[dtype])
        | dict.fromkeys(("temperature_ptr", "residual_ptr", "f_ptr", "g_ptr", "sigma2_ptr"), "fp32")
        | {"mask_ptr": "u8", "sweeps_ptr": "i32"},
        constants={"BLOCK": block, "PACKED": packed, "WITH_INFO": with_info, "WITH_SIGMA2": with_sigma2, "LINES": lines},
        num_warps=block // 32,
        matrices=block,
        label=f"{name} registers {described(dtype, lines, packed)}" + " info" * with_info + " sigma2" * with_sigma2,
    )


def described(dtype: torch.dtype, lines: int, packed: bool) -> str:
    """Those matrices in a label."""
    return TYPES[dtype] + f" {lines}x{lines}" * (lines > 4) + " packed" * packed


@functools.cache
def _forward(dtype: torch.dtype, lines: int, packed: bool, with_info: bool, with_sigma2: bool) -> Configuration:
    block = BLOCK if lines == 4 else _WIDE_BLOCK
    maxnreg = _REGISTERS.get((lines, with_info), None if packed or not with_info else _STRIDED_INFO_REGISTERS)
    which = (dtype, lines, packed, with_info, with_sigma2)
    return replace(forward_configuration(_sinkhorn_fwd_kernel, "sinkhorn forward", block, *which), maxnreg=maxnreg)


@functools.cache
def _backward(dtype: torch.dtype, packed: bool) -> Configuration:
    return Configuration(
        kernel=_sinkhorn_bwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "grad_plan_ptr", "grad_logits_ptr"), TYPES[dtype])
        | {"temperature_ptr": "fp32", "mask_ptr": "u8"},
        constants={"BLOCK": BLOCK, "PACKED": packed},
        num_warps=WARPS,
        matrices=BLOCK,
        label=f"sinkhorn backward registers {described(dtype, 4, packed)}",
    )


@functools.cache
def _history_backward(dtype: torch.dtype, lines: int) -> Configuration:
    return Configuration(
        kernel=_sinkhorn_history_bwd_kernel,
        pointers=dict.fromkeys(("logits_ptr", "grad_plan_ptr", "grad_logits_ptr"), TYPES[dtype])
        | dict.fromkeys(("temperature_ptr", "history_ptr", "aside_ptr"), "fp32"),
        constants={"BLOCK": BLOCK, "LINES": lines},
        num_warps=WARPS,
        maxnreg=255,
        matrices=BLOCK,
        label=f"sinkhorn backward registers {described(dtype, lines, True)}",
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    small = [_backward(dtype, packed) for dtype, packed in itertools.product(TYPES, (False, True))]
    wide = [_history_backward(dtype, lines) for dtype, lines in itertools.product(TYPES, PACKED_LINES)]
    return [_forward(*which) for which in forwards()] + small + wide


def inputs(problem: Problem) -> dict[str, Any]:
    """Kernel arguments that describe matrices and temperature."""
    logits, temperature = problem.logits, problem.temperature
    per_matrix = temperature if isinstance(temperature, Tensor) else None
    bits = None if problem.mask is None else problem.mask.view(torch.uint8)
    return {
        "logits_ptr": logits,
        "mask_ptr": bits,
        "temperature_ptr": per_matrix,
        "batch": logits.shape[0],
        "n": logits.shape[1],
        "m": logits.shape[2],
        **strides("logits", logits),
        **(dict.fromkeys(strides("mask", logits), 0) if bits is None else strides("mask", bits)),
        "temperature_stride": 0 if per_matrix is None else per_matrix.stride(0),
        "scale": scale_of(temperature),
        "has_mask": int(bits is not None),
        "has_temperature": int(per_matrix is not None),
        "unit_rows": int(problem.unit_rows),
    }


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Kernel arguments that describe where the entries of ``x`` (B, n, m) lie."""
    return {f"{name}_stride_{axis}": step for axis, step in zip("bnm", x.stride(), strict=True)}


def launch_forward(configured: Callable[..., Configuration], problem: Problem, outputs: Outputs, **arguments: Any) -> None:
    """Write every given tensor of ``outputs`` by the kernel ``configured`` for it."""
    with_info, with_sigma2 = outputs.f is not None, outputs.sigma2 is not None
    packed = is_packed(problem, outputs.plan)
    configuration = configured(problem.logits.dtype, lines(problem), packed, with_info, with_sigma2)
    configuration.launch(
        triton.cdiv(problem.logits.shape[0], configuration.matrices),
        **inputs(problem),
        n_iters=problem.n_iters,
        plan_ptr=outputs.plan,
        residual_ptr=outputs.residual,
        sweeps_ptr=outputs.sweeps,
        f_ptr=outputs.f,
        g_ptr=outputs.g,
        sigma2_ptr=outputs.sigma2,
        **strides("plan", outputs.plan),
        **arguments,
    )


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> None:
    """Write every given tensor of ``outputs``; for problems that :func:`supports_forward`."""
    launch_forward(_forward, problem, outputs)


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None = None) -> None:
    """Write ``gradients.logits`` from the cotangent ``grad_plan`` of the plan, (B, n, m), any strides.

    For problems that :func:`supports_backward`; ``sweeps`` is ignored, as without tol each matrix makes n_iters.
    """
    if lines(problem) > 4:
        _history_launch(problem, grad_plan, gradients.logits)
        return
    configuration = _backward(problem.logits.dtype, is_packed(problem, grad_plan, gradients.logits))
    configuration.launch(
        triton.cdiv(problem.logits.shape[0], configuration.matrices),
        **inputs(problem),
        n_iters=problem.n_iters,
        grad_plan_ptr=grad_plan,
        grad_logits_ptr=gradients.logits,
        **strides("grad_plan", grad_plan),
        **strides("grad_logits", gradients.logits),
    )


def _history_launch(problem: Problem, grad_plan: Tensor, grad_logits: Tensor) -> None:
    """Peak extra memory: the history of the programs, at most ``HISTORY_BYTES`` unless that of a single one exceeds it."""
    logits = problem.logits
    size = lines(problem)
    configuration = _history_backward(logits.dtype, size)
    sweeps = max(problem.n_iters, 1)
    segments = triton.cdiv(sweeps, SWEEPS_OF_8.value)
    stride = BLOCK * size * (2 * sweeps + segments)
    matrices = BLOCK * size * size if segments > 1 else 0
    blocks = triton.cdiv(logits.shape[0], configuration.matrices)
    programs = history_programs(blocks, _PROGRAMS_PER_SM, 4 * max(stride + matrices, 1), logits.device)
    new = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    known = inputs(problem)
    configuration.launch(
        programs,
        **{name: value for name, value in known.items() if name in configuration.kernel.arg_names},
        n_iters=problem.n_iters,
        grad_plan_ptr=grad_plan,
        grad_logits_ptr=grad_logits,
        history_ptr=new(programs * stride),
        aside_ptr=new(max(programs * matrices, 1)),
        history_stride=stride,
    )
