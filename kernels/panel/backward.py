"""Exact gradient of the truncated iteration, one matrix per program at a time, re-read in row panels.

Symbols and the forward recurrences are those of ``common/line_sweeps.py``; T sweeps were done, D = dP. With v_t, u_t the
factors after sweep t in the units of K, A_t = u_t K v_t and B_t = u_(t-1) K v_t, the adjoints run backwards,
e_t = df_t / r:

    df_T = rowsum(P D),     dg_T = colsum(P (D - e_T)),     dS = P (D - e_T),
    for t = T .. 1:   b_t = v_t dg_t / c,   df_(t-1) = -u_(t-1) (K b_t),   dg_(t-1) = -v_(t-1) K^T (u_(t-1) e_(t-1)),
                      dS -= K W,   W = u_(t-1) (b_t + e_(t-1) v_(t-1)),

the last line being the terms of B_t and A_(t-1) at once. K is that of the segment of sweep t; at the log sweep that begins a
segment, u_(t-1) and v_(t-1) are those of the earlier segment in the new units, times 2^(old f - new f) and 2^(old g - new g):
both are bounded, for the potentials change by one sweep only. There is no A_0: v_0 = 0. Then
    dlogits = dS / temperature,   dlog r = sum of df_t, t = T .. 1,   dlog c = sum of dg_t, t = T .. 1,   df0 = df_0.

Each reverse sweep is one pass, one read and one exponential per entry: df_(t-1) of a panel is complete before the panel's
share of K^T (u e) is added. A final pass sums W from the stored vectors, segment by segment, in registers.

A fixed number of programs share the matrices; each keeps the history of its current one in its slot of ``work_ptr``:
    F (n)   the bases of rows
    f (segments + 1, n)   before the first sweep, then of each segment        g (segments, m)   of each segment
    u (L + 1, n), v (L + 1, m)   u_t and v_t in the units of sweep t + 1      e (L + 1, n)      e_t
    b (L + 1, m)   v_t / c going forward, b_t coming back                     L = max(T, 1)
What one pass wrote the next may read: every pass, and the end of a matrix, has its barrier.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.bases import BITS, UNIT
from ..common.configuration import finite_jit
from ..common.line_sweeps import (
    MAX_ROWS,
    column_indices,
    lifted,
    lifting,
    load_col_marginal,
    load_panel,
    load_tile,
    log_sweep,
    row_sum,
    scaled_kernel,
    scaling_sweep,
    store_tile,
)


@finite_jit
def _sinkhorn_panel_bwd_kernel(
    logits_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    f0_ptr,
    temperature_ptr,
    work_ptr,
    grad_plan_ptr,
    sweeps_ptr,
    grad_logits_ptr,
    grad_f0_ptr,
    grad_row_ptr,
    grad_col_ptr,
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
    grad_plan_stride_b: tl.int64,
    grad_plan_stride_n: tl.int64,
    grad_plan_stride_m: tl.int64,
    grad_stride_b: tl.int64,
    grad_stride_n: tl.int64,
    grad_stride_m: tl.int64,
    batch: tl.int64,
    slot: tl.int64,
    n: tl.int32,
    m: tl.int32,
    n_iters: tl.int32,
    segments: tl.int32,
    uniform_period: tl.int32,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_f0: tl.int32,
    has_temperature: tl.int32,
    unit_rows: tl.int32,
    has_sweeps: tl.int32,
    has_vectors: tl.int32,
    inverse_temperature: tl.float64,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    length = tl.maximum(n_iters, 1) + 1
    base_ptr = work_ptr + program * slot
    hist_f_ptr = base_ptr + n
    hist_g_ptr = hist_f_ptr + (segments + 1) * n
    hist_u_ptr = hist_g_ptr + segments * m
    hist_e_ptr = hist_u_ptr + length * n
    hist_v_ptr = hist_e_ptr + length * n
    hist_b_ptr = hist_v_ptr + length * m
    cols = column_indices(BLOCK_M, CHUNK)
    in_cols = cols < m
    lines = tl.arange(0, MAX_ROWS)
    for b in range(program, batch, tl.num_programs(0)):
        scale = lifting(
            temperature_ptr + b * temperature_stride, has_temperature, inverse_temperature, work_ptr.dtype.element_ty
        )
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
        grad_at = grad_plan_ptr + b * grad_plan_stride_b
        given_c, col_used = load_col_marginal(col_ptr + b * col_stride_b, col_stride_m, has_col, m, cols)
        sweeps = n_iters
        if has_sweeps != 0:
            sweeps = tl.load(sweeps_ptr + b)
        f0 = tl.load(f0_ptr + b * f0_stride_b + lines * f0_stride_n, mask=(lines < n) & (has_f0 != 0), other=0.0)
        tl.store(hist_f_ptr + lines, f0 / LN_2, mask=lines < n)
        tl.store(hist_u_ptr + lines, tl.full([MAX_ROWS], 1.0, k.dtype), mask=lines < n)
        tl.debug_barrier()
        matrix = lifted(matrix, scale, cols, col_used, sweeps, hist_f_ptr, base_ptr, BLOCK_N, ALIGNED)

        g = tl.zeros([BLOCK_M // CHUNK, CHUNK], k.dtype)
        v = tl.zeros([BLOCK_M // CHUNK, CHUNK], k.dtype)
        s = g
        c = g
        r_uniform = tl.sum(g)
        period = uniform_period
        last = 0
        while last < tl.maximum(sweeps, 1):
            segment = last // period
            if last % period == 0:
                new_g, s, c, r_uniform, period = log_sweep(
                    matrix,
                    cols,
                    col_used,
                    given_c,
                    has_col,
                    unit_rows,
                    uniform_period,
                    sweeps,
                    hist_f_ptr + segment * n,
                    hist_u_ptr + last * n,
                    hist_f_ptr + (segment + 1) * n,
                    hist_u_ptr + (last + 1) * n,
                    BLOCK_N,
                    ALIGNED,
                    HISTORY=True,
                )
                v_before = tl.where(last == 0, 0.0, v * exp2(g - new_g))
                tl.store(hist_v_ptr + last * m + cols, v_before, mask=in_cols)
                tl.store(hist_g_ptr + segment * m + cols, new_g, mask=in_cols)
                g = new_g
                v = tl.full([BLOCK_M // CHUNK, CHUNK], 1.0, k.dtype)
            else:
                v, s = scaling_sweep(
                    matrix,
                    cols,
                    col_used,
                    g,
                    s,
                    c,
                    r_uniform,
                    hist_f_ptr + (segment + 1) * n,
                    hist_u_ptr + (last + 1) * n,
                    BLOCK_N,
                    ALIGNED,
                )
            last += 1
            tl.store(hist_v_ptr + last * m + cols, v, mask=in_cols)
            tl.store(hist_b_ptr + last * m + cols, tl.where(c == 0, 0.0, v / c), mask=in_cols)
        poison = tl.where(tl.max((s != s).to(tl.int32)) != 0, float("nan"), 0.0)
        tl.debug_barrier()

        segment = (last - 1) // period
        partial = tl.zeros([BLOCK_M // CHUNK, BLOCK_N, CHUNK], k.dtype)
        for start in range(0, n, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
            r = tl.where(has_row != 0, r, r_uniform)
            f = tl.load(hist_f_ptr + (segment + 1) * n + rows, mask=rows < n, other=0.0)
            u = tl.load(hist_u_ptr + last * n + rows, mask=rows < n, other=0.0)
            plan = scaled_kernel(x, k, f, g) * u[None, :, None] * v[:, None, :]
            grad = load_tile(grad_at, rows, cols, n, m, grad_plan_stride_n, grad_plan_stride_m, 0.0, ALIGNED)
            grad = tl.where(x == -float("inf"), 0.0, grad.to(k.dtype))
            e = tl.where(r == 0, 0.0, row_sum(plan * grad) / r)
            partial += plan * (grad - e[None, :, None])
            tl.store(hist_e_ptr + last * n + rows, e, mask=rows < n)
        dg = tl.sum(partial, axis=1)
        tl.debug_barrier()

        dlog_c = tl.zeros([BLOCK_M // CHUNK, CHUNK], k.dtype)
        for back in range(0, sweeps):
            t = sweeps - back
            f_ptr = hist_f_ptr + ((t - 1) // period + 1) * n
            g = tl.load(hist_g_ptr + ((t - 1) // period) * m + cols, mask=in_cols, other=0.0)
            b_t = tl.load(hist_b_ptr + t * m + cols, mask=in_cols, other=0.0) * dg
            dlog_c += dg
            tl.debug_barrier()
            tl.store(hist_b_ptr + t * m + cols, b_t, mask=in_cols)
            partial = tl.zeros([BLOCK_M // CHUNK, BLOCK_N, CHUNK], k.dtype)
            for start in range(0, n, BLOCK_N):
                rows = start + tl.arange(0, BLOCK_N)
                x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
                r = tl.where(has_row != 0, r, r_uniform)
                kernel = scaled_kernel(x, k, tl.load(f_ptr + rows, mask=rows < n, other=0.0), g)
                u = tl.load(hist_u_ptr + (t - 1) * n + rows, mask=rows < n, other=0.0)
                e = tl.where(r == 0, 0.0, -u * row_sum(kernel * b_t[:, None, :]) / r)
                partial += kernel * (u * e)[None, :, None]
                tl.store(hist_e_ptr + (t - 1) * n + rows, e, mask=rows < n)
            dg = -tl.load(hist_v_ptr + (t - 1) * m + cols, mask=in_cols, other=0.0) * tl.sum(partial, axis=1)
            tl.debug_barrier()

        g_last = tl.load(hist_g_ptr + segment * m + cols, mask=in_cols, other=0.0)
        for start in range(0, n, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            x, r = load_panel(matrix, rows, cols, col_used, ALIGNED)
            r = tl.where(has_row != 0, r, r_uniform)
            f = tl.load(hist_f_ptr + (segment + 1) * n + rows, mask=rows < n, other=0.0)
            u = tl.load(hist_u_ptr + last * n + rows, mask=rows < n, other=0.0)
            grad = load_tile(grad_at, rows, cols, n, m, grad_plan_stride_n, grad_plan_stride_m, 0.0, ALIGNED)
            grad = tl.where(x == -float("inf"), 0.0, grad.to(k.dtype))
            e = tl.load(hist_e_ptr + last * n + rows, mask=rows < n, other=0.0)
            plan = scaled_kernel(x, k, f, g_last) * u[None, :, None] * v[:, None, :]
            grad = plan * (grad - e[None, :, None]) + poison
            dlog_r = e
            for first in range(0, sweeps, period):
                weight = tl.zeros([BLOCK_M // CHUNK, BLOCK_N, CHUNK], k.dtype)
                for t in range(first, tl.minimum(first + period, sweeps)):
                    u = tl.load(hist_u_ptr + t * n + rows, mask=rows < n, other=0.0)
                    e = tl.load(hist_e_ptr + t * n + rows, mask=rows < n, other=0.0)
                    v_t = tl.load(hist_v_ptr + t * m + cols, mask=in_cols, other=0.0)
                    b_t = tl.load(hist_b_ptr + (t + 1) * m + cols, mask=in_cols, other=0.0)
                    weight += u[None, :, None] * (b_t[:, None, :] + e[None, :, None] * v_t[:, None, :])
                    dlog_r += tl.where(t > 0, e, 0.0)
                f = tl.load(hist_f_ptr + (first // period + 1) * n + rows, mask=rows < n, other=0.0)
                g = tl.load(hist_g_ptr + (first // period) * m + cols, mask=in_cols, other=0.0)
                grad -= scaled_kernel(x, k, f, g) * weight
            grad *= scale * UNIT
            store_tile(grad_logits_ptr + b * grad_stride_b, rows, cols, n, m, grad_stride_n, grad_stride_m, grad, ALIGNED)
            tl.store(grad_row_ptr + b * n + rows, r * dlog_r, mask=(rows < n) & (has_vectors != 0))
            e = tl.load(hist_e_ptr + rows, mask=(rows < n) & (sweeps > 0), other=0.0)
            tl.store(grad_f0_ptr + b * n + rows, r * e, mask=(rows < n) & (has_vectors != 0))
        tl.store(grad_col_ptr + b * m + cols, dlog_c, mask=in_cols & (has_vectors != 0))
        tl.debug_barrier()
