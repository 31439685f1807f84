"""Blocks of whole rows streamed past the column potentials: what every pass of the stream family shares.

Matrices beyond 256, rows contiguous in memory. Everything is in base 2, x a logit, k = 1 / temperature, and each
potential a base, that of the first sweep, and what has been added to it since, its fine part:

    y_ij = (k x_ij + (G_j + F_i)) + gamma_j + phi_i,   formed in this order everywhere,   P_ij = u_i 2^y_ij.

Bases lie on a grid, so that G_j + F_i is exact and logits of any size are rounded once, near 0 (``common/bases.py``; bases and
k are in its units). What remains is one and the same in all passes, a change of the logits; u, a row's factor of the last
sweep, takes the rounding of phi out of its sum. A sweep is one pass and one read of the matrix:

    u_i = r_i / sum_j 2^y_ij,    s_j = sum_i u_i 2^y_ij,    then phi_i += log2 u_i,  gamma_j += log2 (c_j / s_j).

A program holds a few rows in registers, so that the row sum is complete before the same entries are added to the column
sums; it walks ``lines`` rows, adds up in registers and leaves one partial sum per column. Another kernel adds the partial
sums of all programs, in one order: no atomics, the same bits in every run.

The first sweep is of the log domain: -G_j is max_i (k x_ij + f0_i) and -F_i is max_j (k x_ij + G_j) on the grid, and what they
differ by is in gamma and phi. From then on rows are exact before a column step and columns before a row step, so that a sum
lies within [1/b, 1] of its line's mass, b = total / min c or total / min r: 2^y can neither overflow nor, unless
(min r)(min c) < 2^-126 total^2, vanish, and no maximum is needed.

Excluded entries (-inf, as masked ones have become, or on a line of zero mass) have x = -inf, hence 2^y = 0. G is -inf on a
column without entries; a row without has F = phi = 0 and u = 1. A NaN or +inf in a used entry makes u NaN, and with it every
column sum. ``masses`` holds of each matrix r and c where they are uniform, and the spacing of its grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arithmetic import exp2
from ..common.bases import BITS, fused, on_grid

MAX_PARTS = tl.constexpr(256)


@triton.jit
def vector_pointers(ptr, cols):
    """Addresses of consecutive entries of a buffer whose lines start on 16 bytes."""
    return tl.max_contiguous(tl.multiple_of(ptr + cols, 16), cols.shape[0])


@triton.jit
def load_vector(ptr, cols, width, other):
    """Entries of a float32 buffer ``width`` long, a multiple of 128; ``other`` beyond it."""
    return tl.load(vector_pointers(ptr, cols), mask=tl.max_constancy(cols < width, 4), other=other)


@triton.jit
def store_vector(ptr, cols, width, values):
    """The mirror of :func:`load_vector`."""
    tl.store(vector_pointers(ptr, cols), values, mask=tl.max_constancy(cols < width, 4))


@triton.jit
def load_block(ptr, stride_n, rows, cols, end, m, other, ALIGNED: tl.constexpr):
    """Entries of whole rows before row ``end``, ``other`` beyond the matrix; the columns are adjacent in memory.

    ALIGNED: every row starts on 16 bytes and m fills vectors of as many.
    """
    pointers = ptr + rows[:, None].to(tl.int64) * stride_n + cols[None, :]
    within = (rows[:, None] < end) & (cols[None, :] < m)
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, cols.shape[0]))
        within = tl.max_constancy(within, (1, 128 // ptr.dtype.element_ty.primitive_bitwidth))
    return tl.load(pointers, mask=within, other=other)


@triton.jit
def row_masses(matrix, rows, end):
    """r_i of rows before ``end``, 0 elsewhere; where none is given that of every row that takes part."""
    row_ptr, row_stride, has_row, r_uniform = matrix[2:6]
    given = tl.load(row_ptr + rows.to(tl.int64) * row_stride, mask=(rows < end) & (has_row != 0), other=0.0)
    return tl.where(rows < end, tl.where(has_row != 0, given, r_uniform), 0.0)


@triton.jit
def load_logits(matrix, rows, cols, end, r, col_used, ALIGNED: tl.constexpr):
    """x of whole rows in float32, -inf where excluded; r: their masses."""
    x_ptr, stride_n, m = matrix[0], matrix[1], matrix[6]
    x = load_block(x_ptr, stride_n, rows, cols, end, m, -float("inf"), ALIGNED).to(tl.float32)
    return tl.where((r != 0)[:, None] & col_used[None, :], x, -float("inf"))


@triton.jit
def near(x, k, col_base, col_fine, row_base):
    """y but for phi; potentials spread over x."""
    return fused(fused(x, k, col_base + row_base), BITS, col_fine)


@triton.jit
def entries(x, k, col_base, col_fine, row_base, row_fine):
    """2^y of whole rows."""
    return exp2(near(x, k, col_base[None, :], col_fine[None, :], row_base[:, None]) + row_fine[:, None])


@triton.jit
def parted(potential, q):
    """A base on the grid, and the rest."""
    base = on_grid(potential, q)
    return base, (potential - base) * BITS


@triton.jit
def largest(parts_ptr, parts):
    """Maximum of at most MAX_PARTS numbers that are not negative; NaN if one is."""
    index = tl.arange(0, MAX_PARTS)
    values = tl.load(parts_ptr + index, mask=index < parts, other=0.0)
    return tl.where(tl.max((values != values).to(tl.int32)) != 0, float("nan"), tl.max(values))


@triton.jit
def finished(residuals_ptr, b, t, chunks, tol, has_tol, batch, sweeps_ptr, has_sweeps):
    """Whether matrix ``b`` makes no sweep ``t``: sweep t - 1 met ``tol``, or it is to stop earlier."""
    done = t > tl.load(sweeps_ptr + b, mask=has_sweeps != 0, other=2147483647)
    if has_tol != 0:
        done = done | (largest(residuals_ptr + (((t - 1) % 2) * batch + b) * chunks, chunks) <= tol)
    return (t > 1) & done
