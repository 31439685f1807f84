"""Exact backward of the sweeps that ``forward.py`` runs; symbols of ``sweeps.py``, D the cotangent of the plan.

The forward is run again and leaves u_t and v_t of every sweep in memory. Within a segment, whose log sweep is t0, the
matrices after the row and the column step of sweep t are diag(u_t) K diag(v_t) and diag(u_{t-1}) K diag(v_t), with
u_{t0} = v_{t0} = 1 and u_{t0-1} = exp(f_{t0-1} - f_{t0}), f before and after the log sweep. With W = -u_T D v_T,
    df = -rowsum(K W),  dg = -colsum(K W),
    for t = T..1:   a = u_t df / r;        W += a v_t^T;        dg -= v_t (K^T a);
                    h = v_t dg / c;        W += u_{t-1} h^T;    df = -u_{t-1} (K h);    dg = 0;
and dS = -K W. Where a segment begins, -K W is added to dS, W starts at 0 and K becomes that of the segment before.
dlog r = sum_t df before the row step, dlog c = sum_t dg before the column step, df0 = the last df.

As v_{t0} = 1 and u_{t0} = 1 need no memory, their places hold g_{t0}, from which K is rebuilt, and u_{t0-1}. The bases
of y lie before all of these.
A matrix that stops before the others of its program repeats u, v and g; its adjoint waits for its own last segment.
A program walks over blocks of matrices and reuses its place in the history; ``n_iters`` 0 is one row step at g = 0.
"""

import triton.language as tl

from ..common.arithmetic import narrow
from ..common.configuration import finite_jit
from ..common.memory import load_entries, store_entries
from .sweeps import (
    col_sums,
    inverse_temperatures,
    lifted,
    line_index,
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
    row_sums,
    shifted,
    tile_offsets,
    vector_offsets,
)


