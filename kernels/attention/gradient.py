"""The last pass of the backward: from dS, tile by tile, to the gradients of query, key and bias.

Symbols are those of ``tile.py``; D_i and V_j are the vectors of the sides whose products are dP, grad_out and value.
With the plan's potentials as set 0 of a stack and those of the segments behind it, E^s = 2^(x + f^s + g^s),

    dS_ij = E^0_ij Z_ij D_i . V_j - sum_s E^s_ij W^s_ij,    W^s_ij = sum over the terms t of segment s of a_it b_jt,

the adjoint of ``fastdsm/_ops/streamed``. W is a product of TERMS terms at a time, to float32's accuracy (EXACT). Then

    a line's gradient = scale / temperature sum_j dS_ij k_j,    bias_ij: the sum over what the bias is expanded over of
    dS_ij / temperature;

where lines are keys, a program adds the query heads of the group, as each has its dS. Features of the result beyond BLOCK_O go
to programs of their own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.configuration import finite_jit
from .arguments import EntryStrides, Logits, Operands, Scales, Sizes, Strides, VectorStrides
from .tile import (
    accumulate,
    accumulated,
    at_head,
    dot,
    drop,
    entries_of,
    exponent,
    first_unit,
    head_scales,
    line_potential,
    line_side,
    load_entries,
    load_lines,
    load_potential,
    load_side,
    product,
    store_lines,
    stream_potential,
    stream_side,
    used_lines,
)

TERMS = tl.constexpr(16)


class Factors(NamedTuple):
    """a and b of the terms, (B, H, terms, lines), and how many terms each segment has, then -1."""

    line_ptr: tl.pointer_type
    stream_ptr: tl.pointer_type
    counts_ptr: tl.pointer_type


@triton.jit
def correction(
    x,
    logits,
    factors,
    all_heads,
    n_terms,
    head,
    first,
    start,
    line_used,
    stream_used,
    STREAM_FIRST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """sum_s E^s W^s of a tile of logits x."""
    n_lines, n_stream = logits.sizes.n_lines, logits.sizes.n_stream
    lines, streams = first + tl.arange(0, x.shape[0]), start + tl.arange(0, x.shape[1])
    line_at, stream_at = head * n_lines, head * n_stream
    left_ptr, right_ptr = factors.line_ptr + line_at * n_terms, factors.stream_ptr + stream_at * n_terms
    total = tl.zeros(x.shape, tl.float32)
    counts_ptr = factors.counts_ptr
    count = tl.load(counts_ptr)
    while count >= 0:
        weight = tl.zeros(x.shape, tl.float32)
        for done in range(0, count, TERMS):
            t = done + tl.arange(0, TERMS)
            left_mask = (lines < n_lines)[:, None] & (t < count)[None, :]
            right_mask = (t < count)[:, None] & (streams < n_stream)[None, :]
            left = tl.load(left_ptr + t.to(tl.int64)[None, :] * n_lines + lines[:, None], mask=left_mask, other=0.0)
            right = tl.load(right_ptr + t.to(tl.int64)[:, None] * n_stream + streams[None, :], mask=right_mask, other=0.0)
            weight = dot(left, right, weight, EXACT)
        left_ptr += count.to(tl.int64) * n_lines
        right_ptr += count.to(tl.int64) * n_stream
        line_at += all_heads * n_lines
        stream_at += all_heads * n_stream
        line_values = load_potential(line_potential(logits, line_at), first, line_used)
        y = exponent(x, line_values, stream_potential(logits, stream_at), start, stream_used, STREAM_FIRST)
        total += exp2(y) * weight
        counts_ptr += 1
        count = tl.load(counts_ptr)
    return total


@triton.jit
def plan_tile(x, logits, head, first, start, line_used, stream_used, STREAM_FIRST: tl.constexpr):
    """E^0 of a tile of logits x."""
    line_at, stream_at = head * logits.sizes.n_lines, head * logits.sizes.n_stream
    line_values = load_potential(line_potential(logits, line_at), first, line_used)
    return exp2(exponent(x, line_values, stream_potential(logits, stream_at), start, stream_used, STREAM_FIRST))


@finite_jit
def _attention_gradient_bwd_kernel(
    operands: Operands,
    factors: Factors,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    out_ptr,
    strides: Strides,
    line_v_strides: VectorStrides,
    stream_v_strides: VectorStrides,
    out_strides: EntryStrides,
    sizes: Sizes,
    e: tl.int32,
    batch: tl.int32,
    n_terms: tl.int32,
    out_d: tl.int32,
    heads_per_out: tl.int32,
    line_is_key: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EXACT: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    program = tl.program_id(0)
    blocks = tl.cdiv(sizes.n_lines, BLOCK_L)
    chunks = 1 if BLOCK_O == BLOCK_D else tl.cdiv(out_d, BLOCK_O)
    first = (program % blocks) * BLOCK_L
    column = ((program // blocks) % chunks) * BLOCK_O
    out_head = (program // (blocks * chunks)).to(tl.int64)
    outs = sizes.heads // heads_per_out
    b, o = out_head // outs, out_head % outs
    line = line_side(logits, b, o)
    all_heads = batch.to(tl.int64) * sizes.heads
    seed = tl.load(seed_ptr)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    line_v_head_ptr = at_head(line_v_ptr, line_v_strides, b, o)
    line_v = load_lines(line_v_head_ptr, line_v_strides.n, e, first, line_used, BLOCK_E)
    acc = tl.zeros([BLOCK_L, BLOCK_O], tl.float32)
    unit = first_unit(BLOCK_L)
    for member in range(0, heads_per_out):
        h = o * heads_per_out + member
        head = b * sizes.heads + h
        stream_h = h // sizes.stream_group
        stream = stream_side(logits, b, stream_h)
        entries = entries_of(logits, b, h)
        stream_v_head_ptr = at_head(stream_v_ptr, stream_v_strides, b, stream_h)
        k, k_bias = head_scales(logits, head)
        for start in range(0, sizes.n_stream, BLOCK_S):
            stream_used = used_lines(stream, start, BLOCK_S)
            if ENTRIES:
                extra = load_entries(entries, logits, k_bias, line_used, stream_used, first, start)
            stream_vectors = load_side(stream, start, stream_used, BLOCK_D)
            x = product(vectors, stream_vectors, PRECISION) * k
            if ENTRIES:
                x += extra
            taken = correction(
                x, logits, factors, all_heads, n_terms, head, first, start, line_used, stream_used, STREAM_FIRST, EXACT
            )
            stream_v = load_lines(stream_v_head_ptr, stream_v_strides.n, e, start, stream_used, BLOCK_E)
            products = product(line_v, stream_v, PRECISION)
            if HAS_DROPOUT:
                products = drop(products, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
            products *= plan_tile(x, logits, head, first, start, line_used, stream_used, STREAM_FIRST)
            grad = products - taken
            if BLOCK_O != BLOCK_D:
                stream_vectors = load_lines(
                    stream.ptr + column, stream.stride_n, stream.d - column, start, stream_used, BLOCK_O
                )
            acc, unit = accumulate(acc, unit, grad * (k * LN_2), stream_vectors, PIECES, PRECISION)

    out_head_ptr = at_head(out_ptr, out_strides, b, o) + column * out_strides.m
    exists = first + tl.arange(0, BLOCK_L) < sizes.n_lines
    acc = accumulated(acc, unit, operands.stream_ptr.dtype.element_ty)
    store_lines(out_head_ptr, out_strides.n, out_strides.m, out_d - column, first, exists, acc)


@finite_jit
def _attention_bias_bwd_kernel(
    operands: Operands,
    factors: Factors,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    out_ptr,
    strides: Strides,
    line_v_strides: VectorStrides,
    stream_v_strides: VectorStrides,
    out_strides: EntryStrides,
    sizes: Sizes,
    e: tl.int32,
    batch: tl.int32,
    n_terms: tl.int32,
    line_group: tl.int32,
    line_is_key: tl.int32,
    sum_b: tl.int32,
    sum_h: tl.int32,
    sum_lines: tl.int32,
    sum_stream: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    line_blocks, stream_blocks = tl.cdiv(sizes.n_lines, BLOCK_L), tl.cdiv(sizes.n_stream, BLOCK_S)
    members_s = tl.where(sum_stream != 0, stream_blocks, 1)
    members_l = tl.where(sum_lines != 0, line_blocks, 1)
    members_h = tl.where(sum_h != 0, sizes.heads, 1)
    members_b = tl.where(sum_b != 0, batch, 1)
    program = tl.program_id(0)
    out_s, program = program % (stream_blocks // members_s), program // (stream_blocks // members_s)
    out_l, program = program % (line_blocks // members_l), program // (line_blocks // members_l)
    out_h, out_b = program % (sizes.heads // members_h), program // (sizes.heads // members_h)
    all_heads = batch.to(tl.int64) * sizes.heads
    seed = tl.load(seed_ptr)

    acc = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for member in range(0, members_b * members_h * members_l * members_s):
        start = (out_s + member % members_s) * BLOCK_S
        first = (out_l + member // members_s % members_l) * BLOCK_L
        h = (out_h + member // members_s // members_l % members_h).to(tl.int64)
        b = (out_b + member // members_s // members_l // members_h).to(tl.int64)
        head, line_h, stream_h = b * sizes.heads + h, h // line_group, h // sizes.stream_group
        line = line_side(logits, b, line_h)
        stream = stream_side(logits, b, stream_h)
        entries = entries_of(logits, b, h)
        k, k_bias = head_scales(logits, head)
        line_used, stream_used = used_lines(line, first, BLOCK_L), used_lines(stream, start, BLOCK_S)
        extra = load_entries(entries, logits, k_bias, line_used, stream_used, first, start)
        vectors = load_side(line, first, line_used, BLOCK_D)
        x = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k + extra
        taken = correction(x, logits, factors, all_heads, n_terms, head, first, start, line_used, stream_used, True, EXACT)
        line_v_head_ptr = at_head(line_v_ptr, line_v_strides, b, line_h)
        stream_v_head_ptr = at_head(stream_v_ptr, stream_v_strides, b, stream_h)
        line_v = load_lines(line_v_head_ptr, line_v_strides.n, e, first, line_used, BLOCK_E)
        stream_v = load_lines(stream_v_head_ptr, stream_v_strides.n, e, start, stream_used, BLOCK_E)
        products = product(line_v, stream_v, PRECISION)
        if HAS_DROPOUT:
            products = drop(products, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
        products *= plan_tile(x, logits, head, first, start, line_used, stream_used, True)
        acc += (products - taken) * (k_bias * LN_2)

    lines, streams = out_l * BLOCK_L + tl.arange(0, BLOCK_L), out_s * BLOCK_S + tl.arange(0, BLOCK_S)
    in_lines, in_stream = lines < sizes.n_lines, streams < sizes.n_stream
    out_at_ptr = at_head(out_ptr, out_strides, out_b.to(tl.int64), out_h.to(tl.int64))
    line_offsets, stream_offsets = lines.to(tl.int64) * out_strides.n, streams.to(tl.int64) * out_strides.m
    if (sum_lines != 0) & (sum_stream != 0):
        tl.store(out_at_ptr, tl.sum(tl.sum(acc, axis=1), axis=0))
    elif sum_lines != 0:
        tl.store(out_at_ptr + stream_offsets, tl.sum(acc, axis=0), mask=in_stream)
    elif sum_stream != 0:
        tl.store(out_at_ptr + line_offsets, tl.sum(acc, axis=1), mask=in_lines)
    else:
        pointers = out_at_ptr + line_offsets[:, None] + stream_offsets[None, :]
        tl.store(pointers, acc, mask=in_lines[:, None] & in_stream[None, :])
