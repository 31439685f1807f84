"""Launching the panel family: one matrix per program, n and m up to 256, any dtype, every option.

The columns are padded to BLOCK_M, the rows walked in panels of BLOCK_N; both bounds are padding constants, so a larger
matrix needs larger constants and no other code. Serves whatever does not stay in the registers of the smaller families.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fastdsm._ops.problem import Gradients, Outputs, Problem

from ..common.configuration import Configuration, history_programs
from ..common.operands import inverse_of, strides_of
from .backward import _sinkhorn_panel_bwd_kernel
from .forward import _sinkhorn_panel_fwd_kernel

MAX_SIZE = 256
BLOCKS_M = (64, 128, 256)
NUM_WARPS = 8
# Rows of a panel by its columns: 2 to 16 entries a thread. Found by compiling for sm_80, sm_90 and sm_100: none spills.
ROWS = {
    (_sinkhorn_panel_fwd_kernel, torch.float32): {64: 32, 128: 8, 256: 16},
    (_sinkhorn_panel_bwd_kernel, torch.float32): {64: 16, 128: 8, 256: 8},
    (_sinkhorn_panel_fwd_kernel, torch.float64): {64: 16, 128: 8, 256: 4},
    (_sinkhorn_panel_bwd_kernel, torch.float64): {64: 8, 128: 4, 256: 4},
}
# But for: kernel, dtype of the logits, columns, aligned.
ROWS_EXCEPTION = {
    (_sinkhorn_panel_fwd_kernel, torch.float32, 64, True): 16,
    (_sinkhorn_panel_bwd_kernel, torch.float64, 256, False): 2,
}
# Registers of a thread, by kernel, compute dtype and WITH_SIGMA2. By itself ptxas stops at 80 or 128 to fit one more program
# onto an SM, and spills for it. Not for the float64 backward, which spills when told.
MAX_REGISTERS: dict[tuple[Any, torch.dtype, bool], int] = {
    (_sinkhorn_panel_fwd_kernel, torch.float32, False): 255,
    (_sinkhorn_panel_fwd_kernel, torch.float32, True): 255,
    (_sinkhorn_panel_fwd_kernel, torch.float64, False): 255,
    (_sinkhorn_panel_fwd_kernel, torch.float64, True): 255,
    (_sinkhorn_panel_bwd_kernel, torch.float32, False): 255,
}
# Programs of a backward per SM: at over 128 registers a thread, only one fits.
PROGRAMS_PER_SM = 1

_ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def supports(problem: Problem) -> bool:
    """Whether n and m are at most 256."""
    return max(problem.logits.shape[1:]) <= MAX_SIZE


def _configuration(kernel: Any, dtype: torch.dtype, block_m: int, aligned: bool, **constants: Any) -> Configuration:
    """The one way to run ``kernel`` on matrices of ``dtype`` with up to ``block_m`` columns."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    vector = 16 // dtype.itemsize if aligned else 1
    pointers = {name: _ELEMENTS[compute] for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= dict.fromkeys(
        pointers.keys() & {"logits_ptr", "plan_ptr", "grad_plan_ptr", "grad_logits_ptr"}, _ELEMENTS[dtype]
    )
    pointers |= {"mask_ptr": "u8", "sweeps_ptr": "i32"}
    return Configuration(
        kernel,
        pointers,
        {
            "BLOCK_N": ROWS_EXCEPTION.get((kernel, dtype, block_m, aligned), ROWS[kernel, compute][block_m]),
            "BLOCK_M": block_m,
            "CHUNK": min(block_m, 32 * vector),
            "ALIGNED": aligned,
            **constants,
        },
        NUM_WARPS,
        matrices=1,
        maxnreg=MAX_REGISTERS.get((kernel, compute, constants.get("WITH_SIGMA2", False))),
        label=f"{_ELEMENTS[dtype]} {block_m} {'aligned' if aligned else 'strided'}"
        + " sigma2" * bool(constants.get("WITH_SIGMA2")),
    )


_KINDS = list(itertools.product(_ELEMENTS, BLOCKS_M, (True, False)))
_FORWARD = {kind: _configuration(_sinkhorn_panel_fwd_kernel, *kind, WITH_SIGMA2=False, LANCZOS_N=0) for kind in _KINDS}
_BACKWARD = {kind: _configuration(_sinkhorn_panel_bwd_kernel, *kind) for kind in _KINDS}
# Its Lanczos passes read the logits element by element anyway.
_SIGMA2 = {
    (dtype, block_m): _configuration(
        _sinkhorn_panel_fwd_kernel,
        dtype,
        block_m,
        False,
        WITH_SIGMA2=True,
        LANCZOS_N=(2048 if dtype == torch.float64 else 4096) // block_m,
    )
    for dtype in _ELEMENTS
    for block_m in BLOCKS_M
}


def configurations() -> list[Configuration]:
    """Every kernel of this family that can be launched."""
    return [*_FORWARD.values(), *_SIGMA2.values(), *_BACKWARD.values()]


def _aligned(*matrices: Tensor) -> bool:
    """Whether the rows of all matrices are made of whole 16-byte vectors."""
    for matrix in matrices:
        vector = 16 // matrix.element_size()
        strides = (matrix.stride(0), matrix.stride(1), matrix.shape[2])
        if matrix.stride(2) != 1 or any(s % vector for s in strides) or matrix.data_ptr() % 16:
            return False
    return True


def _kind(*matrices: Tensor) -> tuple[torch.dtype, int, bool]:
    """What decides the configuration for these matrices of one shape and dtype."""
    block_m = next(block for block in BLOCKS_M if matrices[0].shape[2] <= block)
    return matrices[0].dtype, block_m, _aligned(*matrices)


def _uniform_period(n: int, m: int) -> int:
    """Sweeps from one log sweep to the next when both marginals are uniform."""
    return math.floor(45 / math.log2(max(n, m, 2))) + 1


def _inputs(problem: Problem) -> dict[str, Any]:
    """Arguments that both kernels share."""
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
        "stride_b": logits.stride(0),
        "stride_n": logits.stride(1),
        "stride_m": logits.stride(2),
        **strides_of({"mask": ("bnm", mask), "row": ("bn", row), "col": ("bm", col), "f0": ("bn", f0)}),
        "temperature_stride": 0 if per_matrix is None else per_matrix.stride(0),
        "n": logits.shape[1],
        "m": logits.shape[2],
        "n_iters": problem.n_iters,
        "uniform_period": _uniform_period(*logits.shape[1:]),
        "has_mask": int(mask is not None),
        "has_row": int(row is not None),
        "has_col": int(col is not None),
        "has_f0": int(f0 is not None),
        "has_temperature": int(per_matrix is not None),
        "unit_rows": int(problem.unit_rows),
        "inverse_temperature": inverse_of(temperature),
    }


