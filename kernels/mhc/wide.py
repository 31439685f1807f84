"""The sweeps of ``mixes.py`` and their adjoint for n > 4: matrices as tiles (tokens, L, L), L = 8 or 16, symbols as there.

What L lines have beyond n is a unit matrix of its own, exp(M) = 1 on the diagonal and 0 else, which sweeps leave alone.
Products that lanes add up are rounded by themselves, so that all copies of a sum are one.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LOG2_E, exp2, log2, reciprocal, rounded_product
from .mixes import WIDE_SEGMENT


@triton.jit
def places(step_a, step_b, streams, LINES: tl.constexpr):
    """Where the entries of a matrix lie, (1, L, L), and which there are."""
    line = tl.arange(0, LINES)
    at = line[:, None] * step_a + line[None, :] * step_b
    valid = (line < streams)[:, None] & (line < streams)[None, :]
    return at[None, :, :], valid[None, :, :]


@triton.jit
def wide_logits(own_ptr, q, factor, base_ptr, at, valid):
    """M of each token."""
    s = tl.load(own_ptr[:, None, None] + at, mask=valid, other=0.0)
    M = factor * (q[:, None, None] * s) + tl.load(base_ptr + at, mask=valid, other=0.0)
    line = tl.arange(0, at.shape[1])
    rest = tl.where(line[:, None] == line[None, :], 0.0, float("-inf"))
    return tl.where(valid, M, rest[None, :, :])


@triton.jit
def _softmax(M, options):
    """y."""
    y = (M - tl.max(M, 1)[:, None, :]) * LOG2_E
    return y - log2(tl.sum(exp2(y), 1) + exp2(options.log2_first))[:, None, :]


@triton.jit
def _powers(x, F, G):
    """K."""
    return exp2(x + F[:, :, None] + G[:, None, :])


@triton.jit
def _first_rows(M, options):
    """x, its first row potentials taken in."""
    y = _softmax(M, options)
    x = tl.where((options.floor > 0) & (y > float("-inf")), log2(exp2(y) + options.floor), y)
    x = tl.where(options.n_iters > 0, x, M * LOG2_E)
    top = tl.max(x, 2)
    total = tl.sum(exp2(x - top[:, :, None]), 2) + exp2(options.log2_eps - top)
    return x - (top + log2(total))[:, :, None]


@triton.jit
def _slot(history_ptr, slot, own, stride, LINES: tl.constexpr):
    """Pointers to the two lines of each token."""
    pointers = history_ptr + ((slot * stride + own) * (2 * LINES))[:, None] + tl.arange(0, LINES)[None, :]
    return pointers, pointers + LINES


@triton.jit
def _keep(history_ptr, slot, own, stride, F, G):
    F_pointers, G_pointers = _slot(history_ptr, slot, own, stride, F.shape[1])
    tl.store(F_pointers, F)
    tl.store(G_pointers, G)


@triton.jit
def _kept(history_ptr, slot, own, stride, LINES: tl.constexpr):
    F_pointers, G_pointers = _slot(history_ptr, slot, own, stride, LINES)
    return tl.load(F_pointers), tl.load(G_pointers)


@triton.jit
def wide_plan(K, p, w):
    """K_ab / (p_a w_b)."""
    return reciprocal(p)[:, :, None] * K * reciprocal(w)[:, None, :]


@triton.jit
def wide_project(M, options, history_ptr, own, stride, KEEP: tl.constexpr):
    """x, K, p and w as ``project``; KEEP: lines go to history_ptr (slots, stride, 2, L), each token's to its ``own``."""
    x = _first_rows(M, options)
    F = tl.zeros([M.shape[0], M.shape[1]], tl.float32)
    G = tl.zeros([M.shape[0], M.shape[1]], tl.float32)
    K = _powers(x, F, G)
    p = tl.full([M.shape[0], M.shape[1]], 1.0, tl.float32)
    w = tl.full([M.shape[0], M.shape[1]], 1.0, tl.float32)
    sweeps = tl.maximum(options.n_iters - 1, 0)
    for done in range(0, sweeps, WIDE_SEGMENT):
        F -= log2(p)
        G -= log2(w)
        K = _powers(x, F, G)
        p = tl.full([M.shape[0], M.shape[1]], 1.0, tl.float32)
        w = tl.full([M.shape[0], M.shape[1]], 1.0, tl.float32)
        slot = done + done // WIDE_SEGMENT
        if KEEP:
            _keep(history_ptr, slot, own, stride, F, G)
        for more in range(tl.minimum(sweeps - done, WIDE_SEGMENT)):
            w = tl.sum(rounded_product(K, reciprocal(p)[:, :, None]), 1) + options.eps * w
            p = tl.sum(rounded_product(K, reciprocal(w)[:, None, :]), 2) + options.eps * p
            if KEEP:
                _keep(history_ptr, slot + 1 + more, own, stride, p, w)
    return x, K, p, w


@triton.jit
def wide_adjoint(M, dP, x, K, p, w, options, history_ptr, own, stride):
    """dM, as ``project_adjoint``."""
    dx = rounded_product(wide_plan(K, p, w), dP)
    dF = tl.sum(dx, 2)
    dG = tl.sum(dx, 1)
    sweeps = tl.maximum(options.n_iters - 1, 0)
    segments = tl.cdiv(sweeps, WIDE_SEGMENT)
    for back in range(segments):
        segment = segments - 1 - back
        count = tl.minimum(sweeps - segment * WIDE_SEGMENT, WIDE_SEGMENT)
        F, G = _kept(history_ptr, segment * (WIDE_SEGMENT + 1), own, stride, K.shape[1])
        K = _powers(x, F, G)
        W = tl.zeros(K.shape, tl.float32)
        for done in range(count):
            slot = segment * (WIDE_SEGMENT + 1) + count - done
            p, w = _kept(history_ptr, slot, own, stride, K.shape[1])
            past_p, past_w = _kept(history_ptr, slot - 1, own, stride, K.shape[1])
            past_p = tl.where(done == count - 1, 1.0, past_p)
            past_w = tl.where(done == count - 1, 1.0, past_w)
            v = reciprocal(w)
            past_u = reciprocal(past_p)
            a = dF * reciprocal(p)
            b = v * (dG - v * tl.sum(rounded_product(K, a[:, :, None]), 1))
            W += a[:, :, None] * v[:, None, :] + past_u[:, :, None] * b[:, None, :]
            dF = options.eps * past_p * a - past_u * tl.sum(rounded_product(K, b[:, None, :]), 2)
            dG = options.eps * past_w * b
        dx -= K * W
    dx -= exp2(x) * dF[:, :, None]
    softmax = exp2(_softmax(M, options))
    share = tl.where(options.floor > 0, softmax * reciprocal(softmax + options.floor), 1.0)
    dy = rounded_product(dx, share)
    return tl.where(options.n_iters > 0, dy - softmax * tl.sum(dy, 1)[:, None, :], dx)
