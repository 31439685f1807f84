"""Passes with one number per line: the log-sum-exp of a half sweep, and the plan times a vector.

Symbols are those of ``attention_tile``, y_ij = x_ij + f_i + g_j:

    ONLINE     out_i = ln 2 log2 sum_j 2^y_ij          with a running maximum, in the first sweep
    BOUNDED    out_i = ln 2 log2 sum_j 2^y_ij          no maximum: one exponential per logit
    WEIGHTED   out_i = sum_j 2^y_ij w_j                P w, in float32

After the first sweep 2^y is a plan one side of which is exact, up to the bounded factor of one update: it cannot overflow,
and what underflow takes from a sum is below what float32 would keep of it.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.configuration import finite_jit
from .tile import (
    entries_of,
    exponent,
    head_scales,
    load_entries,
    load_pair,
    load_potential,
    load_side,
    log_sum,
    product,
    side_of,
    used_lines,
)

ONLINE = tl.constexpr("online")
BOUNDED = tl.constexpr("bounded")
WEIGHTED = tl.constexpr("weighted")


@finite_jit
def _attention_sweep_fwd_kernel(
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
    weight_ptr,
    active_ptr,
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
    line_group: tl.int32,
    has_active: tl.int32,
    scale: tl.float32,
    bias_scale: tl.float32,
    KIND: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(n_lines, BLOCK_L)
    first = (program % blocks) * BLOCK_L
    head = (program // blocks).to(tl.int64)
    if tl.load(active_ptr + head, mask=has_active != 0, other=1) == 0:
        return
    b, h = head // heads, head % heads
    line_strides = (line_stride_b, line_stride_h, line_stride_n)
    line = side_of(line_ptr, line_strides, line_padding_ptr, has_line_padding, n_lines, d, b, h // line_group)
    stream_strides = (stream_stride_b, stream_stride_h, stream_stride_n)
    stream = side_of(stream_ptr, stream_strides, stream_padding_ptr, has_stream_padding, n_stream, d, b, h // stream_group)
    bias_strides = (bias_stride_b, bias_stride_h, bias_stride_line, bias_stride_stream)
    mask_strides = (mask_stride_b, mask_stride_h, mask_stride_line, mask_stride_stream)
    entries = entries_of(bias_ptr, bias32_ptr, bias_strides, bias_kind, mask_ptr, mask_strides, has_mask, b, h)
    k, k_bias = head_scales(temperature_ptr, has_temperature, scale, bias_scale, head)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    potential = load_potential(line_base_ptr + head * n_lines, line_fine_ptr + head * n_lines, first, line_used)
    base_ptr, fine_ptr = stream_base_ptr + head * n_stream, stream_fine_ptr + head * n_stream
    weight_head_ptr = weight_ptr + head * n_stream
    total = tl.zeros([BLOCK_L], tl.float32)
    top = tl.full([BLOCK_L], -float("inf"), tl.float32)
    for start in range(0, n_stream, BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, k_bias, line_used, stream_used, first, start)
        x = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            x += extra
        y = exponent(x, potential, base_ptr, fine_ptr, start, stream_used, STREAM_FIRST)
        if KIND == ONLINE:
            new_top = tl.maximum(top, tl.max(y, axis=1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * exp2(top - shift) + tl.sum(exp2(y - shift[:, None]), axis=1)
            top = new_top
        elif KIND == BOUNDED:
            total += tl.sum(exp2(y), axis=1)
        else:
            weight, _ = load_pair(weight_head_ptr, weight_head_ptr, start, stream_used, 0.0, 1.0)
            total += tl.sum(exp2(y) * weight[None, :], axis=1)

    out = total
    if KIND != WEIGHTED:
        out = log_sum(total)
        if KIND == ONLINE:
            out += tl.where(total == 0, 0.0, top).to(tl.float64)
        out *= LN_2
    lines = first + tl.arange(0, BLOCK_L)
    tl.store(out_ptr + head * n_lines + lines, out, mask=lines < n_lines)
