"""Sinkhorn of one matrix per program, re-read in row panels; symbols and derivation in ``common/line_sweeps.py``.

    residual = max_j |v_j s_j / c_j - 1|    from the column sums s that the last sweep left,
    P_ij = u_i K_ij v_j,    f + log2 u,    g + log2 v    in a final pass.

work_ptr holds f, u and the bases of rows of each matrix, 3 n values. With WITH_SIGMA2 the final pass leaves f + log2 u and r in
the first two, from which ``lanczos`` recomputes the plan's entries.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, log2
from ..common.bases import BITS, UNIT
from ..common.configuration import finite_jit
from ..common.line_sweeps import (
    MAX_ROWS,
    column_indices,
    lifted,
    lifting,
    load_col_marginal,
    load_panel,
    log_sweep,
    row_sum,
    scaled_kernel,
    scaling_sweep,
    store_tile,
)
from ..spectrum.lanczos import lanczos_sigma2


@finite_jit
def _sinkhorn_panel_fwd_kernel(
    logits_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    f0_ptr,
    temperature_ptr,
    work_ptr,
    plan_ptr,
    residual_ptr,
    sweeps_ptr,
    f_ptr,
    g_ptr,
    sigma2_ptr,
    stride_b: tl.int64,
    stride_n: tl.int64,
    stride_m: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_n: tl.int64,
    mask_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    f0_stride_b: tl.int64,
    f0_stride_n: tl.int64,
    temperature_stride: tl.int64,
    plan_stride_b: tl.int64,
    plan_stride_n: tl.int64,
    plan_stride_m: tl.int64,
    n: tl.int32,
    m: tl.int32,
    n_iters: tl.int32,
    uniform_period: tl.int32,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_f0: tl.int32,
    has_temperature: tl.int32,
    unit_rows: tl.int32,
    has_info: tl.int32,
    inverse_temperature: tl.float64,
    tol: tl.float64,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_SIGMA2: tl.constexpr,
    LANCZOS_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    scale = lifting(temperature_ptr + b * temperature_stride, has_temperature, inverse_temperature, work_ptr.dtype.element_ty)
    k = tl.zeros_like(scale) + BITS
    matrix = (
        logits_ptr + b * stride_b,
        stride_n,
        stride_m,
        mask_ptr + b * mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        has_mask,
        row_ptr + b * row_stride_b,
        row_stride_n,
        has_row,
        n,
        m,
        k,
    )
    cols = column_indices(BLOCK_M, CHUNK)
    given_c, col_used = load_col_marginal(col_ptr + b * col_stride_b, col_stride_m, has_col, m, cols)
    f_at = work_ptr + b * 3 * n
    u_ptr = f_at + n
    base_ptr = f_at + 2 * n
    lines = tl.arange(0, MAX_ROWS)
    f0 = tl.load(f0_ptr + b * f0_stride_b + lines * f0_stride_n, mask=(lines < n) & (has_f0 != 0), other=0.0)
    tl.store(f_at + lines, f0 / LN_2, mask=lines < n)
    tl.store(u_ptr + lines, tl.full([MAX_ROWS], 1.0, k.dtype), mask=lines < n)
    tl.debug_barrier()
    matrix = lifted(matrix, scale, cols, col_used, n_iters, f_at, base_ptr, BLOCK_N, ALIGNED)
    col_base = matrix[14]

    g = tl.zeros([BLOCK_M // CHUNK, CHUNK], k.dtype)
    v = tl.full([BLOCK_M // CHUNK, CHUNK], 1.0, k.dtype)
    s = g
    c = g
    r_uniform = tl.sum(g)
    residual = tl.sum(g)
    period = uniform_period
    sweep = 0
    running = n_iters >= 0
    while running:
        if sweep % period == 0:
            g, s, c, r_uniform, period = log_sweep(
                matrix,
                cols,
                col_used,
                given_c,
                has_col,
                unit_rows,
                uniform_period,
                n_iters,
                f_at,
                u_ptr,
                f_at,
                u_ptr,
                BLOCK_N,
                ALIGNED,
                HISTORY=False,
            )
            v = tl.full([BLOCK_M // CHUNK, CHUNK], 1.0, k.dtype)
        else:
            v, s = scaling_sweep(matrix, cols, col_used, g, s, c, r_uniform, f_at, u_ptr, BLOCK_N, ALIGNED)
        error = tl.where(c == 0, 0.0, tl.abs(v * s / c - 1.0))
        broken = tl.max((s != s).to(tl.int32))
        residual = tl.where(broken != 0, float("nan"), tl.max(error))
        sweep += 1
        running = (sweep < n_iters) & ((residual <= tol) == 0)

    poison = tl.where(residual != residual, float("nan"), 0.0)
    for start in range(0, n, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
        f = tl.load(f_at + rows, mask=rows < n, other=0.0)
        u = tl.load(u_ptr + rows, mask=rows < n, other=1.0)
        plan = scaled_kernel(x, k, f, g) * u[None, :, None] * v[:, None, :] + poison
        store_tile(plan_ptr + b * plan_stride_b, rows, cols, n, m, plan_stride_n, plan_stride_m, plan, ALIGNED)
        f += log2(u)
        row_base = tl.load(base_ptr + rows, mask=rows < n, other=0.0)
        tl.store(f_ptr + b * n + rows, row_base * UNIT + f * LN_2, mask=(rows < n) & (has_info != 0))
        if WITH_SIGMA2:
            r = tl.where(row_sum(plan) > 0, tl.where(has_row != 0, r, r_uniform), 0.0)
            tl.debug_barrier()
            tl.store(f_at + rows, f, mask=rows < n)
            tl.store(u_ptr + rows, r, mask=rows < n)
    g += log2(v)
    tl.store(g_ptr + b * m + cols, col_base * UNIT + g * LN_2, mask=(cols < m) & (has_info != 0))
    if WITH_SIGMA2:
        tl.debug_barrier()
        c_line = tl.reshape(c, [BLOCK_M])
        g_line = tl.where(c_line == 0, 0.0, tl.reshape(g, [BLOCK_M]))
        small = tl.maximum(n, m) <= 8  # where full accuracy costs next to nothing
        sigma2 = lanczos_sigma2(
            logits_ptr + b * stride_b,
            stride_n,
            stride_m,
            mask_ptr + b * mask_stride_b,
            mask_stride_n,
            mask_stride_m,
            has_mask,
            u_ptr,
            (f_at, base_ptr, g_line, tl.reshape(col_base, [BLOCK_M]), scale),
            c_line,
            n,
            m,
            tl.where(small, 1e-15, 1e-4),
            tl.where(small, 48, 256),
            LANCZOS_N,
            FROM_LOGITS=True,
        )
        tl.store(sigma2_ptr + b, sigma2 + poison)
    tl.store(residual_ptr + b, residual, mask=has_info != 0)
    tl.store(sweeps_ptr + b, tl.minimum(sweep, n_iters), mask=has_info != 0)
