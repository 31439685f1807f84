"""sigma2 of tiles held on chip, by repeated squaring: fixed work, no spectral gap needed, certified from both sides.

Symbols. A tile holds plans P (n x m, padded with zeros to P x P in code), marginals r and c, zero on excluded lines,
with totals R = sum r and C = sum c. With q = sqrt(r / R), p = sqrt(c / C),

    M = (I - q q^T) diag(r)^-1/2 P diag(c)^-1/2 (I - p p^T),      sigma2 = ||M||_2.

Forming M.  (I - q q^T) diag(r)^-1/2 = diag(r)^-1/2 (I - r 1^T / R), so the projections act on the plan itself,
P - r w^T with w = P^T 1 / R and P - s c^T with s = P 1 / C, and the scaling comes last. Near the uniform plan the
difference P - r w^T is 1e5 times smaller than either term: a fused multiply-add rounds the difference, not the
product, and what the rounding of w leaves is a multiple of r, which a second projection removes. M is then accurate
relative to itself, except for eps ||s c^T|| from rounding P - r w^T before s c^T is taken out; it vanishes when the
row sums are r.

Squaring.  M is scaled by a power of two (largest entry in [1, 2)), G_0 = M^T M, and
G_{j+1} = (2^-t_j G_j)^T (2^-t_j G_j) with t_j the exponent of trace G_j. Only exact powers of two are taken out, so

    ||M||_2^2 <= || (M^T M)^(2^k) ||_F^(1/2^k) = 2^(t_0 + t_1/2 + ... + t_k/2^k) ||2^-t_k G_k||_F^(1/2^k),

the sum being exact in float32 (|t_j| <= 14, k <= 14). The bound exceeds ||M||_2 by at most d^(1/2^(k+2)), d = rank M
<= min(n, m) - 1. The longest column of G_k is v; ||M v|| / ||v|| is a lower bound. Its relative loss is at most about
log(d) / 2^(k+2) over all spectra (0.87e-4 in the worst case for d = 63 and k = 13). Squaring ends before k when G_k
is of rank one to 2^-16: (trace G)^2 <= (1 + 2^-16) ||G||_F^2; a matrix that has ended is frozen, whatever its
neighbours in the tile do.

Copies.  Lanes hold copies of a matrix's sums, and decide by them: when it has ended, which column is the longest. A copy that
decided otherwise would square some entries of G and not the others, so terms of these sums are rounded by themselves.

Slack.  eps is the unit roundoff, d as above. A computed product A^T A differs from the exact one by at most P eps
||A||_F^2 in norm; ||M||_F^2 <= d ||M||_2^2 and ||G_j||_F^2 <= d ||G_j||_2^2, so step j multiplies the squared bound
by at most (1 + P d eps)^(1/2^j) and all steps together multiply the bound by 1 + P d eps. The means above leave 2 P
eps ||M||_F <= 2 P sqrt(d) eps ||M||_2, the rounding of M's entries and their scaling 8 sqrt(d) eps, the final
exponential and logarithm 16 eps. For P = 64 in float32 that is 3.1e-4. The lower bound loses P sqrt(d) eps in M v
instead of P d eps. Both also move by 4 eps ||s c^T||.
"""

import triton
import triton.language as tl

from ..common.arithmetic import rounded_product

# Squarings for tiles of each size, so that the Rayleigh value is within 1e-4 of sigma2 for every spectrum.
SQUARINGS = {4: 10, 8: 11, 16: 12, 32: 13, 64: 13}


