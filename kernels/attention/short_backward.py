"""The exact backward of ``short_forward.py`` in two launches, each with one or two tiles of a head's logits; its symbols.

The first makes the sweeps again and leaves u_t and v_t in memory. With D = Z dO V^T, W = -u_T D v_T, and alpha and beta the
cotangents of f and g, if any,

    df = -sum_j K W + alpha,    dg = -sum_i K W + beta,
    for t = T..1:   a_t = u_t df / r;    dg -= v_t (K^T a_t);    h_t = v_t dg / c;    df = -u_(t-1) (K h_t);    dg = 0;

as in ``tile/backward.py``, with u_(t-1) = 2^(f before - f) where t begins a segment, and leaves a_t and h_t there too. The
second has K of one segment after the other, and

    dS = K (u_T D v_T) - sum_t K (a_t v_t^T + u_(t-1) h_t^T),
    d line = scale / temperature dS stream,    d stream = scale / temperature dS^T line;      the first: dV = (Z P)^T dO.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, narrow
from ..common.configuration import finite_jit
from ..tile.sweeps import quotient
from .arguments import EntryStrides, Logits, Operands, Scales, Sizes, Strides, VectorStrides
from .short import line_step, line_sums, log_of, logits_of_head, place_of, stream_factors, stream_step, stream_sums
from .tile import (
    at_head,
    dot,
    drop,
    head_scales,
    line_side,
    load_lines,
    load_side,
    product,
    store_lines,
    stream_side,
    used_lines,
)


class Target(NamedTuple):
    """A gradient (B, H, lines, features) of every query head: in the dtype of its operand, or, where several heads are to be
    added up (``wide``), in float32."""

    out_ptr: tl.pointer_type
    wide_ptr: tl.pointer_type
    wide: tl.int32
    strides: EntryStrides


@triton.jit
def leave(target, b, h, features, exists, tile):
    """Store a head's."""
    strides = target.strides
    if target.wide != 0:
        store_lines(at_head(target.wide_ptr, strides, b, h), strides.n, strides.m, features, 0, exists, tile)
    else:
        store_lines(at_head(target.out_ptr, strides, b, h), strides.n, strides.m, features, 0, exists, tile)


@triton.jit
def sweeps_done(sweeps_ptr, n_iters, tol):
    """Of a head, that by 0 sweeps included."""
    return tl.maximum(tl.where(tol >= 0, tl.load(sweeps_ptr, mask=tol >= 0, other=0), n_iters), 1)


@triton.jit
def scaled(p, dtype: tl.constexpr):
    """p and 1, for float16 p in units of its largest entry, 2^14 of them at least, and the unit."""
    unit = 1.0
    if dtype == tl.float16:
        peak = tl.maximum(tl.minimum(tl.max(tl.max(tl.abs(p), axis=1), axis=0), 2.0**100), 2.0**-100)
        unit = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2.0**-14
        p *= 1.0 / unit
    return p, unit


@triton.jit
def multiplied(p, x, TRANSPOSED: tl.constexpr, PIECES: tl.constexpr):
    """p x, or p^T x, p in float32 in so many pieces of the dtype of x."""
    p, unit = scaled(p, x.dtype)
    acc = tl.zeros([p.shape[1] if TRANSPOSED else p.shape[0], x.shape[1]], tl.float32)
    for _ in tl.static_range(PIECES):
        piece = narrow(p, x.dtype)
        acc = dot(tl.trans(piece) if TRANSPOSED else piece, x, acc, "ieee")
        p -= piece.to(tl.float32)
    return acc * unit


@triton.jit
def both_multiplied(p, stream, line, PIECES: tl.constexpr):
    """p stream and p^T line, of one set of pieces."""
    p, unit = scaled(p, stream.dtype)
    of_line = tl.zeros([p.shape[0], stream.shape[1]], tl.float32)
    of_stream = tl.zeros([p.shape[1], line.shape[1]], tl.float32)
    for _ in tl.static_range(PIECES):
        piece = narrow(p, stream.dtype)
        of_line = dot(piece, stream, of_line, "ieee")
        of_stream = dot(tl.trans(piece), line, of_stream, "ieee")
        p -= piece.to(tl.float32)
    return of_line * unit, of_stream * unit


