"""sigma2 of stored plans by the Lanczos recurrence of ``lanczos.py``, one matrix a program: value and vectors, or
bounds.

Symbols as there; v is the unit vector the recurrence ends with, theta = ||M v||^2, rho = ||G v - theta v||.

Upper bounds.  In the basis (v, its complement) G is [[theta, rho e^T], [rho e, H]], |e| = 1, H >= 0, tr H = ||M||_F^2
- theta =: gamma >= ||H||_2, so sigma2^2 <= (theta + gamma) / 2 + sqrt((theta - gamma)^2 / 4 + rho^2). And by Schur's
test with the vectors sqrt(r), sqrt(c): sigma2^2 <= max_i (|P| 1)_i / r_i * max_j (|P|^T 1)_j / c_j, which is 1 for a
converged plan. The smaller one is returned. Slack: eps the unit roundoff, every sum here is at most 60 additions
deep, each entry errs by 4 eps more, so a pass errs by at most 64 eps ||M||_F in y = M v, 128 eps ||M||_F^2 in G v,
theta, rho and gamma, and what v^T p = O(eps) lets through is 16 eps ||s c^T||, s = P 1 / C - r / C.
"""

import triton
import triton.language as tl

from ..common.configuration import finite_jit
from ..common.memory import load_entries
from .lanczos import apply_gram, dot, less_outer, panel, right_vector
from .squaring import inverse_or_zero, power_of_two


