"""sigma2 of given plans up to 256 lines a side: which kernel serves which size, and the calls that launch it.

Squaring (``squaring.py``) to 64 lines: fixed work on a tile in registers, several small matrices a
program. Lanczos (``lanczos_forward.py``) beyond: one matrix a program, the plan re-read from cache at each step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from fastdsm._ops.problem import compute_dtype

from ..common.configuration import Configuration
from ..common.operands import strides_of
from .lanczos_forward import _sigma2_lanczos_bounds_fwd_kernel, _sigma2_lanczos_fwd_kernel
from .squaring import SQUARINGS
from .squaring_forward import _sigma2_bounds_fwd_kernel, _sigma2_fwd_kernel

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
MAX_LINES = 256
# Lanczos steps after which a plan is left as it is; clustered spectra of 256 lines have needed 211 for tol = 1e-4.
MAX_STEPS = 256

# (matrices, warps) of one program by tile size, none of which spills on sm_80, sm_90 or sm_100. At P = 64 float32 spills
# with 8 warps (sm_80, sm_100) and float64 with 16; at P = 32 float64 spills with 8 (sm_80).
_SINGLE = {4: (32, 4), 8: (8, 4), 16: (4, 4), 32: (1, 4), 64: (1, 16)}
_DOUBLE = {4: (16, 4), 8: (2, 4), 16: (1, 4), 32: (1, 4), 64: (1, 8)}


def supports(plan: Tensor) -> bool:
    """Whether :func:`sigma2` and :func:`sigma2_bounds` take plans (B, n, m) of this shape and dtype."""
    return plan.dtype in _TYPES and min(plan.shape[-2:]) >= 1 and max(plan.shape[-2:]) <= MAX_LINES


@functools.cache
def _squaring(dtype: torch.dtype, size: int, bounds: bool) -> Configuration:
    compute = "fp64" if dtype == torch.float64 else "fp32"
    matrices, warps = (_DOUBLE if dtype == torch.float64 else _SINGLE)[size]
    outputs = ("lower_ptr", "upper_ptr") if bounds else ("sigma2_ptr", "u_ptr", "v_ptr")
    return Configuration(
        kernel=_sigma2_bounds_fwd_kernel if bounds else _sigma2_fwd_kernel,
        pointers={"plan_ptr": _TYPES[dtype], "mask_ptr": "u8"} | dict.fromkeys(("row_ptr", "col_ptr", *outputs), compute),
        constants={"BLOCK_B": matrices, "P": size, "SQUARINGS": SQUARINGS[size]},
        num_warps=warps,
        matrices=matrices,
        label=f"sigma2{'_bounds' if bounds else ''} squaring {_TYPES[dtype]} P={size}",
    )


@functools.cache
def _lanczos(dtype: torch.dtype, size: int, bounds: bool) -> Configuration:
    compute = "fp64" if dtype == torch.float64 else "fp32"
    outputs = ("lower_ptr", "upper_ptr") if bounds else ("sigma2_ptr", "u_ptr", "v_ptr")
    return Configuration(
        kernel=_sigma2_lanczos_bounds_fwd_kernel if bounds else _sigma2_lanczos_fwd_kernel,
        pointers={"plan_ptr": _TYPES[dtype], "mask_ptr": "u8"}
        | dict.fromkeys(("row_ptr", "col_ptr", "used_row_ptr", *outputs), compute),
        constants={"BLOCK_N": (2048 if dtype == torch.float64 else 4096) // size, "COLS": size},
        num_warps=8,
        matrices=1,
        # By itself ptxas stops at 128 registers to fit one more program onto an SM, and spills for it.
        maxnreg=255,
        label=f"sigma2{'_bounds' if bounds else ''} lanczos {_TYPES[dtype]} P={size}",
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    sizes = (4, 8, 16, 32, 64, 128, 256)
    return [_configuration(dtype, size, bounds) for dtype in _TYPES for size in sizes for bounds in (False, True)]


def _configuration(dtype: torch.dtype, size: int, bounds: bool) -> Configuration:
    return _squaring(dtype, size, bounds) if size in _SINGLE else _lanczos(dtype, size, bounds)


def _launch(plan: Tensor, bounds: bool, tol: float, max_steps: int, **arguments: Any) -> None:
    size = max(4, triton.next_power_of_2(max(plan.shape[-2:])))
    configuration = _configuration(plan.dtype, size, bounds)
    more: dict[str, Any] = {}
    if "used_row_ptr" in configuration.pointers:
        used_row = plan.new_empty(plan.shape[:2], dtype=compute_dtype(plan.dtype))
        more = {"used_row_ptr": used_row, "tol": tol, "max_steps": max_steps}
    configuration.launch(triton.cdiv(plan.shape[0], configuration.matrices), **arguments, **more)


def _inputs(plan: Tensor, row_marginal: Tensor | None, col_marginal: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    """Kernel arguments that describe the plans."""
    bits = None if mask is None else mask.view(torch.uint8)
    given = {"plan": ("bnm", plan), "mask": ("bnm", bits), "row": ("bn", row_marginal), "col": ("bm", col_marginal)}
    return {
        "plan_ptr": plan,
        "mask_ptr": bits,
        "row_ptr": row_marginal,
        "col_ptr": col_marginal,
        "batch": plan.shape[0],
        "n": plan.shape[1],
        "m": plan.shape[2],
        **strides_of(given),
        "has_mask": int(mask is not None),
        "has_row": int(row_marginal is not None),
        "has_col": int(col_marginal is not None),
    }


def sigma2(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    value: Tensor,
    u2: Tensor | None = None,
    v2: Tensor | None = None,
    tol: float = 1e-4,
    max_steps: int = MAX_STEPS,
) -> None:
    """Write sigma2 and its vectors.

    plan: (B, n, m), one of the four dtypes, any strides. row_marginal (B, n), col_marginal (B, m): compute dtype, any
    strides, None where uniform. mask: (B, n, m) bool, any strides. value: (B,), u2 (B, n), v2 (B, m): compute dtype,
    contiguous; u2 and v2 both given or both None. value = u2^T M v2 is the Rayleigh lower bound; u2 and v2 have length
    1, are zero on excluded lines, and zero altogether where M is 0. The value is within 1e-4 of sigma2, relative;
    where Lanczos serves, within about tol, unless that takes more than max_steps steps.
    """
    _launch(
        plan,
        False,
        tol,
        max_steps,
        **_inputs(plan, row_marginal, col_marginal, mask),
        sigma2_ptr=value,
        u_ptr=u2,
        v_ptr=v2,
        has_vectors=int(u2 is not None),
    )


def sigma2_bounds(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    lower: Tensor,
    upper: Tensor,
) -> None:
    """Write certified bounds lower <= sigma2 <= upper, each (B,), compute dtype, contiguous; inputs as in sigma2.

    Up to 64 lines upper / lower <= 1.001; beyond, the smaller of the bounds in ``lanczos_forward.py``.
    """
    _launch(
        plan,
        True,
        1e-4,
        MAX_STEPS,
        **_inputs(plan, row_marginal, col_marginal, mask),
        lower_ptr=lower,
        upper_ptr=upper,
    )
