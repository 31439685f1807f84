"""Newton's method in the register family: one thread brings one matrix of up to 8x8 to its tolerance.

The method, its safeguard and their reasons are those of ``fastdsm/pytorch/newton.py``; here marginals are uniform, R valid
rows and C valid columns, and rows have mass 1, columns c = R / C (the plan is scaled in the end). The first step, unless it
is the last, is three scaling sweeps instead of one: with 4 lines each takes 43 instructions, a step of Newton's 185 to 227,
and of 4.4 of those (logits of standard deviation 2, 32 matrices in step) two sweeps save one.

Potentials are in base 2, without log2 c, and as in ``sweeps.py``. A column's is its base, G and the logarithm of a factor v,

    K_ij = 2^(k x_ij + G_j - phi_i),   P_ij = K_ij v_j / t_i,   t_i = sum_j K_ij v_j.

In steps the last column's factor is 1: with a factor of 4, or up to 8, a half-sweep, v and t are within 2^12, or 2^17, of 1 at
the start. A step multiplies v, and takes three exponentials, not sixteen; what K was rounded by is the same in every step, as
if the logits were others close by. Where the factors may have travelled 2^24, powers of two go from v to G and K is made anew:
none is beyond that and one step, and the product of two t is within float32. Packed logits are then read again, which takes
fewer registers than keeping them. What Newton's method descends on is, but for a constant,

    h / ln 2 = sum_i log2 t_i - c sum_j log2 v_j,

and is looked at while the residual is large. The step solves H d = c - P^T 1 for d_3 = 0, H the Laplacian with edges w_jk =
sum_i P_ij P_ik. A ground of rho c on each of C columns, the solution of which has mean 0 as the right side has, is the same
but for a constant as edges of rho c / C between all of them. Columns are taken out one after another by sums, products and
quotients of positive numbers (``fastdsm/pytorch/laplacian.py``).

A matrix that is done keeps its state, whatever the others of its program go on to do; a program ends when all are done. With
the potentials b of the loop, the true ones are, with l = log2(C / R) and s sweeps or steps,

    g = b - l,   f = log2 r + l - L(b),   L_i(b) = log2 sum_j 2^(k x_ij + b_j) = phi_i + log2 t_i,

and for s = 0: g = 0, f = log2 r - L(0).
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, LOG2_E, exp2, log2, quotient, reciprocal
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from ..common.newton_rules import LONGEST_STEP, PURE_BELOW, roughness, step_share
from ..spectrum.jacobi import SINGLE_ROUNDS, deflate, largest_singular_value
from .forward import log2_ratio
from .memory import load_logits, store_line, store_strided
from .packed import load_again, load_packed, store_packed
from .shared import workspace_of
from .sweeps import (
    chosen,
    column_maxima,
    columns_first,
    excluded_columns,
    far_bases,
    first_factors,
    largest,
    lifted,
    lifted_again,
    ones,
    plus,
    poison,
    rebased,
    reciprocals_of,
    scaled,
    scaling_sweep,
    sums_over_rows,
    valid_lines,
    zeros,
)

_FAR = tl.constexpr(24.0)
_FIRST_SWEEPS = tl.constexpr(3)
# How much care the next step of a matrix takes: none is made; a pure one; one that may be shortened or refused; first P again,
# as the last one was refused; first a new K.
_DONE, _PURE, _WATCHED, _REFUSED, _REBASED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
_SHORTEST = tl.constexpr(1e-30)


@triton.jit
def scaled_plan(K, v, spare_row):
    """P of the factors of all columns but the last, and its t, 1 on excluded rows."""
    LINES: tl.constexpr = len(spare_row)
    E = []
    for e in tl.static_range(LINES * LINES):
        if e % LINES == LINES - 1:
            E = E + [K[e]]
        else:
            E = E + [K[e] * v[e % LINES]]
    t = []
    for i in tl.static_range(LINES):
        total = spare_row[i] + E[LINES * i + LINES - 1]
        for j in tl.static_range(LINES - 1):
            total += E[LINES * i + j]
        t = t + [total]
    return scaled(reciprocals_of(t), E, ones(t[0], LINES)), t


@triton.jit
def missing(P, share):
    """What column sums lack of their ``share``, c or, on excluded columns, 0; and the largest of it."""
    LINES: tl.constexpr = len(share)
    sums = sums_over_rows(P, ones(P[0], LINES), zeros(P[0], LINES))
    b = []
    for j in tl.static_range(LINES):
        b = b + [share[j] - sums[j]]
    return b, largest([tl.abs(value) for value in b])


@triton.jit
def shares(c, spare_col):
    """c on valid columns, 0 on others, which tells them apart where no ``spare_col`` is kept."""
    return [tl.where(spare == 0.0, c, 0.0) for spare in spare_col]


@triton.jit
def _log2_product(values):
    """log2 of the product, two factors at a time."""
    COUNT: tl.constexpr = len(values)
    total = log2(values[0] * values[1])
    for i in tl.static_range(2, COUNT - COUNT % 2, 2):
        total += log2(values[i] * values[i + 1])
    if COUNT % 2 == 1:
        total += log2(values[COUNT - 1])
    return total


@triton.jit
def _objective(t, v, c):
    """h / ln 2 but for a constant."""
    return _log2_product(t) - c * _log2_product(v)


@triton.jit
def edges(P, share, rough, rows):
    """w_jk = sum_i P_ij P_ik and what a ground of ``rough`` times each column's mass adds, as w[j][k - j - 1] for j < k."""
    LINES: tl.constexpr = len(share)
    w = []
    for j in tl.static_range(LINES - 1):
        ground = share[j] * (rough * reciprocal(rows))
        to_later = []
        for k in tl.static_range(j + 1, LINES):
            edge = ground * share[k]
            for i in tl.static_range(LINES):
                edge += P[LINES * i + j] * P[LINES * i + k]
            to_later = to_later + [edge]
        w = w + [to_later]
    return w


