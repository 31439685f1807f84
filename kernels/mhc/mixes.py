"""The mixes of a block of tokens, one token a thread: sigmoids, the sweeps of an n x n matrix for n <= 4, and their adjoint.

A matrix M is a tuple of vectors, entry (a, b) at n a + b, turned so that its first side are the columns. In base 2, with
potentials F of rows, G of columns, and x_ab 2^(F_a + G_b) the matrix after a half sweep,

    y_ab = log2(e) M_ab - log2(sum_a e^M_ab),   x = log2(2^y + eps)                 softmax of columns; x = M without sweeps
    F_a <- -log2(sum_b 2^(x_ab + G_b) + eps 2^-F_a)                                 rows, from F = G = 0
    G_b <- -log2(sum_a 2^(x_ab + F_a) + eps 2^-G_b),  then rows again               n_iters - 1 times,

which is division by the sums + eps: 2^F / (2^F s + eps) = 1 / (s + eps 2^-F), the same recurrence whatever of F and G goes
into x: the first F do, so that neither x where it matters nor potentials are large, whatever the logits. Not floored, eps is
added to the sum in y, relative to the largest e^M_ab, in place of 2^y (``floor`` is then 0). With eps = 0 these
are sweeps in the log domain. Between, sweeps are of factors: K = 2^(x + F + G) of row sums 1, p = w = 1,

    w <- K^T (1 / p) + eps w,    p <- K (1 / w) + eps p,

with F - log2 p, G - log2 w the potentials, the same recurrence whatever K has taken in. A column of K has an entry of 1 / n^2
or more; a sweep changes sums by factors within [1 / n, n], so that p and w stay within 2^40 in a segment of
sweeps, after which F, G and K are made anew.

Adjoint, with dF, dG, dx the derivatives by potentials and x, first P dP and its sums; p', w' those before the sweep,

    rows       a = dF / p,   dx_ab -= a_a K_ab / w_b,   dG -= (K^T a) / w,   dF <- eps p' a
    columns    b = dG / w,   dx_ab -= b_b K_ab / p'_a,   dF -= (K b) / p',   dG <- eps w' b
    softmax    dy = dx 2^y / (2^y + eps),   dM = dy - 2^y sum_a dy.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.arithmetic import LOG2_E, exp2, log2, reciprocal
from ..registers.memory import load_line, store_line
from ..registers.sweeps import ones, products, reciprocals_of, scaled, sums_over_cols, sums_over_rows, zeros
from ..registers.values import load_value, store_value

SEGMENT, WIDE_SEGMENT = tl.constexpr(20), tl.constexpr(10)  # sweeps of a segment, of 4 lines and of 16 at most
MAX_LINES = tl.constexpr(4)


class Options(NamedTuple):
    """``Mixing`` as the kernels take it; log2_eps: -inf of no eps; log2_first: of what is added to the first sums."""

    n_iters: tl.int32
    columns_first: tl.int32
    transposed: tl.int32
    eps: tl.float32
    log2_eps: tl.float32
    floor: tl.float32
    log2_first: tl.float32
    pre_eps: tl.float32
    post_mult: tl.float32
    norm_eps: tl.float32


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + exp2(x * -LOG2_E))


@triton.jit
def inverse_root(square, size, norm_eps):
    """q = 1 / sqrt(square / size + norm_eps)."""
    return 1.0 / tl.sqrt(square / size + norm_eps)


@triton.jit
def matrix_steps(options, streams):
    """From entry to entry of M in the row and the column, in memory where H is row by row; and likewise where comb is."""
    columns_first = options.columns_first != 0
    kept = columns_first == (options.transposed != 0)
    return (
        tl.where(columns_first, streams, 1), tl.where(columns_first, 1, streams),
        tl.where(kept, streams, 1), tl.where(kept, 1, streams),
    )  # fmt: skip


@triton.jit
def log_sum(terms):
    """log2 of the sum of powers of two."""
    top = terms[0]
    for i in tl.static_range(1, len(terms)):
        top = tl.maximum(top, terms[i])
    total = exp2(terms[0] - top)
    for i in tl.static_range(1, len(terms)):
        total += exp2(terms[i] - top)
    return top + log2(total)


@triton.jit
def powers(x, F, G):
    """2^(x_ab + F_a + G_b)."""
    LINES: tl.constexpr = len(F)
    R = []
    for e in tl.static_range(LINES * LINES):
        R = R + [exp2(x[e] + F[e // LINES] + G[e % LINES])]
    return R


@triton.jit
def first_softmax(M, options, LINES: tl.constexpr):
    """y: maxima are taken off before anything is rounded at their size."""
    y = M
    for b in tl.static_range(LINES):
        top = M[b]
        for a in tl.static_range(1, LINES):
            top = tl.maximum(top, M[LINES * a + b])
        column = []
        for a in tl.static_range(LINES):
            column = column + [(M[LINES * a + b] - top) * LOG2_E]
        height = log_sum(column + [tl.full(top.shape, options.log2_first, tl.float32)])
        lifted = []
        for e in tl.static_range(LINES * LINES):
            lifted = lifted + [column[e // LINES] - height if e % LINES == b else y[e]]
        y = lifted
    return y


@triton.jit
def first_rows(M, options, LINES: tl.constexpr):
    """x, its first row potentials taken in."""
    y = first_softmax(M, options, LINES)
    x = []
    for a in tl.static_range(LINES):
        row = []
        for b in tl.static_range(LINES):
            value = y[LINES * a + b]
            value = tl.where(options.floor > 0, log2(exp2(value) + options.floor), value)
            row = row + [tl.where(options.n_iters > 0, value, M[LINES * a + b] * LOG2_E)]
        height = log_sum(row + [tl.full(row[0].shape, options.log2_eps, tl.float32)])
        x = x + [value - height for value in row]
    return x


@triton.jit
def sweep(K, p, w, eps):
    """p and w after columns and rows."""
    w = sums_over_rows(K, reciprocals_of(p), [eps * value for value in w])
    p = sums_over_cols(K, reciprocals_of(w), [eps * value for value in p])
    return p, w


@triton.jit
def less_logs(F, p):
    """F - log2 p."""
    values = []
    for i in tl.static_range(len(F)):
        values = values + [F[i] - log2(p[i])]
    return values


@triton.jit
def project(M, options, history_ptr, stride, LINES: tl.constexpr, KEEP: tl.constexpr):
    """x, and K, p, w of the projection K_ab / (p_a w_b).

    KEEP: F and G of each segment and p and w of each of its sweeps go to ``history_ptr``, values ``stride`` apart.
    """
    x = first_rows(M, options, LINES)
    F = zeros(x[0], LINES)
    G = zeros(x[0], LINES)
    K = powers(x, F, G)
    p = ones(x[0], LINES)
    w = ones(x[0], LINES)
    sweeps = tl.maximum(options.n_iters - 1, 0)
    for done in range(0, sweeps, SEGMENT):
        F = less_logs(F, p)
        G = less_logs(G, w)
        K = powers(x, F, G)
        p = ones(x[0], LINES)
        w = ones(x[0], LINES)
        slot = done + done // SEGMENT
        if KEEP:
            keep(history_ptr, slot, stride, F, G)
        for more in range(tl.minimum(sweeps - done, SEGMENT)):
            p, w = sweep(K, p, w, options.eps)
            if KEEP:
                keep(history_ptr, slot + 1 + more, stride, p, w)
    return x, K, p, w


@triton.jit
def plan(K, p, w):
    """K_ab / (p_a w_b)."""
    return scaled(reciprocals_of(p), K, reciprocals_of(w))


@triton.jit
def everywhere(like):
    """True for each token."""
    return tl.full(like.shape, 1, tl.int1)


@triton.jit
def keep(history_ptr, slot, stride, F, G):
    """F and G to memory."""
    COUNT: tl.constexpr = 2 * len(F)
    store_line(history_ptr + slot * COUNT * stride, stride, everywhere(F[0]), COUNT, F + G)


@triton.jit
def kept(history_ptr, slot, stride, LINES: tl.constexpr):
    """F and G from memory."""
    values = load_line(history_ptr + slot * (2 * LINES) * stride, stride, everywhere(history_ptr), 2 * LINES, 2 * LINES)
    F = []
    G = []
    for i in tl.static_range(LINES):
        F = F + [values[i]]
        G = G + [values[LINES + i]]
    return F, G


@triton.jit
def load_matrix(ptr, step_a, step_b, there, LINES: tl.constexpr):
    """The matrix of each token that is ``there``, else 0."""
    values = []
    for e in tl.static_range(LINES * LINES):
        values = values + [load_value(ptr + ((e // LINES) * step_a + (e % LINES) * step_b), there, 0.0)]
    return values


@triton.jit
def store_matrix(ptr, step_a, step_b, live, values, LINES: tl.constexpr):
    """The mirror of :func:`load_matrix`."""
    for e in tl.static_range(LINES * LINES):
        store_value(ptr + ((e // LINES) * step_a + (e % LINES) * step_b), values[e], live)


@triton.jit
def products_less(x, K, W):
    """x - K W, entry by entry."""
    values = []
    for e in tl.static_range(len(x)):
        values = values + [x[e] - K[e] * W[e]]
    return values


@triton.jit
def project_adjoint(M, dP, x, K, p, w, options, history_ptr, stride, LINES: tl.constexpr):
    """dM of P = K_ab / (p_a w_b), of what :func:`project` kept."""
    one = ones(x[0], LINES)
    zero = zeros(x[0], LINES)
    dx = products(plan(K, p, w), dP)
    dF = sums_over_cols(dx, one, zero)
    dG = sums_over_rows(dx, one, zero)
    sweeps = tl.maximum(options.n_iters - 1, 0)
    segments = tl.cdiv(sweeps, SEGMENT)
    for back in range(segments):
        segment = segments - 1 - back
        count = tl.minimum(sweeps - segment * SEGMENT, SEGMENT)
        first = segment * (SEGMENT + 1)
        F, G = kept(history_ptr, first, stride, LINES)
        K = powers(x, F, G)
        W = zeros(x[0], LINES * LINES)
        p, w = kept(history_ptr, first + count, stride, LINES)
        u = reciprocals_of(p)
        v = reciprocals_of(w)
        before_p, before_w = kept(history_ptr, first + count - 1, stride, LINES)
        for done in range(count):
            past_p = before_p
            past_w = before_w
            before_p, before_w = kept(history_ptr, tl.maximum(first + count - 2 - done, first), stride, LINES)
            past_p = [tl.where(done == count - 1, 1.0, value) for value in past_p]
            past_w = [tl.where(done == count - 1, 1.0, value) for value in past_w]
            past_u = reciprocals_of(past_p)
            a = products(u, dF)
            b = products(v, products_less(dG, v, sums_over_rows(K, a, zero)))
            more = []
            for e in tl.static_range(LINES * LINES):
                more = more + [W[e] + (a[e // LINES] * v[e % LINES] + past_u[e // LINES] * b[e % LINES])]
            W = more
            Kb = sums_over_cols(K, b, zero)
            dF = [options.eps * value for value in products(past_p, a)]
            dF = products_less(dF, past_u, Kb)
            dG = [options.eps * value for value in products(past_w, b)]
            u = past_u
            v = reciprocals_of(past_w)
        dx = products_less(dx, K, W)
    return softmax_adjoint(M, rows_adjoint(dx, dF, x), options, LINES)


@triton.jit
def rows_adjoint(dx, dF, x):
    """The derivatives by x before its first row potentials were taken in."""
    LINES: tl.constexpr = len(dF)
    values = []
    for e in tl.static_range(LINES * LINES):
        values = values + [dx[e] - exp2(x[e]) * dF[e // LINES]]
    return values


@triton.jit
def softmax_adjoint(M, dx, options, LINES: tl.constexpr):
    """dM of log2(2^y + eps); without sweeps this is M."""
    softmax = [exp2(value) for value in first_softmax(M, options, LINES)]
    dy = []
    for e in tl.static_range(LINES * LINES):
        share = tl.where(options.floor > 0, softmax[e] * reciprocal(softmax[e] + options.floor), 1.0)
        dy = dy + [dx[e] * share]
    sums = sums_over_rows(dy, ones(dx[0], LINES), zeros(dx[0], LINES))
    dM = []
    for e in tl.static_range(LINES * LINES):
        dM = dM + [tl.where(options.n_iters > 0, dy[e] - softmax[e] * sums[e % LINES], dx[e])]
    return dM
