"""Passes that multiply the plan by vectors; symbols are those of ``attention_tile``, Z is dropout.

    apply      out_i = sum_j Z_ij 2^(x_ij + f_i + g_j) v_j
    attend     out_i = sum_j 2^(x_ij + f_i + g_j) v_j / total_i,    total_i = sum_j 2^(x_ij + f_i + g_j),
               line_i = ln 2 log2 total_i:    the last half sweep as well
    products   out_i = sum_j Z_ij 2^(x_ij + f_i + g_j) D_i . V_j,    the same products that ``attention_gradient`` forms

Where the results are one per key head, a program adds the query heads of the group. Vectors beyond BLOCK_E features go to
programs of their own, which recompute the plan.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.configuration import finite_jit
from .tile import (
    accumulate,
    accumulated,
    drop,
    entries_of,
    exponent,
    first_unit,
    head_scales,
    load_entries,
    load_lines,
    load_potential,
    load_side,
    log_sum,
    product,
    side_of,
    store_lines,
    used_lines,
)


@finite_jit
def _attention_apply_fwd_kernel(
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
    x_ptr,
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
    x_stride_b: tl.int64,
    x_stride_h: tl.int64,
    x_stride_n: tl.int64,
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_n: tl.int64,
    out_stride_e: tl.int64,
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
    out_e: tl.int32,
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
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(n_lines, BLOCK_L)
    chunks = tl.cdiv(out_e, BLOCK_E)
    first = (program % blocks) * BLOCK_L
    column = ((program // blocks) % chunks) * BLOCK_E
    out_head = (program // blocks // chunks).to(tl.int64)
    outs = heads // heads_per_out
    b, o = out_head // outs, out_head % outs
    line_strides = (line_stride_b, line_stride_h, line_stride_n)
    line = side_of(line_ptr, line_strides, line_padding_ptr, has_line_padding, n_lines, d, b, o)
    stream_strides = (stream_stride_b, stream_stride_h, stream_stride_n)
    seed = tl.load(seed_ptr)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    unit = first_unit(BLOCK_L)
    for member in range(0, heads_per_out):
        h = o * heads_per_out + member
        head = b * heads + h
        stream_h = h // stream_group
        stream = side_of(stream_ptr, stream_strides, stream_padding_ptr, has_stream_padding, n_stream, d, b, stream_h)
        bias_strides = (bias_stride_b, bias_stride_h, bias_stride_line, bias_stride_stream)
        mask_strides = (mask_stride_b, mask_stride_h, mask_stride_line, mask_stride_stream)
        entries = entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h)
        x_head_ptr = x_ptr + b * x_stride_b + stream_h * x_stride_h + column
        k, k_bias = head_scales(temperature_ptr, has_temperature, scale, bias_scale, head)
        potential = load_potential(line_base_ptr + head * n_lines, line_fine_ptr + head * n_lines, first, line_used)
        base_ptr, fine_ptr = stream_base_ptr + head * n_stream, stream_fine_ptr + head * n_stream
        for start in range(0, n_stream, BLOCK_S):
            stream_used = used_lines(stream, start, BLOCK_S)
            if ENTRIES:
                extra = load_entries(entries, k_bias, line_used, stream_used, first, start)
            logits = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
            if ENTRIES:
                logits += extra
            plan = exp2(exponent(logits, potential, base_ptr, fine_ptr, start, stream_used, STREAM_FIRST))
            if HAS_DROPOUT:
                plan = drop(plan, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
            x = load_lines(x_head_ptr, x_stride_n, e - column, start, stream_used, BLOCK_E)
            acc, unit = accumulate(acc, unit, plan, x, PIECES, PRECISION)

    out_head_ptr = out_ptr + b * out_stride_b + o * out_stride_h + column * out_stride_e
    acc = accumulated(acc, unit, x_ptr.dtype.element_ty)
    exists = first + tl.arange(0, BLOCK_L) < n_lines
    store_lines(out_head_ptr, out_stride_n, out_stride_e, out_e - column, first, exists, acc)


@finite_jit
def _attention_attend_fwd_kernel(
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
    x_ptr,
    out_ptr,
    total_ptr,
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
    x_stride_b: tl.int64,
    x_stride_h: tl.int64,
    x_stride_n: tl.int64,
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_n: tl.int64,
    out_stride_e: tl.int64,
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
    out_e: tl.int32,
    scale: tl.float32,
    bias_scale: tl.float32,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(n_lines, BLOCK_L)
    chunks = tl.cdiv(out_e, BLOCK_E)
    first = (program % blocks) * BLOCK_L
    column = ((program // blocks) % chunks) * BLOCK_E
    head = (program // blocks // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    line_strides = (line_stride_b, line_stride_h, line_stride_n)
    line = side_of(line_ptr, line_strides, line_padding_ptr, has_line_padding, n_lines, d, b, h)
    stream_strides = (stream_stride_b, stream_stride_h, stream_stride_n)
    stream_h = h // stream_group
    stream = side_of(stream_ptr, stream_strides, stream_padding_ptr, has_stream_padding, n_stream, d, b, stream_h)
    bias_strides = (bias_stride_b, bias_stride_h, bias_stride_line, bias_stride_stream)
    mask_strides = (mask_stride_b, mask_stride_h, mask_stride_line, mask_stride_stream)
    entries = entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h)
    x_head_ptr = x_ptr + b * x_stride_b + stream_h * x_stride_h + column
    k, k_bias = head_scales(temperature_ptr, has_temperature, scale, bias_scale, head)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    potential = load_potential(line_base_ptr + head * n_lines, line_fine_ptr + head * n_lines, first, line_used)
    base_ptr, fine_ptr = stream_base_ptr + head * n_stream, stream_fine_ptr + head * n_stream
    total = tl.zeros([BLOCK_L], tl.float32)
    acc = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
    unit = first_unit(BLOCK_L)
    for start in range(0, n_stream, BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, k_bias, line_used, stream_used, first, start)
        logits = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            logits += extra
        plan = exp2(exponent(logits, potential, base_ptr, fine_ptr, start, stream_used, STREAM_FIRST))
        total += tl.sum(plan, axis=1)
        x = load_lines(x_head_ptr, x_stride_n, e - column, start, stream_used, BLOCK_E)
        acc, unit = accumulate(acc, unit, plan, x, PIECES, PRECISION)

    lines = first + tl.arange(0, BLOCK_L)
    acc = accumulated(acc, unit, x_ptr.dtype.element_ty)
    divisor = tl.where(total == 0, 1.0, total)
    out_head_ptr = out_ptr + b * out_stride_b + h * out_stride_h + column * out_stride_e
    store_lines(out_head_ptr, out_stride_n, out_stride_e, out_e - column, first, lines < n_lines, acc / divisor[:, None])
    tl.store(total_ptr + head * n_lines + lines, log_sum(total) * LN_2, mask=(lines < n_lines) & (column == 0))


@finite_jit
def _attention_products_bwd_kernel(
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
    line_group: tl.int32,
    line_is_key: tl.int32,
    dropout_p: tl.float32,
    dropout_scale: tl.float32,
    scale: tl.float32,
    bias_scale: tl.float32,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(n_lines, BLOCK_L)
    first = (program % blocks) * BLOCK_L
    head = (program // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    line_h, stream_h = h // line_group, h // stream_group
    line_strides = (line_stride_b, line_stride_h, line_stride_n)
    line = side_of(line_ptr, line_strides, line_padding_ptr, has_line_padding, n_lines, d, b, line_h)
    stream_strides = (stream_stride_b, stream_stride_h, stream_stride_n)
    stream = side_of(stream_ptr, stream_strides, stream_padding_ptr, has_stream_padding, n_stream, d, b, stream_h)
    bias_strides = (bias_stride_b, bias_stride_h, bias_stride_line, bias_stride_stream)
    mask_strides = (mask_stride_b, mask_stride_h, mask_stride_line, mask_stride_stream)
    entries = entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h)
    k, k_bias = head_scales(temperature_ptr, has_temperature, scale, bias_scale, head)
    line_v_head_ptr = line_v_ptr + b * line_v_stride_b + line_h * line_v_stride_h
    stream_v_head_ptr = stream_v_ptr + b * stream_v_stride_b + stream_h * stream_v_stride_h
    base_ptr, fine_ptr = stream_base_ptr + head * n_stream, stream_fine_ptr + head * n_stream
    seed = tl.load(seed_ptr)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    line_v = load_lines(line_v_head_ptr, line_v_stride_n, e, first, line_used, BLOCK_E)
    potential = load_potential(line_base_ptr + head * n_lines, line_fine_ptr + head * n_lines, first, line_used)
    total = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, n_stream, BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, k_bias, line_used, stream_used, first, start)
        logits = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            logits += extra
        plan = exp2(exponent(logits, potential, base_ptr, fine_ptr, start, stream_used, STREAM_FIRST))
        stream_v = load_lines(stream_v_head_ptr, stream_v_stride_n, e, start, stream_used, BLOCK_E)
        products = product(line_v, stream_v, PRECISION)
        if HAS_DROPOUT:
            products = drop(products, seed, dropout_p, dropout_scale, head, first, start, line_is_key)
        total += tl.sum(products * plan, axis=1)

    lines = first + tl.arange(0, BLOCK_L)
    tl.store(out_ptr + head * n_lines + lines, total, mask=lines < n_lines)
