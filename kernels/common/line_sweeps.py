"""Sweeps over row panels: what the forward and the backward of the panel family share.

One program owns one matrix, n rows and m columns, m padded to BLOCK_M in code. The matrix is too large for registers, so
it is re-read (from L1 or L2) in panels of BLOCK_N rows. Vectors over columns live in registers, vectors over rows
in memory. A panel is a (BLOCK_M / CHUNK, BLOCK_N, CHUNK) tile and a column vector a (BLOCK_M / CHUNK, CHUNK) one, a CHUNK
being what one warp loads at once: whole rows then belong to one warp, and row sums need no shared memory.
Everything is in base 2: x = logits entry, lifted, k = BITS, f and g the potentials times log2(e), less the bases.

Logits are lifted first (``bases.py``): with k' = 1 / temperature in UNIT, two passes find t_j = max_i (k' x_ij + f0_i) and
T_i = max_j (k' x_ij - t_j), -G and -F are these on the grid, and x is k' x_ij + (G_j + F_i) from then on, rounded once. f
starts at f0 - F.

    K_ij = 2^(k x_ij + f_i + g_j),      P_ij = u_i K_ij v_j.

A segment begins with a log sweep, in two passes,
    columns:  g_j = log2 c_j - max_j - log2 sum_i 2^(k x_ij + f_i - max_j), a running maximum for each entry of the panel;
    rows:     f_i = log2 r_i - max_i - log2 sum_j 2^(k x_ij + g_j - max_i), v = 1, u_i = r_i / sum_j K_ij,
where u, 1 but for rounding, takes the rounding of f out of the row sums: |f| may be in the hundreds. It goes on with
scaling sweeps, one pass and one exponential each, which leave the column sums that the next one needs:
    v_j = c_j / s_j;    u_i = r_i / sum_j K_ij v_j;    s_j = sum_i K_ij u_i.
It ends by f += log2 u, g += log2 v. Each scaling sweep multiplies u and v by factors within [1/b, b], b = max(n, m) for
uniform marginals and b = max(total / min r, total / min c, 2) otherwise, so after floor(45 / log2 b) of them (one less
when not uniform; none where that is negative) the entries that underflow had to be dropped are below 2^-36.

Excluded entries (masked, -inf, or on a line of zero marginal) have x = -inf, hence K = 0. A sum of zero marks an excluded
line; its potential is 0 and its factor 1. A NaN or +inf in a used entry makes the row's f NaN, and with it the column
sums s: NaN there is what tells that the matrix is to be NaN.

Row vectors written in one pass are read in another by other threads: every pass ends with a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp2, log2, narrow, quotient
from .bases import BITS, UNIT, fused, on_grid, spacing
from .memory import load_entries, store_entries

MAX_ROWS = tl.constexpr(256)


@triton.jit
def lifting(temperature_ptr, has_temperature, inverse_temperature, dtype: tl.constexpr):
    """1 / temperature as (1,) in ``dtype``, in UNIT: of the one in memory, or the one given."""
    k = tl.full([1], inverse_temperature, tl.float64).to(dtype)
    if has_temperature != 0:
        k = quotient(tl.full([1], 1.0, dtype), tl.load(temperature_ptr + tl.arange(0, 1)))
    return k * (1.0 / UNIT)


@triton.jit
def row_sum(tile):
    """(BLOCK_N,) sums over the columns of a panel."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def row_max(tile):
    """(BLOCK_N,) maxima over the columns of a panel."""
    return tl.max(tl.max(tile, axis=0), axis=1)


