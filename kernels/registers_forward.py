"""The forward of the register family: one thread projects one matrix of up to 4x4, see ``registers_sweeps.py``.

With f' and g' the potentials of the scaled-down sweeps (marginals left out), l = log2(r/c) = log2(C/R) and s sweeps,

    f = f' + s l,   g = g' + log2 c - (s - 1) l   (s = 0: f = f' + log2 r, g = 0),

where each log-domain sweep starts from the true f and counts from there, so that nothing grows.
"""

import triton
import triton.language as tl

from .arithmetic import LN_2, exp2, log2, quotient, reciprocal
from .configuration import finite_jit
from .jacobi import SINGLE_ROUNDS, deflate, largest_singular_value
from .registers_sweeps import (
    SCALING_SWEEPS,
    load_packed,
    load_strided,
    log_sweep,
    ones,
    scaling_sweeps,
    store_packed,
    store_strided,
    sums_over_rows,
    valid_lines,
)


@triton.jit
def load_logits(
    logits_ptr, mask_ptr, matrix, live, n, m,
    logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits in float32, -inf where an entry is masked or beyond n or m."""
    if PACKED:
        x = load_packed(logits_ptr, matrix, live, BLOCK)
    else:
        x = load_strided(logits_ptr, matrix, live, n, m, logits_stride_b, logits_stride_n, logits_stride_m, float("-inf"))
        take = load_strided(mask_ptr, matrix, live & (has_mask != 0), n, m, mask_stride_b, mask_stride_n, mask_stride_m, 1)
        x = [
            tl.where(take[e] != 0, x[e].to(tl.float32), float("-inf"))
            for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
        ]
    return x


@triton.jit
def log2_count(x):
    """log2 of 1, 2, 3 or 4 as a multiple of 1/2 and, for 3, what is left: differences of two keep their precision."""
    return tl.where(x == 3.0, 1.5, tl.where(x == 4.0, 2.0, x - 1.0)), tl.where(x == 3.0, 0.08496250072115618, 0.0)


@triton.jit
def _log2_factors(u, s, drift):
    """log2(u_i) + s drift; u_i holds 2^(-s drift), up to 2^44: what can be is taken out before the logarithm."""
    whole = tl.floor(s * drift + 0.5)
    power = exp2(whole)
    rest = tl.fma(drift, s.to(tl.float32), -whole)
    return [log2(value * power) + rest for value in u]


@finite_jit
def _sinkhorn_fwd_kernel(
    logits_ptr, mask_ptr, temperature_ptr, plan_ptr, residual_ptr, sweeps_ptr, f_ptr, g_ptr, sigma2_ptr,
    batch: tl.int64, n: tl.int32, m: tl.int32, n_iters: tl.int32,
    logits_stride_b: tl.int64, logits_stride_n: tl.int64, logits_stride_m: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, mask_stride_m: tl.int64,
    plan_stride_b: tl.int64, plan_stride_n: tl.int64, plan_stride_m: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_mask: tl.int32, has_temperature: tl.int32, unit_rows: tl.int32,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, WITH_INFO: tl.constexpr, WITH_SIGMA2: tl.constexpr,
):  # fmt: skip
    """Plan, and on request residual, sweeps, f, g and sigma2. ``scale`` is log2 e over the temperature, if a number."""
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = matrix < batch
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, matrix, live, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, BLOCK,
    )  # fmt: skip
    K, f, g, total, spare_row, spare_col = log_sweep(x, k, x, n_iters, True)
    poison = 0.0 * (total[0] + total[1] + total[2] + total[3])  # at n_iters = 0 a NaN has reached its row only
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    col_halves, col_rest = log2_count(cols)
    row_halves, row_rest = log2_count(rows)
    drift = (col_halves - row_halves) + (col_rest - row_rest)
    scaled = tl.minimum(n_iters - 1, SCALING_SWEEPS)
    u, v = scaling_sweeps(K, spare_row, spare_col, scaled)
    for done in range(1 + SCALING_SWEEPS, n_iters, 1 + SCALING_SWEEPS):
        log_u = _log2_factors(u, scaled, drift)
        f = [f[i] + drift + log_u[i] for i in (0, 1, 2, 3)]
        x = load_logits(
            logits_ptr, mask_ptr, matrix, live, n, m,
            logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
            PACKED, BLOCK,
        )  # fmt: skip
        K, f, g, _, _, _ = log_sweep(x, k, f, n_iters, False)
        scaled = tl.minimum(n_iters - done - 1, SCALING_SWEEPS)
        u, v = scaling_sweeps(K, spare_row, spare_col, scaled)

    r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows))
    left = [r * u[i] + poison for i in (0, 1, 2, 3)]
    P = [left[e // 4] * K[e] * v[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    if PACKED:
        store_packed(plan_ptr, matrix, live, P, BLOCK)
    else:
        store_strided(plan_ptr, matrix, live, n, m, plan_stride_b, plan_stride_n, plan_stride_m, P)
    if WITH_INFO:
        inverse_c = tl.where(unit_rows != 0, cols * reciprocal(rows), 1.0)
        error = [tl.abs(inverse_c * y - 1.0) for y in sums_over_rows(P, ones(P[0]), spare_col)]
        error = [tl.where(spare_col[j] == 0.0, error[j], 0.0) for j in (0, 1, 2, 3)]
        residual = tl.maximum(tl.maximum(error[0], error[1]), tl.maximum(error[2], error[3])) + poison
        tl.store(residual_ptr + matrix, residual, mask=live)
        tl.store(sweeps_ptr + matrix, tl.full([BLOCK], n_iters, tl.int32), mask=live)
        scaled = tl.maximum(scaled, 0)  # at n_iters = 0
        log_r = tl.where(unit_rows != 0, 0.0, drift)
        first_f = tl.where(n_iters == 0, log_r, drift)
        first_g = tl.where(n_iters == 0, 0.0, log_r - drift)
        log_u = _log2_factors(u, scaled, drift)
        log_v = _log2_factors(v, -scaled, drift)
        for i in tl.static_range(4):
            potential = tl.where(spare_row[i] == 0.0, LN_2 * (f[i] + first_f + log_u[i]), 0.0)
            tl.store(f_ptr + matrix * n + i, potential, mask=live & (i < n))
            potential = tl.where(spare_col[i] == 0.0, LN_2 * (g[i] + first_g + log_v[i]), 0.0)
            tl.store(g_ptr + matrix * m + i, potential, mask=live & (i < m))
    if WITH_SIGMA2:
        q = [tl.where(spare_row[i] == 0.0, tl.sqrt(reciprocal(rows)), 0.0) for i in (0, 1, 2, 3)]
        p = [tl.where(spare_col[j] == 0.0, tl.sqrt(reciprocal(cols)), 0.0) for j in (0, 1, 2, 3)]
        size = tl.sqrt(tl.where(unit_rows != 0, cols * reciprocal(rows), rows * reciprocal(cols)))  # 1 / sqrt(r c)
        sigma2 = largest_singular_value(deflate(P, q, p), SINGLE_ROUNDS)
        tl.store(sigma2_ptr + matrix, size * sigma2, mask=live)
