"""Passes that multiply the plan by vectors; symbols are those of ``tile.py``, Z is dropout.

    apply      out_i = sum_j Z_ij 2^(x_ij + f_i + g_j) v_j
    attend     out_i = sum_j 2^(x_ij + f_i + g_j) v_j / total_i,    total_i = sum_j 2^(x_ij + f_i + g_j),
               line_i = ln 2 log2 total_i:    the last half sweep as well
    products   out_i = sum_j Z_ij 2^(x_ij + f_i + g_j) D_i . V_j,    the same products that ``gradient.py`` forms

Where the results are one per key head, a program adds the query heads of the group. Vectors beyond BLOCK_E features go to
programs of their own, which recompute the plan.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.configuration import finite_jit
from .arguments import EntryStrides, Logits, Operands, Scales, Sizes, Strides, VectorStrides
from .tile import (
    accumulate,
    accumulated,
    at_head,
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
    log_sum,
    product,
    store_lines,
    stream_potential,
    stream_side,
    used_lines,
)


@finite_jit
def _attention_apply_fwd_kernel(
    operands: Operands,
    x_ptr,
    seed_ptr,
    out_ptr,
    strides: Strides,
    x_strides: VectorStrides,
    out_strides: EntryStrides,
    sizes: Sizes,
    e: tl.int32,
    out_e: tl.int32,
    heads_per_out: tl.int32,
    line_is_key: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    program = tl.program_id(0)
    blocks = tl.cdiv(sizes.n_lines, BLOCK_L)
    chunks = tl.cdiv(out_e, BLOCK_E)
    first = (program % blocks) * BLOCK_L
    column = ((program // blocks) % chunks) * BLOCK_E
    out_head = (program // blocks // chunks).to(tl.int64)
    outs = sizes.heads // heads_per_out
    b, o = out_head // outs, out_head % outs
    line = line_side(logits, b, o)
    seed = tl.load(seed_ptr)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    unit = first_unit(BLOCK_L)
    for member in range(0, heads_per_out):
        h = o * heads_per_out + member
        head = b * sizes.heads + h
        stream_h = h // sizes.stream_group
        stream = stream_side(logits, b, stream_h)
        entries = entries_of(logits, b, h)
        x_head_ptr = at_head(x_ptr, x_strides, b, stream_h) + column
        k, k_bias = head_scales(logits, head)
        line_values = load_potential(line_potential(logits, head * sizes.n_lines), first, line_used)
        potential = stream_potential(logits, head * sizes.n_stream)
        for start in range(0, sizes.n_stream, BLOCK_S):
            stream_used = used_lines(stream, start, BLOCK_S)
            if ENTRIES:
                extra = load_entries(entries, logits, k_bias, line_used, stream_used, first, start)
            S = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
            if ENTRIES:
                S += extra
            plan = exp2(exponent(S, line_values, potential, start, stream_used, STREAM_FIRST))
            if HAS_DROPOUT:
                plan = drop(plan, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
            x = load_lines(x_head_ptr, x_strides.n, e - column, start, stream_used, BLOCK_E)
            acc, unit = accumulate(acc, unit, plan, x, PIECES, PRECISION)

    out_head_ptr = at_head(out_ptr, out_strides, b, o) + column * out_strides.m
    acc = accumulated(acc, unit, x_ptr.dtype.element_ty)
    exists = first + tl.arange(0, BLOCK_L) < sizes.n_lines
    store_lines(out_head_ptr, out_strides.n, out_strides.m, out_e - column, first, exists, acc)


@finite_jit
def _attention_attend_fwd_kernel(
    operands: Operands,
    x_ptr,
    out_ptr,
    lse_ptr,
    strides: Strides,
    x_strides: VectorStrides,
    out_strides: EntryStrides,
    sizes: Sizes,
    e: tl.int32,
    out_e: tl.int32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    program = tl.program_id(0)
    blocks = tl.cdiv(sizes.n_lines, BLOCK_L)
    chunks = tl.cdiv(out_e, BLOCK_E)
    first = (program % blocks) * BLOCK_L
    column = ((program // blocks) % chunks) * BLOCK_E
    head = (program // blocks // chunks).to(tl.int64)
    b, h = head // sizes.heads, head % sizes.heads
    line = line_side(logits, b, h)
    stream_h = h // sizes.stream_group
    stream = stream_side(logits, b, stream_h)
    entries = entries_of(logits, b, h)
    x_head_ptr = at_head(x_ptr, x_strides, b, stream_h) + column
    k, k_bias = head_scales(logits, head)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    line_values = load_potential(line_potential(logits, head * sizes.n_lines), first, line_used)
    potential = stream_potential(logits, head * sizes.n_stream)
    total = tl.zeros([BLOCK_L], tl.float32)
    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    unit = first_unit(BLOCK_L)
    for start in range(0, sizes.n_stream, BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, logits, k_bias, line_used, stream_used, first, start)
        S = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            S += extra
        plan = exp2(exponent(S, line_values, potential, start, stream_used, STREAM_FIRST))
        total += tl.sum(plan, axis=1)
        x = load_lines(x_head_ptr, x_strides.n, e - column, start, stream_used, BLOCK_E)
        acc, unit = accumulate(acc, unit, plan, x, PIECES, PRECISION)

    lines = first + tl.arange(0, BLOCK_L)
    acc = accumulated(acc, unit, x_ptr.dtype.element_ty)
    divisor = tl.where(total == 0, 1.0, total)
    out_head_ptr = at_head(out_ptr, out_strides, b, h) + column * out_strides.m
    store_lines(
        out_head_ptr, out_strides.n, out_strides.m, out_e - column, first, lines < sizes.n_lines, acc / divisor[:, None]
    )
    tl.store(lse_ptr + head * sizes.n_lines + lines, log_sum(total) * LN_2, mask=(lines < sizes.n_lines) & (column == 0))


@finite_jit
def _attention_products_bwd_kernel(
    operands: Operands,
    line_v_ptr,
    stream_v_ptr,
    seed_ptr,
    out_ptr,
    strides: Strides,
    line_v_strides: VectorStrides,
    stream_v_strides: VectorStrides,
    sizes: Sizes,
    e: tl.int32,
    line_group: tl.int32,
    line_is_key: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scales: Scales,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    program = tl.program_id(0)
    blocks = tl.cdiv(sizes.n_lines, BLOCK_L)
    first = (program % blocks) * BLOCK_L
    head = (program // blocks).to(tl.int64)
    b, h = head // sizes.heads, head % sizes.heads
    line_h, stream_h = h // line_group, h // sizes.stream_group
    line = line_side(logits, b, line_h)
    stream = stream_side(logits, b, stream_h)
    entries = entries_of(logits, b, h)
    k, k_bias = head_scales(logits, head)
    line_v_head_ptr = at_head(line_v_ptr, line_v_strides, b, line_h)
    stream_v_head_ptr = at_head(stream_v_ptr, stream_v_strides, b, stream_h)
    potential = stream_potential(logits, head * sizes.n_stream)
    seed = tl.load(seed_ptr)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    line_v = load_lines(line_v_head_ptr, line_v_strides.n, e, first, line_used, BLOCK_E)
    line_values = load_potential(line_potential(logits, head * sizes.n_lines), first, line_used)
    total = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, sizes.n_stream, BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, logits, k_bias, line_used, stream_used, first, start)
        S = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            S += extra
        plan = exp2(exponent(S, line_values, potential, start, stream_used, STREAM_FIRST))
        stream_v = load_lines(stream_v_head_ptr, stream_v_strides.n, e, start, stream_used, BLOCK_E)
        products = product(line_v, stream_v, PRECISION)
        if HAS_DROPOUT:
            products = drop(products, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
        total += tl.sum(products * plan, axis=1)

    lines = first + tl.arange(0, BLOCK_L)
    tl.store(out_ptr + head * sizes.n_lines + lines, total, mask=lines < sizes.n_lines)
