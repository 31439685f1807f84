"""Sweeps: the pass that finishes a block's row potentials and adds the block to the next column sums, and the reduction.

Symbols and derivation in ``lines.py``. Sweep t reads gamma of slot t and phi, u of slot t - 1, and leaves phi, u in slot t;
the reduction adds the partial sums to s, notes the residual max_j |s_j / c_j - 1| of its columns in half t % 2 of ``residuals``
and leaves gamma in slot t + 1, which only a matrix that goes on will read. Slots are counted modulo ``slots``: two are enough
unless every sweep is to be kept.

A matrix whose residual met ``tol`` is skipped by all later programs; its residuals are handed on from half to half.

WIDE: a row is walked in chunks of BLOCK_M twice, the second time from L2, and the column sums are added up in memory.
"""

import triton
import triton.language as tl

from ..common.arithmetic import log2
from ..common.bases import fused, on_grid
from ..common.configuration import finite_jit
from ..common.line_sweeps import lifting
from .lines import entries, finished, load_logits, load_vector, near, row_masses, store_vector

CHUNK_BITS = tl.constexpr(8192)  # of a row that the first sweep's maxima are taken from at once


@finite_jit
def _sinkhorn_stream_sweep_fwd_kernel(
    logits_ptr,
    row_ptr,
    temperature_ptr,
    masses_ptr,
    col_base_ptr,
    col_fine_ptr,
    row_base_ptr,
    row_fine_ptr,
    row_factor_ptr,
    partial_ptr,
    residuals_ptr,
    sweeps_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    temperature_stride: tl.int64,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    width: tl.int32,
    lines: tl.int32,
    blocks: tl.int32,
    chunks: tl.int32,
    slots: tl.int32,
    t: tl.int32,
    has_row: tl.int32,
    has_temperature: tl.int32,
    has_sweeps: tl.int32,
    has_tol: tl.int32,
    inverse_temperature: tl.float64,
    tol: tl.float64,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, first = program // blocks, (program % blocks).to(tl.int32) * lines
    if finished(residuals_ptr, b, t, chunks, tol, has_tol, batch, sweeps_ptr, has_sweeps):
        return
    end = tl.minimum(first + lines, n)
    k = lifting(temperature_ptr + b * temperature_stride, has_temperature, inverse_temperature, tl.float32)
    matrix = (
        logits_ptr + b * stride_b,
        stride_n,
        row_ptr + b * row_stride_b,
        row_stride_n,
        has_row,
        tl.load(masses_ptr + 3 * b),
        m,
    )
    q_at = masses_ptr + 3 * b + 2
    base_at, fine_at = col_base_ptr + b * width, col_fine_ptr + ((t % slots) * batch + b) * width
    row_base_at = row_base_ptr + b * n
    old = (((t - 1) % slots) * batch + b) * n
    new = ((t % slots) * batch + b) * n
    partial_at = partial_ptr + program * width
    cols = tl.arange(0, BLOCK_M)
    if not WIDE:
        col_base = load_vector(base_at, cols, width, -float("inf"))
        col_fine = load_vector(fine_at, cols, width, 0.0)
        sums = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        r = row_masses(matrix, rows, end)
        base, fine = row_state(row_base_at, row_fine_ptr + old, row_factor_ptr + old, rows, end, t)
        if t == 1:
            FIRST: tl.constexpr = min(BLOCK_M, CHUNK_BITS // logits_ptr.dtype.element_ty.primitive_bitwidth)
            base, fine = first_state(matrix, k, rows, end, r, base_at, fine_at, width, q_at, FIRST, ALIGNED)
        if WIDE:
            total = tl.zeros([ROWS], tl.float32)
            for first_col in range(0, m, BLOCK_M):
                x, col_base, col_fine = load_chunk(matrix, rows, first_col + cols, end, r, base_at, fine_at, width, ALIGNED)
                total += tl.sum(entries(x, k, col_base, col_fine, base, fine), axis=1)
        else:
            x = load_logits(matrix, rows, cols, end, r, col_base != -float("inf"), ALIGNED)
            e = entries(x, k, col_base, col_fine, base, fine)
            total = tl.sum(e, axis=1)
        u = tl.where(total == 0, 1.0, r / total)
        if WIDE:
            for first_col in range(0, m, BLOCK_M):
                chunk = first_col + cols
                x, col_base, col_fine = load_chunk(matrix, rows, chunk, end, r, base_at, fine_at, width, ALIGNED)
                sums = tl.sum(entries(x, k, col_base, col_fine, base, fine) * u[:, None], axis=0)
                before = load_vector(partial_at, chunk, tl.where(start > first, width, 0), 0.0)
                store_vector(partial_at, chunk, width, before + sums)
        else:
            sums += tl.sum(e * u[:, None], axis=0)
        tl.store(row_base_at + rows, base, mask=(rows < end) & (t == 1))
        tl.store(row_fine_ptr + new + rows, fine, mask=rows < end)
        tl.store(row_factor_ptr + new + rows, u, mask=rows < end)
        if WIDE:
            tl.debug_barrier()
    if not WIDE:
        store_vector(partial_at, cols, width, sums)


@triton.jit
def row_state(base_ptr, fine_ptr, factor_ptr, rows, end, t):
    """F and phi that sweep t starts from; none before the first."""
    inside = (rows < end) & (t > 1)
    base = tl.load(base_ptr + rows, mask=inside, other=0.0)
    fine = tl.load(fine_ptr + rows, mask=inside, other=0.0)
    return base, fine + log2(tl.load(factor_ptr + rows, mask=inside, other=1.0))


@triton.jit
def first_state(matrix, k, rows, end, r, base_ptr, fine_ptr, width, q_ptr, BLOCK_M: tl.constexpr, ALIGNED: tl.constexpr):
    """F and phi of the first sweep, the row maxima taken out: rows in chunks, as there are no registers to keep them in."""
    m = matrix[6]
    cols = tl.arange(0, BLOCK_M)
    top = tl.full([rows.shape[0]], -float("inf"), tl.float32)
    for first_col in range(0, m, BLOCK_M):
        x, col_base, _ = load_chunk(matrix, rows, first_col + cols, end, r, base_ptr, fine_ptr, width, ALIGNED)
        top = tl.maximum(top, tl.max(fused(x, k, col_base[None, :]), axis=1))
    base = tl.where(top == -float("inf"), 0.0, -on_grid(top, tl.load(q_ptr)))
    top = tl.full([rows.shape[0]], -float("inf"), tl.float32)
    for first_col in range(0, m, BLOCK_M):
        x, col_base, col_fine = load_chunk(matrix, rows, first_col + cols, end, r, base_ptr, fine_ptr, width, ALIGNED)
        y = near(x, k, col_base[None, :], col_fine[None, :], base[:, None])
        top = tl.maximum(top, tl.max(y, axis=1))
    return base, tl.where(top == -float("inf"), 0.0, -top)


@triton.jit
def load_chunk(matrix, rows, cols, end, r, base_ptr, fine_ptr, width, ALIGNED: tl.constexpr):
    """x of a chunk of columns, their G and gamma."""
    col_base = load_vector(base_ptr, cols, width, -float("inf"))
    x = load_logits(matrix, rows, cols, end, r, col_base != -float("inf"), ALIGNED)
    return x, col_base, load_vector(fine_ptr, cols, width, 0.0)


@triton.jit
def column_sums(partial_ptr, b, cols, width, blocks, PARTS: tl.constexpr):
    """Sums over the ``blocks`` partial sums of matrix ``b``, in one order."""
    sums = tl.zeros([PARTS, cols.shape[0]], tl.float32)
    for start in range(0, blocks, PARTS):
        parts = start + tl.arange(0, PARTS)
        pointers = partial_ptr + (b * blocks + parts)[:, None] * width + cols[None, :]
        sums += tl.load(pointers, mask=(parts < blocks)[:, None] & (cols < width)[None, :], other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def column_masses(col_ptr, stride_m, has_col, masses_ptr, base, cols, width):
    """c_j, 0 on columns without entries, whose G ``base`` is -inf."""
    used = (cols < width) & (base != -float("inf"))
    given = tl.load(col_ptr + cols.to(tl.int64) * stride_m, mask=used & (has_col != 0), other=0.0)
    return tl.where(used, tl.where(has_col != 0, given, tl.load(masses_ptr + 1)), 0.0)


@finite_jit
def _sinkhorn_stream_reduce_fwd_kernel(
    partial_ptr,
    col_ptr,
    masses_ptr,
    col_base_ptr,
    col_fine_ptr,
    residuals_ptr,
    sweeps_ptr,
    done_ptr,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    batch: tl.int64,
    width: tl.int32,
    blocks: tl.int32,
    chunks: tl.int32,
    slots: tl.int32,
    t: tl.int32,
    n_iters: tl.int32,
    has_col: tl.int32,
    has_sweeps: tl.int32,
    has_tol: tl.int32,
    tol: tl.float64,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, chunk = program // chunks, (program % chunks).to(tl.int32)
    residual_at = residuals_ptr + ((t % 2) * batch + b) * chunks + chunk
    if finished(residuals_ptr, b, t, chunks, tol, has_tol, batch, sweeps_ptr, has_sweeps):
        tl.store(residual_at, tl.load(residuals_ptr + (((t - 1) % 2) * batch + b) * chunks + chunk))
        return
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = cols < width
    sums = column_sums(partial_ptr, b, cols, width, blocks, PARTS)
    base = tl.load(col_base_ptr + b * width + cols, mask=inside, other=-float("inf"))
    c = column_masses(col_ptr + b * col_stride_b, col_stride_m, has_col, masses_ptr + 3 * b, base, cols, width)
    ratio = tl.where(c == 0, 1.0, sums / c)
    broken = tl.max((inside & (sums != sums)).to(tl.int32))
    tl.store(residual_at, tl.where(broken != 0, float("nan"), tl.max(tl.abs(ratio - 1.0))))
    fine = tl.load(col_fine_ptr + ((t % slots) * batch + b) * width + cols, mask=inside, other=0.0)
    new = fine - tl.where(ratio == 0, 0.0, log2(ratio))
    tl.store(col_fine_ptr + (((t + 1) % slots) * batch + b) * width + cols, new, mask=inside & (t < n_iters))
    tl.store(done_ptr + b, tl.minimum(t, n_iters), mask=chunk == 0)