@triton.jit
def products_of(
    line, stream, line_v_ptr, line_stride, stream_v_ptr, stream_stride, e, first,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dO V^T."""
    line_v = load_lines(line_v_ptr, line_stride, e, first, used_lines(line, first, BLOCK_L), BLOCK_E)
    stream_v = load_lines(stream_v_ptr, stream_stride, e, first, used_lines(stream, first, BLOCK_S), BLOCK_E)
    return product(line_v, stream_v, "ieee")


@triton.jit
def line_factors(line_ptr, t, start, SLOT: tl.constexpr):
    """u of sweep t, and that of the one before."""
    u = tl.where(t > start, tl.load(line_ptr + t * (2 * SLOT)), 1.0)
    return u, tl.where(t == start + 1, 1.0, tl.load(line_ptr + tl.maximum(t - 1, start) * (2 * SLOT)))


@triton.jit
def stream_factor(stream_ptr, t, start, SLOT: tl.constexpr):
    """v of sweep t."""
    return tl.where(t > start, tl.load(stream_ptr + t * (2 * SLOT)), 1.0)


@finite_jit
def _attention_short_adjoint_bwd_kernel(
    operands: Operands,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    sweeps_ptr,
    line_df_ptr,
    stream_df_ptr,
    history_ptr,
    d_value: Target,
    strides: Strides,
    line_v_strides: VectorStrides,
    stream_v_strides: VectorStrides,
    sizes: Sizes,
    e: tl.int32,
    out_e: tl.int32,
    line_group: tl.int32,
    line_v_group: tl.int32,
    stream_v_group: tl.int32,
    n_iters: tl.int32,
    scalings: tl.int32,
    tol: tl.float32,
    has_line_df: tl.int32,
    has_stream_df: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    LINE_IS_KEY: tl.constexpr,
):
    """``history`` (B H, max(n_iters, 1), 2, BLOCK_L + BLOCK_S) float32: of each sweep u and v, then a and h; dV."""
    logits = Logits(operands, strides, sizes, scales)
    head, b, h, line_h, stream_h = place_of(logits, line_group)
    SLOT: tl.constexpr = BLOCK_L + BLOCK_S
    lines, streams = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
    exists_l, exists_s = lines < sizes.n_lines, streams < sizes.n_stream
    line_ptr = history_ptr + head * tl.maximum(n_iters, 1) * (2 * SLOT) + lines
    stream_ptr = history_ptr + head * tl.maximum(n_iters, 1) * (2 * SLOT) + BLOCK_L + streams
    final = sweeps_done(sweeps_ptr + head, n_iters, tol)
    period = tl.minimum(scalings, final) + 1

    K = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    f, u, r = tl.zeros([BLOCK_L], tl.float32), tl.full([BLOCK_L], 1.0, tl.float32), tl.zeros([BLOCK_L], tl.float32)
    v = tl.full([BLOCK_S], 1.0, tl.float32)
    c = 1.0
    t = final * 0
    while t < final:
        behind = t * (scalings < 0).to(tl.int32)
        x, r, c = logits_of_head(logits, line_group, LINE_IS_KEY, behind, BLOCK_L, BLOCK_S, BLOCK_D, ENTRIES)
        f = tl.where(r != 0, f + log_of(u, r != 0), 0.0)
        g = stream_step(x, f, c)
        g = tl.where(n_iters > 0, g, 0.0)
        tl.store(stream_ptr + t * (2 * SLOT), g)
        K, f, before = line_step(x, g, r, f)
        u = tl.full([BLOCK_L], 1.0, tl.float32)
        v = tl.full([BLOCK_S], 1.0, tl.float32)
        tl.store(line_ptr + t * (2 * SLOT), before)
        stop = tl.minimum(t + period, final)
        t += 1
        while t < stop:
            v = stream_factors(stream_sums(K, u), c)
            u = quotient(r, line_sums(K, v))
            tl.store(line_ptr + t * (2 * SLOT), u)
            tl.store(stream_ptr + t * (2 * SLOT), v)
            t += 1
    tl.debug_barrier()

    line, stream = line_side(logits, b, line_h), stream_side(logits, b, stream_h)
    line_v_ptr = at_head(line_v_ptr, line_v_strides, b, h // line_v_group)
    stream_v_ptr = at_head(stream_v_ptr, stream_v_strides, b, h // stream_v_group)
    seed = tl.load(seed_ptr)
    plan = K * u[:, None] * v[None, :]
    behind = t * (scalings < 0).to(tl.int32)
    D = products_of(
        line, stream, line_v_ptr, line_v_strides.n, stream_v_ptr, stream_v_strides.n, e, behind, BLOCK_L, BLOCK_S, BLOCK_E
    )
    if HAS_DROPOUT:
        D = drop(D, seed, dropout_p, dropout_scale, head, 0, 0, LINE_IS_KEY)
    D = tl.where(plan != 0, D * plan, 0.0)
    df, dg = tl.sum(D, axis=1), tl.sum(D, axis=0)
    df += tl.load(line_df_ptr + head * sizes.n_lines + lines, mask=exists_l & (has_line_df != 0) & (r != 0), other=0.0)
    dg += tl.load(stream_df_ptr + head * sizes.n_stream + streams, mask=exists_s & (has_stream_df != 0), other=0.0)
    if HAS_DROPOUT:
        plan = drop(plan, seed, dropout_p, dropout_scale, head, 0, 0, LINE_IS_KEY)
    if LINE_IS_KEY:
        vectors = load_lines(stream_v_ptr, stream_v_strides.n, e, 0, used_lines(stream, 0, BLOCK_S), BLOCK_E)
        leave(d_value, b, h, out_e, exists_l, multiplied(plan, vectors, False, PIECES))
    else:
        vectors = load_lines(line_v_ptr, line_v_strides.n, e, 0, used_lines(line, 0, BLOCK_L), BLOCK_E)
        leave(d_value, b, h, out_e, exists_s, multiplied(plan, vectors, True, PIECES))

    end = final
    while end > 0:
        start = (end - 1) // period * period
        behind = end * (scalings < 0).to(tl.int32)
        x, r, c = logits_of_head(logits, line_group, LINE_IS_KEY, behind, BLOCK_L, BLOCK_S, BLOCK_D, ENTRIES)
        K, _f, _before = line_step(x, tl.load(stream_ptr + start * (2 * SLOT)), r, f)
        t = end - 1
        while t >= start:
            u, before = line_factors(line_ptr, t, start, SLOT)
            a = quotient(u * df, r)
            tl.store(line_ptr + t * (2 * SLOT) + SLOT, a)
            if n_iters > 0:
                v = stream_factor(stream_ptr, t, start, SLOT)
                dg = (dg - v * stream_sums(K, a)) * (v / c)
                tl.store(stream_ptr + t * (2 * SLOT) + SLOT, dg)
                df = -before * line_sums(K, dg)
                dg = tl.zeros([BLOCK_S], tl.float32)
            t -= 1
        end = start


@finite_jit
def _attention_short_gradient_bwd_kernel(
    operands: Operands,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    sweeps_ptr,
    history_ptr,
    entries_ptr,
    d_query: Target,
    d_key: Target,
    strides: Strides,
    line_v_strides: VectorStrides,
    stream_v_strides: VectorStrides,
    sizes: Sizes,
    e: tl.int32,
    out_d: tl.int32,
    line_group: tl.int32,
    line_v_group: tl.int32,
    stream_v_group: tl.int32,
    n_iters: tl.int32,
    scalings: tl.int32,
    tol: tl.float32,
    has_entries: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    LINE_IS_KEY: tl.constexpr,
):
    """From ``history`` dS, and the gradients of query and key; entries (B, H, lines, streams) <- dS / temperature."""
    logits = Logits(operands, strides, sizes, scales)
    head, b, h, line_h, stream_h = place_of(logits, line_group)
    SLOT: tl.constexpr = BLOCK_L + BLOCK_S
    lines, streams = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
    exists_l, exists_s = lines < sizes.n_lines, streams < sizes.n_stream
    line_ptr = history_ptr + head * tl.maximum(n_iters, 1) * (2 * SLOT) + lines
    stream_ptr = history_ptr + head * tl.maximum(n_iters, 1) * (2 * SLOT) + BLOCK_L + streams
    final = sweeps_done(sweeps_ptr + head, n_iters, tol)
    period = tl.minimum(scalings, final) + 1
    line, stream = line_side(logits, b, line_h), stream_side(logits, b, stream_h)

    line_v_ptr = at_head(line_v_ptr, line_v_strides, b, h // line_v_group)
    stream_v_ptr = at_head(stream_v_ptr, stream_v_strides, b, h // stream_v_group)
    nothing = tl.zeros([BLOCK_L], tl.float32)
    start = (final - 1) // period * period
    x, r, _c = logits_of_head(logits, line_group, LINE_IS_KEY, 0, BLOCK_L, BLOCK_S, BLOCK_D, ENTRIES)
    K, _f, _before = line_step(x, tl.load(stream_ptr + start * (2 * SLOT)), r, nothing)
    t = final - 1
    dS = products_of(
        line, stream, line_v_ptr, line_v_strides.n, stream_v_ptr, stream_v_strides.n, e, 0, BLOCK_L, BLOCK_S, BLOCK_E
    )
    if HAS_DROPOUT:
        dS = drop(dS, tl.load(seed_ptr), dropout_p, dropout_scale, head, 0, 0, LINE_IS_KEY)
    u, _before = line_factors(line_ptr, t, start, SLOT)
    dS = tl.where(K != 0, dS * (K * u[:, None] * stream_factor(stream_ptr, t, start, SLOT)[None, :]), 0.0)
    while t >= 0:
        if t < start:
            start -= period
            behind = t * (scalings < 0).to(tl.int32)
            x, r, _c = logits_of_head(logits, line_group, LINE_IS_KEY, behind, BLOCK_L, BLOCK_S, BLOCK_D, ENTRIES)
            K, _f, _before = line_step(x, tl.load(stream_ptr + start * (2 * SLOT)), r, nothing)
        _u, before = line_factors(line_ptr, t, start, SLOT)
        a = tl.load(line_ptr + t * (2 * SLOT) + SLOT)
        dS -= K * (a[:, None] * stream_factor(stream_ptr, t, start, SLOT)[None, :])
        if n_iters > 0:
            dS -= K * (before[:, None] * tl.load(stream_ptr + t * (2 * SLOT) + SLOT)[None, :])
        t -= 1

    k, k_bias = head_scales(logits, head)
    if has_entries != 0:
        at = head * sizes.n_lines * sizes.n_stream + lines[:, None] * sizes.n_stream + streams[None, :]
        tl.store(entries_ptr + at, dS * (k_bias * LN_2), mask=exists_l[:, None] & exists_s[None, :])
    dS *= k * LN_2
    d_line, d_stream = both_multiplied(
        dS,
        load_side(stream, 0, used_lines(stream, 0, BLOCK_S), BLOCK_D),
        load_side(line, 0, used_lines(line, 0, BLOCK_L), BLOCK_D),
        PIECES,
    )
    if LINE_IS_KEY:
        leave(d_key, b, h, out_d, exists_l, d_line)
        leave(d_query, b, h, out_d, exists_s, d_stream)
    else:
        leave(d_query, b, h, out_d, exists_l, d_line)
        leave(d_key, b, h, out_d, exists_s, d_stream)
