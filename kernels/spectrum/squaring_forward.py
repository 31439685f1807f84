"""The kernels of sigma2 and its bounds by squaring, a tile of matrices a program; derivation in ``squaring.py``."""

import triton
import triton.language as tl

from ..common.configuration import finite_jit
from .squaring import inverse_or_zero, tile_bounds, tile_sigma2


@triton.jit
def _load_tile(
    plan_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    batch,
    n,
    m,
    plan_stride_b,
    plan_stride_n,
    plan_stride_m,
    mask_stride_b,
    mask_stride_n,
    mask_stride_m,
    row_stride_b,
    row_stride_n,
    col_stride_b,
    col_stride_m,
    has_mask,
    has_row,
    has_col,
    DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
):
    """Plans (BLOCK_B, P, P) with excluded entries 0, and both marginals (BLOCK_B, P) as used, 0 on excluded lines."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    i = tl.arange(0, P)
    inside_row = (b < batch)[:, None] & (i < n)[None, :]
    inside_col = (b < batch)[:, None] & (i < m)[None, :]
    row_at = b[:, None] * row_stride_b + i[None, :] * row_stride_n
    col_at = b[:, None] * col_stride_b + i[None, :] * col_stride_m
    r = tl.load(row_ptr + row_at, mask=inside_row & (has_row != 0), other=1.0)
    c = tl.load(col_ptr + col_at, mask=inside_col & (has_col != 0), other=1.0)
    entry = (inside_row & (r != 0))[:, :, None] & (inside_col & (c != 0))[:, None, :]
    mask_at = b[:, None, None] * mask_stride_b + i[None, :, None] * mask_stride_n + i[None, None, :] * mask_stride_m
    entry = entry & (tl.load(mask_ptr + mask_at, mask=entry & (has_mask != 0), other=1) != 0)
    plan_at = b[:, None, None] * plan_stride_b + i[None, :, None] * plan_stride_n + i[None, None, :] * plan_stride_m
    plan = tl.load(plan_ptr + plan_at, mask=entry, other=0.0).to(DTYPE)
    rows = tl.max(entry.to(tl.int32), axis=2) != 0
    cols = tl.max(entry.to(tl.int32), axis=1) != 0
    r, c = tl.where(rows, r, 0.0), tl.where(cols, c, 0.0)
    total = tl.where(has_row != 0, tl.sum(r, axis=1), tl.sum(c, axis=1))
    total = tl.where((has_row != 0) | (has_col != 0), total, tl.sum(rows.to(DTYPE), axis=1))
    uniform_r = total * inverse_or_zero(tl.sum(rows.to(DTYPE), axis=1))
    uniform_c = total * inverse_or_zero(tl.sum(cols.to(DTYPE), axis=1))
    r = tl.where((has_row != 0) | (r == 0), r, uniform_r[:, None])
    c = tl.where((has_col != 0) | (c == 0), c, uniform_c[:, None])
    return plan, r, c


@finite_jit
def _sigma2_fwd_kernel(
    plan_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    sigma2_ptr,
    u_ptr,
    v_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    plan_stride_b: tl.int64,
    plan_stride_n: tl.int64,
    plan_stride_m: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_n: tl.int64,
    mask_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_vectors: tl.int32,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    SQUARINGS: tl.constexpr,
):
    """sigma2 and, where asked for, its vectors u (batch, n) and v (batch, m); BLOCK_B matrices a program."""
    plan, r, c = _load_tile(
        plan_ptr,
        mask_ptr,
        row_ptr,
        col_ptr,
        batch,
        n,
        m,
        plan_stride_b,
        plan_stride_n,
        plan_stride_m,
        mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        row_stride_b,
        row_stride_n,
        col_stride_b,
        col_stride_m,
        has_mask,
        has_row,
        has_col,
        sigma2_ptr.dtype.element_ty,
        BLOCK_B,
        P,
    )
    value, u, v = tile_sigma2(plan, r, c, SQUARINGS)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    i = tl.arange(0, P)
    inside = (b < batch)[:, None] & (has_vectors != 0)
    tl.store(sigma2_ptr + b, value, mask=b < batch)
    tl.store(u_ptr + b[:, None] * n + i[None, :], u, mask=inside & (i < n)[None, :])
    tl.store(v_ptr + b[:, None] * m + i[None, :], v, mask=inside & (i < m)[None, :])


@finite_jit
def _sigma2_bounds_fwd_kernel(
    plan_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    lower_ptr,
    upper_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    plan_stride_b: tl.int64,
    plan_stride_n: tl.int64,
    plan_stride_m: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_n: tl.int64,
    mask_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    SQUARINGS: tl.constexpr,
):
    """Both bounds of sigma2, BLOCK_B matrices a program."""
    plan, r, c = _load_tile(
        plan_ptr,
        mask_ptr,
        row_ptr,
        col_ptr,
        batch,
        n,
        m,
        plan_stride_b,
        plan_stride_n,
        plan_stride_m,
        mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        row_stride_b,
        row_stride_n,
        col_stride_b,
        col_stride_m,
        has_mask,
        has_row,
        has_col,
        lower_ptr.dtype.element_ty,
        BLOCK_B,
        P,
    )
    lower, upper = tile_bounds(plan, r, c, SQUARINGS)
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    tl.store(lower_ptr + b, lower, mask=b < batch)
    tl.store(upper_ptr + b, upper, mask=b < batch)
