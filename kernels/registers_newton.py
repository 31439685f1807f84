"""Newton's method in the register family: one thread brings one matrix of up to 4x4 to its tolerance.

The method, its safeguard and their reasons are those of ``fastdsm/pytorch/newton.py``; here marginals are uniform, R valid
rows and C valid columns, and rows have mass 1, columns c = R / C (the plan is scaled in the end). Potentials are in base 2,
without log2 c: for the column potential g = base + fine, |fine| <= 1/2,

    P_ij = 2^(k x_ij + base_j - top_i) 2^fine_j / (sum over j),   k = log2 e / temperature,   h ln 2 = sum_i L_i - c sum_j g_j,

L_i = log2 sum_j 2^(k x_ij + g_j). What is rounded at the size of the potential, k x + base, is rounded alike in every step
that leaves the base alone, as if the logits were others close by; 2^fine is a factor good to a unit in its last place.

The step solves (H + diag(ground)) d = c - P^T 1, H the Laplacian with edges w_jk = sum_i P_ij P_ik: six edges and a ground,
columns taken out one after another by sums, products and quotients of positive numbers (``fastdsm/pytorch/laplacian.py``).

A matrix that is done keeps its state; a program ends when all of its matrices are done. With the potentials b of the
loop, the true ones are, with l = log2(C / R) and s sweeps or steps,

    g = b - l,   f = log2 r + l - L(b)      (s = 0: g = 0, f = log2 r - L(0)).
"""

import triton
import triton.language as tl

from .arithmetic import LN_2, LOG2_E, exp2, log2, quotient, reciprocal
from .configuration import finite_jit
from .jacobi import SINGLE_ROUNDS, deflate, largest_singular_value
from .registers_forward import load_logits, log2_count
from .registers_sweeps import log_sweep, max4, ones, store_packed, store_strided, sums_over_rows, valid_lines, zeros

PURE_BELOW = tl.constexpr(1e-2)
_ROUNDING = tl.constexpr(2.0**-21)  # share of c by which column sums are known: four units
_LONGEST_STEP = tl.constexpr(8.0)
_GROUND = tl.constexpr(1e-3)
_FINE_MAX = tl.constexpr(0.5)
_NO_EDGE = tl.constexpr(1e-30)
_SHORT = tl.constexpr(1e-3)  # log(1 + s) is s to half of this, and log2(1 + s) all rounding far below


