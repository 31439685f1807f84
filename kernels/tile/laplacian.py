"""The linear system of Newton's step and of the implicit gradient on tiles, (H + diag(ground)) d = b.

H is the Laplacian with edges w_jk = sum_i P_ij P_ik / r_i between columns; ``fastdsm/pytorch/laplacian.py`` says where it comes
from. Two ways to solve it:

Conjugate gradients, the degrees taken out. A product with H,

    (H d)_j = sum_i P_ij (d_j - (P d)_i / r_i),

takes as long as a sweep, and where sigma2 is below about 0.95 a dozen or two bring the error to the rounding of float32. What
H loses to the subtraction is rounding of c: columns of a degree of c / 16 and more keep all digits but one. For others, and for
matrices that have not arrived in time,

Elimination: columns are taken out one after another. With deg_k = sum of w_kl over the columns l left, and the ground of k,

    d_k = b_k / deg_k + sum_l (w_kl / deg_k) d_l,

put into every other line of the system, those already taken out included: none is left to substitute back. It is sums, products
and quotients of positive numbers, and no weight loses digits.
"""

import triton
import triton.language as tl

from ..common.arithmetic import reciprocal, rsqrt
from ..spectrum.squaring import gram
from .sweeps import (
    as_lines,
    as_matrices,
    col_sums,
    over_cols,
    over_matrices,
    over_rows,
    quotient,
    row_sums,
    vector_max,
    vector_sum,
)

_QUICK_FROM = tl.constexpr(16)  # columns; at 8 elimination takes as long as five steps of conjugate gradients, at 64 a hundred
_STEPS = tl.constexpr(24)
_LEAST_DEGREE = tl.constexpr(2.0**-4)  # of a column, as a share of its c


@triton.jit
def as_cols(lines, COLS: tl.constexpr):
    """(BLOCK_B, P) as a vector over columns."""
    return tl.permute(tl.reshape(lines, (lines.shape[0], lines.shape[1] // COLS, COLS)), (1, 0, 2))


@triton.jit
def inverse_rows(r):
    """1 / r, 0 on excluded rows."""
    return tl.where(r != 0, reciprocal(tl.where(r != 0, r, 1.0)), 0.0)


@triton.jit
def conjugate_gradients(P, b, ground, inverse_r, c, accuracy):
    """d, and for which matrices (BLOCK_B,) it is one: its error is ``accuracy`` of that of 0, in the norm of H."""
    degree = col_sums(P * (1.0 - P * over_rows(inverse_r))) + ground
    scale = tl.where(c != 0, quotient(1.0, degree), 0.0)
    quick = vector_max(tl.where(c != 0, _LEAST_DEGREE * c - degree, -1.0)) <= 0.0
    d = tl.zeros_like(b)
    rest, along = b, b * scale
    square = vector_sum(rest * along)
    enough = square * (accuracy * accuracy)
    going = quick & (square > enough)
    left = _STEPS
    while (left > 0) & (tl.max(going.to(tl.int32), axis=0) > 0):
        mean = row_sums(P * over_cols(along)) * inverse_r
        image = col_sums(P * (over_cols(along) - over_rows(mean))) + ground * along
        step = over_matrices(tl.where(going, quotient(square, vector_sum(along * image)), 0.0))
        d += step * along
        rest -= step * image
        scaled = rest * scale
        new_square = vector_sum(rest * scaled)
        along = scaled + over_matrices(quotient(new_square, square)) * along
        square = tl.where(going, new_square, square)
        going = going & (square > enough)
        left -= 1
    return d, quick & ~(square > enough)


@triton.jit
def eliminated(w, b, ground, m):
    """The d (BLOCK_B, P) for edges w (BLOCK_B, P, P), whose diagonal is never looked at."""
    P: tl.constexpr = w.shape[1]
    index = tl.arange(0, P)
    for k in range(0, m):
        this, later = (index == k)[None, :], (index > k)[None, :]
        edges = tl.where(later, tl.sum(tl.where(this[:, :, None], w, 0.0), axis=1), 0.0)
        weights = tl.where(this, 0.0, tl.sum(tl.where(this[:, None, :], w, 0.0), axis=2))
        own_ground = tl.sum(tl.where(this, ground, 0.0), axis=1)
        inverse = reciprocal(tl.sum(edges, axis=1) + own_ground)
        share = edges * inverse[:, None]
        moved = (tl.sum(tl.where(this, b, 0.0), axis=1) * inverse)[:, None]
        w = tl.where(this[:, :, None], share[:, None, :], w + weights[:, :, None] * share[:, None, :])
        b = tl.where(this, moved, b + weights * moved)
        ground += weights * (own_ground * inverse)[:, None]
    return b


@triton.jit
def _eliminated_tile(P, b, ground, r, c, m, COLS: tl.constexpr):
    scale = tl.where(r != 0, rsqrt(tl.where(r != 0, r, 1.0)), 0.0)
    w = gram(as_matrices(P * over_rows(scale)))
    return as_cols(eliminated(w, as_lines(b), as_lines(tl.where(c != 0, ground, 1.0)), m), COLS)


@triton.jit
def solved(P, b, ground, r, c, m, accuracy, COLS: tl.constexpr):
    """d, a vector over columns, of the plan P; 0 on excluded columns, where b is 0. ``accuracy``: (BLOCK_B,) or a number."""
    if COLS * P.shape[1] < _QUICK_FROM:
        return _eliminated_tile(P, b, ground, r, c, m, COLS)
    else:
        d, found = conjugate_gradients(P, b, ground, inverse_rows(r), c, accuracy)
        if tl.min(found.to(tl.int32), axis=0) == 0:
            d = tl.where(over_matrices(found), d, _eliminated_tile(P, b, ground, r, c, m, COLS))
        return d
