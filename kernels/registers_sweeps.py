"""Device functions of the register family: a 4x4 matrix in 16 registers of one thread, its sweeps as plain arithmetic.

A matrix is a tuple of 16 vectors of BLOCK values, row by row, entry (i, j) at 4 i + j; Triton puts one value of each
in a thread, so no operation crosses threads. Smaller matrices are padded with -inf logits: an excluded line has K = 0,
and 1 is added to its denominator, where the sum of products starts, which costs nothing and keeps every factor finite.

Marginals are uniform, r on each valid row and c on each valid column, and are left out of the sweeps: K has row sums 1,

    v_t = 1 / (K^T u_(t-1)),   u_t = 1 / (K v_t),   P = r u K v,

and the true factors are v_t (c/r)^t and u_t (r/c)^t. With R rows and C columns a true sweep multiplies v by factors
within [1/C, R] and u within [1/R, C], so, r/c being C/R, one of these multiplies v within [1/R, C] and u within
[1/C, R]: after SCALING_SWEEPS = 22 sweeps every factor is within 4^22 = 2^44 and a product of two within float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp2, log2, narrow, reciprocal, reciprocals

SCALING_SWEEPS = tl.constexpr(22)


@triton.jit
def ones(like):
    """Four vectors of ones."""
    return [tl.full(like.shape, 1.0, tl.float32) for _ in (0, 1, 2, 3)]


@triton.jit
def zeros(like):
    """Four vectors of zeros."""
    return [tl.full(like.shape, 0.0, tl.float32) for _ in (0, 1, 2, 3)]


@triton.jit
def _halves(x, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the second half of each row of x (BLOCK, WIDTH)."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _joined(x, y, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of WIDTH values with x as their first half and y as their second."""
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (BLOCK, WIDTH))


