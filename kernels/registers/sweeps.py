"""Device functions of the register family: a matrix in the registers of one thread, its sweeps as plain arithmetic.

A matrix of LINES x LINES, 4 to 8, is a tuple of vectors of BLOCK values, row by row, entry (i, j) at LINES i + j; Triton puts
one value of each in a thread, so no operation crosses threads. Smaller ones are padded with -inf logits: an excluded line has
K = 0, and 1 is added to its denominator, where the sum of products starts, which costs nothing and keeps every factor finite.

Marginals are uniform, r on each valid row and c on each valid column, and are left out of the sweeps,

    v_t = 1 / (K^T u_(t-1)),   u_t = 1 / (K v_t),   P = r u_T K v_T,

where K has its bases taken out (``common/bases.py``; those of columns G, those of rows phi):

    y_ij = k x_ij + G_j - phi_i,   K = 2^y,   G_j = -max_i k x_ij,   phi_i = max_j (k x_ij + G_j) <= 0,   u_0 = 2^phi.

Each column has its maximum in a row with phi = 0, where u_0 = K = 1: sums of columns and rows are 1 or more, and K is never
made in the log domain again. Bases that are below 2^22 together are integers, the maxima but for 1/2, so that y is one fma; a
matrix with larger ones is *far*. If a program has one, its K are made by another branch: bases on a coarser grid, and what
they lack of the maxima, gamma for columns and a part of phi for rows, added afterwards. A matrix that is near has the same
bits from either. Potentials in base 2 are log2 u - phi and G + log2 v; a far matrix keeps in G what moves, not its base.

The true factors are v_t (c/r)^t and u_t (r/c)^t. With R rows and C columns a true sweep multiplies v by factors within
[1/C, R] and u within [1/R, C], so, r/c being C/R, one of these multiplies v within [1/R, C] and u within [1/C, R]: after 22
sweeps of 4 lines, or 15 of up to 8, every factor is within 2^46 and a product of two within float32. Then powers of two go
from v to G, and K is made anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arithmetic import exp2, log2, reciprocal, reciprocals
from ..common.bases import UNIT, fused, on_grid, spacing

SWEEPS_OF_4, SWEEPS_OF_8 = tl.constexpr(22), tl.constexpr(15)  # sweeps of a segment, by lines at most
_INTEGERS = tl.constexpr(1.5 * 2.0**23)  # what is added to it is rounded to an integer
_NO_COLUMN = tl.constexpr(2.0**-60)
_NEAR = tl.constexpr(2.0**22 / UNIT)


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
def chosen(new, x, y):
    """Of each two values the first where ``new``."""
    values = []
    for i in tl.static_range(len(x)):
        values = values + [tl.where(new, x[i], y[i])]
    return values


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
def row_factors(K, v, spare_row):
    """u = 1 / (K v)."""
    return [reciprocal(value) for value in sums_over_cols(K, v, spare_row)]


@triton.jit
def first_factors(phi, spare_col, n_iters):
    """u_0, and where column sums start: without sweeps the row step alone is one from u_0 = 0 with v = 1."""
    u = []
    start = []
    for i in tl.static_range(len(phi)):
        u = u + [tl.where(n_iters == 0, 0.0, exp2(phi[i]))]
        start = start + [tl.where(n_iters == 0, 1.0, spare_col[i])]
    return u, start


@triton.jit
def scaling_sweeps(K, u, v, spare_row, spare_col, count):
    """(u, v) after ``count`` scaling sweeps from u. Sums of more than 6 lines take longer than their reciprocals."""
    for _ in range(count):
        u, v = scaling_sweep(K, u, spare_row, spare_col, len(v) <= 6)
    return u, v


@triton.jit
def nearest(x):
    """The nearest integer of what is below 2^22."""
    return (x + _INTEGERS) - _INTEGERS


@triton.jit
def rebased(G, v):
    """G with the powers of two in v, and what they leave of v, within 2^(1/2) of 1."""
    base = []
    left = []
    for j in tl.static_range(len(v)):
        power = nearest(log2(v[j]))
        base = base + [power * (1.0 / UNIT) + G[j]]
        left = left + [v[j] * exp2(-power)]
    return base, left


@triton.jit
def _exclusion(high):
    """Maxima of lines, 0 on excluded ones, and the indicators of these."""
    spare = [tl.where(value == float("-inf"), 1.0, 0.0) for value in high]
    return [tl.where(value == float("-inf"), 0.0, value) for value in high], spare


@triton.jit
def column_maxima(x, LINES: tl.constexpr):
    """max_i x_ij, 0 on excluded columns, and the indicators of these."""
    high = []
    for j in tl.static_range(LINES):
        top = x[j]
        for i in tl.static_range(1, LINES):
            top = tl.maximum(top, x[LINES * i + j])
        high = high + [top]
    return _exclusion(high)


@triton.jit
def _row_maxima(x, kappa, G):
    """max_j (kappa x_ij + G_j), 0 on excluded rows, and the indicators of these."""
    LINES: tl.constexpr = len(G)
    high = []
    for i in tl.static_range(LINES):
        top = fused(x[LINES * i], kappa, G[0])
        for j in tl.static_range(1, LINES):
            top = tl.maximum(top, fused(x[LINES * i + j], kappa, G[j]))
        high = high + [top]
    return _exclusion(high)


@triton.jit
def _farthest(G, top):
    """How large |kappa x| may be where 2^y matters."""
    return largest([tl.abs(value) for value in G]) + largest([tl.abs(value) for value in top])


@triton.jit
def _near_kernel(x, k, G, top):
    """K and phi of a program without a far matrix, from the maxima ``top`` of rows."""
    LINES: tl.constexpr = len(G)
    phi = [nearest(value * UNIT) for value in top]
    K = []
    for e in tl.static_range(LINES * LINES):
        K = K + [exp2(fused(x[e], k, G[e % LINES] * UNIT - phi[e // LINES]))]
    return K, phi


@triton.jit
def _far_kernel(x, kappa, kappa_columns, G, near):
    """K and phi of any matrices, and the indicators of excluded rows."""
    LINES: tl.constexpr = len(G)
    level = near | (kappa_columns == 0.0)  # whose column potentials are G
    base = []
    high, _spare_col = column_maxima(x, LINES)
    for j in tl.static_range(LINES):
        base = base + [G[j] - tl.where(level, 0.0, high[j] * kappa)]
    top, spare_row = _row_maxima(x, kappa, base)
    q = spacing(_farthest(base, top))
    base = [tl.where(level, value, on_grid(value, q)) for value in base]
    top = [tl.where(near, nearest(value * UNIT) * (1.0 / UNIT), on_grid(value, q)) for value in top]
    y = []
    for e in tl.static_range(LINES * LINES):
        y = y + [fused(x[e], kappa, base[e % LINES] - top[e // LINES]) * UNIT]
    gamma = []
    for j in tl.static_range(LINES):
        above = y[j] + top[0] * UNIT
        for i in tl.static_range(1, LINES):
            above = tl.maximum(above, y[LINES * i + j] + top[i] * UNIT)
        gamma = gamma + [tl.where(level | (above == float("-inf")), 0.0, G[j] * UNIT - above)]
    K = []
    phi = []
    for i in tl.static_range(LINES):
        row = []
        for j in tl.static_range(LINES):
            row = row + [y[LINES * i + j] + gamma[j]]
        rest = tl.where(near | (spare_row[i] != 0.0), 0.0, largest(row))
        K = K + [exp2(value - rest) for value in row]
        phi = phi + [top[i] * UNIT + rest]
    return K, phi, spare_row


@triton.jit
def columns_first(x, kappa_columns, LINES: tl.constexpr):
    """G, _NO_COLUMN on excluded columns, and column maxima, 0 there. ``kappa_columns``: kappa, or 0 for G = 0."""
    high, spare_col = column_maxima(x, LINES)
    G = []
    for j in tl.static_range(LINES):
        base = -(fused(high[j], kappa_columns, _INTEGERS / UNIT) - _INTEGERS / UNIT)
        G = G + [tl.where(spare_col[j] != 0.0, _NO_COLUMN, base)]
    return G, high


@triton.jit
def excluded_columns(G):
    """Indicators, by G: to know them by the maxima, the compiler would keep the matrix."""
    return [tl.where(value == _NO_COLUMN, 1.0, 0.0) for value in G]


@triton.jit
def lifted(x, kappa, kappa_columns, G, shift):
    """K, phi, the G to keep, which is ``shift`` where far, whether matrices are near, all of them are, rows are excluded."""
    top, spare_row = _row_maxima(x, kappa, G)
    near = _farthest(G, top) < _NEAR
    all_near = tl.min(near.to(tl.int32), 0)
    if all_near != 0:
        K, phi = _near_kernel(x, kappa * UNIT, G, top)
    else:
        moved = []
        for j in tl.static_range(len(G)):
            moved = moved + [tl.where(near | (G[j] == _NO_COLUMN), G[j], shift[j])]
        G = moved
        K, phi, _spare_row = _far_kernel(x, kappa, kappa_columns, G, near)
    return K, phi, G, near, all_near, spare_row


@triton.jit
def lifted_again(x, kappa, kappa_columns, G, near, all_near):
    """K and phi of a G that has moved, and the indicators of excluded rows."""
    if all_near != 0:
        top, spare_row = _row_maxima(x, kappa, G)
        K, phi = _near_kernel(x, kappa * UNIT, G, top)
    else:
        K, phi, spare_row = _far_kernel(x, kappa, kappa_columns, G, near)
    return K, phi, spare_row


@triton.jit
def far_bases(high, kappa_columns, near):
    """The bases that far matrices do not keep in G, minus k times the column maxima, in two parts."""
    base = []
    fine = []
    for j in tl.static_range(len(high)):
        value = tl.where(near, 0.0, -high[j] * kappa_columns)
        base = base + [value * UNIT]
        fine = fine + [tl.where(near, 0.0, -fused(high[j], kappa_columns, value) * UNIT)]
    return base, fine
