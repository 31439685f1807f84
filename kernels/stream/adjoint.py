"""The sweeps' adjoint: passes that read the matrix once each, and their reduction. Symbols of ``lines.py``; D = dP.

With A_t = exp(S + f_t + g_t) and B_t = exp(S + f_(t-1) + g_t), T sweeps done, e_t = df_t / r and beta_t = dg_t / c,

    df_T = rowsum(P D),           dg_T = colsum(P (D - e_T)),
    df_(t-1) = -B_t beta_t,       dg_(t-1) = -A_(t-1)^T e_(t-1) = -2^(gamma_(t-1) - gamma_t) B_t^T e_(t-1),    t = T .. 1.

Each line is one pass: the row sum of a block is complete before the same entries, in registers, are added to the column sums.
There is no A_0. The first line reads D beside the logits (COTANGENT), for every matrix at its own T; then sweep t of all
matrices that made it, F_0 + phi_0 being the potential that they started from.

WIDE: a row is walked in chunks of BLOCK_M twice, the second time from L2, and the column sums are added up in memory.
"""

import triton
import triton.language as tl

from ..common.arithmetic import exp2
from ..common.configuration import finite_jit
from ..common.line_sweeps import lifting
from .lines import entries, load_block, load_logits, load_vector, parted, row_masses, store_vector
from .sweep import column_masses, column_sums