@triton.jit
def ties(spare_col):
    """Edges of 1 to the last column: of excluded columns, which have no other; if it is one itself, of the first valid one."""
    LINES: tl.constexpr = len(spare_col)
    before = spare_col[LINES - 1]  # whether it and all columns so far are excluded
    tie = []
    for j in tl.static_range(LINES - 1):
        tie = tie + [spare_col[j] + before * (1.0 - spare_col[j])]
        before *= spare_col[j]
    return tie


@triton.jit
def _eliminated(w, b):
    """Edges and right side of all columns but the first, its share of each of them, and its own part of d."""
    LATER: tl.constexpr = len(b) - 1
    total = w[0][0]
    for k in tl.static_range(1, LATER):
        total += w[0][k]
    inverse = reciprocal(total)
    s = [edge * inverse for edge in w[0]]
    rest = []
    for k in tl.static_range(LATER):
        rest = rest + [b[k + 1] + s[k] * b[0]]
    left = []
    for k in tl.static_range(LATER - 1):
        to_later = []
        for m in tl.static_range(k + 1, LATER):
            to_later = to_later + [w[k + 1][m - k - 1] + s[k] * w[0][m]]
        left = left + [to_later]
    return left, rest, s, b[0] * inverse


@triton.jit
def solve(w, b, tie):
    """The d, 0 in the last column, with H d = b of the Laplacian with the edges w and ``tie``."""
    COLUMNS: tl.constexpr = len(tie)
    left = []
    for j in tl.static_range(COLUMNS):
        to_later = []
        for k in tl.static_range(COLUMNS - 1 - j):
            to_later = to_later + [w[j][k]]
        left = left + [to_later + [w[j][COLUMNS - 1 - j] + tie[j]]]
    s = []
    own = []
    for _ in tl.static_range(COLUMNS):
        left, b, s_first, own_first = _eliminated(left, b)
        s = s + [s_first]
        own = own + [own_first]
    d = []
    for j in tl.static_range(COLUMNS - 1, -1, -1):
        value = own[j]
        for k in tl.static_range(COLUMNS - 1 - j):
            value += s[j][k] * d[k]
        d = [value] + d
    return d


@triton.jit
def direction(P, b, residual, share, rows, tie):
    """Newton's direction, in natural units, 0 in the last column and in excluded ones."""
    return solve(edges(P, share, roughness(residual), rows), b, tie)


@triton.jit
def _spread(d):
    return tl.maximum(largest(d), 0.0) + tl.maximum(largest([-value for value in d]), 0.0)


@triton.jit
def _care(going, residual, damped, travelled):
    """_DONE to _REBASED."""
    care = tl.where(damped, _REFUSED, tl.where(residual >= PURE_BELOW, _WATCHED, _PURE))
    return tl.where(going, tl.where(travelled > _FAR, _REBASED, care), _DONE)