@triton.jit
def _norms(source, c, w, rest, weight, n, m, BLOCK_N: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """||M||_F^2 and ||s c^T||, both with the power of two of ``weight``, and Schur's bound on sigma2^2."""
    squares = tl.zeros([BLOCK_N, c.shape[0]], c.dtype)
    columns = tl.zeros([BLOCK_N, c.shape[0]], c.dtype)
    rows = tl.zeros([BLOCK_N], c.dtype)
    means = tl.zeros([BLOCK_N], c.dtype)
    inverse_total = inverse_or_zero(tl.sum(c, axis=0))
    for start in range(0, n, BLOCK_N):
        plan, r = panel(source, c, start, n, m, BLOCK_N, FROM_LOGITS)
        x = less_outer(less_outer(plan, r, w), r, rest)
        s = tl.sum(x, axis=1) * inverse_total
        x = less_outer(x, s, c) * weight[None, :]
        squares += x * x * inverse_or_zero(r)[:, None]
        columns += tl.abs(plan)
        rows = tl.maximum(rows, tl.sum(tl.abs(plan), axis=1) * inverse_or_zero(r))
        means += s * s * inverse_or_zero(r)
    frobenius = tl.sum(tl.sum(squares, axis=1), axis=0)
    correction = tl.sqrt(tl.sum(means, axis=0) * dot(weight * c, weight * c))
    schur = tl.max(rows, axis=0) * tl.max(tl.sum(columns, axis=0) * inverse_or_zero(c), axis=0)
    return frobenius, correction, schur


@triton.jit
def _stored_plan(
    plan_ptr,
    plan_stride_n,
    plan_stride_m,
    mask_ptr,
    mask_stride_n,
    mask_stride_m,
    row_ptr,
    row_stride_n,
    col_ptr,
    col_stride_m,
    used_row_ptr,
    n,
    m,
    has_mask,
    has_row,
    has_col,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
):
    """The source of a stored plan and its column marginal (COLS,); that of the rows goes to ``used_row`` (n,).

    Both are the marginals as used, 0 on excluded lines.
    """
    DTYPE: tl.constexpr = used_row_ptr.dtype.element_ty
    j = tl.arange(0, COLS)
    c = tl.load(col_ptr + j.to(tl.int64) * col_stride_m, mask=(j < m) & (has_col != 0), other=1.0)
    inside = (j < m) & (c != 0)
    found = tl.zeros([BLOCK_N, COLS], tl.int32)
    totals = tl.zeros([BLOCK_N], DTYPE)
    counts = tl.zeros([BLOCK_N], DTYPE)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        r = tl.load(row_ptr + i.to(tl.int64) * row_stride_n, mask=(i < n) & (has_row != 0), other=1.0)
        entry = ((i < n) & (r != 0))[:, None] & inside[None, :]
        at = i.to(tl.int64)[:, None] * mask_stride_n + j.to(tl.int64)[None, :] * mask_stride_m
        entry = entry & (load_entries(mask_ptr + at, entry & (has_mask != 0), 1) != 0)
        found = found | entry.to(tl.int32)
        valid = tl.max(entry.to(tl.int32), axis=1) != 0
        r = tl.where(valid, r, 0.0)
        totals += r
        counts += valid.to(DTYPE)
        tl.store(used_row_ptr + i, r, mask=i < n)
    tl.debug_barrier()
    valid = tl.max(found, axis=0) != 0
    rows, cols = tl.sum(counts, axis=0), tl.sum(valid.to(DTYPE), axis=0)
    total = tl.sum(tl.where(valid, c, 0.0), axis=0)
    total = tl.where(has_row != 0, tl.sum(totals, axis=0), tl.where(has_col != 0, total, rows))
    uniform_r = tl.where(has_row != 0, 1.0, total * inverse_or_zero(rows))
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        r = tl.load(used_row_ptr + i, mask=i < n, other=0.0)
        tl.debug_barrier()  # every lane that holds a copy has loaded it
        tl.store(used_row_ptr + i, r * uniform_r, mask=i < n)
    tl.debug_barrier()
    c = tl.where(valid, tl.where(has_col != 0, c, total * inverse_or_zero(cols)), 0.0)
    source = (plan_ptr, plan_stride_n, plan_stride_m, mask_ptr, mask_stride_n, mask_stride_m, has_mask, used_row_ptr)
    return source, c


@finite_jit
def _sigma2_lanczos_fwd_kernel(
    plan_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    used_row_ptr,
    sigma2_ptr,
    u_ptr,
    v_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    plan_stride_b: tl.int64,
    plan_stride_n: tl.int64,
    plan_stride_m: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_n: tl.int64,
    mask_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    has_vectors: tl.int32,
    tol: tl.float32,
    max_steps: tl.int32,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
):
    """sigma2 and, where asked for, its vectors u (batch, n) and v (batch, m), contiguous; one matrix a program."""
    b = tl.program_id(0).to(tl.int64)
    source, c = _stored_plan(
        plan_ptr + b * plan_stride_b,
        plan_stride_n,
        plan_stride_m,
        mask_ptr + b * mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        row_ptr + b * row_stride_b,
        row_stride_n,
        col_ptr + b * col_stride_b,
        col_stride_m,
        used_row_ptr + b * n,
        n,
        m,
        has_mask,
        has_row,
        has_col,
        BLOCK_N,
        COLS,
    )
    v, w, rest, weight, exponent = right_vector(source, c, n, m, tol, max_steps, BLOCK_N, False)
    u_ptr += b * n
    _, energy = apply_gram(source, c, w, rest, weight * v, u_ptr, has_vectors, n, m, BLOCK_N, False)
    norm = tl.sqrt(energy)
    tl.store(sigma2_ptr + b, norm * power_of_two(exponent, c.dtype))
    tl.debug_barrier()
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        inside = (i < n) & (has_vectors != 0)
        u = tl.load(u_ptr + i, mask=inside, other=0.0)
        tl.debug_barrier()
        tl.store(u_ptr + i, u * inverse_or_zero(norm), mask=inside)
    j = tl.arange(0, COLS)
    tl.store(v_ptr + b * m + j, v * norm * inverse_or_zero(norm), mask=(j < m) & (has_vectors != 0))


@finite_jit
def _sigma2_lanczos_bounds_fwd_kernel(
    plan_ptr,
    mask_ptr,
    row_ptr,
    col_ptr,
    used_row_ptr,
    lower_ptr,
    upper_ptr,
    batch: tl.int64,
    n: tl.int32,
    m: tl.int32,
    plan_stride_b: tl.int64,
    plan_stride_n: tl.int64,
    plan_stride_m: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_n: tl.int64,
    mask_stride_m: tl.int64,
    row_stride_b: tl.int64,
    row_stride_n: tl.int64,
    col_stride_b: tl.int64,
    col_stride_m: tl.int64,
    has_mask: tl.int32,
    has_row: tl.int32,
    has_col: tl.int32,
    tol: tl.float32,
    max_steps: tl.int32,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
):
    """Both bounds of sigma2, one matrix a program."""
    b = tl.program_id(0).to(tl.int64)
    source, c = _stored_plan(
        plan_ptr + b * plan_stride_b,
        plan_stride_n,
        plan_stride_m,
        mask_ptr + b * mask_stride_b,
        mask_stride_n,
        mask_stride_m,
        row_ptr + b * row_stride_b,
        row_stride_n,
        col_ptr + b * col_stride_b,
        col_stride_m,
        used_row_ptr + b * n,
        n,
        m,
        has_mask,
        has_row,
        has_col,
        BLOCK_N,
        COLS,
    )
    v, w, rest, weight, exponent = right_vector(source, c, n, m, tol, max_steps, BLOCK_N, False)
    image, theta = apply_gram(source, c, w, rest, weight * v, used_row_ptr, 0, n, m, BLOCK_N, False)
    root_c = tl.sqrt(c)
    p = root_c * inverse_or_zero(tl.sqrt(tl.sum(c, axis=0)))
    image *= weight
    image -= p * dot(p, image) + theta * v
    frobenius, correction, schur = _norms(source, c, w, rest, weight, n, m, BLOCK_N, False)
    unit: tl.constexpr = 2.0**-53 if c.dtype == tl.float64 else 2.0**-24
    lost = 128.0 * unit * frobenius
    gamma = tl.maximum(frobenius - theta, 0.0) + 2.0 * lost
    rho = tl.sqrt(dot(image, image)) + lost
    theta_high = theta + lost
    spread = 0.5 * (theta_high - gamma)
    outer = power_of_two(exponent, c.dtype)
    deflation = 16.0 * unit * correction
    upper = (
        (tl.sqrt(0.5 * (theta_high + gamma) + tl.sqrt(spread * spread + rho * rho)) + deflation) * (1.0 + 128.0 * unit) * outer
    )
    lower = tl.sqrt(theta) - 64.0 * unit * tl.sqrt(frobenius) - deflation
    nan = theta * 0.0
    tl.store(lower_ptr + b, tl.maximum(lower, 0.0) * (1.0 - 128.0 * unit) * outer + nan)
    tl.store(upper_ptr + b, tl.minimum(upper, tl.sqrt(schur) * (1.0 + 128.0 * unit)) + nan)
