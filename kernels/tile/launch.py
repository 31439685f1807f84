"""Launching the tile family: matrices that stay on chip, padded to P x P, P = 4 ... 128; every option.

float32 and narrower: a float64 tile takes twice the registers and spills, and the panel family has every dtype.

What is absent (mask, marginals, f0, temperatures, info, vector gradients) is told by a run-time flag, and None.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm._ops.problem import Gradients, Outputs, Problem

from ..common.configuration import Configuration, history_programs
from ..common.operands import inverse_of, strides_of
from ..spectrum.squaring import SQUARINGS
from .backward import _sinkhorn_tile_bwd_kernel
from .forward import _sinkhorn_tile_fwd_kernel

ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# By P: matrices of a program, rows and columns dealt out to lanes and warps (ROWS, COLS), warps. Chosen so that nothing
# spills on sm_80, sm_90 and sm_100, and for P <= 32 so that a matrix lies within one warp. A sweep is a chain of exchanges
# between lanes and warps: few warps with many entries each are up to three times as fast on an H100 as many with few.
_FORWARD = {
    4: (32, 1, 1, 1),
    8: (16, 1, 2, 1),
    16: (4, 2, 4, 1),
    32: (1, 4, 8, 1),
    64: (1, 8, 8, 2),
    128: (1, 16, 16, 8),
}
_SIGMA2 = _FORWARD | {8: (8, 1, 4, 1), 64: (1, 16, 32, 16)}
_BACKWARD = {
    4: (32, 1, 1, 1),
    8: (8, 1, 4, 1),
    16: (4, 4, 4, 2),
    32: (1, 4, 8, 1),
    64: (1, 32, 8, 8),
}
# What Hopper has instead, as it spills on the others.
_BACKWARD_HOPPER = _BACKWARD | {64: (1, 16, 8, 4)}
# Programs of a backward per SM, and the bytes of all their histories together.
_PROGRAMS_PER_SM = 8


def configuration_of(
    kernel: Any, dtype: torch.dtype, size: int, blocks: dict[int, tuple[int, int, int, int]], **constants: Any
) -> Configuration:
    """The one way to run ``kernel`` on matrices of ``dtype`` padded to ``size``."""
    block_b, rows, cols, num_warps = blocks[size]
    element = ELEMENTS[dtype]
    pointers = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), "fp32")
    pointers |= {"mask_ptr": "u8", "sweeps_ptr": "i32", "reached_ptr": "u8"}
    matrices = ("logits_ptr", "plan_ptr", "grad_plan_ptr", "grad_logits_ptr")
    pointers |= {name: element for name in matrices if name in pointers}
    return Configuration(
        kernel,
        pointers,
        {"BLOCK_B": block_b, "P": size, "ROWS": rows, "COLS": cols, **constants},
        num_warps,
        matrices=block_b,
        # By itself ptxas stops at 168 registers to fit one more program onto an SM, and spills for it.
        maxnreg=255 if num_warps <= 8 else None,
        label=" ".join([element, str(size), *(["sigma2"] if constants.get("WITH_SIGMA2") else [])]),
    )


def configuration_with_own(
    kernel: Any,
    dtype: torch.dtype,
    size: int,
    blocks: dict[int, tuple[int, int, int, int]],
    target: str,
    own: dict[int, tuple[int, int, int, int]],
    **constants: Any,
) -> Configuration:
    """That of ``blocks``, and where it is another that of ``own`` in its place on ``target``."""
    anywhere, there = (configuration_of(kernel, dtype, size, x, **constants) for x in (blocks, own))
    return anywhere if anywhere == there else anywhere.with_own(there, target)


_FORWARD_TABLE = {
    (dtype, size, sigma2): configuration_of(
        _sinkhorn_tile_fwd_kernel,
        dtype,
        size,
        _SIGMA2 if sigma2 else _FORWARD,
        RELOAD=size == 128,
        WITH_SIGMA2=sigma2,
        SQUARINGS=SQUARINGS[size] if sigma2 else 0,
    )
    for sigma2 in (False, True)
    for dtype in ELEMENTS
    for size in (SQUARINGS if sigma2 else _FORWARD)
}
_BACKWARD_TABLE = {
    (dtype, size): configuration_with_own(_sinkhorn_tile_bwd_kernel, dtype, size, _BACKWARD, "sm_90", _BACKWARD_HOPPER)
    for dtype in ELEMENTS
    for size in _BACKWARD
}


def configurations() -> list[Configuration]:
    """Every kernel of this family that can be launched."""
    return [*_FORWARD_TABLE.values(), *(y for x in _BACKWARD_TABLE.values() for y in x.everywhere())]


def size_of(problem: Problem) -> int:
    """P: the power of two, at least 4, that n and m are padded to."""
    return max(4, triton.next_power_of_2(max(problem.logits.shape[1:])))


def supports_forward(problem: Problem, with_sigma2: bool) -> bool:
    """Whether :func:`sinkhorn_forward` covers this size and dtype."""
    return (problem.logits.dtype, size_of(problem), with_sigma2) in _FORWARD_TABLE


def supports_backward(problem: Problem) -> bool:
    """Whether :func:`sinkhorn_backward` covers this size and dtype."""
    return (problem.logits.dtype, size_of(problem)) in _BACKWARD_TABLE


def uniform_scalings(n: int, m: int) -> int:
    """Scaling sweeps of a segment with uniform marginals; as many as there are for a single entry."""
    return math.floor(45 / math.log2(max(n, m))) if max(n, m) > 1 else 2**30


def inputs(problem: Problem) -> dict[str, Any]:
    """Arguments that the forward and the backward share."""
    logits, row, col, f0 = problem.logits, problem.row_marginal, problem.col_marginal, problem.f0
    mask = None if problem.mask is None else problem.mask.view(torch.uint8)
    temperature = problem.temperature
    per_matrix = temperature if isinstance(temperature, Tensor) else None
    return {
        "logits_ptr": logits,
        "mask_ptr": mask,
        "row_ptr": row,
        "col_ptr": col,
        "f0_ptr": f0,
        "temperature_ptr": per_matrix,
        "batch": logits.shape[0],
        "n": logits.shape[1],
        "m": logits.shape[2],
        "n_iters": problem.n_iters,
        "uniform_scalings": uniform_scalings(*logits.shape[1:]),
        **strides("", logits),
        **strides_of({"mask": ("bnm", mask), "row": ("bn", row), "col": ("bm", col), "f0": ("bn", f0)}),
        "temperature_stride": 0 if per_matrix is None else per_matrix.stride(0),
        "has_mask": int(mask is not None),
        "has_row": int(row is not None),
        "has_col": int(col is not None),
        "has_f0": int(f0 is not None),
        "has_temperature": int(per_matrix is not None),
        "unit_rows": int(problem.unit_rows),
        "inverse_temperature": inverse_of(temperature),
    }


def strides(prefix: str, matrices: Tensor) -> dict[str, int]:
    """The stride arguments of (B, n, m)."""
    return {f"{prefix}stride_{axis}": matrices.stride(dim) for dim, axis in enumerate("bnm")}


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> None:
    """Write what ``outputs`` asks for; see :func:`supports_forward`."""
    logits, plan, sigma2 = problem.logits, outputs.plan, outputs.sigma2
    configuration = _FORWARD_TABLE[logits.dtype, size_of(problem), sigma2 is not None]
    if configuration.constants["RELOAD"]:
        outputs = outputs.with_info(problem)
    configuration.launch(
        triton.cdiv(logits.shape[0], configuration.matrices),
        **inputs(problem),
        plan_ptr=plan,
        **strides("plan_", plan),
        residual_ptr=outputs.residual,
        sweeps_ptr=outputs.sweeps,
        f_ptr=outputs.f,
        g_ptr=outputs.g,
        sigma2_ptr=sigma2,
        has_info=int(outputs.residual is not None),
        tol=problem.tol,
    )


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None) -> None:
    """Write ``gradients`` for the cotangent ``grad_plan`` (B, n, m), any strides, in the logits' dtype.

    ``sweeps``: (B,) int32, those each matrix did where it could stop by itself, None where all did ``n_iters``. Peak
    extra memory: the history of the programs, at most ``HISTORY_BYTES`` unless that of a single program exceeds it.
    """
    logits = problem.logits
    configuration = _BACKWARD_TABLE[logits.dtype, size_of(problem)].on(logits.device)
    size = size_of(problem)
    slot = 2 * configuration.matrices * size * (max(problem.n_iters, 1) + 1)
    blocks = triton.cdiv(logits.shape[0], configuration.matrices)
    programs = history_programs(blocks, _PROGRAMS_PER_SM, slot * problem.compute_dtype.itemsize, logits.device)
    history = torch.empty(programs * slot, dtype=problem.compute_dtype, device=logits.device)
    configuration.launch(
        programs,
        **inputs(problem),
        sweeps_ptr=sweeps,
        grad_plan_ptr=grad_plan,
        **strides("grad_plan_", grad_plan),
        history_ptr=history,
        grad_logits_ptr=gradients.logits,
        **strides("grad_logits_", gradients.logits),
        grad_f0_ptr=gradients.f0,
        grad_row_ptr=gradients.log_row,
        grad_col_ptr=gradients.log_col,
        has_sweeps=int(sweeps is not None),
        has_vectors=int(gradients.f0 is not None),
    )