@triton.jit
def _mean(potential, valid, cols):
    """Mean over valid columns."""
    total = tl.zeros_like(cols)
    for j in tl.static_range(len(valid)):
        total += tl.where(valid[j], potential[j], 0.0)
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
    BLOCK: tl.constexpr, PACKED: tl.constexpr, WITH_INFO: tl.constexpr, WITH_SIGMA2: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Plan, and on request residual, steps (as sweeps), f, g and sigma2; at most ``n_iters`` steps, the first a sweep."""
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
    G, _high = columns_first(x, kappa_columns, LINES)
    K, phi, G, near, all_near, spare_row = lifted(x, kappa, kappa_columns, G, zeros(k, LINES))
    spare_col = excluded_columns(G)
    u, start = first_factors(phi, spare_col, n_iters)
    u, v = scaling_sweep(K, u, spare_row, start, False)
    rows = valid_lines(spare_row)
    cols = valid_lines(spare_col)
    c = quotient(rows, cols)
    inverse_c = quotient(cols, rows) + poison(u)  # where it is NaN, so are residual and plan
    share = shares(c, spare_col)
    tie = ties(spare_col)
    back = _mean([log2(value) for value in v], [value == 0.0 for value in spare_col], cols)  # what the mean of g has lost
    if n_iters > 1:
        for _ in tl.static_range(_FIRST_SWEEPS - 1):
            u, v = scaling_sweep(K, u, spare_row, spare_col, False)
    last = reciprocal(v[LINES - 1])
    factors = []
    for j in tl.static_range(LINES - 1):
        factors = factors + [v[j] * last]
    v = factors
    P, t = scaled_plan(K, v, spare_row)
    b, residual = missing(P, share)
    residual *= inverse_c
    objective = _objective(t, v, c)
    travelled = tl.zeros_like(residual)
    steps = tl.zeros_like(matrix).to(tl.int32) + tl.minimum(n_iters, 1)
    damped = residual < 0.0
    care = _care(live & (residual > tol), residual, damped, travelled)
    most = tl.max(care, 0)
    count = 1
    while (count < n_iters) & (most > _DONE):
        count += 1
        going = care > _DONE
        steps += going.to(tl.int32)
        if most > _WATCHED:
            if most == _REBASED:
                new = care == _REBASED
                powers, left = rebased(zeros(k, LINES - 1), v)
                powers, v = chosen(new, powers, zeros(k, LINES - 1)), chosen(new, left, v)
                G = plus(G[0 : LINES - 1], powers) + G[LINES - 1 :]
                back -= _mean(powers, [value > 0.0 for value in share[0 : LINES - 1]], cols) * UNIT
                again_x = load_again(logits_ptr, first, batch, workspace, LINES) if PACKED else x
                K, _phi, _spare_row = lifted_again(again_x, kappa, kappa, G, near, all_near)
                travelled = tl.where(new, 0.0, travelled)
            P, t = scaled_plan(K, v, spare_row)
            b, _residual = missing(P, share)
            objective = tl.where(care == _REBASED, _objective(t, v, c), objective)
        d = direction(P, b, residual, share, rows, tie)
        reach = largest([tl.abs(value) for value in d])
        length = tl.minimum(reciprocal(tl.maximum(reach, _SHORTEST)) * (0.5 * LONGEST_STEP), 1.0) * LOG2_E
        if most > _PURE:
            length = tl.where(care > _PURE, LOG2_E * step_share(_spread(d), damped), length)
        length = tl.where(going, length, 0.0)
        new_v = []
        for j in tl.static_range(LINES - 1):
            new_v = new_v + [v[j] * exp2(length * d[j])]
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
            new_v = chosen(damped, v, new_v)
            new_residual = tl.where(damped, residual, new_residual)
        v, residual = new_v, new_residual
        care = _care(going & ~(residual <= tol), residual, damped, travelled)
        most = tl.max(care, 0)

    if most > _WATCHED:
        P, t = scaled_plan(K, v, spare_row)
    r = tl.where(unit_rows != 0, 1.0 + 0.0 * inverse_c, inverse_c)
    P = [r * value for value in P]
    if PACKED:
        store_packed(plan_ptr, first, batch, P, workspace, LINES)
    else:
        store_strided(plan_ptr, matrix, live, n, m, plan_stride_b, plan_stride_n, plan_stride_m, P)
    if WITH_SIGMA2:
        q = [tl.where(spare_row[i] == 0.0, tl.sqrt(reciprocal(rows)), 0.0) for i in (0, 1, 2, 3)]
        p = [tl.where(share[j] > 0.0, tl.sqrt(reciprocal(cols)), 0.0) for j in (0, 1, 2, 3)]
        size = tl.sqrt(tl.where(unit_rows != 0, inverse_c, c))  # 1 / sqrt(r c)
        sigma2 = largest_singular_value(deflate(P, q, p), SINGLE_ROUNDS)
        tl.store(sigma2_ptr + matrix, size * sigma2, mask=live)
    if WITH_INFO:
        tl.store(residual_ptr + matrix, residual, mask=live)
        tl.store(sweeps_ptr + matrix, steps, mask=live)
        last_x = load_packed(logits_ptr, first, batch, workspace, LINES) if PACKED else x
        high, spare_col = column_maxima(last_x, LINES)
        _K, phi, spare_row = lifted_again(last_x, kappa, kappa_columns, G, near, all_near)
        base, gamma = far_bases(high, kappa_columns, near)
        fine = [log2(value) for value in v] + zeros(k, 1)
        back -= _mean(fine, [value == 0.0 for value in spare_col], cols)
        halves, rest = log2_ratio(cols, rows, LINES)
        drift = halves + rest
        first_g = tl.where(n_iters == 0, 0.0, -drift)
        first_f = tl.where(unit_rows != 0, 0.0, drift) - first_g
        f = []
        g = []
        for i in tl.static_range(LINES):
            left = tl.fma(-phi[i], LN_2, (first_f - (log2(t[i]) + back)) * LN_2)
            right = tl.fma(base[i] + G[i] * UNIT, LN_2, (gamma[i] + fine[i] + (first_g + back)) * LN_2)
            f = f + [tl.where(spare_row[i] == 0.0, left, 0.0)]
            g = g + [tl.where(spare_col[i] == 0.0, right, 0.0)]
        store_line(f_ptr + matrix * n, 1, live, n, f)
        store_line(g_ptr + matrix * m, 1, live, m, g)