@triton.jit
def _chunk(ptr, matrix, START: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers (BLOCK, WIDTH) to 16 aligned bytes of each matrix."""
    start = tl.multiple_of(ptr + (matrix[:, None] * 16 + START), (16, 16))
    return start + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _four(x, BLOCK: tl.constexpr):
    left, right = _halves(x, BLOCK, 4)
    a, b = tl.split(left)
    c, d = tl.split(right)
    return (a, b, c, d)


@triton.jit
def load_packed(ptr, matrix, live, BLOCK: tl.constexpr):
    """Contiguous, aligned 4x4 matrices, 16 bytes at a time, each thread its own: no exchange between threads."""
    some = live[:, None]
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        x0 = tl.load(_chunk(ptr, matrix, 0, 4), mask=some, other=0.0)
        x1 = tl.load(_chunk(ptr, matrix, 4, 4), mask=some, other=0.0)
        x2 = tl.load(_chunk(ptr, matrix, 8, 4), mask=some, other=0.0)
        x3 = tl.load(_chunk(ptr, matrix, 12, 4), mask=some, other=0.0)
    else:
        x0, x1 = _halves(tl.load(_chunk(ptr, matrix, 0, 8), mask=some, other=0.0), BLOCK, 8)
        x2, x3 = _halves(tl.load(_chunk(ptr, matrix, 8, 8), mask=some, other=0.0), BLOCK, 8)
    x = _four(x0, BLOCK) + _four(x1, BLOCK) + _four(x2, BLOCK) + _four(x3, BLOCK)
    return [value.to(tl.float32) for value in x]


@triton.jit
def _row(x, ROW: tl.constexpr, BLOCK: tl.constexpr):
    left = tl.join(x[4 * ROW], x[4 * ROW + 1])
    right = tl.join(x[4 * ROW + 2], x[4 * ROW + 3])
    return _joined(left, right, BLOCK, 4)


@triton.jit
def store_packed(ptr, matrix, live, x, BLOCK: tl.constexpr):
    """The mirror of :func:`load_packed`."""
    some = live[:, None]
    y = [narrow(value, ptr.dtype.element_ty) for value in x]
    x0 = _row(y, 0, BLOCK)
    x1 = _row(y, 1, BLOCK)
    x2 = _row(y, 2, BLOCK)
    x3 = _row(y, 3, BLOCK)
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        tl.store(_chunk(ptr, matrix, 0, 4), x0, mask=some)
        tl.store(_chunk(ptr, matrix, 4, 4), x1, mask=some)
        tl.store(_chunk(ptr, matrix, 8, 4), x2, mask=some)
        tl.store(_chunk(ptr, matrix, 12, 4), x3, mask=some)
    else:
        tl.store(_chunk(ptr, matrix, 0, 8), _joined(x0, x1, BLOCK, 8), mask=some)
        tl.store(_chunk(ptr, matrix, 8, 8), _joined(x2, x3, BLOCK, 8), mask=some)


@triton.jit
def load_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, default):
    """Any strides and any n, m <= 4, ``default`` beyond."""
    start = ptr + matrix * stride_b
    return [
        tl.load(start + (e // 4) * stride_n + (e % 4) * stride_m, mask=live & (e // 4 < n) & (e % 4 < m), other=default)
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]


@triton.jit
def store_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, x):
    """The mirror of :func:`load_strided`."""
    start = ptr + matrix * stride_b
    for e in tl.static_range(16):
        tl.store(
            start + (e // 4) * stride_n + (e % 4) * stride_m,
            narrow(x[e], ptr.dtype.element_ty),
            mask=live & (e // 4 < n) & (e % 4 < m),
        )


@triton.jit
def sums_over_rows(K, u, start):
    """start + K^T u: one value for each column."""
    return [start[j] + u[0] * K[j] + u[1] * K[4 + j] + u[2] * K[8 + j] + u[3] * K[12 + j] for j in (0, 1, 2, 3)]


@triton.jit
def sums_over_cols(K, v, start):
    """start + K v: one value for each row."""
    return [start[i] + v[0] * K[4 * i] + v[1] * K[4 * i + 1] + v[2] * K[4 * i + 2] + v[3] * K[4 * i + 3] for i in (0, 1, 2, 3)]


@triton.jit
def valid_lines(spare):
    """How many of four lines are not excluded, at least 1."""
    return tl.maximum(4.0 - (spare[0] + spare[1] + spare[2] + spare[3]), 1.0)


@triton.jit
def max4(a, b, c, d):
    """The largest of four."""
    return tl.maximum(tl.maximum(a, b), tl.maximum(c, d))


@triton.jit
def scaling_sweep(K, u, spare_row, spare_col, PAIRED: tl.constexpr):
    """v = 1 / (K^T u), u = 1 / (K v).

    PAIRED: v takes one reciprocal for two values. Reciprocals run at an eighth of the rate of products, so that sweeps
    alone are bound by both: 47 instructions, 6 of them reciprocals (unpaired 43 and 8; with u paired too, 51 and 4).
    """
    y = sums_over_rows(K, u, spare_col)
    if PAIRED:
        v0, v1 = reciprocals(y[0], y[1])
        v2, v3 = reciprocals(y[2], y[3])
        v = [v0, v1, v2, v3]
    else:
        v = [reciprocal(value) for value in y]
    u = [reciprocal(value) for value in sums_over_cols(K, v, spare_row)]
    return u, v


@triton.jit
def scaling_sweeps(K, spare_row, spare_col, count):
    """(u, v) after ``count`` scaling sweeps from u = v = 1."""
    u = ones(K[0])
    v = ones(K[0])
    for _ in range(count):
        u, v = scaling_sweep(K, u, spare_row, spare_col, True)
    return u, v


@triton.jit
def log_columns(x, k, f, FIRST: tl.constexpr):
    """The first half of a sweep in the log domain, base 2, S = k x, of the row potential f (FIRST: 0 in place of it).

    Returns E = 2^(S + f - high), its column maxima ``high``, its column sums, and the indicators of excluded columns, whose
    sums are 1. The first sweep takes the maximum of x and rounds it in the two places where it enters alike, so that this
    error cancels.
    """
    if FIRST:
        high = [max4(x[j], x[4 + j], x[8 + j], x[12 + j]) * k for j in (0, 1, 2, 3)]
    else:
        s = [tl.fma(x[e], k, f[e // 4]) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
        high = [max4(s[j], s[4 + j], s[8 + j], s[12 + j]) for j in (0, 1, 2, 3)]
    spare_col = [tl.where(value == float("-inf"), 1.0, 0.0) for value in high]
    high = [tl.where(value == float("-inf"), 0.0, value) for value in high]
    if FIRST:
        s = [tl.fma(x[e], k, -high[e % 4]) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    else:
        s = [s[e] - high[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    E = [exp2(value) for value in s]
    return E, high, [spare_col[j] + E[j] + E[4 + j] + E[8 + j] + E[12 + j] for j in (0, 1, 2, 3)], spare_col


@triton.jit
def log_kernel(x, k, g):
    """K = 2^(S + g - high) of a column potential, its row maxima ``high``, 0 on excluded rows, and the indicators of those."""
    s = [tl.fma(x[e], k, g[e % 4]) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    high = [max4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]) for i in (0, 1, 2, 3)]
    spare_row = [tl.where(value == float("-inf"), 1.0, 0.0) for value in high]
    high = [tl.where(value == float("-inf"), 0.0, value) for value in high]
    K = [exp2(s[e] - high[e // 4]) for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    return K, high, spare_row


@triton.jit
def log_sweep(x, k, f, n_iters, FIRST: tl.constexpr):
    """One sweep in the log domain from the row potential f, as :func:`log_kernel` starts it.

    Returns K with row sums 1; f = -LSE_j(S + g); g; the row sums behind f; and the indicators of exclusion.
    """
    _E, high, total, spare_col = log_columns(x, k, f, FIRST)
    g = [tl.where(n_iters == 0, 0.0, -high[j] - log2(total[j])) for j in (0, 1, 2, 3)]
    E, high, spare_row = log_kernel(x, k, g)
    total = [spare_row[i] + E[4 * i] + E[4 * i + 1] + E[4 * i + 2] + E[4 * i + 3] for i in (0, 1, 2, 3)]
    f = [-high[i] - log2(total[i]) for i in (0, 1, 2, 3)]
    scale = [reciprocal(value) for value in total]
    K = [E[e] * scale[e // 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)]
    return K, f, g, total, spare_row, spare_col
