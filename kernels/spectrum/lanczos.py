"""sigma2 of one plan too large for the chip: a three-term Lanczos recurrence on M^T M, re-reading the plan each step.

Symbols as in ``squaring.py``: P is n x m with marginals r, c of totals R, C; q = sqrt(r / R), p = sqrt(c / C);
M = (I - q q^T) diag(r)^-1/2 P diag(c)^-1/2 (I - p p^T); G = M^T M; sigma2 = ||M||_2.

Deflation.  Entries are read as X_ij = P_ij - r_i w_j, w = P^T 1 / R, by fused multiply-adds with w in two parts (the
second is what the rounding of the first leaves), so that nothing cancels later even near the uniform plan. X differs
from M, once scaled, by a multiple of p^T only, which is orthogonal to every vector used: a vector v is kept
orthogonal to p, and

    t = diag(r)^-1 X diag(c)^-1/2 v,   ||M v||^2 = sum r t^2,   G v = (I - p p^T) diag(c)^-1/2 X^T t

is one pass over row panels. The factor diag(c)^-1/2 carries a power of two that makes the largest entry of M about 1.

Recurrence.  x is the current vector, theta = x^T G x, d = (G x - theta x) / rho its residual direction, y the
direction of the previous change, orthonormal. The next x is the best unit vector of span(x, d, y): the top
eigenvector s of the 3 x 3 matrix of G there, and y becomes the part of (0, s1, s2) orthogonal to it, along
(-(s1^2 + s2^2), s0 s1, s0 s2). It is Lanczos restarted at every step with three vectors: on doubly-stochastic plans
of 256 lines (random logits of std 1 to 20, bands, circulants, low rank) it was within 1e-4 of sigma2 after as many
steps as Lanczos with full re-orthogonalisation, 1 to 43, and there is no basis to store. G x, G d, G y follow the
same combinations, so a step is one pass.

Stop.  Some eigenvalue of G lies within rho of theta, so rho <= 2 tol theta leaves ||M v|| within tol of a singular
value. The top of a cluster that x sees as a whole lies about 2 rho above theta, so the test is rho <= tol theta / 2.
Sharper tests that divide by a gap of Ritz values stop early, 1.6e-3 off, on clustered spectra.
"""

import triton
import triton.language as tl

from ..common.bases import BITS, fused
from ..common.memory import load_entries
from .squaring import exponent_of, inverse_or_zero, power_of_two


