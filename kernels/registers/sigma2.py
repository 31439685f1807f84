"""sigma2 of given plans of up to 4x4, one matrix in the registers of each thread, by Jacobi: see ``spectrum/jacobi.py``."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configuration import Configuration, finite_jit
from ..common.operands import strides_of
from ..spectrum.jacobi import DOUBLE_ROUNDS, SINGLE_ROUNDS, deflate, largest_singular_pair, lift
from .memory import load_strided

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
_BLOCK, _WARPS = 128, 4


@triton.jit
def _load_line(ptr, matrix, live, has, count, stride_b, stride):
    """A marginal, 1 where it is absent, 0 beyond ``count``."""
    return [
        tl.where(
            i < count,
            tl.load(ptr + matrix * stride_b + i * stride, mask=live & (has != 0) & (i < count), other=1.0),
            0.0,
        )
        for i in (0, 1, 2, 3)
    ]


@triton.jit
def _root(marginal, total):
    """sqrt(r), 1 / sqrt(r), sqrt(r / total), all 0 where r is."""
    root = [tl.sqrt(value) for value in marginal]
    inverse = [tl.where(value > 0.0, 1.0 / tl.where(value > 0.0, value, 1.0), 0.0) for value in root]
    unit = 1.0 / tl.sqrt(tl.where(total > 0.0, total, 1.0))
    return inverse, [value * unit for value in root]


@finite_jit
def _sigma2_fwd_kernel(
    plan_ptr, row_ptr, col_ptr, mask_ptr, value_ptr, u2_ptr, v2_ptr,
    batch: tl.int64, n: tl.int32, m: tl.int32,
    plan_stride_b: tl.int64, plan_stride_n: tl.int64, plan_stride_m: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, mask_stride_m: tl.int64,
    row_stride_b: tl.int64, row_stride_n: tl.int64, col_stride_b: tl.int64, col_stride_m: tl.int64,
    has_mask: tl.int32, has_row: tl.int32, has_col: tl.int32,
    BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Value and vectors; a line is valid if it has an entry that is not masked and lies on no line of marginal 0."""
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = matrix < batch
    P = load_strided(plan_ptr, matrix, live, n, m, plan_stride_b, plan_stride_n, plan_stride_m, 0.0)
    take = load_strided(mask_ptr, matrix, live & (has_mask != 0), n, m, mask_stride_b, mask_stride_n, mask_stride_m, 1)
    row = _load_line(row_ptr, matrix, live, has_row, n, row_stride_b, row_stride_n)
    col = _load_line(col_ptr, matrix, live, has_col, m, col_stride_b, col_stride_m)
    valid = [
        (take[e] != 0) & (row[e // 4] != 0.0) & (col[e % 4] != 0.0)
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]
    P = [
        tl.where(valid[e], P[e].to(value_ptr.dtype.element_ty), 0.0)
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]
    rows = [valid[4 * i] | valid[4 * i + 1] | valid[4 * i + 2] | valid[4 * i + 3] for i in (0, 1, 2, 3)]
    cols = [valid[j] | valid[4 + j] | valid[8 + j] | valid[12 + j] for j in (0, 1, 2, 3)]
    r = [tl.where(rows[i], row[i], 0.0) for i in (0, 1, 2, 3)]
    c = [tl.where(cols[j], col[j], 0.0) for j in (0, 1, 2, 3)]
    # An absent marginal is 1 on each valid line so far: its sum counts them, and it takes the total of the other.
    total_r = r[0] + r[1] + r[2] + r[3]
    total_c = c[0] + c[1] + c[2] + c[3]
    to_r = tl.where((has_row == 0) & (has_col != 0), total_c / tl.maximum(total_r, 1e-30), 1.0)
    to_c = tl.where(has_col == 0, total_r / tl.maximum(total_c, 1e-30), 1.0)
    inverse_r, q = _root([value * to_r for value in r], total_r * to_r)
    inverse_c, p = _root([value * to_c for value in c], total_c * to_c)
    N = [inverse_r[e // 4] * P[e] * inverse_c[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    value, u, v = largest_singular_pair(deflate(N, q, p), ROUNDS)
    tl.store(value_ptr + matrix, value, mask=live)
    u = lift(u, q)
    v = lift(v, p)
    for i in tl.static_range(4):
        tl.store(u2_ptr + matrix * n + i, tl.where(rows[i], u[i], 0.0), mask=live & (i < n))
        tl.store(v2_ptr + matrix * m + i, tl.where(cols[i], v[i], 0.0), mask=live & (i < m))


def supports(plan: Tensor) -> bool:
    """Whether :func:`sigma2` takes plans (B, n, m) of this shape and dtype."""
    return plan.dtype in _TYPES and min(plan.shape[-2:]) >= 1 and max(plan.shape[-2:]) <= 4


@functools.cache
def _configuration(dtype: torch.dtype) -> Configuration:
    double = dtype == torch.float64
    vectors = ("row_ptr", "col_ptr", "value_ptr", "u2_ptr", "v2_ptr")
    return Configuration(
        kernel=_sigma2_fwd_kernel,
        pointers={"plan_ptr": _TYPES[dtype], "mask_ptr": "u8"} | dict.fromkeys(vectors, "fp64" if double else "fp32"),
        constants={"BLOCK": _BLOCK, "ROUNDS": (DOUBLE_ROUNDS if double else SINGLE_ROUNDS).value},
        num_warps=_WARPS,
        matrices=_BLOCK,
        label=f"sigma2 registers {_TYPES[dtype]}",
    )


def configurations() -> list[Configuration]:
    """Every kernel this module can launch."""
    return [_configuration(dtype) for dtype in _TYPES]


def sigma2(
    plan: Tensor,
    row_marginal: Tensor | None,
    col_marginal: Tensor | None,
    mask: Tensor | None,
    value: Tensor,
    u2: Tensor,
    v2: Tensor,
) -> None:
    """Write sigma2 = u2^T M v2 into ``value`` (B,) and its unit vectors into ``u2`` (B, n) and ``v2`` (B, m).

    plan: (B, n, m), n, m <= 4, any of the four dtypes, any strides. row_marginal (B, n), col_marginal (B, m): compute
    dtype, any strides, None where uniform. mask: (B, n, m) bool, any strides. The outputs are contiguous and in the
    compute dtype; the vectors are 0 on excluded lines, and altogether where M is 0.
    """
    configuration = _configuration(plan.dtype)
    bits = None if mask is None else mask.view(torch.uint8)
    given = {"plan": ("bnm", plan), "mask": ("bnm", bits), "row": ("bn", row_marginal), "col": ("bm", col_marginal)}
    configuration.launch(
        triton.cdiv(plan.shape[0], configuration.matrices),
        plan_ptr=plan,
        row_ptr=row_marginal,
        col_ptr=col_marginal,
        mask_ptr=bits,
        value_ptr=value,
        u2_ptr=u2,
        v2_ptr=v2,
        batch=plan.shape[0],
        n=plan.shape[1],
        m=plan.shape[2],
        **strides_of(given),
        has_mask=int(mask is not None),
        has_row=int(row_marginal is not None),
        has_col=int(col_marginal is not None),
    )