@finite_jit
def _sinkhorn_tile_bwd_kernel(
    logits_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    f0_ptr,
    temperature_ptr,
    sweeps_ptr,
    grad_plan_ptr,
    history_ptr,
    grad_logits_ptr,
    grad_f0_ptr,
    grad_row_ptr,
    grad_col_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    n_iters: tl.int64,
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
    grad_plan_stride_b: tl.int64,
    grad_plan_stride_n: tl.int64,
    grad_plan_stride_m: tl.int64,
    grad_logits_stride_b: tl.int64,
    grad_logits_stride_n: tl.int64,
    grad_logits_stride_m: tl.int64,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_f0: tl.int32,
    has_temperature: tl.int32,
    has_sweeps: tl.int32,
    has_vectors: tl.int32,
    unit_rows: tl.int32,
    inverse_temperature: tl.float64,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Blocks of BLOCK_B matrices; history (programs, max(n_iters, 1) + 1, 2, BLOCK_B, P) in the compute dtype."""
    dtype: tl.constexpr = history_ptr.dtype.element_ty
    SLOT: tl.constexpr = 2 * BLOCK_B * P
    last = tl.maximum(n_iters, 1)
    slot_row = over_matrices(tl.arange(0, BLOCK_B)) * P + line_index(P, ROWS)
    slot_col = over_matrices(tl.arange(0, BLOCK_B)) * P + line_index(P, COLS)
    everywhere = tl.full([1, 1, 1], True, tl.int1)
    u_ptr = history_ptr + (tl.program_id(0).to(tl.int64) * (last + 1) + 1) * SLOT + slot_row
    v_ptr = history_ptr + (tl.program_id(0).to(tl.int64) * (last + 1) + 1) * SLOT + BLOCK_B * P + slot_col
    blocks = tl.cdiv(batch, BLOCK_B)
    block = tl.program_id(0).to(tl.int64)
    while block < blocks:
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
        store_entries(u_ptr - SLOT, R, everywhere)
        store_entries(v_ptr - SLOT, G, everywhere)
        done = tl.load(sweeps_ptr + b, mask=inside & (has_sweeps != 0), other=0).to(tl.int64)
        done = tl.where((has_sweeps != 0) & (n_iters > 0), done, last)
        final = tl.max(done, axis=0)
        period = tl.minimum(scalings, last) + 1

        K = tl.zeros([P // ROWS, P // COLS, BLOCK_B, ROWS, COLS], dtype)
        g = tl.zeros([P // COLS, BLOCK_B, COLS], dtype)
        u = tl.full([P // ROWS, BLOCK_B, ROWS], 1.0, dtype)
        v = tl.full([P // COLS, BLOCK_B, COLS], 1.0, dtype)
        t = block * 0
        while t < final:
            moving = over_matrices(t < done)
            f = shifted(f, u, r)
            g = tl.where(moving & (n_iters > 0), log_col_step(y, f, c), g)
            K, f, before = log_row_step(y, g, r, f)
            u = tl.where(moving, 1.0, u)
            v = tl.where(moving, 1.0, v)
            store_entries(u_ptr + t * SLOT, before, everywhere)
            store_entries(v_ptr + t * SLOT, g, everywhere)
            s = col_sums(K * over_rows(u))
            stop = tl.minimum(t + period, final)
            t += 1
            while t < stop:
                moving = over_matrices(t < done)
                v = tl.where(moving, quotient(c, s), v)
                u = tl.where(moving, quotient(r, row_sums(K * over_cols(v))), u)
                s = col_sums(K * over_rows(u))
                store_entries(u_ptr + t * SLOT, u, everywhere)
                store_entries(v_ptr + t * SLOT, v, everywhere)
                t += 1
        tl.debug_barrier()

        b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
        within = over_rows(inside_row) & over_cols(inside_col)
        grad_plan_at = grad_plan_ptr + tile_offsets(b, i, j, grad_plan_stride_b, grad_plan_stride_n, grad_plan_stride_m)
        W = -load_entries(grad_plan_at, within & (K != 0), 0.0).to(dtype) * over_rows(u) * over_cols(v)
        df, dg = -row_sums(K * W), -col_sums(K * W)
        dS = tl.zeros([P // ROWS, P // COLS, BLOCK_B, ROWS, COLS], dtype)
        grad_row = tl.zeros([P // ROWS, BLOCK_B, ROWS], dtype)
        grad_col = tl.zeros([P // COLS, BLOCK_B, COLS], dtype)
        end = final
        while end > 0:
            start = (end - 1) // period * period
            if end < final:
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
                G = load_entries(v_ptr - SLOT, everywhere, 0.0)
                R = load_entries(u_ptr - SLOT, everywhere, 0.0)
                y = relative(x_again, k, G, R)
                K, _, _ = log_row_step(y, load_entries(v_ptr + start * SLOT, everywhere, 0.0), r, f)
            t = end - 1
            u = load_entries(u_ptr + t * SLOT, everywhere & (t > start), 1.0)
            while t >= start:
                before = load_entries(u_ptr + tl.maximum(t - 1, start) * SLOT, everywhere & (t != start + 1), 1.0)
                v = load_entries(v_ptr + t * SLOT, everywhere & (t > start), 1.0)
                moving = over_matrices(t < done)
                used_df = tl.where(moving, df, 0.0)
                a = quotient(u * used_df, r)
                grad_row += used_df
                W += over_rows(a) * over_cols(v)
                used_dg = tl.where(moving & (n_iters > 0), dg - v * col_sums(K * over_rows(a)), 0.0)
                h = quotient(v * used_dg, c)
                grad_col += used_dg
                W += over_rows(before) * over_cols(h)
                df = tl.where(moving, -before * row_sums(K * over_cols(h)), df)
                dg = tl.where(moving, 0.0, dg)
                u = before
                t -= 1
            begun = over_rows(over_matrices(start < done))
            dS -= tl.where(begun, K * W, 0.0)
            W = tl.where(begun, 0.0, W)
            end = start
        tl.debug_barrier()

        b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
        within = over_rows(inside_row) & over_cols(inside_col)
        grad_logits_at = grad_logits_ptr + tile_offsets(
            b, i, j, grad_logits_stride_b, grad_logits_stride_n, grad_logits_stride_m
        )
        grad_logits = dS * over_rows(over_matrices(k))
        store_entries(grad_logits_at, narrow(grad_logits, grad_logits_ptr.dtype.element_ty), within)
        if has_vectors != 0:
            at_row, at_col = vector_offsets(b, i, n, 1), vector_offsets(b, j, m, 1)
            store_entries(grad_f0_ptr + at_row, tl.where(r != 0, df, 0.0), inside_row)
            store_entries(grad_row_ptr + at_row, grad_row, inside_row)
            store_entries(grad_col_ptr + at_col, grad_col, inside_col)
        block += tl.num_programs(0)
