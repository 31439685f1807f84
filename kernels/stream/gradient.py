"""The gradient of the logits in one pass, from the vectors that ``adjoint.py`` left; symbols there and in ``lines.py``.

    dS = P (D - e_T) - sum_(t=1..T) B_t beta_t - sum_(t=1..T-1) A_t e_t,    D the cotangent of P.

Every B_t and A_t is E = exp(S + f_s + g_s) of one sweep s times a rank-one matrix, so that the sums over a segment of REACH
sweeps from s on cost one exponential per entry and a product of factors that stay within float32:

    E * sum_t 2^(phi_t - phi_s) (2^(gamma_(t+1) - gamma_s) beta_(t+1) + 2^(gamma_t - gamma_s) e_t),    t = s .. s + reach - 1.

B_1, which starts from arbitrary potentials, is a segment of its own. A factor lies within b^reach: reach is floor(45 / log2 b),
b = max(n, m), for uniform marginals, and 1 otherwise. Then dlogits = dS / temperature, and of the lines

    dlog r = r sum_(t=1..T) e_t,    dlog c = c sum_(t=1..T) beta_t,    df0 = r e_0.
"""

import triton.language as tl

from ..common.arithmetic import exp2
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from ..common.line_sweeps import lifting
from .apply import across, down, load_tile, load_used, place, store_tile, tile_entries
from .lines import largest, parted
from .sweep import column_masses


@finite_jit
def _sinkhorn_stream_gradient_bwd_kernel(
    logits_ptr,
    grad_plan_ptr,
    row_ptr,
    col_ptr,
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
    residuals_ptr,
    done_ptr,
    grad_logits_ptr,
    grad_f0_ptr,
    grad_row_ptr,
    grad_col_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_m: tl.int64,
    grad_plan_stride_b: tl.int64,
    grad_plan_stride_n: tl.int64,
    grad_plan_stride_m: tl.int64,
    grad_logits_stride_b: tl.int64,
    grad_logits_stride_n: tl.int64,
    grad_logits_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    temperature_stride: tl.int64,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    width: tl.int32,
    chunks: tl.int32,
    steps: tl.int32,
    reach: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_temperature: tl.int32,
    has_vectors: tl.int32,
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
    sweeps = tl.load(done_ptr + b)
    last = tl.maximum(sweeps, 1)
    k = lifting(temperature_ptr + b * temperature_stride, has_temperature, inverse_temperature, tl.float32)
    r_at = row_ptr + b * row_stride_b + rows.to(tl.int64) * row_stride_n
    given = tl.load(r_at, mask=in_rows & (has_row != 0), other=0.0)
    r = tl.where(has_row != 0, given, tl.load(masses_ptr + 3 * b))
    col_base = tl.load(col_base_ptr + b * width + cols, mask=in_cols, other=-float("inf"))
    row_base = tl.load(row_base_ptr + b * n + rows, mask=in_rows, other=0.0)
    residual = largest(residuals_ptr + ((steps % 2) * batch + b) * chunks, chunks)
    poison = tl.where(residual != residual, float("nan"), 0.0)
    # Vectors of sweep t of this matrix lie t strides further on.
    of_rows, of_cols = b * n + rows, b * width + cols
    step_n, step_m = batch * n, batch * width

    x_at = logits_ptr + b * stride_b
    x = load_used(x_at, rows, cols, r, col_base, n, m, stride_n, stride_m, ALIGNED, TRANSPOSED)
    grad_at = grad_plan_ptr + b * grad_plan_stride_b
    grad = load_tile(grad_at, rows, cols, n, m, grad_plan_stride_n, grad_plan_stride_m, 0.0, ALIGNED, TRANSPOSED)
    grad = tl.where(x == -float("inf"), 0.0, grad.to(tl.float32))
    col_fine = tl.load(col_fine_ptr + last * step_m + of_cols, mask=in_cols, other=0.0)
    row_fine = tl.load(row_fine_ptr + last * step_n + of_rows, mask=in_rows, other=0.0)
    u = tl.load(row_factor_ptr + last * step_n + of_rows, mask=in_rows, other=1.0)
    e = tl.load(e_ptr + last * step_n + of_rows, mask=in_rows, other=0.0)
    plan = tile_entries(x, k, col_base, col_fine, row_base, row_fine, TRANSPOSED) * down(u, TRANSPOSED)
    grad = plan * (grad - down(e, TRANSPOSED))
    if sweeps > 0:
        col_fine = tl.load(col_fine_ptr + step_m + of_cols, mask=in_cols, other=0.0)
        beta = tl.load(beta_ptr + step_m + of_cols, mask=in_cols, other=0.0)
        base, fine = parted(tl.load(start_ptr + of_rows, mask=in_rows, other=0.0), tl.load(masses_ptr + 3 * b + 2))
        grad -= tile_entries(x, k, col_base, col_fine, base, fine, TRANSPOSED) * across(beta, TRANSPOSED)
    for s in range(1, sweeps, reach):
        # phi_t is what sweep t + 1 started from.
        row_fine = tl.load(row_fine_ptr + (s + 1) * step_n + of_rows, mask=in_rows, other=0.0)
        col_fine = tl.load(col_fine_ptr + s * step_m + of_cols, mask=in_cols, other=0.0)
        weight = tl.zeros_like(x)
        q = tl.full(cols.shape, 1.0, tl.float32)
        for t in range(s, tl.minimum(s + reach, sweeps)):
            p = exp2(tl.load(row_fine_ptr + (t + 1) * step_n + of_rows, mask=in_rows, other=0.0) - row_fine)
            e = tl.load(e_ptr + t * step_n + of_rows, mask=in_rows, other=0.0)
            next_q = exp2(tl.load(col_fine_ptr + (t + 1) * step_m + of_cols, mask=in_cols, other=0.0) - col_fine)
            beta = tl.load(beta_ptr + (t + 1) * step_m + of_cols, mask=in_cols, other=0.0) * next_q
            terms = across(beta, TRANSPOSED) + down(e, TRANSPOSED) * across(q, TRANSPOSED)
            weight += down(p, TRANSPOSED) * terms
            q = next_q
        grad -= tile_entries(x, k, col_base, col_fine, row_base, row_fine, TRANSPOSED) * weight
    grad = grad * (k * UNIT) + poison
    target_at = grad_logits_ptr + b * grad_logits_stride_b
    store_tile(target_at, rows, cols, n, m, grad_logits_stride_n, grad_logits_stride_m, grad, ALIGNED, TRANSPOSED)
    if has_vectors != 0:
        if first_col == 0:
            total = tl.zeros_like(r)
            for t in range(1, last + 1):
                total += tl.load(e_ptr + t * step_n + of_rows, mask=in_rows, other=0.0)
            e = tl.load(e_ptr + of_rows, mask=in_rows & (sweeps > 0), other=0.0)
            tl.store(grad_row_ptr + of_rows, r * total + poison, mask=in_rows)
            tl.store(grad_f0_ptr + of_rows, r * e + poison, mask=in_rows)
        if first_row == 0:
            total = tl.zeros_like(col_base)
            for t in range(1, sweeps + 1):
                total += tl.load(beta_ptr + t * step_m + of_cols, mask=in_cols, other=0.0)
            c = column_masses(col_ptr + b * col_stride_b, col_stride_m, has_col, masses_ptr + 3 * b, col_base, cols, width)
            tl.store(grad_col_ptr + b * m + cols, c * total + poison, mask=in_cols)
