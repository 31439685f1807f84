"""What is done entry by entry: the plan, from the potentials of each matrix's last sweep; symbols in ``lines.py``.

A tile lies along the axis that is contiguous in memory: rows of the problem, or, where it is TRANSPOSED, its columns.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, exp2, log2, narrow
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from ..common.line_sweeps import lifting
from ..common.memory import load_entries, store_entries
from .lines import largest, near


@triton.jit
def down(rows, TRANSPOSED: tl.constexpr):
    """A vector over rows, spread over a tile."""
    if TRANSPOSED:
        return rows[None, :]
    else:
        return rows[:, None]


@triton.jit
def across(cols, TRANSPOSED: tl.constexpr):
    """A vector over columns, spread over a tile."""
    if TRANSPOSED:
        return cols[:, None]
    else:
        return cols[None, :]


@triton.jit
def tile_pointers(ptr, rows, cols, stride_n, stride_m, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Addresses of a tile; under ALIGNED its last axis is adjacent in memory and starts on 16 bytes."""
    if ALIGNED and TRANSPOSED:
        pointers = ptr + across(cols.to(tl.int64), TRANSPOSED) * stride_m + down(rows, TRANSPOSED)
    elif ALIGNED:
        pointers = ptr + down(rows.to(tl.int64), TRANSPOSED) * stride_n + across(cols, TRANSPOSED)
    else:
        offsets = down(rows.to(tl.int64), TRANSPOSED) * stride_n + across(cols.to(tl.int64), TRANSPOSED) * stride_m
        pointers = ptr + offsets
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, pointers.shape[1]))
    return pointers


