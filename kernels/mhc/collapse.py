"""From partial sums to mixes, and the collapse h = sum_i pre_i X_i in the same launch.

A program adds up the partial sums of its tokens, leaves them in memory and reads them again one token a thread, makes the
mixes, and collapses its part of the channels with weights read back likewise: so each stage has the layout that suits it.
With few tokens several programs make the same mixes, of the same bits, and take a part of the channels each.
"""

import triton
import triton.language as tl

from ..common.arithmetic import narrow
from ..common.configuration import finite_jit
from ..registers.memory import load_line, store_line
from .mixes import MAX_LINES, Options, everywhere, inverse_root, load_matrix, matrix_steps, plan, project, sigmoid, store_matrix
from .spectrum import store_spectrum
from .tiles import Strides, inside, load_tile, tokens_from, vectors
from .wide import places, wide_logits, wide_plan, wide_project

AT_ONCE = tl.constexpr(8)  # partial sums that are on their way together


@triton.jit
def add_partials(partials_ptr, sums_ptr, token, live, tokens, columns, width, parts):
    """sums (tokens, columns) of a block of tokens."""
    for first in range(0, columns, 32):
        column = first + tl.arange(0, 32)
        mask = live[:, None] & (column < columns)[None, :]
        total = tl.zeros([token.shape[0], 32], tl.float32)
        own_ptr = partials_ptr + ((token * width)[:, None] + column[None, :])
        for first_part in range(0, parts, AT_ONCE):
            for place in tl.static_range(AT_ONCE):
                part = first_part + place
                total += tl.load(own_ptr + part * (tokens * width), mask=mask & (part < parts), other=0.0)
        tl.store((sums_ptr + token * columns)[:, None] + column[None, :], total, mask=mask)


@triton.jit
def sigmoids(own_ptr, q, factor, base_ptr, streams, LINES: tl.constexpr):
    """sigmoid(factor q s + base) of each stream."""
    s = load_line(own_ptr, 1, everywhere(q), streams, LINES)
    values = []
    for i in tl.static_range(LINES):
        base = tl.load(base_ptr + i, mask=i < streams, other=0.0)
        values = values + [sigmoid(factor * (q * s[i]) + base)]
    return values


@triton.jit
def matrix_logits(own_ptr, q, factor, base_ptr, step_a, step_b, LINES: tl.constexpr):
    """M of each token."""
    s = load_matrix(own_ptr, step_a, step_b, everywhere(q), LINES)
    M = []
    for e in tl.static_range(LINES * LINES):
        M = M + [factor * (q * s[e]) + tl.load(base_ptr + ((e // LINES) * step_a + (e % LINES) * step_b))]
    return M


@triton.jit
def collapse(
    X_ptr, X_strides, weights_ptr, h_ptr, token, live, streams, channels, first, last,
    LINES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """h of channels from ``first`` to ``last``."""
    weights = []
    for i in tl.static_range(LINES):
        weights = weights + [tl.load(weights_ptr + token * streams + i, mask=i < streams, other=0.0)]
    for channel in range(first, last, BLOCK_C):
        h = tl.zeros([token.shape[0], BLOCK_C], tl.float32)
        for i in tl.static_range(LINES):
            there = (token >= 0) & (i < streams)
            x = load_tile(X_ptr + i * X_strides.stream, X_strides.token, token, there, channel, last, BLOCK_C)
            h += weights[i][:, None] * x.to(tl.float32)
        mask = inside(live, channel, last, h_ptr, BLOCK_C)
        tl.store(vectors(h_ptr, channels.to(tl.int64), token, channel, BLOCK_C), narrow(h, h_ptr.dtype.element_ty), mask=mask)


@finite_jit
def _mhc_mix_fwd_kernel(
    partials_ptr, X_ptr, scale_ptr, base_ptr, given_ptr, h_ptr, pre_ptr, post_ptr, comb_ptr, info_ptr, sums_ptr,
    tokens: tl.int64, streams: tl.int32, channels: tl.int32, rows: tl.int32, width: tl.int32, parts: tl.int32,
    channel_parts: tl.int32, channels_of_part: tl.int32, size: tl.float32, X_strides: Strides, options: Options,
    has_given: tl.int32,
    LINES: tl.constexpr, HEAD: tl.constexpr, INFO: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """pre, post, comb, ``sums``; h, unless ``channels_of_part`` is 0. LINES: n, or more. HEAD: pre alone. INFO: of comb."""
    program = tl.program_id(0)
    token, live = tokens_from((program // channel_parts).to(tl.int64) * BLOCK_T, tokens, BLOCK_T)
    add_partials(partials_ptr, sums_ptr, token, live, tokens, rows + 1, width, parts)
    tl.debug_barrier()
    own_ptr = sums_ptr + token * (rows + 1)
    q = inverse_root(tl.load(own_ptr + rows), size, options.norm_eps)
    pre = sigmoids(own_ptr, q, tl.load(scale_ptr), base_ptr, streams, LINES)
    store_line(pre_ptr + token * streams, 1, live, streams, [value + options.pre_eps for value in pre])
    if not HEAD:
        post = sigmoids(own_ptr + streams, q, tl.load(scale_ptr + 1), base_ptr + streams, streams, LINES)
        store_line(post_ptr + token * streams, 1, live, streams, [options.post_mult * value for value in post])
        step_a, step_b, comb_a, comb_b = matrix_steps(options, streams)
        factor = tl.load(scale_ptr + 2)
        own_ptr += 2 * streams
        base_ptr += 2 * streams
        own_comb_ptr = comb_ptr + token * (streams * streams)
        if LINES <= MAX_LINES:
            M = matrix_logits(own_ptr, q, factor, base_ptr, step_a, step_b, LINES)
            _x, K, p, w = project(M, options, sums_ptr, 0, LINES, False)
            store_matrix(own_comb_ptr, comb_a, comb_b, live, plan(K, p, w), LINES)
        else:
            at, valid = places(step_a, step_b, streams, LINES)
            M = wide_logits(own_ptr, q, factor, base_ptr, at, valid)
            _x, K, p, w = wide_project(M, options, sums_ptr, token, tokens, False)
            at, valid = places(comb_a, comb_b, streams, LINES)
            tl.store(own_comb_ptr[:, None, None] + at, wide_plan(K, p, w), mask=live[:, None, None] & valid)
    tl.debug_barrier()
    if INFO:
        store_spectrum(comb_ptr, info_ptr, token, live, streams, LINES)
    first = (program % channel_parts) * channels_of_part
    last = tl.minimum(first + channels_of_part, channels)
    weights_ptr = given_ptr if has_given != 0 else pre_ptr
    collapse(X_ptr, X_strides, weights_ptr, h_ptr, token, live, streams, channels, first, last, LINES, BLOCK_C)
