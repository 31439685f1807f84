"""The forward of the register family: one thread projects one matrix of up to 8x8, see ``sweeps.py``.

With f' and g' the potentials of the scaled-down sweeps (marginals left out), l = log2(r/c) = log2(C/R) and s sweeps,

    f = f' + s l,   g = g' + log2 c - (s - 1) l   (s = 0: f = f' + log2 r, g = 0).
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, exp2, log2, quotient, reciprocal
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from ..spectrum.jacobi import SINGLE_ROUNDS, deflate, largest_singular_value
from .memory import load_logits, store_line, store_strided
from .packed import load_again, store_packed
from .shared import workspace_of
from .sweeps import (
    SWEEPS_OF_4,
    SWEEPS_OF_8,
    columns_first,
    excluded_columns,
    far_bases,
    lifted,
    lifted_again,
    ones,
    poison,
    rebased,
    row_factors,
    scaled,
    scaling_sweeps,
    sums_over_rows,
    valid_lines,
    zeros,
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
def natural(base, powers, fine, s, halves, rest):
    """ln 2 times base + powers + fine + s (halves + rest), integers and halves first, whose sum is exact."""
    return tl.fma(base + (powers + halves * s), LN_2, (fine + rest * s) * LN_2)


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
    kappa = k * (1.0 / UNIT)
    kappa_columns = tl.where(n_iters == 0, 0.0, kappa)
    G, high = columns_first(x, kappa_columns, LINES)
    K, phi, G, near, all_near, spare_row = lifted(x, kappa, kappa_columns, G, zeros(k, LINES))
    spare_col = excluded_columns(G)
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    u = [exp2(value) for value in phi]
    v = ones(k, LINES)
    if n_iters == 0:
        u = row_factors(K, v, spare_row)
        broken = poison(u)  # a NaN has reached its row only
        u = [value + broken for value in u]
    SEGMENT: tl.constexpr = SWEEPS_OF_4 if LINES == 4 else SWEEPS_OF_8
    u, v = scaling_sweeps(K, u, v, spare_row, spare_col, tl.minimum(n_iters, SEGMENT))
    for done in range(SEGMENT, n_iters, SEGMENT):
        G, v = rebased(G, v)
        tl.debug_barrier()  # read again, and not before, as there are no registers to keep it in
        if PACKED:
            x = load_again(logits_ptr, first, batch, workspace, LINES)
        else:
            x = load_logits(
                logits_ptr, mask_ptr, first, batch, workspace, n, m,
                logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
                PACKED, LINES,
            )  # fmt: skip
        K, phi, _spare_row = lifted_again(x, kappa, kappa, G, near, all_near)
        u = row_factors(K, v, spare_row)
        u, v = scaling_sweeps(K, u, v, spare_row, spare_col, tl.minimum(n_iters - done, SEGMENT))

    r = tl.where(unit_rows != 0, 1.0, cols * reciprocal(rows))
    P = scaled([r * value for value in u], K, v)
    if WITH_INFO:
        inverse_c = tl.where(unit_rows != 0, cols * reciprocal(rows), 1.0)
        sums = sums_over_rows(P, ones(k, LINES), spare_col)
        residual = tl.zeros_like(k)
        for j in tl.static_range(LINES):
            residual = tl.maximum(residual, tl.where(spare_col[j] == 0.0, tl.abs(inverse_c * sums[j] - 1.0), 0.0))
        tl.store(residual_ptr + matrix, residual + poison(u), mask=live)
        tl.store(sweeps_ptr + matrix, tl.full([BLOCK], n_iters, tl.int32), mask=live)
        halves, rest = log2_ratio(cols, rows, LINES)
        up = tl.where(unit_rows != 0, n_iters, tl.maximum(n_iters, 1)).to(tl.float32)
        down = tl.where(unit_rows != 0, -n_iters, tl.minimum(1 - n_iters, 0)).to(tl.float32)
        powers_u, u = rebased(zeros(k, LINES), u)
        G, v = rebased(G, v)
        base, gamma = far_bases(high, kappa_columns, near)
        left = []
        right = []
        for i in tl.static_range(LINES):
            f = natural(-phi[i], powers_u[i] * UNIT, log2(u[i]), up, halves, rest)
            g = natural(base[i], G[i] * UNIT, gamma[i] + log2(v[i]), down, halves, rest)
            left = left + [tl.where(spare_row[i] == 0.0, f, 0.0)]
            right = right + [tl.where(spare_col[i] == 0.0, g, 0.0)]
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