@triton.jit
def inside(rows, cols, n, m, element: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Entries of a tile within the matrix."""
    within = down(rows < n, TRANSPOSED) & across(cols < m, TRANSPOSED)
    if ALIGNED:
        within = tl.max_constancy(within, (1, 128 // element.primitive_bitwidth))
    return within


@triton.jit
def load_tile(ptr, rows, cols, n, m, stride_n, stride_m, other, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Entries of a tile, ``other`` beyond the matrix."""
    pointers = tile_pointers(ptr, rows, cols, stride_n, stride_m, ALIGNED, TRANSPOSED)
    within = inside(rows, cols, n, m, ptr.dtype.element_ty, ALIGNED, TRANSPOSED)
    if ALIGNED:
        return tl.load(pointers, mask=within, other=other)
    else:
        return load_entries(pointers, within, other)


@triton.jit
def store_tile(ptr, rows, cols, n, m, stride_n, stride_m, values, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The mirror of :func:`load_tile`; rounds to the element type."""
    pointers = tile_pointers(ptr, rows, cols, stride_n, stride_m, ALIGNED, TRANSPOSED)
    within = inside(rows, cols, n, m, ptr.dtype.element_ty, ALIGNED, TRANSPOSED)
    values = narrow(values, ptr.dtype.element_ty)
    if ALIGNED:
        tl.store(pointers, values, mask=within)
    else:
        store_entries(pointers, values, within)


@triton.jit
def load_used(ptr, rows, cols, r, col_base, n, m, stride_n, stride_m, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """x of a tile in float32, -inf where excluded."""
    x = load_tile(ptr, rows, cols, n, m, stride_n, stride_m, -float("inf"), ALIGNED, TRANSPOSED).to(tl.float32)
    used = down(r != 0, TRANSPOSED) & across(col_base != -float("inf"), TRANSPOSED)
    return tl.where(used, x, -float("inf"))


@triton.jit
def tile_entries(x, k, col_base, col_fine, row_base, row_fine, TRANSPOSED: tl.constexpr):
    """2^y of a tile."""
    y = near(x, k, across(col_base, TRANSPOSED), across(col_fine, TRANSPOSED), down(row_base, TRANSPOSED))
    return exp2(y + down(row_fine, TRANSPOSED))


@triton.jit
def place(program, n, m, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Matrix, first row and first column of a program, neighbours along the axis contiguous in memory."""
    along, beside = n, m
    if not TRANSPOSED:
        along, beside = m, n
    tiles_along, tiles_beside = tl.cdiv(along, BLOCK_1), tl.cdiv(beside, BLOCK_0)
    at = (program // tiles_along % tiles_beside).to(tl.int32) * BLOCK_0
    start = (program % tiles_along).to(tl.int32) * BLOCK_1
    first_row, first_col = start, at
    if not TRANSPOSED:
        first_row, first_col = at, start
    return program // (tiles_along.to(tl.int64) * tiles_beside), first_row, first_col


@finite_jit
def _sinkhorn_stream_plan_fwd_kernel(
    logits_ptr,
    row_ptr,
    temperature_ptr,
    col_base_ptr,
    col_fine_ptr,
    row_base_ptr,
    row_fine_ptr,
    row_factor_ptr,
    residuals_ptr,
    done_ptr,
    plan_ptr,
    residual_ptr,
    f_ptr,
    g_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    temperature_stride: tl.int64,
    plan_stride_b: tl.int64,
    plan_stride_n: tl.int64,
    plan_stride_m: tl.int64,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    width: tl.int32,
    chunks: tl.int32,
    slots: tl.int32,
    steps: tl.int32,
    has_row: tl.int32,
    has_temperature: tl.int32,
    has_info: tl.int32,
    inverse_temperature: tl.float64,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    b, first_row, first_col = place(tl.program_id(0).to(tl.int64), n, m, BLOCK_0, BLOCK_1, TRANSPOSED)
    rows = first_row + tl.arange(0, BLOCK_1 if TRANSPOSED else BLOCK_0)
    cols = first_col + tl.arange(0, BLOCK_0 if TRANSPOSED else BLOCK_1)
    in_rows, in_cols = rows < n, cols < m
    slot = (tl.maximum(tl.load(done_ptr + b), 1) % slots) * batch + b
    k = lifting(temperature_ptr + b * temperature_stride, has_temperature, inverse_temperature, tl.float32)
    r_at = row_ptr + b * row_stride_b + rows.to(tl.int64) * row_stride_n
    r = tl.load(r_at, mask=in_rows & (has_row != 0), other=1.0)
    col_base = tl.load(col_base_ptr + b * width + cols, mask=in_cols, other=-float("inf"))
    col_fine = tl.load(col_fine_ptr + slot * width + cols, mask=in_cols, other=0.0)
    row_base = tl.load(row_base_ptr + b * n + rows, mask=in_rows, other=0.0)
    row_fine = tl.load(row_fine_ptr + slot * n + rows, mask=in_rows, other=0.0)
    u = tl.load(row_factor_ptr + slot * n + rows, mask=in_rows, other=1.0)
    residual = largest(residuals_ptr + ((steps % 2) * batch + b) * chunks, chunks)
    poison = tl.where(residual != residual, float("nan"), 0.0)
    x_at = logits_ptr + b * stride_b
    x = load_used(x_at, rows, cols, r, col_base, n, m, stride_n, stride_m, ALIGNED, TRANSPOSED)
    plan = tile_entries(x, k, col_base, col_fine, row_base, row_fine, TRANSPOSED) * down(u, TRANSPOSED) + poison
    plan_at = plan_ptr + b * plan_stride_b
    store_tile(plan_at, rows, cols, n, m, plan_stride_n, plan_stride_m, plan, ALIGNED, TRANSPOSED)
    f = row_base.to(tl.float64) * UNIT + (row_fine + log2(u)).to(tl.float64) * LN_2 + poison
    g = tl.where(col_base == -float("inf"), 0.0, col_base.to(tl.float64) * UNIT + col_fine.to(tl.float64) * LN_2) + poison
    tl.store(f_ptr + b * n + rows, f, mask=in_rows & (has_info != 0) & (first_col == 0))
    tl.store(g_ptr + b * m + cols, g, mask=in_cols & (has_info != 0) & (first_row == 0))
    tl.store(residual_ptr + b, residual, mask=(has_info != 0) & (first_row == 0) & (first_col == 0))
