"""The forward of the register family: one thread projects one matrix of up to 8x8, see ``sweeps.py``.

With f' and g' the potentials of the scaled-down sweeps (marginals left out), l = log2(r/c) = log2(C/R) and s sweeps,

    f = f' + s l,   g = g' + log2 c - (s - 1) l   (s = 0: f = f' + log2 r, g = 0),

where each K made anew takes its g with the factors so far, less the (1 - s) l that they hold, and counts from there.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, exp2, log2, quotient, reciprocal
from ..common.configuration import finite_jit
from ..spectrum.jacobi import SINGLE_ROUNDS, deflate, largest_singular_value
from .memory import load_logits, store_line, store_strided
from .packed import load_again, store_packed
from .shared import workspace_of
from .sweeps import (
    SCALINGS_OF_4,
    SCALINGS_OF_8,
    first_columns,
    ones,
    plus,
    poison,
    row_step,
    scaled,
    scaling_sweeps,
    sums_over_rows,
    valid_lines,
)


@triton.jit
def _log2_count(x, LINES: tl.constexpr):
    """log2 of 1, ..., LINES as a multiple of 1/2 and what is left."""
    halves = tl.where(x == 3.0, 1.5, tl.where(x == 4.0, 2.0, x - 1.0))
    rest = tl.where(x == 3.0, 0.08496250072115618, 0.0)
    if LINES > 4:
        halves = tl.where(x > 4.0, tl.where(x > 6.0, 3.0, 2.5), halves)
        rest = tl.where(x == 6.0, 0.08496250072115618, rest)
        rest = tl.where(x == 5.0, -0.17807190511263765, tl.where(x == 7.0, -0.19264507794239588, rest))
    return halves, rest


@triton.jit
def log2_ratio(cols, rows, LINES: tl.constexpr):
    """log2(C / R) as a multiple of 1/2 and what is left, below 0.4: a multiple of both keeps the precision of each."""
    col_halves, col_rest = _log2_count(cols, LINES)
    row_halves, row_rest = _log2_count(rows, LINES)
    return col_halves - row_halves, col_rest - row_rest


@triton.jit
def log2_factors(u, s, halves, rest):
    """log2(u_i) + s (halves + rest); u_i holds 2^-that, up to 2^45: what can be is taken out before the logarithm."""
    drift = halves * s
    whole = tl.floor(drift + 0.5)
    left = tl.fma(rest, s.to(tl.float32), drift - whole)
    power = exp2(whole)
    return [log2(value * power) + left for value in u]


@finite_jit
def _sinkhorn_fwd_kernel(
    logits_ptr, mask_ptr, temperature_ptr, plan_ptr, residual_ptr, sweeps_ptr, f_ptr, g_ptr, sigma2_ptr,
    batch: tl.int64, n: tl.int32, m: tl.int32, n_iters: tl.int32,
    logits_stride_b: tl.int64, logits_stride_n: tl.int64, logits_stride_m: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, mask_stride_m: tl.int64,
    plan_stride_b: tl.int64, plan_stride_n: tl.int64, plan_stride_m: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_mask: tl.int32, has_temperature: tl.int32, unit_rows: tl.int32,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, WITH_INFO: tl.constexpr, WITH_SIGMA2: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """Plan, and on request residual, sweeps, f, g and sigma2, of 4 lines. ``scale`` is log2 e over the temperature, if a
    number."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    matrix = first + tl.arange(0, BLOCK)
    live = matrix < batch
    matrix = tl.minimum(matrix, batch - 1)
    workspace = workspace_of(logits_ptr, BLOCK, LINES)
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, first, batch, workspace, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, LINES,
    )  # fmt: skip
    g, spare_col = first_columns(x, k, n_iters, LINES)
    if LINES > 4:  # read again, and not before, as there are no registers to keep it in
        tl.debug_barrier()
        x = load_again(logits_ptr, first, batch, workspace, LINES)
    K, f, total, spare_row = row_step(x, k, g)
    broken = poison(total)  # at n_iters = 0 a NaN has reached its row only
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    halves, rest = log2_ratio(cols, rows, LINES)
    SEGMENT: tl.constexpr = SCALINGS_OF_4 if LINES == 4 else SCALINGS_OF_8
    scalings = tl.minimum(n_iters - 1, SEGMENT)
    u, v = scaling_sweeps(K, spare_row, spare_col, scalings)
    for done in range(1 + SEGMENT, n_iters, SEGMENT):
        g = plus(g, log2_factors(v, -scalings, halves, rest))
        if PACKED:
            x = load_again(logits_ptr, first, batch, workspace, LINES)
        else:
            x = load_logits(
                logits_ptr, mask_ptr, first, batch, workspace, n, m,
                logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
                PACKED, LINES,
            )  # fmt: skip
        K, f, _total, spare_row = row_step(x, k, g)
        scalings = tl.minimum(n_iters - done, SEGMENT)
        u, v = scaling_sweeps(K, spare_row, spare_col, scalings)

    r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows))
    P = scaled([r * value + broken for value in u], K, v)
    if WITH_INFO:
        inverse_c = tl.where(unit_rows != 0, cols * reciprocal(rows), 1.0)
        sums = sums_over_rows(P, ones(k, LINES), spare_col)
        residual = tl.zeros_like(k)
        for j in tl.static_range(LINES):
            residual = tl.maximum(residual, tl.where(spare_col[j] == 0.0, tl.abs(inverse_c * sums[j] - 1.0), 0.0))
        tl.store(residual_ptr + matrix, residual + broken, mask=live)
        tl.store(sweeps_ptr + matrix, tl.full([BLOCK], n_iters, tl.int32), mask=live)
        scalings = tl.maximum(scalings, 0)  # at n_iters = 0
        drift = halves + rest
        log_r = tl.where(unit_rows != 0, 0.0, drift)
        first_f = tl.where(n_iters == 0, log_r, drift)
        first_g = tl.where(n_iters == 0, 0.0, log_r - drift)
        log_u = log2_factors(u, scalings, halves, rest)
        log_v = log2_factors(v, -scalings, halves, rest)
        left = []
        right = []
        for i in tl.static_range(LINES):
            left = left + [tl.where(spare_row[i] == 0.0, LN_2 * (f[i] + first_f + log_u[i]), 0.0)]
            right = right + [tl.where(spare_col[i] == 0.0, LN_2 * (g[i] + first_g + log_v[i]), 0.0)]
        store_line(f_ptr + matrix * n, 1, live, n, left)
        store_line(g_ptr + matrix * m, 1, live, m, right)
    if WITH_SIGMA2:
        q = [tl.where(spare_row[i] == 0.0, tl.sqrt(reciprocal(rows)), 0.0) for i in (0, 1, 2, 3)]
        p = [tl.where(spare_col[j] == 0.0, tl.sqrt(reciprocal(cols)), 0.0) for j in (0, 1, 2, 3)]
        size = tl.sqrt(tl.where(unit_rows != 0, cols * reciprocal(rows), rows * reciprocal(cols)))  # 1 / sqrt(r c)
        sigma2 = largest_singular_value(deflate(P, q, p), SINGLE_ROUNDS)
        tl.store(sigma2_ptr + matrix, size * sigma2, mask=live)
    if PACKED:
        store_packed(plan_ptr, first, batch, P, workspace, LINES)
    else:
        store_strided(plan_ptr, matrix, live, n, m, plan_stride_b, plan_stride_n, plan_stride_m, P)
