"""Newton's method on tiles: matrices of up to 64 lines, brought to their tolerance on chip, with every option.

The method, its safeguard and their reasons are those of ``fastdsm/pytorch/newton.py``, the system is that of
``fastdsm/pytorch/system.py``; tiles and vectors are those of ``sweeps.py``. Marginals are in units of the largest r. A step
makes the plan anew from y, base and fine, P = exp(y + base + fine - L), so that nothing drifts.

Cold matrices are warmed, unless sweeps have brought their residual to ``_COOLED_BELOW``: of y beyond ``_WARM_RANGE`` nats a
2^h-th within them is solved first, and each time the residual is that small h falls by one and the potentials double, in a step
of its own.

On a tile one direction takes as long as a dozen sweeps or a hundred. So the first step is not one sweep but several, launched
as sweeps are, with their own layout; and for the matrices that these leave scaling sweeps here, as long as the rate at which
their residual falls promises that they arrive.
"""

import triton
import triton.language as tl

from ..common.arithmetic import exp2, log2, narrow, reciprocal
from ..common.bases import UNIT
from ..common.configuration import finite_jit
from ..common.memory import load_entries, store_entries
from ..common.newton_rules import PURE_BELOW, roughness, step_share
from .laplacian import solved
from .sweeps import (
    col_sums,
    exp,
    fused,
    in_units,
    inverse_temperatures,
    lifted,
    load_logits,
    log,
    log_col_step,
    marginals,
    over_cols,
    over_matrices,
    over_rows,
    places,
    quotient,
    row_maxima,
    row_sums,
    store_on_base,
    tile_offsets,
    unrelated,
    vector_max,
    vector_offsets,
    vector_sum,
)

_FINE_MAX = tl.constexpr(0.5)
_WARM_RANGE = tl.constexpr(128.0)  # nats
_COOLED_BELOW = tl.constexpr(0.1)
_LONGEST_SEGMENT = tl.constexpr(8)  # sweeps on one K, if its marginals allow as many
_MOST_ACCURATE, _LEAST_ACCURATE = tl.constexpr(1e-3), tl.constexpr(1e-1)  # of a direction; between them it is the residual


@triton.jit
def system(x, k, f, r, c, col_first, has_row, has_col, unit_rows, uniform_scalings):
    """y finite, its bases, f relative to them; r, c and what is aimed at in units of the largest r, that unit, the sweeps of a
    segment, poison (BLOCK_B,).

    Poison is 0 where all of a matrix is finite and NaN where not: y is 0 there, and results are marked in the end.
    """
    r, c, scalings = marginals(x, r, c, has_row, has_col, unit_rows, uniform_scalings)
    y, G, R, f = lifted(x, k, f, r, col_first)
    poison = vector_sum(row_sums(tl.where(y == -float("inf"), 0.0, y * 0.0)))
    sound = over_matrices(poison == 0.0)
    y, G, R, f = tl.where(over_rows(sound), y, 0.0), tl.where(sound, G, 0.0), tl.where(sound, R, 0.0), tl.where(sound, f, 0.0)
    unit = vector_max(r)
    unit = tl.where(unit > 0, unit, 1.0)
    r, c = quotient(r, over_matrices(unit)), quotient(c, over_matrices(unit))
    return y, G, R, f, r, c, c * over_matrices(quotient(vector_sum(r), vector_sum(c))), unit, scalings, poison


@triton.jit
def ones_of(vector):
    """(BLOCK_B,) ones."""
    return tl.full([vector.shape[1]], 1.0, vector.dtype)


@triton.jit
def plan_at(y, share, base, fine, r):
    """The plan of ``share`` (BLOCK_B,) of y with exact rows at a column potential, and its log-sums L."""
    exponent = fused(y, over_rows(over_matrices(share)), over_cols(base))
    top = row_maxima(exponent)
    top = tl.where(top == -float("inf"), 0.0, top)
    P = exp(exponent - over_rows(top)) * over_cols(exp(fine))
    total = tl.where(r != 0, row_sums(P), 1.0)
    return P * over_rows(r * reciprocal(total)), tl.where(r != 0, top + log(total, r != 0), 0.0)


@triton.jit
def folded(base, fine):
    """The same potential with |fine| at most 1/2 nat, the base left alone where that holds already."""
    large = over_matrices(vector_max(tl.abs(fine)) > in_units(_FINE_MAX))
    return tl.where(large, base + fine, base), tl.where(large, 0.0, fine)


@triton.jit
def judged(P, L, base, fine, r, c, aim):
    """P^T 1, the residual and h of a plan."""
    sums = col_sums(P)
    residual = vector_max(tl.where(c != 0, tl.abs(quotient(sums, c) - 1.0), 0.0))
    return sums, residual, vector_sum(r * L) - vector_sum(aim * (base + fine))


