"""The column step of the first sweep, in three kernels; symbols and derivation in ``lines.py``.

start     of ``lines`` rows: in each column the maximum of k x_ij + f_i, in two terms, as large ones are rounded, and the sum of
          2^(k x_ij + f_i - max), with a running maximum; how many rows have an entry, their given masses, and the largest
          |k x_ij|; F of "sweep 0", f0, 0 on rows without entries.
columns   of a chunk of columns, over all rows: G_j, the maximum on the grid, and gamma_j = -log2 of the sum of
          2^(k x_ij + f_i + G_j); how many columns have an entry, and their given masses.
masses    r and c where they are uniform, from those counts, and the spacing of the grid; gamma_j += log2 c_j.

Without sweeps (``n_iters`` 0) G and gamma are 0: only the row step is left to do.
"""

import triton
import triton.language as tl

from ..common.arithmetic import exp2, log2
from ..common.bases import BITS, UNIT, fused, on_grid, spacing
from ..common.configuration import finite_jit
from ..common.line_sweeps import lifting
from .lines import MAX_PARTS, load_logits, row_masses, store_vector


@finite_jit
def _sinkhorn_stream_start_fwd_kernel(
    logits_ptr,
    row_ptr,
    col_ptr,
    f0_ptr,
    temperature_ptr,
    start_ptr,
    top_ptr,
    rest_ptr,
    total_ptr,
    row_counts_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    f0_stride_b: tl.int64,
    f0_stride_n: tl.int64,
    temperature_stride: tl.int64,
    n: tl.int32,
    m: tl.int32,
    width: tl.int32,
    lines: tl.int32,
    blocks: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_f0: tl.int32,
    has_temperature: tl.int32,
    inverse_temperature: tl.float64,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, first = program // blocks, (program % blocks).to(tl.int32) * lines
    end = tl.minimum(first + lines, n)
    k = lifting(temperature_ptr + b * temperature_stride, has_temperature, inverse_temperature, tl.float32)
    matrix = (logits_ptr + b * stride_b, stride_n, row_ptr + b * row_stride_b, row_stride_n, has_row, 1.0, m)
    size = tl.zeros([ROWS], tl.float32)
    for first_col in range(0, m, BLOCK_M):
        cols = first_col + tl.arange(0, BLOCK_M)
        col_at = col_ptr + b * col_stride_b + cols.to(tl.int64) * col_stride_m
        col_used = (cols < m) & (tl.load(col_at, mask=(cols < m) & (has_col != 0), other=1.0) != 0)
        top = tl.full([BLOCK_M], -3.0e38, tl.float32)
        rest = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(first, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = rows < end
            r = row_masses(matrix, rows, end)
            x = load_logits(matrix, rows, cols, end, r, col_used, ALIGNED)
            f = start_potential(f0_ptr + b * f0_stride_b, f0_stride_n, has_f0, rows, inside)
            used = x != -float("inf")
            # (T, s) stands for the maximum T BITS + s.
            new_top = tl.maximum(top, tl.max(tl.where(used, fused(x, k, f[:, None]), top), axis=0))
            y = tl.where(used, fused(x, k, f[:, None] - new_top[None, :]) * BITS, -float("inf"))
            moved = (top - new_top) * BITS + rest
            rest = tl.maximum(moved, tl.max(y, axis=0))
            total = total * exp2(moved - rest) + tl.sum(exp2(y - rest[None, :]), axis=0)
            top = new_top
            size = tl.maximum(size, tl.max(tl.where(used, tl.abs(x) * k, 0.0), axis=1))
            before = tl.load(start_ptr + b * n + rows, mask=inside & (first_col > 0), other=0.0)
            row_used = tl.maximum(tl.max(used.to(tl.float32), axis=1), before)
            tl.store(start_ptr + b * n + rows, row_used, mask=inside)
        store_vector(top_ptr + program * width, cols, width, top)
        store_vector(rest_ptr + program * width, cols, width, rest)
        store_vector(total_ptr + program * width, cols, width, total)
        tl.debug_barrier()
    n_rows = tl.zeros([ROWS], tl.float32)
    r_total = tl.zeros([ROWS], tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        used = tl.load(start_ptr + b * n + rows, mask=inside, other=0.0) != 0
        f = start_potential(f0_ptr + b * f0_stride_b, f0_stride_n, has_f0, rows, inside)
        n_rows += used.to(tl.float32)
        r_total += tl.where(used, row_masses(matrix, rows, end), 0.0)
        tl.debug_barrier()
        tl.store(start_ptr + b * n + rows, tl.where(used, f, 0.0), mask=inside)
    tl.store(row_counts_ptr + program * 3, tl.sum(n_rows))
    tl.store(row_counts_ptr + program * 3 + 1, tl.sum(r_total))
    tl.store(row_counts_ptr + program * 3 + 2, tl.max(size))


@triton.jit
def start_potential(f0_ptr, stride_n, has_f0, rows, inside):
    """f0 in UNIT, 0 where none is given."""
    return tl.load(f0_ptr + rows.to(tl.int64) * stride_n, mask=inside & (has_f0 != 0), other=0.0) * (1.0 / UNIT)


@finite_jit
def _sinkhorn_stream_columns_fwd_kernel(
    top_ptr,
    rest_ptr,
    total_ptr,
    row_counts_ptr,
    col_ptr,
    col_base_ptr,
    col_fine_ptr,
    col_counts_ptr,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    m: tl.int32,
    width: tl.int32,
    blocks: tl.int32,
    chunks: tl.int32,
    has_col: tl.int32,
    n_iters: tl.int32,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, cols = program // chunks, (program % chunks).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    top = tl.full([PARTS, CHUNK], -3.0e38, tl.float32)
    rest = tl.zeros([PARTS, CHUNK], tl.float32)
    total = tl.zeros([PARTS, CHUNK], tl.float32)
    for start in range(0, blocks, PARTS):
        parts = start + tl.arange(0, PARTS)
        offsets = (b * blocks + parts)[:, None] * width + cols[None, :]
        within = (parts < blocks)[:, None] & (cols < width)[None, :]
        part_top = tl.load(top_ptr + offsets, mask=within, other=-3.0e38)
        part_rest = tl.load(rest_ptr + offsets, mask=within, other=0.0)
        part_total = tl.load(total_ptr + offsets, mask=within, other=0.0)
        new_top = tl.maximum(top, part_top)
        moved, part_moved = (top - new_top) * BITS + rest, (part_top - new_top) * BITS + part_rest
        rest = tl.maximum(moved, part_moved)
        total = total * exp2(moved - rest) + part_total * exp2(part_moved - rest)
        top = new_top
    col_top = tl.max(top, axis=0)
    moved = (top - col_top[None, :]) * BITS + rest
    col_rest = tl.max(moved, axis=0)
    col_total = tl.sum(total * exp2(moved - col_rest[None, :]), axis=0)
    used = col_total != 0
    sweeping = n_iters != 0
    grid = on_grid(col_top, spacing_of(row_counts_ptr + b * blocks * 3, blocks))
    base = tl.where(used, tl.where(sweeping, -grid, 0.0), -float("inf"))
    fine = tl.where(used & sweeping, ((grid - col_top) * BITS - col_rest) - log2(col_total), 0.0)
    tl.store(col_base_ptr + b * width + cols, base, mask=cols < width)
    tl.store(col_fine_ptr + b * width + cols, fine, mask=cols < width)
    given = tl.load(col_ptr + b * col_stride_b + cols.to(tl.int64) * col_stride_m, mask=used & (has_col != 0), other=0.0)
    tl.store(col_counts_ptr + program * 2, tl.sum(used.to(tl.float32)))
    tl.store(col_counts_ptr + program * 2 + 1, tl.sum(given))


@finite_jit
def _sinkhorn_stream_masses_fwd_kernel(
    row_counts_ptr,
    col_counts_ptr,
    col_ptr,
    col_base_ptr,
    col_fine_ptr,
    masses_ptr,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    width: tl.int32,
    blocks: tl.int32,
    chunks: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    unit_rows: tl.int32,
    n_iters: tl.int32,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, cols = program // chunks, (program % chunks).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    n_rows, r_total = sums(row_counts_ptr + b * blocks * 3, blocks, 3)
    n_cols, c_total = sums(col_counts_ptr + b * chunks * 2, chunks, 2)
    n_rows, n_cols = tl.maximum(n_rows, 1.0), tl.maximum(n_cols, 1.0)
    total = tl.where(has_row != 0, r_total, tl.where(has_col != 0, c_total, tl.where(unit_rows != 0, n_rows, n_cols)))
    first = program % chunks == 0
    tl.store(masses_ptr + b * 3, total / n_rows, mask=first)
    tl.store(masses_ptr + b * 3 + 1, total / n_cols, mask=first)
    tl.store(masses_ptr + b * 3 + 2, spacing_of(row_counts_ptr + b * blocks * 3, blocks), mask=first)
    used = (cols < width) & (tl.load(col_base_ptr + b * width + cols, mask=cols < width, other=0.0) != -float("inf"))
    given = tl.load(col_ptr + b * col_stride_b + cols.to(tl.int64) * col_stride_m, mask=used & (has_col != 0), other=1.0)
    c = tl.where(has_col != 0, given, total / n_cols)
    fine = tl.load(col_fine_ptr + b * width + cols, mask=used, other=0.0)
    tl.store(col_fine_ptr + b * width + cols, fine + log2(c), mask=used & (n_iters != 0))


@triton.jit
def sums(counts_ptr, parts, size):
    """Sums of the first and the second of ``size`` numbers that each of at most MAX_PARTS parts has left."""
    index = tl.arange(0, MAX_PARTS)
    first = tl.load(counts_ptr + size * index, mask=index < parts, other=0.0)
    second = tl.load(counts_ptr + size * index + 1, mask=index < parts, other=0.0)
    return tl.sum(first), tl.sum(second)


@triton.jit
def spacing_of(row_counts_ptr, blocks):
    """The spacing of a matrix's grid."""
    index = tl.arange(0, MAX_PARTS)
    return spacing(tl.max(tl.load(row_counts_ptr + 3 * index + 2, mask=index < blocks, other=0.0)))
