"""The adjoint of ``post.py`` in one launch, G_new the cotangent of X'_new:

    dX_old = sum_new comb[old, new] G_new,    dcomb[old, new] = <X_old, G_new>,
    dF     = sum_new post_new G_new,          dpost_new       = <F, G_new>.

A row of a program's tile is a token and GROUP of its old streams (``streams.py``), and walks all channels: all G, then F and
one old stream after the other, each of which gives its gradient and is added to n dot products. These are sums of each
thread's own until the last channel, in float32. Every group makes the part of F, which spares a second kind of row; the
first one stores it. Mixes are loaded again in every step, from L1: beyond four streams there are no registers to keep them.
"""

import triton
import triton.language as tl

from ..common.configuration import finite_jit
from .streams import GROUP, load_mix, load_stream, shifted, store_stream, token_and_group


@triton.jit
def _pulled(source, cotangents, sums, mix_ptr, offset, n, there, LANES: tl.constexpr):
    """The gradient of a source whose mixes are ``offset`` on, and the sums of its products with each of the cotangents."""
    VECTOR: tl.constexpr = source.shape[1] // LANES
    gradient = tl.zeros(source.shape, tl.float32)
    added = []
    for new in tl.static_range(len(cotangents)):
        gradient += load_mix(mix_ptr, offset + new, there & (new < n)) * cotangents[new]
        products = tl.reshape(source * cotangents[new], (source.shape[0], LANES, VECTOR))
        added = added + [sums[new] + tl.sum(products, axis=2)]
    return gradient, added


@triton.jit
def _totals(sums, entries):
    """The dot products of each row, the e-th in lane e: stored together, and where they are."""
    totals = tl.zeros(sums[0].shape, tl.float32)
    for e in tl.static_range(len(sums)):
        totals = tl.where(entries == e, tl.sum(sums[e], axis=1)[:, None], totals)
    return totals


@finite_jit
def _mhc_post_bwd_kernel(
    grad_new_streams_ptr,
    branch_ptr,
    streams_ptr,
    post_ptr,
    comb_ptr,
    grad_branch_ptr,
    grad_streams_ptr,
    grad_post_ptr,
    grad_comb_ptr,
    grad_stride_t: tl.int64,
    grad_stride_n: tl.int64,
    branch_stride_t: tl.int64,
    stride_t: tl.int64,
    stride_n: tl.int64,
    tokens: tl.int32,
    n: tl.int32,
    channels: tl.int32,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N: tl.constexpr = GROUPS * GROUP
    token, first = token_and_group(tl.program_id(0), GROUPS, ROWS)
    exists = token < tokens
    leads = exists & (first == 0)
    sums = []
    for _ in tl.static_range((GROUP + 1) * N):
        sums = sums + [tl.zeros([ROWS, LANES], tl.float32)]
    columns = tl.arange(0, CHANNELS)[None, :]
    branch_ptr = shifted(branch_ptr + token * branch_stride_t, columns, ALIGNED)
    streams_ptr = shifted(streams_ptr + token * stride_t + first * stride_n, columns, ALIGNED)
    grad_new_streams_ptr = shifted(grad_new_streams_ptr + token * grad_stride_t, columns, ALIGNED)
    grad_branch_ptr = shifted(grad_branch_ptr + token * channels, columns, ALIGNED)
    grad_streams_ptr = shifted(grad_streams_ptr + (token * n + first) * channels, columns, ALIGNED)
    post_ptr += token * n
    comb_ptr += (token * n + first) * n
    for start in range(0, channels, CHANNELS):
        left = channels - start
        cotangents = []
        for new in tl.static_range(N):
            offset, there = new * grad_stride_n + start, exists & (new < n)
            cotangents = cotangents + [load_stream(grad_new_streams_ptr, offset, there, columns, left, ALIGNED).to(tl.float32)]
        branch = load_stream(branch_ptr, start, exists, columns, left, ALIGNED).to(tl.float32)
        gradient, added = _pulled(branch, cotangents, sums[:N], post_ptr, 0, n, exists, LANES)
        store_stream(grad_branch_ptr, start, leads, columns, left, gradient, ALIGNED)
        for i in tl.static_range(GROUP):
            there = exists & (first + i < n)
            stream = load_stream(streams_ptr, i * stride_n + start, there, columns, left, ALIGNED).to(tl.float32)
            mine = sums[(i + 1) * N : (i + 2) * N]
            gradient, more = _pulled(stream, cotangents, mine, comb_ptr, i * n, n, there, LANES)
            store_stream(grad_streams_ptr, i * channels + start, there, columns, left, gradient, ALIGNED)
            added = added + more
        sums = added
    entries = tl.arange(0, LANES)[None, :]
    tl.store(grad_post_ptr + token * n + entries, _totals(sums[:N], entries), mask=leads & (entries < n))
    for i in tl.static_range(GROUP):
        pointers = grad_comb_ptr + (token * n + first + i) * n + entries
        there = exists & (first + i < n) & (entries < n)
        tl.store(pointers, _totals(sums[(i + 1) * N : (i + 2) * N], entries), mask=there)