@triton.jit
def direction(P, sums, residual, r, c, aim, m, COLS: tl.constexpr):
    """Newton's direction in nats, around 0, and 0 on excluded columns."""
    accuracy = tl.minimum(tl.maximum(residual, _MOST_ACCURATE), _LEAST_ACCURATE)
    b = aim - sums
    b -= c * over_matrices(quotient(vector_sum(b), vector_sum(c)))  # rounding, along which H is next to nothing
    d = solved(P, b, c * over_matrices(roughness(residual)), r, c, m, accuracy, COLS)
    valid = (c != 0).to(d.dtype)
    return (d - over_matrices(quotient(vector_sum(d * valid), vector_sum(valid)))) * valid


@triton.jit
def swept(y, base, r, c, aim, going, scalings, tol, SEGMENTS: tl.constexpr):
    """The column potential after scaling sweeps; a matrix stops at ``tol``, or where it would not get there in time."""
    one = ones_of(c)
    before = one * float("inf")
    wanted = log2((one * tol).to(c.dtype))
    going = going & (scalings > 0)
    left = SEGMENTS
    while (left > 0) & (tl.max(going.to(tl.int32), axis=0) > 0):
        K, _ = plan_at(y, one, base, tl.zeros_like(base), r)
        sums = col_sums(K)
        residual = vector_max(tl.where(c != 0, tl.abs(quotient(sums, aim) - 1.0), 0.0))
        arrives = log2(residual) + left * (log2(residual) - log2(before)) <= wanted
        going = going & (residual > tol) & (arrives | (left > SEGMENTS - 2))
        before = residual
        v = quotient(aim, sums)
        for _ in range(1, tl.minimum(scalings, _LONGEST_SEGMENT)):
            u = quotient(r, row_sums(K * over_cols(v)))
            v = quotient(aim, col_sums(K * over_rows(u)))
        base = tl.where(over_matrices(going) & (c != 0), base + log(v, v > 0), base)
        left -= 1
    return base


@triton.jit
def halvings_of(y):
    """How often y is to be halved for all of it to be within ``_WARM_RANGE``, (BLOCK_B,)."""
    spread = vector_max(row_maxima(tl.where(y == -float("inf"), 0.0, -y)))
    return tl.ceil(log2(tl.maximum(spread * (UNIT / _WARM_RANGE), 1.0)))


@triton.jit
def newton(y, base, r, c, aim, going, n_iters, tol, m, COLS: tl.constexpr, WARMS: tl.constexpr):
    """The column potential, base and fine, its residual and the steps made, from that which the first step led to.

    At most ``n_iters`` steps, the first counted; matrices that are not ``going`` stay where they are. WARMS: cold ones are
    warmed, and have a residual of inf where they are left so.
    """
    fine, one = tl.zeros_like(base), ones_of(c)
    plan, L = plan_at(y, one, base, fine, r)
    sums, residual, objective = judged(plan, L, base, fine, r, c, aim)
    damped = residual < 0.0
    going = going & ~(residual <= tol)
    halvings = one - 1.0
    if WARMS and n_iters > 1:
        # A halving above the one to begin at, where potentials of 0 pass for cooled.
        halvings = tl.where(going & (residual > _COOLED_BELOW), halvings_of(y), 0.0)
        halvings = tl.where(halvings > 0.0, halvings + 1.0, 0.0)
        base, residual = tl.where(over_matrices(halvings > 0.0), 0.0, base), tl.where(halvings > 0.0, 0.0, residual)
    d = fine
    if (n_iters > 1) & (tl.max((going & (halvings == 0.0)).to(tl.int32), axis=0) > 0):
        d = direction(plan, sums, residual, r, c, aim, m, COLS)
    steps = tl.zeros_like(going.to(tl.int32)) + tl.minimum(n_iters, 1)
    count = 1
    while (count < n_iters) & (tl.max(going.to(tl.int32), axis=0) > 0):
        count += 1
        steps += going.to(tl.int32)
        length = in_units(step_share(vector_max(d) + vector_max(-d), damped))
        new_base, new_fine = folded(base, fine + d * over_matrices(length))
        share, cooled = one, (halvings > 0.0) & (residual <= _COOLED_BELOW)
        if WARMS:
            halvings -= cooled.to(halvings.dtype)
            share = exp2(-halvings)
            new_base = tl.where(over_matrices(cooled), 2.0 * (base + fine), new_base)
            new_fine = tl.where(over_matrices(cooled), 0.0, new_fine)
        plan, L = plan_at(y, share, new_base, new_fine, r)
        sums, new_residual, new_objective = judged(plan, L, new_base, new_fine, r, c, aim)
        fallen = (new_objective <= objective) | (new_residual <= tol) | cooled
        refused = (residual >= PURE_BELOW) & ~damped & ~fallen
        moved = going & ~refused
        there = over_matrices(moved)
        base, fine = tl.where(there, new_base, base), tl.where(there, new_fine, fine)
        residual, objective = tl.where(moved, new_residual, residual), tl.where(moved, new_objective, objective)
        damped = refused
        going = going & (~(residual <= tol) | (halvings > 0.0))
        if (count < n_iters) & (tl.max((going & moved).to(tl.int32), axis=0) > 0):
            d = tl.where(there, direction(plan, sums, new_residual, r, c, aim, m, COLS), d)
    if WARMS:
        warm = halvings > 0.0
        base = tl.where(over_matrices(warm), (base + fine) * over_matrices(exp2(halvings)), base)
        fine, residual = tl.where(over_matrices(warm), 0.0, fine), tl.where(warm, float("inf"), residual)
    return base, fine, residual, steps