@triton.jit
def _row_halves(m):
    return tl.split(tl.permute(tl.reshape(m, (2, m.shape[0] // 2, m.shape[1])), (1, 2, 0)))


@triton.jit
def _blocks(left, right):
    """left^T left, left^T right and right^T right of (K, P) each.

    16 rows at a time, with a barrier between: fetched all at once the operands overflow the registers.
    """
    if left.shape[0] > 16:
        upper_left, lower_left = _row_halves(left)
        upper_right, lower_right = _row_halves(right)
        ll, lr, rr = _blocks(upper_left, upper_right)
        tl.debug_barrier()
        more_ll, more_lr, more_rr = _blocks(lower_left, lower_right)
        ll, lr, rr = ll + more_ll, lr + more_lr, rr + more_rr
    else:
        ll = tl.dot(tl.trans(left), left, input_precision="ieee", out_dtype=left.dtype)
        lr = tl.dot(tl.trans(left), right, input_precision="ieee", out_dtype=left.dtype)
        rr = tl.dot(tl.trans(right), right, input_precision="ieee", out_dtype=left.dtype)
    return ll, lr, rr


@triton.jit
def _gram_of_one(m):
    """m^T m for (P, P), in blocks of 32 columns.

    From 64 rows on Triton 3.7 lowers a float32 dot to Blackwell's TF32 units, whatever precision is asked for.
    """
    if m.shape[1] > 32:
        left, right = tl.split(tl.permute(tl.reshape(m, (m.shape[0], 2, m.shape[1] // 2)), (0, 2, 1)))
        ll, lr, rr = _blocks(left, right)
        product = tl.join(tl.join(ll, lr), tl.join(tl.trans(lr), rr))
        product = tl.reshape(tl.permute(product, (3, 0, 2, 1)), m.shape)
    else:
        product = tl.dot(tl.trans(m), m, input_precision="ieee", out_dtype=m.dtype)
    return product


@triton.jit
def _gram_by_columns(m):
    """m^T m of each (P, P) matrix in (BLOCK_B, P, P), a column of it at a time."""
    columns = tl.arange(0, m.shape[2])[None, None, :]
    product = tl.zeros_like(m)
    for j in range(m.shape[2]):
        column = tl.sum(tl.where(columns == j, m, 0.0), axis=2)
        product = tl.where(columns == j, tl.sum(m * column[:, :, None], axis=1)[:, :, None], product)
    return product


@triton.jit
def gram(m):
    """m^T m of each (P, P) matrix in (BLOCK_B, P, P); a dot where its smallest size allows and in float32.

    Not in float64: Triton 3.7 aborts on the tensor-core form of it (sm_80, sm_90) for some layouts of the operands.
    """
    tl.static_assert(m.shape[2] <= 64)
    if m.shape[2] < 8:  # a thread may have one term of a sum alone
        product = tl.sum(rounded_product(m[:, :, :, None], m[:, :, None, :]), axis=1)
    elif m.shape[2] < 16:
        product = tl.sum(m[:, :, :, None] * m[:, :, None, :], axis=1)
    elif m.dtype == tl.float64:
        product = _gram_by_columns(m)
    elif m.shape[0] == 1:
        product = _gram_of_one(tl.reshape(m, (m.shape[1], m.shape[2])))[None, :, :]
    else:
        product = tl.dot(tl.permute(m, (0, 2, 1)), m, input_precision="ieee", out_dtype=m.dtype)
    return product


@triton.jit
def _energy(m):
    """||m||_F^2 of each matrix in (BLOCK_B, P, P)."""
    return tl.sum(tl.sum(rounded_product(m, m), axis=2), axis=1)


@triton.jit
def power_of_two(exponent, dtype: tl.constexpr):
    """2^exponent, exactly, for an int32 exponent within the normal range of ``dtype``."""
    if dtype == tl.float64:
        return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """floor(log2 x) as int32 for x >= 0, kept within +-100 (+-1000 in float64), so that both 2^+-e are normal."""
    if x.dtype == tl.float64:
        exponent = ((x.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1023
        return tl.minimum(tl.maximum(exponent, -1000), 1000)
    else:
        exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        return tl.minimum(tl.maximum(exponent, -100), 100)


@triton.jit
def inverse_or_zero(x):
    """1 / x, and 0 where x is 0."""
    return tl.where(x != 0, 1.0 / tl.where(x != 0, x, 1.0), 0.0)


@triton.jit
def _deflated(plan, r, c):
    """M / 2^scale with largest entry in [1, 2), scale, min(valid rows, valid columns), ||s c^T||.

    M is 0 where there is one valid line; the last three are (BLOCK_B,).
    """
    root_r, root_c = tl.sqrt(r), tl.sqrt(c)
    inverse_root_r, inverse_root_c = inverse_or_zero(root_r), inverse_or_zero(root_c)
    total_c = tl.sum(c, axis=1)
    inverse_total_r, inverse_total_c = inverse_or_zero(tl.sum(r, axis=1)), inverse_or_zero(total_c)
    correction = total_c * 0.0
    for repeat in tl.static_range(2):
        w = tl.sum(plan, axis=1) * inverse_total_r[:, None]
        plan = tl.fma(-r[:, :, None], tl.broadcast_to(w[:, None, :], plan.shape), plan)
        s = tl.sum(plan, axis=2) * inverse_total_c[:, None]
        plan = tl.fma(-s[:, :, None], tl.broadcast_to(c[:, None, :], plan.shape), plan)
        if repeat == 0:
            scaled_s = s * inverse_root_r
            correction = tl.sqrt(tl.sum(scaled_s * scaled_s, axis=1) * total_c)
    m = plan * inverse_root_r[:, :, None] * inverse_root_c[:, None, :]
    scale = exponent_of(tl.max(tl.max(tl.abs(m), axis=2), axis=1))
    lines = tl.minimum(tl.sum((r != 0).to(tl.int32), axis=1), tl.sum((c != 0).to(tl.int32), axis=1))
    factor = power_of_two(-scale, m.dtype) * (lines > 1).to(m.dtype)
    return m * factor[:, None, None], scale, lines, correction


@triton.jit
def _powers(m, SQUARINGS: tl.constexpr):
    """G_k (BLOCK_B, P, P), log2 of its bound on ||M||_2 (BLOCK_B,), whether M is finite (BLOCK_B,)."""
    trace = _energy(m)
    finite = trace < float("inf")
    exponent = exponent_of(trace)
    inverse = power_of_two(-exponent, m.dtype)
    g = gram(m) * inverse[:, None, None]
    trace *= inverse
    weight = trace * 0.0 + 0.5
    log_bound = exponent.to(m.dtype) * 0.5
    energy = _energy(g)
    active = energy * (1.0 + 2.0**-16) < trace * trace
    step = 0
    while (step < SQUARINGS) & (tl.max(active.to(tl.int32), axis=0) > 0):
        exponent = tl.where(active, exponent_of(energy), 0)
        inverse = power_of_two(-exponent, m.dtype)
        weight = tl.where(active, weight * 0.5, weight)
        log_bound += exponent.to(m.dtype) * weight
        trace = tl.where(active, energy * inverse, trace)
        squared = gram(g) * inverse[:, None, None]
        g = squared if m.shape[0] == 1 else tl.where(active[:, None, None], squared, g)
        energy = _energy(g)
        active = active & (energy * (1.0 + 2.0**-16) < trace * trace)
        step += 1
    safe_energy = tl.where(energy > 0, energy, 1.0)
    return g, log_bound + 0.5 * weight * tl.log2(safe_energy), finite


@triton.jit
def _leading_pair(m, g):
    """||M v||, u = M v / ||M v||, v the longest column of G over its length; zeros where M is 0."""
    columns = tl.arange(0, m.shape[2])
    longest = tl.argmax(tl.sum(rounded_product(g, g), axis=1), axis=1)
    v = tl.sum(tl.where(columns[None, None, :] == longest[:, None, None], g, 0.0), axis=2)
    v *= inverse_or_zero(tl.sqrt(tl.sum(rounded_product(v, v), axis=1)))[:, None]
    u = tl.sum(rounded_product(m, v[:, None, :]), axis=2)
    value = tl.sqrt(tl.sum(rounded_product(u, u), axis=1))
    return value, u * inverse_or_zero(value)[:, None], v


@triton.jit
def tile_sigma2(plan, r, c, SQUARINGS: tl.constexpr):
    """sigma2 (BLOCK_B,), u (BLOCK_B, P), v (BLOCK_B, P) of plans (BLOCK_B, P, P) with marginals r, c (BLOCK_B, P).

    All in the compute dtype; lines with marginal 0 are excluded and their plan entries must be 0. sigma2 = u^T M v is
    the Rayleigh lower bound. M = 0: everything 0. An entry that is not finite: NaN for that matrix alone.
    """
    m, scale, _, _ = _deflated(plan, r, c)
    g, _, finite = _powers(m, SQUARINGS)
    value, u, v = _leading_pair(m, g)
    nan = float("nan")
    value = tl.where(finite, value * power_of_two(scale, m.dtype), nan)
    return value, tl.where(finite[:, None], u, nan), tl.where(finite[:, None], v, nan)


@triton.jit
def tile_bounds(plan, r, c, SQUARINGS: tl.constexpr):
    """(lower, upper), each (BLOCK_B,), around the exact sigma2 of the plan; arguments as :func:`tile_sigma2`.

    One valid row or column: both are 0. An entry that is not finite: both NaN for that matrix alone.
    """
    m, scale, lines, correction = _deflated(plan, r, c)
    g, log_bound, finite = _powers(m, SQUARINGS)
    value, _, _ = _leading_pair(m, g)
    size: tl.constexpr = m.shape[2]
    unit: tl.constexpr = 2.0**-53 if m.dtype == tl.float64 else 2.0**-24
    d = tl.maximum(lines - 1, 0).to(m.dtype)
    root = tl.sqrt(d)
    outer = power_of_two(scale, m.dtype)
    slack = 4.0 * unit * correction
    upper = tl.exp2(log_bound) * outer * (1.0 + unit * (size * d + (2.0 * size + 8.0) * root + 16.0)) + slack
    lower = tl.maximum(value * outer * (1.0 - unit * ((3.0 * size + 8.0) * root + 16.0)) - slack, 0.0)
    some = (value > 0) & (d > 0)
    nan = float("nan")
    return tl.where(finite, tl.where(some, lower, 0.0), nan), tl.where(finite, tl.where(d > 0, upper, 0.0), nan)
