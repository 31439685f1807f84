"""Newton's method in the register family: one thread brings one matrix of up to 4x4 to its tolerance.

The method, its safeguard and their reasons are those of ``fastdsm/pytorch/newton.py``; here marginals are uniform, R valid
rows and C valid columns, and rows have mass 1, columns c = R / C (the plan is scaled in the end). The first step, unless it
is the last, is three scaling sweeps instead of one: each takes 43 instructions, a step of Newton's 185 to 227, and of 4.4
of those (logits of standard deviation 2, 32 matrices in step) two sweeps save one.

Potentials are in base 2, without log2 c. A column potential is a base and the logarithm of a factor v:

    K_ij = 2^(k x_ij + base_j - lift_i),   k = log2 e / temperature,   P_ij = K_ij v_j / t_i,   t_i = sum_j K_ij v_j.

The first K is divided by its column maxima, as the first sweep leaves it, and lift is 0. Where a row sum of its plan is below
2^-16 it is made again, as every later one is: lift the row maxima, v = 1. In steps the last column's factor is 1: with four
per sweep, no t is below 2^-24 or v above 2^10 at the start.

A step multiplies v, and takes three exponentials, not sixteen; what K was rounded by is the same in every step, as if the
logits were others close by. Where the factors may have travelled 2^24, K is made anew: none is beyond that and one step, and
the product of two t is within float32. Packed logits are then read again, which takes fewer registers than keeping them. What
Newton's method descends on is, but for a constant,

    h / ln 2 = sum_i log2 t_i - c sum_j log2 v_j,

and is looked at while the residual is large. The step solves H d = c - P^T 1 for d_3 = 0, H the Laplacian with edges w_jk =
sum_i P_ij P_ik. A ground of rho c on each of C columns, the solution of which has mean 0 as the right side has, is the same
but for a constant as edges of rho c / C between all of them. Columns are taken out one after another by sums, products and
quotients of positive numbers (``fastdsm/pytorch/laplacian.py``).

A matrix that is done keeps its state, whatever the others of its program go on to do; a program ends when all are done. With
the potentials b of the loop, the true ones are, with l = log2(C / R) and s sweeps or steps,

    g = b - l,   f = log2 r + l - L(b),   L_i(b) = log2 sum_j 2^(k x_ij + b_j)      (s = 0: g = 0, f = log2 r - L(0)).
"""

import triton
import triton.language as tl

from .arithmetic import LN_2, LOG2_E, exp2, log2, quotient, reciprocal, reciprocals
from .configuration import finite_jit
from .jacobi import SINGLE_ROUNDS, deflate, largest_singular_value
from .newton_rules import LONGEST_STEP, PURE_BELOW, roughness, step_share
from .registers_forward import load_logits, log2_count
from .registers_sweeps import (
    load_packed,
    log_columns,
    log_kernel,
    max4,
    ones,
    scaling_sweep,
    store_packed,
    store_strided,
    sums_over_cols,
    sums_over_rows,
    valid_lines,
    zeros,
)

_FAR = tl.constexpr(24.0)
_LARGEST = tl.constexpr(2.0**16)
_FIRST_SWEEPS = tl.constexpr(3)
# How much care the next step of a matrix takes: none is made; a pure one; one that may be shortened or refused; first P again,
# as the last one was refused; first a new K.
_DONE, _PURE, _WATCHED, _REFUSED, _REBASED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_SHORTEST = tl.constexpr(1e-30)


