"""The streams behind a branch: X'_new = post_new F + sum_old comb[old, new] X_old, F the branch's output.

A row of a program's tile is a token and GROUP of its new streams (``streams.py``): all sources are loaded before the first
product, so that each warp has n + 1 vectors on their way, and added up in float32 in the order of the formula.
"""

import triton.language as tl

from ..common.configuration import finite_jit
from .streams import GROUP, load_mix, load_stream, store_stream, token_and_group


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
    sources = [load_stream(branch_ptr + token * branch_stride_t, columns, channels, exists, ALIGNED)]
    for old in tl.static_range(GROUPS * GROUP):
        at = streams_ptr + token * stride_t + old * stride_n
        sources = sources + [load_stream(at, columns, channels, exists & (old < n), ALIGNED)]
    for i in tl.static_range(GROUP):
        new, there = first + i, exists & (first + i < n)
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
        total += load_mix(post_ptr, token * n + new, there) * sources[0].to(tl.float32)
        for old in tl.static_range(GROUPS * GROUP):
            mix = load_mix(comb_ptr, (token * n + old) * n + new, there & (old < n))
            total += mix * sources[old + 1].to(tl.float32)
        store_stream(new_streams_ptr + (token * n + new) * channels, columns, channels, there, total, ALIGNED)
