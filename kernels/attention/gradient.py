"""The last pass of the backward: from dS, tile by tile, to the gradients of query, key and bias.

Symbols are those of ``attention_tile``; D_i and V_j are the vectors of the sides whose products are dP, grad_out and value.
With the plan's potentials as set 0 of a stack and those of the segments behind it, E^s = 2^(x + f^s + g^s),

    dS_ij = E^0_ij Z_ij D_i . V_j - sum_s E^s_ij W^s_ij,    W^s_ij = sum over the terms t of segment s of a_it b_jt,

the adjoint of ``fastdsm/_ops/streamed``. W is a product of TERMS terms at a time, to float32's accuracy (EXACT). Then

    a line's gradient = scale / temperature sum_j dS_ij k_j,    bias_ij: the sum over what the bias is expanded over of
    dS_ij / temperature;

where lines are keys, a program adds the query heads of the group, as each has its dS. Features of the result beyond BLOCK_O go
to programs of their own.
"""

import triton
import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.configuration import finite_jit
from .tile import (
    accumulate,
    accumulated,
    dot,
    drop,
    entries_of,
    exponent,
    first_unit,
    head_scales,
    load_entries,
    load_lines,
    load_potential,
    load_side,
    product,
    side_of,
    store_lines,
    used_lines,
)

TERMS = tl.constexpr(16)


@triton.jit
def correction(x, terms, sizes, head, first, start, line_used, stream_used, STREAM_FIRST: tl.constexpr, EXACT: tl.constexpr):
    """sum_s E^s W^s of a tile of logits x.

    terms = (base and fine of the lines' potentials, of the stream's, stacked; a; b; the terms of each segment, then -1).
    sizes = (all heads, lines, lines of the stream, terms).
    """
    all_heads, n_lines, n_stream, n_terms = sizes
    lines, streams = first + tl.arange(0, x.shape[0]), start + tl.arange(0, x.shape[1])
    line_at, stream_at = head * n_lines, head * n_stream
    left_ptr, right_ptr = terms[4] + line_at * n_terms, terms[5] + stream_at * n_terms
    total = tl.zeros(x.shape, tl.float32)
    counts_ptr = terms[6]
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
        potential = load_potential(terms[0] + line_at, terms[1] + line_at, first, line_used)
        y = exponent(x, potential, terms[2] + stream_at, terms[3] + stream_at, start, stream_used, STREAM_FIRST)
        total += exp2(y) * weight
        counts_ptr += 1
        count = tl.load(counts_ptr)
    return total


@triton.jit
def plan_tile(x, terms, sizes, head, first, start, line_used, stream_used, STREAM_FIRST: tl.constexpr):
    """E^0 of a tile of logits x."""
    line_at, stream_at = head * sizes[1], head * sizes[2]
    potential = load_potential(terms[0] + line_at, terms[1] + line_at, first, line_used)
    return exp2(exponent(x, potential, terms[2] + stream_at, terms[3] + stream_at, start, stream_used, STREAM_FIRST))