@triton.jit
def panel(source, c, start, n, m, BLOCK_N: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """Rows start.. of the plan (BLOCK_N, COLS), zero where excluded, and their marginal (BLOCK_N,)."""
    matrix_ptr, stride_n, stride_m = source[0], source[1], source[2]
    mask_ptr, mask_stride_n, mask_stride_m, has_mask, row_ptr = source[3], source[4], source[5], source[6], source[7]
    i = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    j = tl.arange(0, c.shape[0]).to(tl.int64)[None, :]
    r = tl.load(row_ptr + i, mask=i < n, other=0.0)
    entry = (r != 0) & (j < m) & (c != 0)[None, :]
    bits = load_entries(mask_ptr + i * mask_stride_n + j * mask_stride_m, entry & (has_mask != 0), 1)
    entry = entry & (bits != 0)
    at = matrix_ptr + i * stride_n + j * stride_m
    if FROM_LOGITS:
        f_ptr, row_base_ptr, g, col_base, scale = source[8]
        f = tl.load(f_ptr + i, mask=i < n, other=0.0)
        row_base = tl.load(row_base_ptr + i, mask=i < n, other=0.0)
        logits = load_entries(at, entry, float("-inf")).to(c.dtype)
        bits = tl.full([], BITS, c.dtype)  # a constant alone is a float32 to fma
        plan = tl.exp2(fused(fused(logits, scale, row_base + col_base[None, :]), bits, g[None, :]) + f)
    else:
        plan = load_entries(at, entry, 0.0).to(c.dtype)
    return plan, tl.sum(r, axis=1)


@triton.jit
def less_outer(plan, r, w):
    """plan - r w^T, rounded once."""
    return tl.fma(tl.broadcast_to(-r[:, None], plan.shape), tl.broadcast_to(w[None, :], plan.shape), plan)


@triton.jit
def _column_means(source, c, w, n, m, inverse_total, BLOCK_N: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """Column sums of plan - r w^T times ``inverse_total``, and largest |plan - r w^T| / sqrt(r c)."""
    sums = tl.zeros([BLOCK_N, c.shape[0]], c.dtype)
    largest = tl.zeros([BLOCK_N, c.shape[0]], c.dtype)
    for start in range(0, n, BLOCK_N):
        plan, r = panel(source, c, start, n, m, BLOCK_N, FROM_LOGITS)
        x = less_outer(plan, r, w)
        sums += x
        largest = tl.maximum(largest, tl.abs(x) * inverse_or_zero(tl.sqrt(r))[:, None])
    top = tl.max(tl.max(largest, axis=0) * inverse_or_zero(tl.sqrt(c)), axis=0)
    return tl.sum(sums, axis=0) * inverse_total, top


@triton.jit
def apply_gram(source, c, w, rest, direction, left_ptr, has_left, n, m, BLOCK_N: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """X^T t and sum r t^2 for t = diag(r)^-1 X direction; sqrt(r) t is stored to left (n,) where asked for."""
    product = tl.zeros([BLOCK_N, c.shape[0]], c.dtype)
    energy = tl.zeros([BLOCK_N], c.dtype)
    for start in range(0, n, BLOCK_N):
        plan, r = panel(source, c, start, n, m, BLOCK_N, FROM_LOGITS)
        x = less_outer(less_outer(plan, r, w), r, rest)
        t = tl.sum(x * direction[None, :], axis=1) * inverse_or_zero(r)
        product += x * t[:, None]
        energy += r * t * t
        i = start + tl.arange(0, BLOCK_N)
        tl.store(left_ptr + i, tl.sqrt(r) * t, mask=(i < n) & (has_left != 0))
    return tl.sum(product, axis=0), tl.sum(energy, axis=0)


@triton.jit
def dot(x, y):
    """x . y of two vectors."""
    return tl.sum(x * y, axis=0)


@triton.jit
def _rotation(app, aqq, apq):
    """Tangent, cosine and sine of the Jacobi rotation that annihilates apq."""
    difference = aqq - app
    root = tl.sqrt(difference * difference + 4.0 * apq * apq)
    tangent = 2.0 * apq * inverse_or_zero(difference + tl.where(difference < 0, -root, root))
    cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    return tangent, cosine, tangent * cosine


@triton.jit
def _top_of_three(a00, a01, a02, a11, a12, a22):
    """Unit top eigenvector, first entry >= 0, of a symmetric 3 x 3 matrix, by Jacobi rotations."""
    one, zero = a00 * 0.0 + 1.0, a00 * 0.0
    v00, v01, v02 = one, zero, zero
    v10, v11, v12 = zero, one, zero
    v20, v21, v22 = zero, zero, one
    for _ in tl.static_range(4):
        t, cs, sn = _rotation(a00, a11, a01)
        a00, a11, a01 = a00 - t * a01, a11 + t * a01, zero
        a02, a12 = cs * a02 - sn * a12, sn * a02 + cs * a12
        v00, v01 = cs * v00 - sn * v01, sn * v00 + cs * v01
        v10, v11 = cs * v10 - sn * v11, sn * v10 + cs * v11
        v20, v21 = cs * v20 - sn * v21, sn * v20 + cs * v21
        t, cs, sn = _rotation(a00, a22, a02)
        a00, a22, a02 = a00 - t * a02, a22 + t * a02, zero
        a01, a12 = cs * a01 - sn * a12, sn * a01 + cs * a12
        v00, v02 = cs * v00 - sn * v02, sn * v00 + cs * v02
        v10, v12 = cs * v10 - sn * v12, sn * v10 + cs * v12
        v20, v22 = cs * v20 - sn * v22, sn * v20 + cs * v22
        t, cs, sn = _rotation(a11, a22, a12)
        a11, a22, a12 = a11 - t * a12, a22 + t * a12, zero
        a01, a02 = cs * a01 - sn * a02, sn * a01 + cs * a02
        v01, v02 = cs * v01 - sn * v02, sn * v01 + cs * v02
        v11, v12 = cs * v11 - sn * v12, sn * v11 + cs * v12
        v21, v22 = cs * v21 - sn * v22, sn * v21 + cs * v22
    second = a11 > a00
    s0, s1, s2 = tl.where(second, v01, v00), tl.where(second, v11, v10), tl.where(second, v21, v20)
    third = a22 > tl.maximum(a00, a11)
    s0, s1, s2 = tl.where(third, v02, s0), tl.where(third, v12, s1), tl.where(third, v22, s2)
    sign = tl.where(s0 < 0, -1.0, 1.0).to(a00.dtype)
    return sign * s0, sign * s1, sign * s2


@triton.jit
def right_vector(source, c, n, m, tol, max_steps, BLOCK_N: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """v (COLS,) with ||M v|| close to sigma2, and (w, rest, 2^-e diag(c)^-1/2, e) for further passes."""
    totals = tl.zeros([BLOCK_N], c.dtype)
    counts = tl.zeros([BLOCK_N], tl.int32)
    row_ptr = source[7]
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        r = tl.load(row_ptr + i, mask=i < n, other=0.0)
        totals += r
        counts += (r != 0).to(tl.int32)
    lines = tl.minimum(tl.sum(counts, axis=0), tl.sum((c != 0).to(tl.int32), axis=0))
    inverse_total = inverse_or_zero(tl.sum(totals, axis=0))
    w, _ = _column_means(source, c, tl.zeros_like(c), n, m, inverse_total, BLOCK_N, FROM_LOGITS)
    rest, top = _column_means(source, c, w, n, m, inverse_total, BLOCK_N, FROM_LOGITS)
    exponent = exponent_of(top)
    root_c = tl.sqrt(c)
    weight = inverse_or_zero(root_c) * power_of_two(-exponent, c.dtype) * (lines > 1).to(c.dtype)
    p = root_c * inverse_or_zero(tl.sqrt(tl.sum(c, axis=0)))

    x = tl.where(c != 0, tl.rand(2, tl.arange(0, c.shape[0])).to(c.dtype) - 0.5, 0.0)
    x -= p * dot(p, x)
    x *= inverse_or_zero(tl.sqrt(dot(x, x)))
    gx, _ = apply_gram(source, c, w, rest, weight * x, row_ptr, 0, n, m, BLOCK_N, FROM_LOGITS)
    gx *= weight
    gx -= p * dot(p, gx)
    theta = dot(x, gx)
    d = gx - theta * x
    d -= x * dot(x, d)
    rho = tl.sqrt(dot(d, d))
    y, gy = tl.zeros_like(x), tl.zeros_like(x)
    floor: tl.constexpr = 2.0**-46 if c.dtype == tl.float64 else 2.0**-18
    accepted = tl.maximum(0.5 * tol, floor)
    step = 0
    while (step < max_steps) & (rho > accepted * theta):
        d *= 1.0 / rho
        gd, _ = apply_gram(source, c, w, rest, weight * d, row_ptr, 0, n, m, BLOCK_N, FROM_LOGITS)
        gd *= weight
        gd -= p * dot(p, gd)
        s0, s1, s2 = _top_of_three(theta, dot(d, gx), dot(y, gx), dot(d, gd), dot(y, gd), dot(y, gy))
        change = s1 * s1 + s2 * s2
        turn = inverse_or_zero(tl.sqrt(change * (change + s0 * s0)))
        x, y = s0 * x + s1 * d + s2 * y, turn * (s0 * (s1 * d + s2 * y) - change * x)
        gx, gy = s0 * gx + s1 * gd + s2 * gy, turn * (s0 * (s1 * gd + s2 * gy) - change * gx)
        length = 1.0 / tl.sqrt(dot(x, x))
        x *= length
        gx *= length
        theta = dot(x, gx)
        d = gx - theta * x
        d -= x * dot(x, d) + y * dot(y, d)
        rho = tl.sqrt(dot(d, d))
        step += 1
    x -= p * dot(p, x)
    x *= inverse_or_zero(tl.sqrt(dot(x, x)))
    return x, w, rest, weight, exponent


@triton.jit
def lanczos_sigma2(
    matrix_ptr,
    stride_n,
    stride_m,
    mask_ptr,
    mask_stride_n,
    mask_stride_m,
    has_mask,
    row_ptr,
    potentials,
    c,
    n,
    m,
    tol,
    max_steps,
    BLOCK_N: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
):
    """sigma2 of one matrix, a scalar in the compute dtype; every pointer is to that matrix's first element.

    matrix: the plan (n, m), or its logits if FROM_LOGITS, with element strides. mask: uint8, read where has_mask != 0.
    row: marginal (n,), contiguous, compute dtype, 0 on excluded lines; c (COLS,): that of the columns, 0 on excluded
    lines and beyond m. Only with FROM_LOGITS: the plan is 2^(BITS (k logits + (F + G)) + f + g), potentials = (f (n,), F (n,),
    g (COLS,), G (COLS,), k), lines of rows in memory and contiguous (``common/bases.py``). What this program itself has stored
    to row or f needs a ``tl.debug_barrier()`` before this call. COLS = c.shape[0] is a power of two >= m; there are
    BLOCK_N * COLS elements in registers at once. tol and max_steps as in ``spectrum.sigma2``.
    """
    source = (
        matrix_ptr,
        stride_n,
        stride_m,
        mask_ptr,
        mask_stride_n,
        mask_stride_m,
        has_mask,
        row_ptr,
        potentials,
    )
    v, w, rest, weight, exponent = right_vector(source, c, n, m, tol, max_steps, BLOCK_N, FROM_LOGITS)
    _, energy = apply_gram(source, c, w, rest, weight * v, row_ptr, 0, n, m, BLOCK_N, FROM_LOGITS)
    return tl.sqrt(energy) * power_of_two(exponent, c.dtype)