def sinkhorn_forward(problem: Problem, outputs: Outputs) -> None:
    """Write what ``outputs`` asks for."""
    logits, plan = problem.logits, outputs.plan
    batch, n, _ = logits.shape
    work = torch.empty(batch * 3 * n, dtype=problem.compute_dtype, device=logits.device)
    kind = _kind(logits, plan)
    (_FORWARD[kind] if outputs.sigma2 is None else _SIGMA2[kind[:2]]).launch(
        batch,
        **_inputs(problem),
        work_ptr=work,
        plan_ptr=plan,
        residual_ptr=outputs.residual,
        sweeps_ptr=outputs.sweeps,
        f_ptr=outputs.f,
        g_ptr=outputs.g,
        sigma2_ptr=outputs.sigma2,
        plan_stride_b=plan.stride(0),
        plan_stride_n=plan.stride(1),
        plan_stride_m=plan.stride(2),
        has_info=int(outputs.residual is not None),
        tol=problem.tol,
    )


def sinkhorn_backward(problem: Problem, grad_plan: Tensor, gradients: Gradients, sweeps: Tensor | None) -> None:
    """Write what ``gradients`` asks for; ``sweeps`` (B,) int32 are those done, None where every matrix did ``n_iters``."""
    logits, grad = problem.logits, gradients.logits
    batch, n, m = logits.shape
    dtype, device = problem.compute_dtype, logits.device
    uniform = problem.row_marginal is None and problem.col_marginal is None
    length = max(problem.n_iters, 1) + 1
    segments = -(-(length - 1) // _uniform_period(n, m)) if uniform else length - 1
    slot = (segments + 2) * n + segments * m + 2 * length * (n + m)
    programs = history_programs(batch, PROGRAMS_PER_SM, slot * dtype.itemsize, device)
    work = torch.empty(programs * slot, dtype=dtype, device=device)
    _BACKWARD[_kind(logits, grad_plan, grad)].launch(
        programs,
        **_inputs(problem),
        work_ptr=work,
        grad_plan_ptr=grad_plan,
        sweeps_ptr=sweeps,
        grad_logits_ptr=grad,
        grad_f0_ptr=gradients.f0,
        grad_row_ptr=gradients.log_row,
        grad_col_ptr=gradients.log_col,
        grad_plan_stride_b=grad_plan.stride(0),
        grad_plan_stride_n=grad_plan.stride(1),
        grad_plan_stride_m=grad_plan.stride(2),
        grad_stride_b=grad.stride(0),
        grad_stride_n=grad.stride(1),
        grad_stride_m=grad.stride(2),
        batch=batch,
        slot=slot,
        segments=segments,
        has_sweeps=int(sweeps is not None),
        has_vectors=int(gradients.f0 is not None),
    )
