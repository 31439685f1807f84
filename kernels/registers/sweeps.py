"""Device functions of the register family: a matrix in the registers of one thread, its sweeps as plain arithmetic.

A matrix of LINES x LINES, 4 to 8, is a tuple of vectors of BLOCK values, row by row, entry (i, j) at LINES i + j; Triton puts
one value of each in a thread, so no operation crosses threads. Smaller ones are padded with -inf logits: an excluded line has
K = 0, and 1 is added to its denominator, where the sum of products starts, which costs nothing and keeps every factor finite.

Marginals are uniform, r on each valid row and c on each valid column, and are left out of the sweeps: K has row sums 1,

    v_t = 1 / (K^T u_(t-1)),   u_t = 1 / (K v_t),   P = r u_T K v,

and the true factors are v_t (c/r)^t and u_t (r/c)^t. With R rows and C columns a true sweep multiplies v by factors
within [1/C, R] and u within [1/R, C], so, r/c being C/R, one of these multiplies v within [1/R, C] and u within
[1/C, R]: after 22 sweeps of 4 lines, or 15 of up to 8, every factor is within 2^45 and a product of two within float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arithmetic import exp2, log2, reciprocal, reciprocals

SCALINGS_OF_4, SCALINGS_OF_8 = tl.constexpr(22), tl.constexpr(15)  # scaling sweeps of a segment, by lines at most


@triton.jit
def ones(like, LINES: tl.constexpr):
    """A line of ones."""
    line = []
    for _ in tl.static_range(LINES):
        line = line + [tl.full(like.shape, 1.0, tl.float32)]
    return line


@triton.jit
def zeros(like, LINES: tl.constexpr):
    """A line of zeros."""
    line = []
    for _ in tl.static_range(LINES):
        line = line + [tl.full(like.shape, 0.0, tl.float32)]
    return line


@triton.jit
def products(x, y):
    """x_e y_e."""
    values = []
    for e in tl.static_range(len(x)):
        values = values + [x[e] * y[e]]
    return values


@triton.jit
def plus(x, y):
    """x_e + y_e."""
    values = []
    for e in tl.static_range(len(x)):
        values = values + [x[e] + y[e]]
    return values


@triton.jit
def sums_over_rows(K, u, start):
    """start + K^T u: one value for each column."""
    LINES: tl.constexpr = len(u)
    sums = []
    for j in tl.static_range(LINES):
        total = start[j]
        for i in tl.static_range(LINES):
            total += u[i] * K[LINES * i + j]
        sums = sums + [total]
    return sums


@triton.jit
def sums_over_cols(K, v, start):
    """start + K v: one value for each row."""
    LINES: tl.constexpr = len(v)
    sums = []
    for i in tl.static_range(LINES):
        total = start[i]
        for j in tl.static_range(LINES):
            total += v[j] * K[LINES * i + j]
        sums = sums + [total]
    return sums


@triton.jit
def scaled(u, K, v):
    """u_i K_ij v_j."""
    LINES: tl.constexpr = len(v)
    P = []
    for e in tl.static_range(LINES * LINES):
        P = P + [u[e // LINES] * K[e] * v[e % LINES]]
    return P


@triton.jit
def valid_lines(spare):
    """How many lines are not excluded, at least 1."""
    excluded = spare[0]
    for i in tl.static_range(1, len(spare)):
        excluded += spare[i]
    return tl.maximum(len(spare) - excluded, 1.0)


@triton.jit
def largest(values):
    """The largest of them."""
    top = values[0]
    for i in tl.static_range(1, len(values)):
        top = tl.maximum(top, values[i])
    return top


@triton.jit
def poison(values):
    """0, or NaN where one of them is not finite."""
    total = values[0]
    for i in tl.static_range(1, len(values)):
        total += values[i]
    return 0.0 * total


@triton.jit
def column_maxima(x, LINES: tl.constexpr):
    """max_i x_ij."""
    high = []
    for j in tl.static_range(LINES):
        top = x[j]
        for i in tl.static_range(1, LINES):
            top = tl.maximum(top, x[LINES * i + j])
        high = high + [top]
    return high


@triton.jit
def row_maxima(x, LINES: tl.constexpr):
    """max_j x_ij."""
    high = []
    for i in tl.static_range(LINES):
        top = x[LINES * i]
        for j in tl.static_range(1, LINES):
            top = tl.maximum(top, x[LINES * i + j])
        high = high + [top]
    return high


@triton.jit
def reciprocals_of(values):
    """1 / value of each, one reciprocal for two of them; no product of two neighbours may overflow or underflow."""
    COUNT: tl.constexpr = len(values)
    inverse = []
    for i in tl.static_range(0, COUNT - 1, 2):
        left, right = reciprocals(values[i], values[i + 1])
        inverse = inverse + [left, right]
    if COUNT % 2 == 1:
        inverse = inverse + [reciprocal(values[COUNT - 1])]
    return inverse


@triton.jit
def scaling_sweep(K, u, spare_row, spare_col, PAIRED: tl.constexpr):
    """v = 1 / (K^T u), u = 1 / (K v).

    PAIRED: v takes one reciprocal for two values. Reciprocals run at an eighth of the rate of products, so that sweeps of 4
    lines are bound by both: 47 instructions, 6 of them reciprocals (unpaired 43 and 8; with u paired too, 51 and 4).
    """
    y = sums_over_rows(K, u, spare_col)
    if PAIRED:
        v = reciprocals_of(y)
    else:
        v = [reciprocal(value) for value in y]
    u = [reciprocal(value) for value in sums_over_cols(K, v, spare_row)]
    return u, v


@triton.jit
def scaling_sweeps(K, spare_row, spare_col, count):
    """(u, v) after ``count`` scaling sweeps from u = v = 1. Sums of more than 6 lines take longer than their reciprocals."""
    LINES: tl.constexpr = len(spare_col)
    u = ones(K[0], LINES)
    v = ones(K[0], LINES)
    for _ in range(count):
        u, v = scaling_sweep(K, u, spare_row, spare_col, LINES <= 6)
    return u, v


@triton.jit
def _exclusion(high):
    """Maxima of lines, 0 on excluded ones, and the indicators of these."""
    spare = [tl.where(value == float("-inf"), 1.0, 0.0) for value in high]
    return [tl.where(value == float("-inf"), 0.0, value) for value in high], spare


@triton.jit
def log_columns(x, k, LINES: tl.constexpr):
    """The first half of the first sweep in the log domain, base 2, S = k x.

    Returns E = 2^(S - high), its column maxima ``high``, its column sums, and the indicators of excluded columns, whose sums
    are 1. The maximum is rounded in the two places where it enters alike, so that this error cancels.
    """
    high, spare_col = _exclusion([value * k for value in column_maxima(x, LINES)])
    E = []
    for e in tl.static_range(LINES * LINES):
        E = E + [exp2(tl.fma(x[e], k, -high[e % LINES]))]
    return E, high, sums_over_rows(E, ones(k, LINES), spare_col), spare_col


@triton.jit
def log_kernel(x, k, g):
    """K = 2^(S + g - high) of a column potential, its row maxima ``high``, 0 on excluded rows, and the indicators of those."""
    LINES: tl.constexpr = len(g)
    s = []
    for e in tl.static_range(LINES * LINES):
        s = s + [tl.fma(x[e], k, g[e % LINES])]
    high, spare_row = _exclusion(row_maxima(s, LINES))
    K = []
    for e in tl.static_range(LINES * LINES):
        K = K + [exp2(s[e] - high[e // LINES])]
    return K, high, spare_row


@triton.jit
def first_columns(x, k, n_iters, LINES: tl.constexpr):
    """g = -LSE_i(S), 0 without sweeps, and the indicators of excluded columns."""
    _E, high, total, spare_col = log_columns(x, k, LINES)
    g = []
    for j in tl.static_range(LINES):
        g = g + [tl.where(n_iters == 0, 0.0, -high[j] - log2(total[j]))]
    return g, spare_col


@triton.jit
def row_step(x, k, g):
    """K with row sums 1, f = -LSE_j(S + g), the row sums behind f, and the indicators of excluded rows."""
    LINES: tl.constexpr = len(g)
    E, high, spare_row = log_kernel(x, k, g)
    total = sums_over_cols(E, ones(k, LINES), spare_row)
    f = []
    for i in tl.static_range(LINES):
        f = f + [-high[i] - log2(total[i])]
    K = scaled([reciprocal(value) for value in total], E, ones(k, LINES))
    return K, f, total, spare_row
