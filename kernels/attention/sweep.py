"""Passes with one number per line: the log-sum-exp of a half sweep, and the plan times a vector.

Symbols are those of ``tile.py``, y_ij = x_ij + f_i + g_j:

    ONLINE     out_i = ln 2 log2 sum_j 2^y_ij          with a running maximum, in the first sweep
    BOUNDED    out_i = ln 2 log2 sum_j 2^y_ij          no maximum: one exponential per logit
    WEIGHTED   out_i = sum_j 2^y_ij w_j                P w, in float32

After the first sweep 2^y is a plan one side of which is exact, up to the bounded factor of one update: it cannot overflow,
and what underflow takes from a sum is below what float32 would keep of it.
"""

import triton.language as tl

from ..common.arithmetic import LN_2, exp2
from ..common.configuration import finite_jit
from .arguments import Logits, Operands, Scales, Sizes, Strides
from .tile import (
    entries_of,
    exponent,
    head_scales,
    line_potential,
    line_side,
    load_entries,
    load_pair,
    load_potential,
    load_side,
    log_sum,
    product,
    stream_potential,
    stream_side,
    used_lines,
)

ONLINE = tl.constexpr("online")
BOUNDED = tl.constexpr("bounded")
WEIGHTED = tl.constexpr("weighted")


@finite_jit
def _attention_sweep_fwd_kernel(
    operands: Operands,
    weight_ptr,
    active_ptr,
    out_ptr,
    strides: Strides,
    sizes: Sizes,
    line_group: tl.int32,
    has_active: tl.int32,
    scales: Scales,
    KIND: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
):
    logits = Logits(operands, strides, sizes, scales)
    program = tl.program_id(0)
    blocks = tl.cdiv(sizes.n_lines, BLOCK_L)
    first = (program % blocks) * BLOCK_L
    head = (program // blocks).to(tl.int64)
    if tl.load(active_ptr + head, mask=has_active != 0, other=1) == 0:
        return
    b, h = head // sizes.heads, head % sizes.heads
    line = line_side(logits, b, h // line_group)
    stream = stream_side(logits, b, h // sizes.stream_group)
    entries = entries_of(logits, b, h)
    k, k_bias = head_scales(logits, head)

    line_used = used_lines(line, first, BLOCK_L)
    vectors = load_side(line, first, line_used, BLOCK_D)
    line_values = load_potential(line_potential(logits, head * sizes.n_lines), first, line_used)
    potential = stream_potential(logits, head * sizes.n_stream)
    weight_head_ptr = weight_ptr + head * sizes.n_stream
    total = tl.zeros([BLOCK_L], tl.float32)
    top = tl.full([BLOCK_L], -float("inf"), tl.float32)
    for start in range(0, sizes.n_stream, BLOCK_S):
        stream_used = used_lines(stream, start, BLOCK_S)
        if ENTRIES:
            extra = load_entries(entries, logits, k_bias, line_used, stream_used, first, start)
        x = product(vectors, load_side(stream, start, stream_used, BLOCK_D), PRECISION) * k
        if ENTRIES:
            x += extra
        y = exponent(x, line_values, potential, start, stream_used, STREAM_FIRST)
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
    tl.store(out_ptr + head * sizes.n_lines + lines, out, mask=lines < sizes.n_lines)