@finite_jit
def _attention_gradient_bwd_kernel(
    line_ptr,
    stream_ptr,
    bias_ptr,
    bias32_ptr,
    mask_ptr,
    line_padding_ptr,
    stream_padding_ptr,
    temperature_ptr,
    line_base_ptr,
    line_fine_ptr,
    stream_base_ptr,
    stream_fine_ptr,
    line_x_ptr,
    stream_x_ptr,
    counts_ptr,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    out_ptr,
    line_stride_b: tl.int64,
    line_stride_h: tl.int64,
    line_stride_n: tl.int64,
    stream_stride_b: tl.int64,
    stream_stride_h: tl.int64,
    stream_stride_n: tl.int64,
    bias_stride_b: tl.int64,
    bias_stride_h: tl.int64,
    bias_stride_line: tl.int64,
    bias_stride_stream: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_h: tl.int64,
    mask_stride_line: tl.int64,
    mask_stride_stream: tl.int64,
    line_v_stride_b: tl.int64,
    line_v_stride_h: tl.int64,
    line_v_stride_n: tl.int64,
    stream_v_stride_b: tl.int64,
    stream_v_stride_h: tl.int64,
    stream_v_stride_n: tl.int64,
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_n: tl.int64,
    out_stride_d: tl.int64,
    heads: tl.int32,
    stream_group: tl.int32,
    n_lines: tl.int32,
    n_stream: tl.int32,
    d: tl.int32,
    bias_kind: tl.int32,
    has_mask: tl.int32,
    has_line_padding: tl.int32,
    has_stream_padding: tl.int32,
    has_temperature: tl.int32,
    e: tl.int32,
    batch: tl.int32,
    n_terms: tl.int32,
    out_d: tl.int32,
    heads_per_out: tl.int32,
    line_is_key: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scale: tl.float32,
    bias_scale: tl.float32,
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
    program = tl.program_id(0)
    blocks = tl.cdiv(n_lines, BLOCK_L)
    chunks = 1 if BLOCK_O == BLOCK_D else tl.cdiv(out_d, BLOCK_O)
    first = (program % blocks) * BLOCK_L
    column = ((program // blocks) % chunks) * BLOCK_O
    out_head = (program // (blocks * chunks)).to(tl.int64)
    outs = heads // heads_per_out
    b, o = out_head // outs, out_head % outs
    line_strides = (line_stride_b, line_stride_h, line_stride_n)
    line = side_of(line_ptr, line_strides, line_padding_ptr, has_line_padding, n_lines, d, b, o)
    stream_strides = (stream_stride_b, stream_stride_h, stream_stride_n)
    terms = (line_base_ptr, line_fine_ptr, stream_base_ptr, stream_fine_ptr, line_x_ptr, stream_x_ptr, counts_ptr)
    sizes = (batch.to(tl.int64) * heads, n_lines, n_stream, n_terms)
    seed = tl.load(seed_ptr)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    line_v_head_ptr = line_v_ptr + b * line_v_stride_b + o * line_v_stride_h
    line_v = load_lines(line_v_head_ptr, line_v_stride_n, e, first, line_used, BLOCK_E)
    acc = tl.zeros([BLOCK_L, BLOCK_O], tl.float32)
    unit = first_unit(BLOCK_L)
    for member in range(0, heads_per_out):
        h = o * heads_per_out + member
        head = b * heads + h
        stream_h = h // stream_group
        stream = side_of(stream_ptr, stream_strides, stream_padding_ptr, has_stream_padding, n_stream, d, b, stream_h)
        bias_strides = (bias_stride_b, bias_stride_h, bias_stride_line, bias_stride_stream)
        mask_strides = (mask_stride_b, mask_stride_h, mask_stride_line, mask_stride_stream)
        entries = entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h)
        stream_v_head_ptr = stream_v_ptr + b * stream_v_stride_b + stream_h * stream_v_stride_h
        k, k_bias = head_scales(temperature_ptr, has_temperature, scale, bias_scale, head)
        for start in range(0, n_stream, BLOCK_S):
            stream_used = used_lines(stream, start, BLOCK_S)
            if ENTRIES:
                extra = load_entries(entries, k_bias, line_used, stream_used, first, start)
            stream_vectors = load_side(stream, start, stream_used, BLOCK_D)
            x = product(vectors, stream_vectors, PRECISION) * k
            if ENTRIES:
                x += extra
            taken = correction(x, terms, sizes, head, first, start, line_used, stream_used, STREAM_FIRST, EXACT)
            stream_v = load_lines(stream_v_head_ptr, stream_v_stride_n, e, start, stream_used, BLOCK_E)
            products = product(line_v, stream_v, PRECISION)
            if HAS_DROPOUT:
                products = drop(products, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
            products *= plan_tile(x, terms, sizes, head, first, start, line_used, stream_used, STREAM_FIRST)
            grad = products - taken
            if BLOCK_O != BLOCK_D:
                stream_vectors = load_lines(stream[0] + column, stream[1], d - column, start, stream_used, BLOCK_O)
            acc, unit = accumulate(acc, unit, grad * (k * LN_2), stream_vectors, PIECES, PRECISION)

    out_head_ptr = out_ptr + b * out_stride_b + o * out_stride_h + column * out_stride_d
    exists = first + tl.arange(0, BLOCK_L) < n_lines
    acc = accumulated(acc, unit, stream_ptr.dtype.element_ty)
    store_lines(out_head_ptr, out_stride_n, out_stride_d, out_d - column, first, exists, acc)


@finite_jit
def _attention_bias_bwd_kernel(
    line_ptr,
    stream_ptr,
    bias_ptr,
    bias32_ptr,
    mask_ptr,
    line_padding_ptr,
    stream_padding_ptr,
    temperature_ptr,
    line_base_ptr,
    line_fine_ptr,
    stream_base_ptr,
    stream_fine_ptr,
    line_x_ptr,
    stream_x_ptr,
    counts_ptr,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    out_ptr,
    line_stride_b: tl.int64,
    line_stride_h: tl.int64,
    line_stride_n: tl.int64,
    stream_stride_b: tl.int64,
    stream_stride_h: tl.int64,
    stream_stride_n: tl.int64,
    bias_stride_b: tl.int64,
    bias_stride_h: tl.int64,
    bias_stride_line: tl.int64,
    bias_stride_stream: tl.int64,
    mask_stride_b: tl.int64,
    mask_stride_h: tl.int64,
    mask_stride_line: tl.int64,
    mask_stride_stream: tl.int64,
    line_v_stride_b: tl.int64,
    line_v_stride_h: tl.int64,
    line_v_stride_n: tl.int64,
    stream_v_stride_b: tl.int64,
    stream_v_stride_h: tl.int64,
    stream_v_stride_n: tl.int64,
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_line: tl.int64,
    out_stride_stream: tl.int64,
    heads: tl.int32,
    stream_group: tl.int32,
    n_lines: tl.int32,
    n_stream: tl.int32,
    d: tl.int32,
    bias_kind: tl.int32,
    has_mask: tl.int32,
    has_line_padding: tl.int32,
    has_stream_padding: tl.int32,
    has_temperature: tl.int32,
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
    scale: tl.float32,
    bias_scale: tl.float32,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    line_blocks, stream_blocks = tl.cdiv(n_lines, BLOCK_L), tl.cdiv(n_stream, BLOCK_S)
    members_s = tl.where(sum_stream != 0, stream_blocks, 1)
    members_l = tl.where(sum_lines != 0, line_blocks, 1)
    members_h = tl.where(sum_h != 0, heads, 1)
    members_b = tl.where(sum_b != 0, batch, 1)
    program = tl.program_id(0)
    out_s, program = program % (stream_blocks // members_s), program // (stream_blocks // members_s)
    out_l, program = program % (line_blocks // members_l), program // (line_blocks // members_l)
    out_h, out_b = program % (heads // members_h), program // (heads // members_h)
    stream_strides = (stream_stride_b, stream_stride_h, stream_stride_n)
    line_strides = (line_stride_b, line_stride_h, line_stride_n)
    bias_strides = (bias_stride_b, bias_stride_h, bias_stride_line, bias_stride_stream)
    mask_strides = (mask_stride_b, mask_stride_h, mask_stride_line, mask_stride_stream)
    terms = (line_base_ptr, line_fine_ptr, stream_base_ptr, stream_fine_ptr, line_x_ptr, stream_x_ptr, counts_ptr)
    sizes = (batch.to(tl.int64) * heads, n_lines, n_stream, n_terms)
    seed = tl.load(seed_ptr)

    acc = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for member in range(0, members_b * members_h * members_l * members_s):
        start = (out_s + member % members_s) * BLOCK_S
        first = (out_l + member // members_s % members_l) * BLOCK_L
        h = (out_h + member // members_s // members_l % members_h).to(tl.int64)
        b = (out_b + member // members_s // members_l // members_h).to(tl.int64)
        head, line_h, stream_h = b * heads + h, h // line_group, h // stream_group
        line = side_of(line_ptr, line_strides, line_padding_ptr, has_line_padding, n_lines, d, b, line_h)
        stream = side_of(stream_ptr, stream_strides, stream_padding_ptr, has_stream_padding, n_stream, d, b, stream_h)
        entries = entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h)
        k, k_bias = head_scales(temperature_ptr, has_temperature, scale, bias_scale, head)
        line_used, stream_used = used_lines(line, first, BLOCK_L), used_lines(stream, start, BLOCK_S)
        extra = load_entries(entries, k_bias, line_used, stream_used, first, start)
        vectors = load_side(line, first, line_used, BLOCK_D)
        x = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k + extra
        taken = correction(x, terms, sizes, head, first, start, line_used, stream_used, True, EXACT)
        line_v_head_ptr = line_v_ptr + b * line_v_stride_b + line_h * line_v_stride_h
        stream_v_head_ptr = stream_v_ptr + b * stream_v_stride_b + stream_h * stream_v_stride_h
        line_v = load_lines(line_v_head_ptr, line_v_stride_n, e, first, line_used, BLOCK_E)
        stream_v = load_lines(stream_v_head_ptr, stream_v_stride_n, e, start, stream_used, BLOCK_E)
        products = product(line_v, stream_v, PRECISION)
        if HAS_DROPOUT:
            products = drop(products, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
        products *= plan_tile(x, terms, sizes, head, first, start, line_used, stream_used, True)
        acc += (products - taken) * (k_bias * LN_2)

    lines, streams = out_l * BLOCK_L + tl.arange(0, BLOCK_L), out_s * BLOCK_S + tl.arange(0, BLOCK_S)
    in_lines, in_stream = lines < n_lines, streams < n_stream
    out_at_ptr = out_ptr + out_b.to(tl.int64) * out_stride_b + out_h.to(tl.int64) * out_stride_h
    line_offsets, stream_offsets = lines.to(tl.int64) * out_stride_line, streams.to(tl.int64) * out_stride_stream
    if (sum_lines != 0) & (sum_stream != 0):
        tl.store(out_at_ptr, tl.sum(tl.sum(acc, axis=1), axis=0))
    elif sum_lines != 0:
        tl.store(out_at_ptr + stream_offsets, tl.sum(acc, axis=0), mask=in_stream)
    elif sum_stream != 0:
        tl.store(out_at_ptr + line_offsets, tl.sum(acc, axis=1), mask=in_lines)
    else:
        pointers = out_at_ptr + line_offsets[:, None] + stream_offsets[None, :]
        tl.store(pointers, acc, mask=in_lines[:, None] & in_stream[None, :])