@finite_jit
def _sinkhorn_stream_adjoint_bwd_kernel(
    logits_ptr,
    grad_plan_ptr,
    row_ptr,
    temperature_ptr,
    masses_ptr,
    col_base_ptr,
    col_fine_ptr,
    row_base_ptr,
    row_fine_ptr,
    row_factor_ptr,
    start_ptr,
    beta_ptr,
    e_ptr,
    partial_ptr,
    done_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    grad_plan_stride_b: tl.int64,
    grad_plan_stride_n: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    temperature_stride: tl.int64,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    width: tl.int32,
    lines: tl.int32,
    blocks: tl.int32,
    t: tl.int32,
    has_row: tl.int32,
    has_temperature: tl.int32,
    inverse_temperature: tl.float64,
    COTANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, first = program // blocks, (program % blocks).to(tl.int32) * lines
    done = tl.load(done_ptr + b)
    if t > done:
        return
    col_slot = tl.where(t == 0, tl.maximum(done, 1), t)
    row_slot = tl.where(t == 0, col_slot, t - 1)
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
    q = tl.load(masses_ptr + 3 * b + 2)
    cotangent = (grad_plan_ptr + b * grad_plan_stride_b, grad_plan_stride_n, m)
    col_at = (col_slot * batch + b) * width
    columns = (col_base_ptr + b * width, col_fine_ptr + col_at, beta_ptr + col_at, width)
    row_at = (row_slot * batch + b) * n
    partial_at = partial_ptr + program * width
    cols = tl.arange(0, BLOCK_M)
    if not WIDE:
        col_base, col_fine, beta = load_columns(columns, cols, COTANGENT)
        sums = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        r = row_masses(matrix, rows, end)
        base = tl.load(tl.where(row_slot == 0, start_ptr, row_base_ptr) + b * n + rows, mask=inside, other=0.0)
        base, fine = parted(base, q)
        fine += tl.load(row_fine_ptr + row_at + rows, mask=inside & (row_slot > 0), other=0.0)
        u = tl.load(row_factor_ptr + row_at + rows, mask=inside & (row_slot > 0), other=1.0)
        if WIDE:
            total = tl.zeros([ROWS], tl.float32)
            for first_col in range(0, m, BLOCK_M):
                chunk = first_col + cols
                col_base, col_fine, beta = load_columns(columns, chunk, COTANGENT)
                p, d = products(
                    matrix, cotangent, k, rows, chunk, end, r, col_base, col_fine, base, fine, beta, COTANGENT, ALIGNED
                )
                total += tl.sum(d, axis=1)
        else:
            p, d = products(matrix, cotangent, k, rows, cols, end, r, col_base, col_fine, base, fine, beta, COTANGENT, ALIGNED)
            total = tl.sum(d, axis=1)
        e = tl.where(r == 0, 0.0, u * total / r)
        if not COTANGENT:
            e = -e
        if WIDE:
            for first_col in range(0, m, BLOCK_M):
                chunk = first_col + cols
                col_base, col_fine, beta = load_columns(columns, chunk, COTANGENT)
                p, d = products(
                    matrix, cotangent, k, rows, chunk, end, r, col_base, col_fine, base, fine, beta, COTANGENT, ALIGNED
                )
                before = load_vector(partial_at, chunk, tl.where(start > first, width, 0), 0.0)
                store_vector(partial_at, chunk, width, before + share(p, d, u, e, COTANGENT))
            tl.debug_barrier()
        else:
            sums += share(p, d, u, e, COTANGENT)
        tl.store(e_ptr + row_at + rows, e, mask=inside)
    if not WIDE:
        store_vector(partial_at, cols, width, sums)


@triton.jit
def load_columns(columns, cols, COTANGENT: tl.constexpr):
    """G, gamma and beta of some columns; with the cotangent there is no beta yet."""
    base_ptr, fine_ptr, beta_ptr, width = columns
    base = load_vector(base_ptr, cols, width, -float("inf"))
    fine = load_vector(fine_ptr, cols, width, 0.0)
    beta = fine
    if not COTANGENT:
        beta = load_vector(beta_ptr, cols, width, 0.0)
    return base, fine, beta


@triton.jit
def products(
    matrix,
    cotangent,
    k,
    rows,
    cols,
    end,
    r,
    col_base,
    col_fine,
    base,
    fine,
    beta,
    COTANGENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """2^y of some rows, and the same times D or beta."""
    x = load_logits(matrix, rows, cols, end, r, col_base != -float("inf"), ALIGNED)
    p = entries(x, k, col_base, col_fine, base, fine)
    if COTANGENT:
        grad_ptr, stride_n, m = cotangent
        grad = load_block(grad_ptr, stride_n, rows, cols, end, m, 0.0, ALIGNED).to(tl.float32)
        weight = tl.where(x == -float("inf"), 0.0, grad)
    else:
        weight = tl.broadcast_to(beta[None, :], p.shape)
    return p, p * weight


@triton.jit
def share(p, d, u, e, COTANGENT: tl.constexpr):
    """What some rows add to the column sums."""
    if COTANGENT:
        terms = (d - p * e[:, None]) * u[:, None]
    else:
        terms = p * (u * e)[:, None]
    return tl.sum(terms, axis=0)


@finite_jit
def _sinkhorn_stream_reduce_bwd_kernel(
    partial_ptr,
    col_ptr,
    masses_ptr,
    col_base_ptr,
    col_fine_ptr,
    beta_ptr,
    done_ptr,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    batch: tl.int64,
    width: tl.int32,
    blocks: tl.int32,
    chunks: tl.int32,
    t: tl.int32,
    has_col: tl.int32,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b, cols = program // chunks, (program % chunks).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    done = tl.load(done_ptr + b)
    if t > done:
        return
    inside = cols < width
    sums = column_sums(partial_ptr, b, cols, width, blocks, PARTS)
    slot = tl.where(t == 0, tl.maximum(done, 1), t - 1)
    if t > 0:
        before = tl.load(col_fine_ptr + (slot * batch + b) * width + cols, mask=inside, other=0.0)
        after = tl.load(col_fine_ptr + (t * batch + b) * width + cols, mask=inside, other=0.0)
        sums *= -exp2(before - after)
    base = tl.load(col_base_ptr + b * width + cols, mask=inside, other=-float("inf"))
    c = column_masses(col_ptr + b * col_stride_b, col_stride_m, has_col, masses_ptr + 3 * b, base, cols, width)
    tl.store(beta_ptr + (slot * batch + b) * width + cols, tl.where(c == 0, 0.0, sums / c), mask=inside)
