"""The streams behind a branch: X'_new = post_new F + sum_old comb[old, new] X_old, F the branch's output.

A row of a program's tile is a token and GROUP of its new streams (``streams.py``): all n + 1 sources are loaded before the
first product, and added up in float32 in the order of the formula. Stores come last, as the compiler takes no load past them.
"""

import triton.language as tl

from ..common.configuration import finite_jit
from .streams import GROUP, load_mix, load_stream, shifted, store_stream, token_and_group


@finite_jit
def _mhc_post_fwd_kernel(
    branch_ptr,
    streams_ptr,
    post_ptr,
    comb_ptr,
    new_streams_ptr,
    branch_stride_t: tl.int64,
    stride_t: tl.int64,
    stride_n: tl.int64,
    tokens: tl.int32,
    n: tl.int32,
    channels: tl.int32,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    parts = tl.cdiv(channels, CHANNELS)
    token, first = token_and_group(tl.program_id(0) // parts, GROUPS, ROWS)
    columns = (tl.program_id(0) % parts) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = token < tokens
    branch_ptr = shifted(branch_ptr + token * branch_stride_t, columns, ALIGNED)
    streams_ptr = shifted(streams_ptr + token * stride_t, columns, ALIGNED)
    new_streams_ptr = shifted(new_streams_ptr + (token * n + first) * channels, columns, ALIGNED)
    post_ptr += token * n + first
    comb_ptr += token * (n * n) + first
    sources = [load_stream(branch_ptr, 0, exists, columns, channels, ALIGNED)]
    for old in tl.static_range(GROUPS * GROUP):
        sources = sources + [load_stream(streams_ptr, old * stride_n, exists & (old < n), columns, channels, ALIGNED)]
    totals = []
    for i in tl.static_range(GROUP):
        there = exists & (first + i < n)
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
        total += load_mix(post_ptr, i, there) * sources[0].to(tl.float32)
        for old in tl.static_range(GROUPS * GROUP):
            total += load_mix(comb_ptr, old * n + i, there & (old < n)) * sources[old + 1].to(tl.float32)
        totals = totals + [total]
    for i in tl.static_range(GROUP):
        store_stream(new_streams_ptr, i * channels, exists & (first + i < n), columns, channels, totals[i], ALIGNED)
