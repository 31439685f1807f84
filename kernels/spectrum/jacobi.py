"""sigma2 of a matrix of up to 4x4 in the registers of one thread: deflation to 3x3, then cyclic Jacobi.

With N = diag(r)^-1/2 P diag(c)^-1/2 and the unit vectors q = sqrt(r / total), p = sqrt(c / total), sigma2 is the norm
of (I - q q^T) N (I - p p^T), hence of the 3x3 matrix M = A^T N B when the columns of A, B span the complements of q, p.
The reflection that maps q to -e_0 has such columns,

    A_k = e_k - q_k (q + e_0) / (1 + q_0),   k = 1, 2, 3,

and as q_0 >= 0 nothing cancels; a line with marginal 0 only adds a zero row, so one path serves every size and mask.
M is formed before anything is squared: the leading singular value, 1, is gone when G = M^T M is taken, and an error of
one unit in the last place of the largest eigenvalue of G is half of one in sigma2.

A rotation of G in the plane (p, q), h = (G_pp - G_qq) / 2, g = G_pq, w = sign(h) / sqrt(h^2 + g^2): the eigenvalues of
the 2x2 block are (G_pp + G_qq) / 2 +- sqrt(h^2 + g^2), cos^2 = (1 + h w) / 2 and 2 sin cos = g w. Three rounds of the
three planes leave a relative error of 2e-7 in float32, on random matrices, on plans of logit std 0.1 .. 50, and where
singular values agree to 1e-4 .. 1e-1; two rounds leave up to 2e-3. float64 takes one more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.arithmetic import reciprocal, rsqrt

SINGLE_ROUNDS = tl.constexpr(3)
DOUBLE_ROUNDS = tl.constexpr(4)
_ROOT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def deflate(N, q, p):
    """M = A^T N B of 16 entries N (4x4) and unit vectors q, p: 9 entries."""
    scale = reciprocal(1.0 + q[0])
    z = [scale * (N[j] + (q[0] * N[j] + q[1] * N[4 + j] + q[2] * N[8 + j] + q[3] * N[12 + j])) for j in (0, 1, 2, 3)]
    T = [N[4 + e] - q[1 + e // 4] * z[e % 4] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    scale = reciprocal(1.0 + p[0])
    z = [
        scale * (T[4 * k] + (p[0] * T[4 * k] + p[1] * T[4 * k + 1] + p[2] * T[4 * k + 2] + p[3] * T[4 * k + 3]))
        for k in (0, 1, 2)
    ]
    return [T[4 * (e // 3) + 1 + e % 3] - z[e // 3] * p[1 + e % 3] for e in (0, 1, 2, 3, 4, 5, 6, 7, 8)]


@triton.jit
def lift(a, q):
    """A a: the vector of length 4 whose coordinates in the complement of q are a."""
    total = q[1] * a[0] + q[2] * a[1] + q[3] * a[2]
    z = total * reciprocal(1.0 + q[0])
    return -total, a[0] - q[1] * z, a[1] - q[2] * z, a[2] - q[3] * z


@triton.jit
def _dot3(M, i: tl.constexpr, j: tl.constexpr):
    return M[i] * M[j] + M[3 + i] * M[3 + j] + M[6 + i] * M[6 + j]


@triton.jit
def _rotate(a, b, g):
    """cos, sin, and the eigenvalues of [[a, g], [g, b]], the one nearer to a first."""
    mean = 0.5 * a + 0.5 * b
    h = 0.5 * a - 0.5 * b
    size = tl.abs(h) + 1e-18  # never 0, so that a multiple of the identity is turned by nothing
    square = size * size + g * g
    inverse = rsqrt(square)
    w = tl.where(h < 0.0, -inverse, inverse)
    root = square * w
    twice = 1.0 + size * inverse
    scale = _ROOT_HALF * rsqrt(twice)
    return twice * scale, g * w * scale, mean + root, mean - root


@triton.jit
def _gram(M):
    """Diagonal and off-diagonal entries (01, 02, 12) of M^T M."""
    return _dot3(M, 0, 0), _dot3(M, 1, 1), _dot3(M, 2, 2), _dot3(M, 0, 1), _dot3(M, 0, 2), _dot3(M, 1, 2)


@triton.jit
def largest_singular_value(M, ROUNDS: tl.constexpr):
    """||M||_2 of the 9 entries of M, NaN if one of them is not finite. A norm below 1e-9 may come out as 1e-9."""
    a, b, c, ab, ac, bc = _gram(M)
    broken = 0.0 * (a + b + c)
    for _ in tl.static_range(ROUNDS):
        cos, sin, a, b = _rotate(a, b, ab)
        ac, bc = cos * ac + sin * bc, cos * bc - sin * ac
        cos, sin, a, c = _rotate(a, c, ac)
        ab, bc = sin * bc, cos * bc
        cos, sin, b, c = _rotate(b, c, bc)
        ab, ac, bc = cos * ab, -sin * ab, tl.zeros_like(bc)
    return tl.sqrt(tl.maximum(tl.maximum(a, b), tl.maximum(c, 0.0))) + broken


@triton.jit
def largest_singular_pair(M, ROUNDS: tl.constexpr):
    """value = ||M v||, u = M v / value and v, the unit right singular vector of the largest singular value of M.

    M of any scale; the vectors are 0 where M is, value is NaN where an entry of M is not finite.
    """
    top = tl.maximum(tl.maximum(tl.maximum(tl.abs(M[0]), tl.abs(M[1])), tl.abs(M[2])), 1e-30)
    for i in tl.static_range(3, 9):
        top = tl.maximum(top, tl.abs(M[i]))
    M = [value / top for value in M]
    a, b, c, ab, ac, bc = _gram(M)
    broken = 0.0 * (a + b + c)
    zero = tl.zeros_like(a)
    one = zero + 1.0
    va, vb, vc = (one, zero, zero), (zero, one, zero), (zero, zero, one)
    for _ in tl.static_range(ROUNDS):
        cos, sin, a, b = _rotate(a, b, ab)
        ac, bc = cos * ac + sin * bc, cos * bc - sin * ac
        va, vb = _turn(va, vb, cos, sin)
        cos, sin, a, c = _rotate(a, c, ac)
        ab, bc = sin * bc, cos * bc
        va, vc = _turn(va, vc, cos, sin)
        cos, sin, b, c = _rotate(b, c, bc)
        ab, ac, bc = cos * ab, -sin * ab, tl.zeros_like(bc)
        vb, vc = _turn(vb, vc, cos, sin)
    v = [tl.where(a >= tl.maximum(b, c), va[i], tl.where(b >= c, vb[i], vc[i])) for i in (0, 1, 2)]
    scale = rsqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    u = [M[3 * i] * v[0] + M[3 * i + 1] * v[1] + M[3 * i + 2] * v[2] for i in (0, 1, 2)]
    square = u[0] * u[0] + u[1] * u[1] + u[2] * u[2]
    inverse = tl.where(square > 0.0, rsqrt(square + 1e-37), 0.0)
    v = [tl.where(square > 0.0, scale * value, 0.0) for value in v]
    return (
        top * scale * tl.sqrt(square) + broken,
        [inverse * value + broken for value in u],
        [value + broken for value in v],
    )


@triton.jit
def _turn(x, y, cos, sin):
    """Two orthogonal vectors turned in their plane."""
    return [cos * x[i] + sin * y[i] for i in (0, 1, 2)], [cos * y[i] - sin * x[i] for i in (0, 1, 2)]
