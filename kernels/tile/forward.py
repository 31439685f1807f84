"""Sinkhorn of tiles on chip: one read of the logits, one write of the plan; symbols and derivation in ``sweeps.py``.

The column sums s = K^T u that a sweep leaves serve twice: as denominators of the next sweep and as the residual of this one,

    residual = max_j |v_j s_j / c_j - 1|.
"""

import triton.language as tl

from ..common.arithmetic import narrow
from ..common.configuration import finite_jit
from ..common.memory import load_entries, store_entries
from ..spectrum.squaring import tile_sigma2
from .sweeps import (
    as_lines,
    as_matrices,
    col_sums,
    inverse_temperatures,
    lifted,
    load_logits,
    log_col_step,
    log_row_step,
    marginals,
    over_cols,
    over_matrices,
    over_rows,
    places,
    quotient,
    relative,
    residuals,
    row_sums,
    shifted,
    store_on_base,
    tile_offsets,
    unrelated,
    vector_offsets,
)


@finite_jit
def _sinkhorn_tile_fwd_kernel(
    logits_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    f0_ptr,
    temperature_ptr,
    plan_ptr,
    residual_ptr,
    sweeps_ptr,
    f_ptr,
    g_ptr,
    sigma2_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    n_iters: tl.int32,
    uniform_scalings: tl.int32,
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
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_f0: tl.int32,
    has_temperature: tl.int32,
    has_info: tl.int32,
    unit_rows: tl.int32,
    inverse_temperature: tl.float64,
    tol: tl.float64,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RELOAD: tl.constexpr,
    WITH_SIGMA2: tl.constexpr,
    SQUARINGS: tl.constexpr,
):
    """BLOCK_B matrices; ``n_iters`` 0 is the row step of a log sweep at g = 0.

    RELOAD: the registers have no room for y and K at once, so each segment reads its logits again, from L1 or L2, and their
    bases, for which ``has_info`` is to be 1.
    """
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    row_at = row_ptr + vector_offsets(b, i, row_stride_b, row_stride_n)
    col_at = col_ptr + vector_offsets(b, j, col_stride_b, col_stride_m)
    f0_at = f0_ptr + vector_offsets(b, i, f0_stride_b, f0_stride_n)
    r = load_entries(row_at, inside_row & (has_row != 0), 1.0)
    c = load_entries(col_at, inside_col & (has_col != 0), 1.0)
    f = load_entries(f0_at, inside_row & (has_f0 != 0), 0.0)
    inverse_tau = inverse_temperatures(temperature_ptr, temperature_stride, b, inside, has_temperature, inverse_temperature)
    k = inverse_tau.to(dtype)
    x = load_logits(
        logits_ptr,
        stride_b,
        stride_n,
        stride_m,
        mask_ptr,
        mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        has_mask,
        b,
        i,
        j,
        over_rows(inside_row & (r != 0)) & over_cols(inside_col & (c != 0)),
        dtype,
    )
    r, c, scalings = marginals(x, r, c, has_row, has_col, unit_rows, uniform_scalings)
    y, G, R, f = lifted(x, k, f, r, n_iters > 0)
    if has_info != 0:  # until the end bases are where f and g will be: the registers are for the sweeps
        store_entries(f_ptr + vector_offsets(b, i, n, 1), R, inside_row)
        store_entries(g_ptr + vector_offsets(b, j, m, 1), G, inside_col)
        tl.debug_barrier()

    K = tl.zeros([P // ROWS, P // COLS, BLOCK_B, ROWS, COLS], dtype)
    g = tl.zeros([P // COLS, BLOCK_B, COLS], dtype)
    s = tl.zeros([P // COLS, BLOCK_B, COLS], dtype)
    u = tl.full([P // ROWS, BLOCK_B, ROWS], 1.0, dtype)
    v = tl.full([P // COLS, BLOCK_B, COLS], 1.0, dtype)
    done = tl.zeros([BLOCK_B], tl.int32)
    active = done == 0
    running = batch > 0
    sweep = 0
    last = tl.maximum(n_iters, 1)
    while (sweep < last) & running:
        if RELOAD:
            b_again, i_again, j_again, _, in_row, in_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
            x_again = load_logits(
                logits_ptr,
                stride_b,
                stride_n,
                stride_m,
                mask_ptr,
                mask_stride_b,
                mask_stride_n,
                mask_stride_m,
                has_mask,
                b_again,
                i_again,
                j_again,
                over_rows(in_row & (r != 0)) & over_cols(in_col & (c != 0)),
                dtype,
            )
            R = load_entries(f_ptr + vector_offsets(b_again, i_again, n, 1), in_row, 0.0)
            G = load_entries(g_ptr + vector_offsets(b_again, j_again, m, 1), in_col, 0.0)
            y = relative(x_again, k, G, R)
        moving = over_matrices(active)
        f = shifted(f, u, r)
        g = tl.where(moving & (n_iters > 0), log_col_step(y, f, c), g)
        K, f, _ = log_row_step(y, g, r, f)
        u = tl.where(moving, 1.0, u)
        v = tl.where(moving, 1.0, v)
        s = col_sums(K * over_rows(u))
        sweep += 1
        if tol >= 0:
            done += active.to(tl.int32)
            active = active & (residuals(s, v, c) > tol)
            running = tl.max(active.to(tl.int32), axis=0) > 0
        stop = tl.minimum(sweep + scalings, last)
        while (sweep < stop) & running:
            moving = over_matrices(active)
            v = tl.where(moving, quotient(c, s), v)
            u = tl.where(moving, quotient(r, row_sums(K * over_cols(v))), u)
            s = col_sums(K * over_rows(u))
            sweep += 1
            if tol >= 0:
                done += active.to(tl.int32)
                active = active & (residuals(s, v, c) > tol)
                running = tl.max(active.to(tl.int32), axis=0) > 0

    residual = residuals(s, v, c)
    poison = tl.where(residual < float("inf"), 0.0, float("nan"))
    plan = K * over_rows(u) * over_cols(v) + over_rows(over_matrices(poison))
    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    plan_at = plan_ptr + tile_offsets(b, i, j, plan_stride_b, plan_stride_n, plan_stride_m)
    store_entries(plan_at, narrow(plan, plan_ptr.dtype.element_ty), over_rows(inside_row) & over_cols(inside_col))
    if has_info != 0:
        tl.store(residual_ptr + b, residual + poison, mask=inside)
        tl.store(sweeps_ptr + b, tl.where(tol >= 0, tl.minimum(done, n_iters), n_iters), mask=inside)
        f_at, g_at = f_ptr + vector_offsets(b, i, unrelated(n), 1), g_ptr + vector_offsets(b, j, unrelated(m), 1)
        tl.debug_barrier()  # every lane that holds a copy has loaded it
        store_on_base(f_at, shifted(f, u, r), inside_row)
        store_on_base(g_at, shifted(g, v, c), inside_col)
    if WITH_SIGMA2:
        sigma2, _, _ = tile_sigma2(as_matrices(plan), as_lines(r), as_lines(c), SQUARINGS)
        tl.store(sigma2_ptr + b, sigma2, mask=inside)
