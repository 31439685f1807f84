"""A whole sweep in one pass, where the lines of the first side fit on chip beside a block of the last.

Symbols are those of ``tile.py``. The lines are the first side's, all of them, and a program streams a chunk of the
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
from .arguments import Logits, Operands, Scales, Sizes, Strides
from .tile import (
    entries_of,
    exponent,
    head_scales,
    line_potential,
    line_side,
    load_entries,
    load_potential,
    load_side,
    product,
    stream_potential,
    stream_side,
    used_lines,
)


@finite_jit
def _attention_whole_fwd_kernel(
    operands: Operands,
    active_ptr,
    total_ptr,
    top_ptr,
    partial_ptr,
    strides: Strides,
    sizes: Sizes,
    line_group: tl.int32,
    chunk: tl.int32,
    scales: Scales,
    ONLINE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    program = tl.program_id(0)
    chunks = tl.cdiv(sizes.n_stream, chunk)
    begin = (program % chunks) * chunk
    head = (program // chunks).to(tl.int64)
    if tl.load(active_ptr + head) == 0:
        return
    b, h = head // sizes.heads, head % sizes.heads
    line = line_side(logits, b, h // line_group)
    stream = stream_side(logits, b, h // sizes.stream_group)
    entries = entries_of(logits, b, h)
    k, k_bias = head_scales(logits, head)

    line_used = used_lines(line, 0, BLOCK_L)
    vectors = load_side(line, 0, line_used, BLOCK_D)
    line_values = load_potential(line_potential(logits, head * sizes.n_lines), 0, line_used)
    potential = stream_potential(logits, head * sizes.n_stream)
    partial = tl.zeros([BLOCK_L], tl.float32)
    for start in range(begin, tl.minimum(begin + chunk, sizes.n_stream), BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, logits, k_bias, line_used, stream_used, 0, start)
        x = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            x += extra
        y = exponent(x, line_values, potential, start, stream_used, False)
        if ONLINE:
            top = tl.max(y, axis=0)
            top = tl.where(top == -float("inf"), 0.0, top)
            y -= top[None, :]
        E = exp2(y)
        total = tl.sum(E, axis=0)
        share = tl.where(total == 0, 0.0, reciprocal(tl.where(total == 0, 1.0, total)))
        partial += tl.sum(E * share[None, :], axis=1)
        streams = start + tl.arange(0, BLOCK_S)
        tl.store(total_ptr + head * sizes.n_stream + streams, total, mask=streams < sizes.n_stream)
        if ONLINE:
            tl.store(top_ptr + head * sizes.n_stream + streams, top, mask=streams < sizes.n_stream)

    lines = tl.arange(0, BLOCK_L)
    tl.store(partial_ptr + program.to(tl.int64) * sizes.n_lines + lines, partial, mask=lines < sizes.n_lines)
