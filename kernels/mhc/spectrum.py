"""The spectrum of a mix on request: its singular values, sigma2, and how far it is from doubly stochastic.

One-sided Jacobi (Hestenes) of tiles (tokens, L, L), zeros where L lines go beyond n. In step m of a round, m = 1 .. L - 1, each
column j is turned in the plane of columns j and j XOR m, so that a round meets every pair. With a, b their squared norms and g
their product,

    h = (b - a) / 2,   t = sign(h) g / (|h| + sqrt(h^2 + g^2)),   c = 1 / sqrt(1 + t^2),   s = t c,
    A_j <- A_j - s (A_m + s / (1 + c) A_j),

which seen from the other column has h and t of the other sign: both compute it, and agree, as sums are of rounded products.
Corrections vanish with t, and what they round with them: 5e-7 of error at 16 lines, where rotations c A_j - s A_m give 2e-6.
The rounds are one more than brought random plans of logit std 0 .. 16 to that.
"""

import triton
import triton.language as tl

from ..common.arithmetic import rounded_product


@triton.jit
def _turned(A, step):
    """Every column turned against its partner."""
    LINES: tl.constexpr = A.shape[2]
    column = tl.arange(0, LINES)
    partner = column ^ step
    B = tl.gather(A, tl.broadcast_to(partner[None, None, :], A.shape), 2)
    g = tl.sum(rounded_product(A, B), 1)
    h = 0.5 * (tl.sum(rounded_product(B, B), 1) - tl.sum(rounded_product(A, A), 1))
    size = tl.abs(h) + tl.sqrt(h * h + g * g)
    ahead = (h > 0.0) | ((h == 0.0) & (column < partner)[None, :])
    t = tl.where(ahead, g, -g) / tl.where(size == 0.0, 1.0, size)
    c = 1.0 / tl.sqrt(1.0 + t * t)
    s = t * c
    return A - s[:, None, :] * (B + (s / (1.0 + c))[:, None, :] * A)


@triton.jit
def _singular_values(A, ROUNDS: tl.constexpr):
    """(tokens, L), in no order."""
    for _ in range(ROUNDS):
        for step in range(1, A.shape[2]):
            A = _turned(A, step)
    return tl.sqrt(tl.sum(rounded_product(A, A), 1))


@triton.jit
def _ranks(values):
    """Of each in falling order, those that are the same, or NaN, as they come."""
    line = tl.arange(0, values.shape[1])
    known = tl.where(values == values, values, 0.0)
    one, other = known[:, :, None], known[:, None, :]
    before = (one > other) | ((one == other) & (line[:, None] < line[None, :])[None, :, :])
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def store_spectrum(comb_ptr, info_ptr, token, live, streams, LINES: tl.constexpr):
    """info (tokens, n + 2): the singular values of comb in falling order, sigma2, the residual."""
    L: tl.constexpr = 4 if LINES == 3 else LINES
    ROUNDS: tl.constexpr = 8 if L > 8 else 7 if L > 4 else 5
    line = tl.arange(0, L)
    has = line < streams
    at = line[:, None] * streams + line[None, :]
    there = (has[:, None] & has[None, :])[None, :, :]
    P = tl.load((comb_ptr + token * (streams * streams))[:, None, None] + at[None, :, :], mask=there, other=0.0)
    rows, columns = tl.sum(P, 2), tl.sum(P, 1)
    total = tl.sum(rows, 1)
    info_ptr += token * (streams + 2)
    off = tl.where(has[None, :], tl.maximum(tl.abs(rows - 1.0), tl.abs(columns - 1.0)), 0.0)
    broken = 0.0 * total
    tl.store(info_ptr + (streams + 1), tl.max(off, 1) + broken, mask=live)
    # (I - J) P (I - J), whose largest singular value is sigma2: less the means of rows and columns.
    count = streams.to(tl.float32)
    means = rows[:, :, None] + columns[:, None, :] - (total / count)[:, None, None]
    deflated = tl.where(there, P - means / count, 0.0)
    for kind in range(2):
        values = _singular_values(tl.where(kind == 0, P, deflated), ROUNDS)
        rank = _ranks(values)
        kept = live[:, None] & (rank < tl.where(kind == 0, streams, 1))
        tl.store(info_ptr[:, None] + (rank + kind * streams), values + broken[:, None], mask=kept)
