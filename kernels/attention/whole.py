"""A whole sweep in one pass, where the lines of the first side fit on chip beside a block of the last.

Symbols are those of ``attention_tile``. The lines are the first side's, all of them, and a program streams a chunk of the
last past them, block by block:

    E_ij = 2^(y_ij - t_j)      t_j the largest y of the stream's line in the first sweep (ONLINE), else 0
    out_j = ln 2 (t_j + log2 sum_i E_ij)                 what normalises the last side
    partial_i = sum_j E_ij / sum_i E_ij                  line sums of the first side after that, over this chunk

so that one exponential per logit serves both half sweeps. Every chunk leaves its partial sums, which are added up in one
order: results are the same bits each time. One of the two sums crosses the threads of a tile; with the whole side as lines
it is the shorter one, a block's, and takes less than the second exponential and the second product that are spared.
"""

import triton.language as tl

from ..common.arithmetic import exp2, reciprocal
from ..common.configuration import finite_jit
from .tile import entries_of, exponent, head_scales, load_entries, load_potential, load_side, product, side_of, used_lines


@finite_jit
def _attention_whole_fwd_kernel(
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
    active_ptr,
    total_ptr,
    top_ptr,
    partial_ptr,
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
    chunk: tl.int32,
    scale: tl.float32,
    bias_scale: tl.float32,
    ONLINE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    program = tl.program_id(0)
    chunks = tl.cdiv(n_stream, chunk)
    begin = (program % chunks) * chunk
    head = (program // chunks).to(tl.int64)
    if tl.load(active_ptr + head) == 0:
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

    line_used = used_lines(line, 0, BLOCK_L)
    vectors = load_side(line, 0, line_used, BLOCK_D)
    potential = load_potential(line_base_ptr + head * n_lines, line_fine_ptr + head * n_lines, 0, line_used)
    base_ptr, fine_ptr = stream_base_ptr + head * n_stream, stream_fine_ptr + head * n_stream
    partial = tl.zeros([BLOCK_L], tl.float32)
    for start in range(begin, tl.minimum(begin + chunk, n_stream), BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, k_bias, line_used, stream_used, 0, start)
        x = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            x += extra
        y = exponent(x, potential, base_ptr, fine_ptr, start, stream_used, False)
        if ONLINE:
            top = tl.max(y, axis=0)
            top = tl.where(top == -float("inf"), 0.0, top)
            y -= top[None, :]
        E = exp2(y)
        total = tl.sum(E, axis=0)
        share = tl.where(total == 0, 0.0, reciprocal(tl.where(total == 0, 1.0, total)))
        partial += tl.sum(E * share[None, :], axis=1)
        streams = start + tl.arange(0, BLOCK_S)
        tl.store(total_ptr + head * n_stream + streams, total, mask=streams < n_stream)
        if ONLINE:
            tl.store(top_ptr + head * n_stream + streams, top, mask=streams < n_stream)

    lines = tl.arange(0, BLOCK_L)
    tl.store(partial_ptr + program.to(tl.int64) * n_lines + lines, partial, mask=lines < n_lines)