@triton.jit
def among(left, inside, inside_row, inside_col):
    """What :func:`places` says exists, of the matrices that are ``left`` (BLOCK_B,)."""
    return inside & left, inside_row & over_matrices(left), inside_col & over_matrices(left)


@finite_jit
def _newton_tile_fwd_kernel(
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
    continues: tl.int32,
    unit_rows: tl.int32,
    inverse_temperature: tl.float64,
    tol: tl.float64,
    BLOCK_B: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """BLOCK_B matrices; at most ``n_iters`` steps, the first of sweeps, of one if it is the last; 0 is a row step at g = 0.

    continues: every output holds what sweeps have led to, f0 their f; a matrix whose residual is within ``tol`` keeps it.
    """
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    left = ~(tl.load(residual_ptr + b, mask=inside & (continues != 0), other=float("inf")) <= tol)
    tl.store(sweeps_ptr + b, 1, mask=inside & ~left)
    if tl.max((inside & left).to(tl.int32), axis=0) == 0:
        return
    inside, inside_row, inside_col = among(left, inside, inside_row, inside_col)
    r = load_entries(row_ptr + vector_offsets(b, i, row_stride_b, row_stride_n), inside_row & (has_row != 0), 1.0)
    c = load_entries(col_ptr + vector_offsets(b, j, col_stride_b, col_stride_m), inside_col & (has_col != 0), 1.0)
    f = load_entries(f0_ptr + vector_offsets(b, i, f0_stride_b, f0_stride_n), inside_row & (has_f0 != 0), 0.0)
    k = inverse_temperatures(temperature_ptr, temperature_stride, b, inside, has_temperature, inverse_temperature).to(dtype)
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
    f = tl.where(tl.abs(f) == float("inf"), 0.0, f)  # float32 may not hold what potentials of 1e38 come to
    y, G, R, f, r, c, aim, unit, scalings, poison = system(
        x, k, f, r, c, n_iters > 0, has_row, has_col, unit_rows, uniform_scalings
    )
    if has_info != 0:  # until the end bases are where f and g will be, as in ``forward.py``
        tl.debug_barrier()  # f0 may be f: every lane that holds a copy has loaded it
        store_entries(f_ptr + vector_offsets(b, i, n, 1), R, inside_row)
        store_entries(g_ptr + vector_offsets(b, j, m, 1), G, inside_col)

    base = tl.zeros([P // COLS, BLOCK_B, COLS], dtype)
    if n_iters > 0:
        base = log_col_step(y, f, c)
    going = inside & (poison == 0.0)
    if n_iters > 1:
        base = swept(y, base, r, c, aim, going, scalings, tol, SEGMENTS)
    base, fine, residual, steps = newton(y, base, r, c, aim, going, n_iters, tol, m, COLS, WARMS=True)
    plan, L = plan_at(y, ones_of(c), base, fine, r)
    _sums, last, _objective = judged(plan, L, base, fine, r, c, aim)
    residual = tl.where(residual < float("inf"), residual, last)
    plan = plan * over_rows(over_matrices(unit)) + over_rows(over_matrices(poison))
    b, i, j, inside, inside_row, inside_col = places(block, batch, n, m, BLOCK_B, P, ROWS, COLS)
    inside, inside_row, inside_col = among(left, inside, inside_row, inside_col)
    out_at = plan_ptr + tile_offsets(b, i, j, plan_stride_b, plan_stride_n, plan_stride_m)
    store_entries(out_at, narrow(plan, plan_ptr.dtype.element_ty), over_rows(inside_row) & over_cols(inside_col))
    if has_info != 0:
        tl.debug_barrier()  # every lane that holds a copy has loaded what was left
        tl.store(residual_ptr + b, residual + poison, mask=inside)
        tl.store(sweeps_ptr + b, steps, mask=inside)
        f = tl.where(r != 0, log(r * over_matrices(unit), r != 0) - L, 0.0)
        store_on_base(f_ptr + vector_offsets(b, i, unrelated(n), 1), f, inside_row)
        store_on_base(g_ptr + vector_offsets(b, j, unrelated(m), 1), base + fine, inside_col)