@triton.jit
def _replaced(new, K, lift, v, new_K, new_lift):
    """K, lift and factors, those of a K that was just made where ``new``."""
    K = [tl.where(new, new_K[e], K[e]) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    lift = [tl.where(new, new_lift[i], lift[i]) for i in (0, 1, 2, 3)]
    return K, lift, [tl.where(new, 1.0, value) for value in v]


@triton.jit
def scaled_plan(K, v, spare_row):
    """P of the factors of all columns but the last, and its t, 1 on excluded rows."""
    E = [K[e] if e % 4 == 3 else K[e] * v[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    t = [spare_row[i] + E[4 * i + 3] + E[4 * i] + E[4 * i + 1] + E[4 * i + 2] for i in (0, 1, 2, 3)]
    s0, s1 = reciprocals(t[0], t[1])
    s2, s3 = reciprocals(t[2], t[3])
    scale = [s0, s1, s2, s3]
    return [E[e] * scale[e // 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)], t


@triton.jit
def missing(P, share):
    """What column sums lack of their ``share``, c or, on excluded columns, 0; and the largest of it."""
    sums = sums_over_rows(P, ones(P[0]), zeros(P[0]))
    b = [share[j] - sums[j] for j in (0, 1, 2, 3)]
    return b, max4(tl.abs(b[0]), tl.abs(b[1]), tl.abs(b[2]), tl.abs(b[3]))


@triton.jit
def shares(c, spare_col):
    """c on valid columns, 0 on others."""
    return [tl.where(spare_col[j] == 0.0, c, 0.0) for j in (0, 1, 2, 3)]


@triton.jit
def _objective(t, v, c):
    """h / ln 2 but for a constant."""
    return log2(t[0] * t[1]) + log2(t[2] * t[3]) - c * (log2(v[0] * v[1]) + log2(v[2]))


@triton.jit
def _edge(P, ground, share, j: tl.constexpr, k: tl.constexpr):
    return ground[j] * share[k] + P[j] * P[k] + P[4 + j] * P[4 + k] + P[8 + j] * P[8 + k] + P[12 + j] * P[12 + k]


@triton.jit
def edges(P, share, rough, rows):
    """w_jk = sum_i P_ij P_ik for jk = 01, 02, 03, 12, 13, 23, and what a ground of ``rough`` times each column's mass adds."""
    ground = [share[j] * (rough * reciprocal(rows)) for j in (0, 1, 2)]
    return (
        _edge(P, ground, share, 0, 1), _edge(P, ground, share, 0, 2), _edge(P, ground, share, 0, 3),
        _edge(P, ground, share, 1, 2), _edge(P, ground, share, 1, 3), _edge(P, ground, share, 2, 3),
    )  # fmt: skip


@triton.jit
def ties(spare_col):
    """Edges of 1 to the last column: of excluded columns, which have no other; if it is one itself, of the first valid one."""
    s0, s1, s2, s3 = spare_col
    return [s0 + s3 * (1.0 - s0), s1 + s3 * s0 * (1.0 - s1), s2 + s3 * s0 * s1 * (1.0 - s2)]


@triton.jit
def solve(w, b, tie):
    """The d, 0 in the last column, with H d = b of the Laplacian with the edges w and ``tie``."""
    w01, w02, w03, w12, w13, w23 = w
    b0, b1, b2, _b3 = b
    w03 += tie[0]
    w13 += tie[1]
    w23 += tie[2]
    inverse0 = reciprocal(w01 + w02 + w03)
    s01 = w01 * inverse0
    s02 = w02 * inverse0
    b1 += s01 * b0
    b2 += s02 * b0
    w12 += s01 * w02
    w13 += s01 * w03
    w23 += s02 * w03
    inverse1 = reciprocal(w12 + w13)
    s12 = w12 * inverse1
    b2 += s12 * b1
    w23 += s12 * w13
    d2 = b2 * reciprocal(w23)
    d1 = b1 * inverse1 + s12 * d2
    d0 = b0 * inverse0 + s01 * d1 + s02 * d2
    return [d0, d1, d2]


@triton.jit
def direction(P, b, residual, share, rows, tie):
    """Newton's direction, in natural units, 0 in the last column and in excluded ones."""
    return solve(edges(P, share, roughness(residual), rows), b, tie)


@triton.jit
def _spread(d):
    return max4(d[0], d[1], d[2], 0.0) + max4(-d[0], -d[1], -d[2], 0.0)


@triton.jit
def _care(going, residual, damped, travelled):
    """_DONE to _REBASED."""
    care = tl.where(damped, _REFUSED, tl.where(residual >= PURE_BELOW, _WATCHED, _PURE))
    return tl.where(going, tl.where(travelled > _FAR, _REBASED, care), _DONE)


@triton.jit
def _mean(potential, spare_col, cols):
    """Mean over valid columns."""
    total = tl.zeros_like(cols)
    for j in tl.static_range(4):
        total += tl.where(spare_col[j] == 0.0, potential[j], 0.0)
    return total * reciprocal(cols)


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
    K, high, total, spare_col = log_columns(x, k, x, True)
    base = [-value for value in high]
    swept = [tl.where(n_iters == 0, 0.0, base[j] - log2(total[j])) for j in (0, 1, 2, 3)]
    lift = zeros(K[0])
    v = [reciprocal(value) for value in total]
    if PACKED:
        spare_row = zeros(K[0])
    else:
        spare_row = [tl.where(i < n, 0.0, tl.full([BLOCK], 1.0, tl.float32)) for i in (0, 1, 2, 3)]
    u = [reciprocal(value) for value in sums_over_cols(K, v, spare_row)]
    anew = ~(max4(u[0], u[1], u[2], u[3]) <= _LARGEST) | (n_iters == 0)
    if tl.max(anew.to(tl.int32), 0) > 0:
        new_K, new_lift, new_spare_row = log_kernel(x, k, swept)
        new_u = [reciprocal(value) for value in sums_over_cols(new_K, ones(u[0]), new_spare_row)]
        K, lift, v = _replaced(anew, K, lift, v, new_K, new_lift)
        base = [tl.where(anew, swept[j], base[j]) for j in (0, 1, 2, 3)]
        u = [tl.where(anew, new_u[i], u[i]) for i in (0, 1, 2, 3)]
        spare_row = [tl.where(anew, new_spare_row[i], spare_row[i]) for i in (0, 1, 2, 3)]
    poison = 0.0 * (u[0] + u[1] + u[2] + u[3])
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    c = quotient(rows, cols)
    inverse_c = quotient(cols, rows)
    share = shares(c, spare_col)
    tie = ties(spare_col)
    first_mean = _mean(swept, spare_col, cols)
    if n_iters > 1:
        for _ in tl.static_range(_FIRST_SWEEPS - 1):
            u, v = scaling_sweep(K, u, spare_row, spare_col, False)
    last = reciprocal(v[3])
    v = [v[j] * last for j in (0, 1, 2)]
    P, t = scaled_plan(K, v, spare_row)
    b, residual = missing(P, share)
    residual *= inverse_c
    objective = _objective(t, v, c)
    travelled = tl.zeros_like(residual)
    steps = tl.zeros_like(matrix).to(tl.int32) + tl.minimum(n_iters, 1)
    damped = residual < 0.0
    care = _care(live & (poison == 0.0) & ~(residual <= tol), residual, damped, travelled)
    most = tl.max(care, 0)
    count = 1
    while (count < n_iters) & (most > _DONE):
        count += 1
        going = care > _DONE
        steps += going.to(tl.int32)
        if most > _WATCHED:
            if most == _REBASED:
                new = care == _REBASED
                base = [tl.where(new, base[j] + log2(v[j]), base[j]) for j in (0, 1, 2)] + [base[3]]
                if PACKED:
                    x = load_packed(logits_ptr, matrix, live, BLOCK)
                new_K, new_lift, _spare_row = log_kernel(x, k, base)
                K, lift, v = _replaced(new, K, lift, v, new_K, new_lift)
                travelled = tl.where(new, 0.0, travelled)
            P, t = scaled_plan(K, v, spare_row)
            b, _residual = missing(P, share)
            objective = tl.where(care == _REBASED, _objective(t, v, c), objective)
        d = direction(P, b, residual, share, rows, tie)
        reach = tl.maximum(tl.maximum(tl.abs(d[0]), tl.abs(d[1])), tl.abs(d[2]))
        length = tl.minimum(reciprocal(tl.maximum(reach, _SHORTEST)) * (0.5 * LONGEST_STEP), 1.0) * LOG2_E
        if most > _PURE:
            length = tl.where(care > _PURE, LOG2_E * step_share(_spread(d), damped), length)
        length = tl.where(going, length, 0.0)
        new_v = [v[j] * exp2(length * d[j]) for j in (0, 1, 2)]
        travelled = tl.fma(length, reach, travelled)
        P, t = scaled_plan(K, new_v, spare_row)
        b, new_residual = missing(P, share)
        new_residual *= inverse_c
        damped_before, damped = damped, residual < 0.0
        if most > _PURE:
            new_objective = _objective(t, new_v, c)
            risen = ~(new_objective <= objective) & ~(new_residual <= tol)
            damped = (care > _PURE) & (residual >= PURE_BELOW) & ~damped_before & risen
            objective = tl.where((care > _PURE) & ~damped, new_objective, objective)
            new_v = [tl.where(damped, v[j], new_v[j]) for j in (0, 1, 2)]
            new_residual = tl.where(damped, residual, new_residual)
        v, residual = new_v, new_residual
        care = _care(going & ~(residual <= tol), residual, damped, travelled)
        most = tl.max(care, 0)

    if most > _WATCHED:
        P, t = scaled_plan(K, v, spare_row)
    r = tl.where(unit_rows != 0, 1.0, inverse_c) + poison
    P = [r * value for value in P]
    if PACKED:
        store_packed(plan_ptr, matrix, live, P, BLOCK)
    else:
        store_strided(plan_ptr, matrix, live, n, m, plan_stride_b, plan_stride_n, plan_stride_m, P)
    if WITH_INFO:
        t = scaled_plan(K, v, spare_row)[1]
        end = [base[0] + log2(v[0]), base[1] + log2(v[1]), base[2] + log2(v[2]), base[3]]
        tl.store(residual_ptr + matrix, residual + poison, mask=live)
        tl.store(sweeps_ptr + matrix, steps, mask=live)
        shift = first_mean - _mean(end, spare_col, cols)
        col_halves, col_rest = log2_count(cols)
        row_halves, row_rest = log2_count(rows)
        drift = (col_halves - row_halves) + (col_rest - row_rest)
        first_g = tl.where(n_iters == 0, 0.0, -drift)
        first_f = tl.where(unit_rows != 0, 0.0, drift) - first_g
        for i in tl.static_range(4):
            potential = tl.where(spare_row[i] == 0.0, LN_2 * (first_f - (lift[i] + (log2(t[i]) + shift))), 0.0)
            tl.store(f_ptr + matrix * n + i, potential, mask=live & (i < n))
            potential = tl.where(spare_col[i] == 0.0, LN_2 * (end[i] + (first_g + shift)), 0.0)
            tl.store(g_ptr + matrix * m + i, potential, mask=live & (i < m))
    if WITH_SIGMA2:
        q = [tl.where(spare_row[i] == 0.0, tl.sqrt(reciprocal(rows)), 0.0) for i in (0, 1, 2, 3)]
        p = [tl.where(spare_col[j] == 0.0, tl.sqrt(reciprocal(cols)), 0.0) for j in (0, 1, 2, 3)]
        size = tl.sqrt(tl.where(unit_rows != 0, inverse_c, c))  # 1 / sqrt(r c)
        sigma2 = largest_singular_value(deflate(P, q, p), SINGLE_ROUNDS)
        tl.store(sigma2_ptr + matrix, size * sigma2, mask=live)
