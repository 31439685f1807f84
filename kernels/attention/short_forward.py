"""Attention of a head on chip in one launch: logits, sweeps, and the plan times value; symbols of ``short.py``."""

import triton.language as tl

from ..common.arithmetic import LN_2
from ..common.configuration import finite_jit
from ..tile.sweeps import quotient
from .arguments import EntryStrides, Logits, Operands, Scales, Sizes, Strides, VectorStrides
from .short import line_step, line_sums, log_of, logits_of_head, place_of, residual_of, stream_factors, stream_step, stream_sums
from .tile import (
    accumulate,
    accumulated,
    at_head,
    drop,
    first_unit,
    line_side,
    load_lines,
    store_lines,
    stream_side,
    used_lines,
)


@finite_jit
def _attention_short_fwd_kernel(
    operands: Operands,
    x_ptr,
    seed_ptr,
    out_ptr,
    line_f_ptr,
    stream_f_ptr,
    residual_ptr,
    sweeps_ptr,
    strides: Strides,
    x_strides: VectorStrides,
    out_strides: EntryStrides,
    sizes: Sizes,
    e: tl.int32,
    out_e: tl.int32,
    line_group: tl.int32,
    x_group: tl.int32,
    n_iters: tl.int32,
    scalings: tl.int32,
    tol: tl.float32,
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
    """out (B, H, N, e), potentials (B, H, lines) float64, residual and sweeps (B, H); ``n_iters`` 0 is one step of lines."""
    logits = Logits(operands, strides, sizes, scales)
    head, b, h, line_h, stream_h = place_of(logits, line_group)
    last = tl.maximum(n_iters, 1)
    lines, streams = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
    exists_l, exists_s = lines < sizes.n_lines, streams < sizes.n_stream
    line_f_ptr += head * sizes.n_lines + lines
    stream_f_ptr += head * sizes.n_stream + streams
    K = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    f, u, r = tl.zeros([BLOCK_L], tl.float32), tl.full([BLOCK_L], 1.0, tl.float32), tl.zeros([BLOCK_L], tl.float32)
    v = tl.full([BLOCK_S], 1.0, tl.float32)
    c = 1.0
    done = 0
    running = last > 0
    while (done < last) & running:
        behind = done * (scalings < 0).to(tl.int32)
        x, r, c = logits_of_head(logits, line_group, LINE_IS_KEY, behind, BLOCK_L, BLOCK_S, BLOCK_D, ENTRIES)
        f = tl.where(r != 0, f + log_of(u, r != 0), 0.0)
        g = stream_step(x, f, c)
        g = tl.where(n_iters > 0, g, 0.0)
        tl.store(stream_f_ptr, g.to(tl.float64), mask=exists_s)  # until the end: the registers are for the sweeps
        K, f, _ = line_step(x, g, r, f)
        u = tl.full([BLOCK_L], 1.0, tl.float32)
        v = tl.full([BLOCK_S], 1.0, tl.float32)
        done += 1
        stop = tl.minimum(done + scalings, last)
        if tol >= 0:
            running = ~(residual_of(stream_sums(K, u), v, c) <= tol)
        while (done < stop) & running:
            v = stream_factors(stream_sums(K, u), c)
            u = quotient(r, line_sums(K, v))
            done += 1
            if tol >= 0:
                running = ~(residual_of(stream_sums(K, u), v, c) <= tol)

    s = stream_sums(K, u)
    tl.store(residual_ptr + head, residual_of(s, v, c))
    tl.store(sweeps_ptr + head, tl.minimum(done, n_iters))
    f = tl.where(r != 0, f + log_of(u, r != 0), 0.0)
    tl.store(line_f_ptr, f.to(tl.float64) * LN_2, mask=exists_l)
    tl.debug_barrier()
    g = tl.load(stream_f_ptr, mask=exists_s, other=0.0) + log_of(v, s != 0).to(tl.float64)
    tl.debug_barrier()  # every lane that holds a copy has loaded it
    tl.store(stream_f_ptr, tl.where(s != 0, g, 0.0) * LN_2, mask=exists_s)

    plan = K * u[:, None] * v[None, :]
    if HAS_DROPOUT:
        plan = drop(plan, tl.load(seed_ptr), dropout_p, dropout_scale, head, 0, 0, LINE_IS_KEY)
    if LINE_IS_KEY:
        plan, keys, exists = tl.trans(plan), line_side(logits, b, line_h), exists_s
    else:
        keys, exists = stream_side(logits, b, stream_h), exists_l
    used = used_lines(keys, 0, plan.shape[1])
    vectors = load_lines(at_head(x_ptr, x_strides, b, h // x_group), x_strides.n, e, 0, used, BLOCK_E)
    acc = tl.zeros([plan.shape[0], BLOCK_E], tl.float32)
    acc, unit = accumulate(acc, first_unit(plan.shape[0]), plan, vectors, PIECES, "ieee")
    acc = accumulated(acc, unit, x_ptr.dtype.element_ty)
    store_lines(at_head(out_ptr, out_strides, b, h), out_strides.n, out_strides.m, out_e, 0, exists, acc)