@triton.jit
def column_indices(BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """0 .. BLOCK_M - 1 as a column vector."""
    return tl.arange(0, BLOCK_M // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def tile_pointers(ptr, rows, cols, stride_n, stride_m, ALIGNED: tl.constexpr):
    """Addresses of a panel; under ALIGNED the columns are adjacent and every row starts on 16 bytes."""
    offsets = rows[None, :, None].to(tl.int64) * stride_n
    if ALIGNED:
        pointers = tl.multiple_of(ptr + offsets + cols[:, None, :], (1, 1, 16))
        return tl.max_contiguous(pointers, (1, 1, cols.shape[1]))
    else:
        return ptr + offsets + cols[:, None, :].to(tl.int64) * stride_m


@triton.jit
def inside(ptr, rows, cols, n, m, ALIGNED: tl.constexpr):
    """Entries of a panel within the matrix; under ALIGNED m fills vectors of 16 bytes."""
    within = (rows[None, :, None] < n) & (cols[:, None, :] < m)
    if ALIGNED:
        within = tl.max_constancy(within, (1, 1, 128 // ptr.dtype.element_ty.primitive_bitwidth))
    return within


@triton.jit
def load_tile(ptr, rows, cols, n, m, stride_n, stride_m, other, ALIGNED: tl.constexpr):
    """Entries of a panel, ``other`` beyond the matrix. What is ALIGNED tells by itself along which axis lanes run."""
    pointers, within = tile_pointers(ptr, rows, cols, stride_n, stride_m, ALIGNED), inside(ptr, rows, cols, n, m, ALIGNED)
    if ALIGNED:
        return tl.load(pointers, mask=within, other=other)
    else:
        return load_entries(pointers, within, other)


@triton.jit
def store_tile(ptr, rows, cols, n, m, stride_n, stride_m, values, ALIGNED: tl.constexpr):
    """The mirror of :func:`load_tile`; rounds to the element type."""
    pointers, within = tile_pointers(ptr, rows, cols, stride_n, stride_m, ALIGNED), inside(ptr, rows, cols, n, m, ALIGNED)
    values = narrow(values, ptr.dtype.element_ty)
    if ALIGNED:
        tl.store(pointers, values, mask=within)
    else:
        store_entries(pointers, values, within)


@triton.jit
def load_logits(matrix, rows, cols, col_used, ALIGNED: tl.constexpr):
    """Logits of a panel in the dtype of k, -inf where excluded, and the given row marginal, 1 where none is given."""
    x_ptr, stride_n, stride_m, mask_ptr, mask_stride_n, mask_stride_m, has_mask, row_ptr, stride_row = matrix[0:9]
    has_row, n, m, k = matrix[9:13]
    x = load_tile(x_ptr, rows, cols, n, m, stride_n, stride_m, -float("inf"), ALIGNED)
    r = tl.load(row_ptr + rows.to(tl.int64) * stride_row, mask=(rows < n) & (has_row != 0), other=1.0)
    used = (r != 0)[None, :, None] & col_used[:, None, :]
    if has_mask != 0:
        kept = load_tile(mask_ptr, rows, cols, n, m, mask_stride_n, mask_stride_m, 0, False)
        used = used & (kept != 0)
    return tl.where(used, x.to(k.dtype), -float("inf")), r


@triton.jit
def load_panel(matrix, rows, cols, col_used, ALIGNED: tl.constexpr):
    """x of a panel, lifted, -inf where excluded, and the given row marginal, 1 where none is given."""
    logits, r = load_logits(matrix, rows, cols, col_used, ALIGNED)
    n, scale, col_base, base_ptr = matrix[10], matrix[13], matrix[14], matrix[15]
    row_base = tl.load(base_ptr + rows, mask=rows < n, other=0.0)
    return fused(logits, scale, col_base[:, None, :] + row_base[None, :, None]), r


@triton.jit
def lifted(matrix, scale, cols, col_used, n_iters, f_ptr, base_ptr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """``matrix`` with the bases that its logits are lifted by: writes those of rows, and takes them from f."""
    n, k = matrix[10], matrix[12]
    top = tl.full([cols.shape[0], BLOCK_N, cols.shape[1]], -float("inf"), k.dtype)
    size = tl.zeros_like(top)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x, _ = load_logits(matrix, rows, cols, col_used, ALIGNED)
        size = tl.maximum(size, tl.where(x == -float("inf"), 0.0, tl.abs(x)))
        f = tl.load(f_ptr + rows, mask=rows < n, other=0.0) * (1.0 / BITS)
        top = tl.maximum(top, fused(x, scale, f[None, :, None]))
    col_top = tl.max(top, axis=1)
    col_top = tl.where((col_top == -float("inf")) | (n_iters == 0), 0.0, col_top)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x, _ = load_logits(matrix, rows, cols, col_used, ALIGNED)
        row_top = row_max(fused(x, scale, -col_top[:, None, :]))
        row_top = tl.where(row_top == -float("inf"), 0.0, row_top)
        tl.store(base_ptr + rows, row_top, mask=rows < n)
    tl.debug_barrier()
    q = spacing(tl.max(tl.max(tl.max(size, axis=2), axis=1), axis=0) * tl.max(scale))
    lines = tl.arange(0, MAX_ROWS)
    row_base = -on_grid(tl.load(base_ptr + lines, mask=lines < n, other=0.0), q)
    f = tl.load(f_ptr + lines, mask=lines < n, other=0.0)
    tl.debug_barrier()
    tl.store(base_ptr + lines, row_base, mask=lines < n)
    tl.store(f_ptr + lines, f - row_base * BITS, mask=lines < n)
    tl.debug_barrier()
    return matrix + (scale, -on_grid(col_top, q), base_ptr)


@triton.jit
def load_col_marginal(col_ptr, stride_col, has_col, m, cols):
    """The given column marginal, 1 where none is given, and the columns that it does not exclude."""
    c = load_entries(col_ptr + cols.to(tl.int64) * stride_col, (cols < m) & (has_col != 0), 1.0)
    return c, (cols < m) & (c != 0)


@triton.jit
def scaled_kernel(x, k, f, g):
    """K of a panel. After a column step from f = 0, k x_ij + g_j is small wherever K matters: add g first, f last."""
    return exp2(tl.fma(x, k, tl.broadcast_to(g[:, None, :], x.shape)) + f[None, :, None])


@triton.jit
def log_columns(matrix, cols, col_used, f_ptr, u_ptr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """First pass of a log sweep: largest exponent k x_ij + f_i + log2 u_i of each column, and the sum beside it.

    The sum is 0 in excluded columns. Also of the rows with a used entry: number, total and least of the given marginals.
    """
    n, k = matrix[10], matrix[12]
    top = tl.full([cols.shape[0], BLOCK_N, cols.shape[1]], -3.0e38, k.dtype)
    total = tl.zeros_like(top)
    n_rows = tl.zeros([BLOCK_N], tl.int32)
    r_total = tl.zeros([BLOCK_N], k.dtype)
    r_min = tl.full([BLOCK_N], float("inf"), k.dtype)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
        f = tl.load(f_ptr + rows, mask=rows < n, other=0.0) + log2(tl.load(u_ptr + rows, mask=rows < n, other=1.0))
        used = x != -float("inf")
        exponent = tl.where(used, tl.fma(x, k, tl.broadcast_to(f[None, :, None], x.shape)), -float("inf"))
        new_top = tl.maximum(top, exponent)
        below = tl.fma(x, k, f[None, :, None] - new_top)  # large f may round above 0 what is far below other rows
        term = tl.where(used, exp2(tl.where(below > 0, 0.0, below)), 0.0)
        total = total * exp2(top - new_top) + term
        top = new_top
        row_used = row_max(used.to(tl.int32))
        n_rows += row_used
        r_total += tl.where(row_used != 0, r, 0.0)
        r_min = tl.minimum(r_min, tl.where(row_used != 0, r, float("inf")))
    col_top = tl.max(top, axis=1)
    col_total = tl.sum(total * exp2(top - col_top[:, None, :]), axis=1)
    return col_top, col_total, tl.sum(n_rows), tl.sum(r_total), tl.min(r_min)


@triton.jit
def log_rows(
    matrix,
    cols,
    col_used,
    g,
    r_uniform,
    f_ptr,
    u_ptr,
    new_f_ptr,
    new_u_ptr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """Second pass of a log sweep: writes f and u, returns s.

    HISTORY: what ``u_ptr`` and ``f_ptr`` held before the sweep becomes, at ``u_ptr``, the u that goes with the new f.
    """
    has_row, n, k = matrix[9], matrix[10], matrix[12]
    partial = tl.zeros([cols.shape[0], BLOCK_N, cols.shape[1]], k.dtype)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
        r = tl.where(has_row != 0, r, r_uniform)
        exponent = tl.fma(x, k, tl.broadcast_to(g[:, None, :], x.shape))
        top = row_max(exponent)
        top = tl.where(top == -float("inf"), 0.0, top)
        total = row_sum(exp2(exponent - top[None, :, None]))
        f = tl.where(total == 0, 0.0, log2(r) - top - log2(total))
        kernel = scaled_kernel(x, k, f, g)
        total = row_sum(kernel)
        u = tl.where(total == 0, 1.0, r / total)
        partial += kernel * u[None, :, None]
        if HISTORY:
            old_f = tl.load(f_ptr + rows, mask=rows < n, other=0.0)
            old_u = tl.load(u_ptr + rows, mask=rows < n, other=0.0)
            tl.debug_barrier()
            tl.store(u_ptr + rows, tl.where(total == 0, 0.0, old_u * exp2(old_f - f)), mask=rows < n)
        tl.store(new_f_ptr + rows, f, mask=rows < n)
        tl.store(new_u_ptr + rows, u, mask=rows < n)
    return tl.sum(partial, axis=1)


@triton.jit
def scale_rows(matrix, cols, col_used, g, v, r_uniform, f_ptr, u_ptr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """The pass of a scaling sweep whose v is known: writes u, returns s."""
    has_row, n, k = matrix[9], matrix[10], matrix[12]
    partial = tl.zeros([cols.shape[0], BLOCK_N, cols.shape[1]], k.dtype)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
        kernel = scaled_kernel(x, k, tl.load(f_ptr + rows, mask=rows < n, other=0.0), g)
        total = row_sum(kernel * v[:, None, :])
        u = tl.where(total == 0, 1.0, tl.where(has_row != 0, r, r_uniform) / total)
        partial += kernel * u[None, :, None]
        tl.store(u_ptr + rows, u, mask=rows < n)
    return tl.sum(partial, axis=1)


@triton.jit
def marginals(given_c, has_col, has_row, unit_rows, col_valid, n_rows, r_total, r_min, uniform_period):
    """c, the row marginal where none is given, and the sweeps from one log sweep to the next."""
    n_rows = tl.maximum(n_rows, 1).to(given_c.dtype)
    n_cols = tl.maximum(tl.sum(col_valid.to(tl.int32)), 1).to(given_c.dtype)
    c_total = tl.sum(tl.where(col_valid, given_c, 0.0))
    total = tl.where(has_row != 0, r_total, tl.where(has_col != 0, c_total, tl.where(unit_rows != 0, n_rows, n_cols)))
    r_uniform = total / n_rows
    c = tl.where(col_valid, tl.where(has_col != 0, given_c, total / n_cols), 0.0)
    c_min = tl.min(tl.where(col_valid, c, float("inf")))
    bound = tl.maximum(total / tl.minimum(tl.where(has_row != 0, r_min, r_uniform), c_min), 2.0)
    scalings = tl.maximum(tl.floor(45.0 / log2(bound)) - 1.0, 0.0).to(tl.int32)
    return c, r_uniform, tl.where((has_row != 0) | (has_col != 0), scalings + 1, uniform_period)


@triton.jit
def log_sweep(
    matrix,
    cols,
    col_used,
    given_c,
    has_col,
    unit_rows,
    uniform_period,
    n_iters,
    f_ptr,
    u_ptr,
    new_f_ptr,
    new_u_ptr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """A log sweep from f + log2 u at ``f_ptr`` and ``u_ptr``; with ``n_iters`` 0 only its row step, at g = 0.

    Returns g, s and what :func:`marginals` gives, which is the same in every log sweep.
    """
    top, total, n_rows, r_total, r_min = log_columns(matrix, cols, col_used, f_ptr, u_ptr, BLOCK_N, ALIGNED)
    tl.debug_barrier()
    valid = total != 0
    c, r_uniform, period = marginals(given_c, has_col, matrix[9], unit_rows, valid, n_rows, r_total, r_min, uniform_period)
    g = tl.where(valid & (n_iters != 0), log2(c) - top - log2(total), 0.0)
    s = log_rows(matrix, cols, col_used, g, r_uniform, f_ptr, u_ptr, new_f_ptr, new_u_ptr, BLOCK_N, ALIGNED, HISTORY)
    tl.debug_barrier()
    return g, s, c, r_uniform, period


@triton.jit
def scaling_sweep(matrix, cols, col_used, g, s, c, r_uniform, f_ptr, u_ptr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """A scaling sweep from the column sums s = K^T u: writes u, returns v and the new s."""
    v = tl.where(s == 0, 1.0, c / s)
    s = scale_rows(matrix, cols, col_used, g, v, r_uniform, f_ptr, u_ptr, BLOCK_N, ALIGNED)
    tl.debug_barrier()
    return v, s