@triton.jit
def plan_at(x, k, base, fine, spare_row):
    """P with row sums 1 and L of the column potential base + fine; base and fine are finite."""
    s = [tl.fma(x[e], k, base[e % 4]) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    top = [max4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]) for i in (0, 1, 2, 3)]
    top = [tl.where(spare_row[i] == 0.0, top[i], 0.0) for i in (0, 1, 2, 3)]
    v = [exp2(value) for value in fine]
    E = [exp2(s[e] - top[e // 4]) * v[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    total = [spare_row[i] + E[4 * i] + E[4 * i + 1] + E[4 * i + 2] + E[4 * i + 3] for i in (0, 1, 2, 3)]
    scale = [reciprocal(value) for value in total]
    P = [E[e] * scale[e // 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    return P, [top[i] + log2(total[i]) for i in (0, 1, 2, 3)]


@triton.jit
def residual_of(col_sums, inverse_c, spare_col):
    """max_j |col_sums_j / c - 1| over valid columns."""
    error = [tl.where(spare_col[j] == 0.0, tl.abs(inverse_c * col_sums[j] - 1.0), 0.0) for j in (0, 1, 2, 3)]
    return max4(error[0], error[1], error[2], error[3])


@triton.jit
def _objective(L, base, fine, c, spare_row):
    """h ln 2; excluded columns have potential 0."""
    rows = tl.zeros_like(c)
    cols = tl.zeros_like(c)
    for i in tl.static_range(4):
        rows += tl.where(spare_row[i] == 0.0, L[i], 0.0)
        cols += base[i] + fine[i]
    return rows - c * cols


@triton.jit
def _inverse(x):
    """1 / x, 0 where there is (nearly) nothing to divide by."""
    return tl.where(x > _NO_EDGE, reciprocal(tl.maximum(x, _NO_EDGE)), 0.0)


@triton.jit
def _edge(P, j: tl.constexpr, k: tl.constexpr):
    return P[j] * P[k] + P[4 + j] * P[4 + k] + P[8 + j] * P[8 + k] + P[12 + j] * P[12 + k]


@triton.jit
def edges(P):
    """w_jk = sum_i P_ij P_ik for jk = 01, 02, 03, 12, 13, 23."""
    return _edge(P, 0, 1), _edge(P, 0, 2), _edge(P, 0, 3), _edge(P, 1, 2), _edge(P, 1, 3), _edge(P, 2, 3)


@triton.jit
def solve(w, b, ground):
    """The d with (H + diag(ground)) d = b of the Laplacian with the edges w; 0 in a column without an edge."""
    w01, w02, w03, w12, w13, w23 = w
    b0, b1, b2, b3 = b
    g0, g1, g2, g3 = ground
    inverse0 = _inverse(w01 + w02 + w03 + g0)
    s01 = w01 * inverse0
    s02 = w02 * inverse0
    s03 = w03 * inverse0
    b1 += s01 * b0
    b2 += s02 * b0
    b3 += s03 * b0
    w12 += s01 * w02
    w13 += s01 * w03
    w23 += s02 * w03
    g1 += s01 * g0
    g2 += s02 * g0
    g3 += s03 * g0
    inverse1 = _inverse(w12 + w13 + g1)
    s12 = w12 * inverse1
    s13 = w13 * inverse1
    b2 += s12 * b1
    b3 += s13 * b1
    w23 += s12 * w13
    g2 += s12 * g1
    g3 += s13 * g1
    inverse2 = _inverse(w23 + g2)
    s23 = w23 * inverse2
    b3 += s23 * b2
    g3 += s23 * g2
    d3 = b3 * _inverse(g3)
    d2 = b2 * inverse2 + s23 * d3
    d1 = b1 * inverse1 + s12 * d2 + s13 * d3
    d0 = b0 * inverse0 + s01 * d1 + s02 * d2 + s03 * d3
    return [d0, d1, d2, d3]


@triton.jit
def direction(P, col_sums, residual, c, cols, spare_col):
    """Newton's direction, in natural units, around 0; 0 in excluded columns."""
    rough = tl.where(residual >= PURE_BELOW, tl.minimum(residual, 1.0) * _GROUND, _ROUNDING)
    b = [tl.where(spare_col[j] == 0.0, c - col_sums[j], 0.0) for j in (0, 1, 2, 3)]
    ground = [tl.where(spare_col[j] == 0.0, c * rough, 0.0) for j in (0, 1, 2, 3)]
    d = solve(edges(P), b, ground)
    mean = (d[0] + d[1] + d[2] + d[3]) * reciprocal(cols)
    return [tl.where(spare_col[j] == 0.0, d[j] - mean, 0.0) for j in (0, 1, 2, 3)]


@triton.jit
def moved(base, fine, d, length):
    """The potential after a step of length * d, d in natural units, as base and fine with |fine| <= 1/2."""
    fine = [tl.fma(length * LOG2_E, d[j], fine[j]) for j in (0, 1, 2, 3)]
    large = max4(tl.abs(fine[0]), tl.abs(fine[1]), tl.abs(fine[2]), tl.abs(fine[3])) > _FINE_MAX
    base = [tl.where(large, base[j] + fine[j], base[j]) for j in (0, 1, 2, 3)]
    return base, [tl.where(large, 0.0, value) for value in fine]


@triton.jit
def _length(d, damped):
    """Share of d to go: all of it or log(1 + s) / s of it, and no further than a spread of _LONGEST_STEP."""
    spread = max4(d[0], d[1], d[2], d[3]) + max4(-d[0], -d[1], -d[2], -d[3])
    spread = tl.maximum(spread, _NO_EDGE)
    wanted = tl.where(damped & (spread > _SHORT), LN_2 * log2(1.0 + spread), spread)
    return tl.minimum(tl.minimum(wanted, _LONGEST_STEP) * reciprocal(spread), 1.0)


@finite_jit
def _newton_fwd_kernel(
    logits_ptr, mask_ptr, temperature_ptr, plan_ptr, residual_ptr, sweeps_ptr, f_ptr, g_ptr, sigma2_ptr,
    batch: tl.int64, n: tl.int32, m: tl.int32, n_iters: tl.int32,
    logits_stride_b: tl.int64, logits_stride_n: tl.int64, logits_stride_m: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, mask_stride_m: tl.int64,
    plan_stride_b: tl.int64, plan_stride_n: tl.int64, plan_stride_m: tl.int64,
    temperature_stride: tl.int64, scale: tl.float32, has_mask: tl.int32, has_temperature: tl.int32, unit_rows: tl.int32,
    tol: tl.float32,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, WITH_INFO: tl.constexpr, WITH_SIGMA2: tl.constexpr,
):  # fmt: skip
    """Plan, and on request residual, steps (as sweeps), f, g and sigma2; at most ``n_iters`` steps, the first a sweep."""
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = matrix < batch
    tau = tl.load(temperature_ptr + matrix * temperature_stride, mask=live & (has_temperature != 0), other=1.0)
    k = quotient(tl.full([BLOCK], scale, tl.float32), tau)
    x = load_logits(
        logits_ptr, mask_ptr, matrix, live, n, m,
        logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
        PACKED, BLOCK,
    )  # fmt: skip
    _, _, base, total, spare_row, spare_col = log_sweep(x, k, x, n_iters, True)
    poison = 0.0 * (total[0] + total[1] + total[2] + total[3])
    k = tl.where(poison == 0.0, k, 0.0)
    x = [tl.where(poison == 0.0, value, 0.0) for value in x]
    base = [tl.where(poison == 0.0, value, 0.0) for value in base]
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    c = quotient(rows, cols)
    inverse_c = quotient(cols, rows)

    fine = zeros(x[0])
    P, L = plan_at(x, k, base, fine, spare_row)
    col_sums = sums_over_rows(P, ones(P[0]), zeros(P[0]))
    residual = residual_of(col_sums, inverse_c, spare_col)
    objective = _objective(L, base, fine, c, spare_row)
    d = direction(P, col_sums, residual, c, cols, spare_col)
    steps = tl.zeros_like(matrix).to(tl.int32) + tl.minimum(n_iters, 1)
    damped = residual < 0.0
    going = live & ~(residual <= tol)
    count = 1
    while (count < n_iters) & (tl.max(going.to(tl.int32), 0) > 0):
        count += 1
        steps += going.to(tl.int32)
        new_base, new_fine = moved(base, fine, d, _length(d, damped))
        P, L = plan_at(x, k, new_base, new_fine, spare_row)
        col_sums = sums_over_rows(P, ones(P[0]), zeros(P[0]))
        new_residual = residual_of(col_sums, inverse_c, spare_col)
        new_objective = _objective(L, new_base, new_fine, c, spare_row)
        risen = ~(new_objective <= objective) & ~(new_residual <= tol)
        refused = (residual >= PURE_BELOW) & ~damped & risen
        there = going & ~refused
        new_d = direction(P, col_sums, new_residual, c, cols, spare_col)
        base = [tl.where(there, new_base[j], base[j]) for j in (0, 1, 2, 3)]
        fine = [tl.where(there, new_fine[j], fine[j]) for j in (0, 1, 2, 3)]
        d = [tl.where(there, new_d[j], d[j]) for j in (0, 1, 2, 3)]
        residual = tl.where(there, new_residual, residual)
        objective = tl.where(there, new_objective, objective)
        damped = refused
        going = going & ~(residual <= tol)

    P, L = plan_at(x, k, base, fine, spare_row)
    r = tl.where(unit_rows != 0, 1.0, inverse_c) + poison
    P = [r * value for value in P]
    if PACKED:
        store_packed(plan_ptr, matrix, live, P, BLOCK)
    else:
        store_strided(plan_ptr, matrix, live, n, m, plan_stride_b, plan_stride_n, plan_stride_m, P)
    if WITH_INFO:
        tl.store(residual_ptr + matrix, residual + poison, mask=live)
        tl.store(sweeps_ptr + matrix, steps, mask=live)
        col_halves, col_rest = log2_count(cols)
        row_halves, row_rest = log2_count(rows)
        drift = (col_halves - row_halves) + (col_rest - row_rest)
        first_g = tl.where(n_iters == 0, 0.0, -drift)
        first_f = tl.where(unit_rows != 0, 0.0, drift) - first_g
        for i in tl.static_range(4):
            potential = tl.where(spare_row[i] == 0.0, LN_2 * (first_f - L[i]), 0.0)
            tl.store(f_ptr + matrix * n + i, potential, mask=live & (i < n))
            potential = tl.where(spare_col[i] == 0.0, LN_2 * (base[i] + (fine[i] + first_g)), 0.0)
            tl.store(g_ptr + matrix * m + i, potential, mask=live & (i < m))
    if WITH_SIGMA2:
        q = [tl.where(spare_row[i] == 0.0, tl.sqrt(reciprocal(rows)), 0.0) for i in (0, 1, 2, 3)]
        p = [tl.where(spare_col[j] == 0.0, tl.sqrt(reciprocal(cols)), 0.0) for j in (0, 1, 2, 3)]
        size = tl.sqrt(tl.where(unit_rows != 0, inverse_c, c))  # 1 / sqrt(r c)
        sigma2 = largest_singular_value(deflate(P, q, p), SINGLE_ROUNDS)
        tl.store(sigma2_ptr + matrix, size * sigma2, mask=live)
