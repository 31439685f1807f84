"""A layer's streams and, while they are on chip, all that the next layer's ``pre`` needs of them; up to GROUP streams.

X' as in ``post.py``. Of X' as rounded, which is what is read later, a program leaves over its part of the channels

    partial_d = sum_{i, c} fn_d,ic X'_ic,    partial_D = sum_{i, c} X'_ic^2,    and, weights given, h = sum_i given_i X'_i.

A thread has a vector of one token, so that the mixes of that token stay in its registers; X' goes on to the tensor cores by way
of shared memory. The product is as exact as float32 (``exact.py``). Tensor cores cut off what they add to a sum; so each step's
is begun anew, and added to the others in float32.
"""

import triton
import triton.language as tl

from ..common.arithmetic import narrow
from ..common.configuration import finite_jit
from .exact import exact_product, kept
from .streams import GROUP, load_mix


@triton.jit
def _lines(ptr, stride, there, left, CHANNELS: tl.constexpr):
    """Addresses of CHANNELS of the ``left`` ones of lines from ``ptr`` on, and what exists.

    Lines are made of whole 16-byte vectors; offsets in a tile are of 32 bits.
    """
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    column = tl.arange(0, CHANNELS)[None, :]
    offsets = tl.arange(0, there.shape[0])[:, None] * stride.to(tl.int32) + column
    pointers = tl.max_contiguous(tl.multiple_of(ptr + offsets, (1, 16)), (1, CHANNELS))
    return pointers, tl.max_constancy(there & (column < left), (1, VECTOR))


@triton.jit
def load_lines(ptr, stride, there, left, CHANNELS: tl.constexpr):
    """What exists of lines that are ``there``, 0 elsewhere."""
    pointers, inside = _lines(ptr, stride, there, left, CHANNELS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_lines(ptr, stride, there, left, values, CHANNELS: tl.constexpr):
    """The mirror of :func:`load_lines`."""
    pointers, inside = _lines(ptr, stride, there, left, CHANNELS)
    tl.store(pointers, values, mask=inside)


@triton.jit
def _joined(tiles):
    """GROUP tiles side by side, channel by channel."""
    tile = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))
    return tl.reshape(tile, (tile.shape[0], GROUP * tile.shape[1]))


@finite_jit
def _mhc_post_pre_fwd_kernel(
    branch_ptr,
    streams_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    given_ptr,
    new_streams_ptr,
    h_ptr,
    partials_ptr,
    branch_stride_t: tl.int64,
    stride_t: tl.int64,
    stride_n: tl.int64,
    tokens: tl.int32,
    n: tl.int32,
    channels: tl.int32,
    rows: tl.int32,
    width: tl.int32,
    parts: tl.int32,
    channels_of_part: tl.int32,
    GIVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    part = tl.program_id(0) % parts
    first = (tl.program_id(0) // parts).to(tl.int64) * TOKENS
    lines = tl.arange(0, TOKENS)[:, None]
    exists = first + lines < tokens
    post_ptr += (first + lines) * n
    given_ptr += (first + lines) * n
    comb_ptr += (first + lines) * (n * n)
    mixes, weights = [], []
    for new in tl.static_range(GROUP):
        there = exists & (new < n)
        mixes = mixes + [load_mix(post_ptr, new, there)]
        for old in tl.static_range(GROUP):
            mixes = mixes + [load_mix(comb_ptr, old * n + new, there & (old < n))]
        if GIVEN:
            weights = weights + [load_mix(given_ptr, new, there)]
    row = tl.arange(0, ROWS)[:, None]
    branch_ptr += first * branch_stride_t
    streams_ptr += first * stride_t
    new_streams_ptr += first * n * channels
    h_ptr += first * channels

    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    squares = tl.zeros([TOKENS, CHANNELS // VECTOR], tl.float32)
    begin = part * channels_of_part
    for start in range(begin, tl.minimum(begin + channels_of_part, channels), CHANNELS):
        left = channels - start
        sources = [load_lines(branch_ptr + start, branch_stride_t, exists, left, CHANNELS)]
        for old in tl.static_range(GROUP):
            sources = sources + [load_lines(streams_ptr + old * stride_n + start, stride_t, exists & (old < n), left, CHANNELS)]
        news, fns = [], []
        if GIVEN:
            h = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for new in tl.static_range(GROUP):
            total = tl.zeros([TOKENS, CHANNELS], tl.float32)
            for source in tl.static_range(GROUP + 1):
                total += mixes[new * (GROUP + 1) + source] * sources[source].to(tl.float32)
            stream = kept(narrow(total, new_streams_ptr.dtype.element_ty))
            store_lines(new_streams_ptr + new * channels + start, n * channels, exists & (new < n), left, stream, CHANNELS)
            total = stream.to(tl.float32)
            squares += tl.sum(tl.reshape(total * total, (TOKENS, CHANNELS // VECTOR, VECTOR)), axis=2)
            if GIVEN:
                h += weights[new] * total
            news = news + [stream]
            fns = fns + [load_lines(fn_ptr + new * channels + start, n * channels, (row < rows) & (new < n), left, CHANNELS)]
        if GIVEN:
            store_lines(h_ptr + start, channels, exists, left, narrow(h, h_ptr.dtype.element_ty), CHANNELS)
        acc += exact_product(_joined(news), _joined(fns))
    column = tl.arange(0, ROWS)[None, :]
    found = tl.where(column == rows, tl.sum(squares, axis=1)[:, None], acc)
    pointers = partials_ptr + (part * tokens.to(tl.int64) + first + lines) * width + column
    tl.store(pointers, found, mask=exists & (column <= rows))
