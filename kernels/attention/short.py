"""Sweeps of a head whose logits fit on chip: what the one launch of its forward and the one of its backward share.

A program holds all logits of a query head, LINES by STREAMS, the lines being the side that is exact at the end: queries where
columns come first, keys where rows do. Symbols are those of ``tile.py``, potentials in base 2. With r and c the masses of lines
and streams, a segment begins with a sweep in the log domain,

    g_j = log c - LSE_i(x_ij + f_i),    K_ij = r_i 2^(x_ij + g_j) / sum_j 2^(x_ij + g_j),    f_i accordingly,

and goes on with sweeps of factors, v_j = c / (K^T u)_j and u_i = r_i / (K v)_i, each within [1/b, b] of the one before, b the
larger number of lines: floor(45 / log2 b) of them keep what underflows in K below 2^-36 of a line. Then f += log u, and the
next segment makes its logits and its K anew: they are a product away.

A thread of a tensor core's tile has many streams and few lines, so that every vector over streams takes a quarter to half of
what K does: no more than two are kept. c is one number, and v of a stream without an entry, whose K are 0, is 1.
"""

import triton
import triton.language as tl

from ..common.arithmetic import exp2, log2, reciprocal
from ..tile.sweeps import quotient
from .tile import entries_of, head_scales, line_side, load_entries, load_side, product, stream_side, used_lines


@triton.jit
def place_of(logits, line_group):
    """Of a program: query head of all, batch, query head, the line's head and the stream's."""
    head = tl.program_id(0).to(tl.int64)
    h = head % logits.sizes.heads
    return head, head // logits.sizes.heads, h, h // line_group, h // logits.sizes.stream_group


@triton.jit
def logits_of_head(
    logits,
    line_group,
    line_is_key,
    first,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """x, -inf where an entry takes no part; r, 0 of lines without an entry, and c.

    The mass of a query is 1, of a key the number of queries over that of keys, those that have an entry.
    """
    head, b, h, line_h, stream_h = place_of(logits, line_group)
    line, stream = line_side(logits, b, line_h), stream_side(logits, b, stream_h)
    line_used, stream_used = used_lines(line, first, BLOCK_L), used_lines(stream, first, BLOCK_S)
    k, k_bias = head_scales(logits, head)
    x = product(load_side(line, first, line_used, BLOCK_D), load_side(stream, first, stream_used, BLOCK_D), "ieee") * k
    if ENTRIES:
        x += load_entries(entries_of(logits, b, h), logits, k_bias, line_used, stream_used, first, first)
    x = tl.where(line_used[:, None] & stream_used[None, :], x, -float("inf"))
    if ENTRIES:
        entries = (x != -float("inf")).to(tl.int32)
        line_used, stream_used = tl.max(entries, axis=1) != 0, tl.max(entries, axis=0) != 0
    n_lines, n_streams = tl.sum(line_used.to(tl.float32), axis=0), tl.sum(stream_used.to(tl.float32), axis=0)
    ratio = tl.maximum(n_lines, 1.0) / tl.maximum(n_streams, 1.0)
    of_line = tl.where(n_streams > 0, tl.where(line_is_key != 0, 1.0 / ratio, 1.0), 0.0)
    return x, tl.where(line_used, of_line, 0.0), tl.where(line_is_key != 0, 1.0, ratio)


@triton.jit
def log_of(x, used):
    """log2 x, 0 where not ``used``."""
    return log2(tl.where(used, x, 1.0))


@triton.jit
def stream_step(x, f, c):
    """g from f."""
    y = x + f[:, None]
    top = tl.max(y, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(exp2(y - top[None, :]), axis=0)
    return tl.where(total != 0, log2(c) - top - log_of(total, total != 0), 0.0)


@triton.jit
def line_step(x, g, r, old_f):
    """K, f and 2^(old_f - f) from g; the last without f, whose rounding K does not share."""
    y = x + g[None, :]
    top = tl.max(y, axis=1)
    top = tl.where(top == -float("inf"), 0.0, top)
    K = exp2(y - top[:, None])
    total = tl.where(r != 0, tl.sum(K, axis=1), 1.0)
    f = tl.where(r != 0, log_of(r, r != 0) - top - log_of(total, r != 0), 0.0)
    return K * quotient(r, total)[:, None], f, exp2(old_f + top) * quotient(total, r)


@triton.jit
def line_sums(K, v):
    """K v."""
    return tl.sum(K * v[None, :], axis=1)


@triton.jit
def stream_sums(K, u):
    """K^T u."""
    return tl.sum(K * u[:, None], axis=0)


@triton.jit
def stream_factors(s, c):
    """v of the streams' sums s, 1 of a stream without an entry, whose K are 0."""
    return tl.where(s != 0, c * reciprocal(s), 1.0)


@triton.jit
def residual_of(s, v, c):
    """max_j |v_j s_j / c - 1|."""
    error = tl.abs(v * s / c - 1.0)
    error = tl.where(error < float("inf"), error, float("inf"))
    return tl.max(tl.where(s != 0, error, 0.0), axis=0)
