"""Tiles of residual streams: a row of a tile is a token and a GROUP of its streams, a warp's; its columns are channels.

The n streams of a token are handled by one warp (n <= 4), two (n <= 8) or four (n <= 16), each of which holds or makes GROUP
of them and reads all it needs of the others: what several warps of a program read comes from memory once, then from L1. The
code is unrolled over GROUPS GROUP streams; those from n on are never read or written, and their mixes are 0.
"""

import triton
import triton.language as tl

from ..common.arithmetic import narrow

GROUP = tl.constexpr(4)


@triton.jit
def token_and_group(block, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of a program's ``block`` its token, and its first stream; (ROWS, 1)."""
    rows = tl.arange(0, ROWS)[:, None]
    return block.to(tl.int64) * (ROWS // GROUPS) + rows // GROUPS, (rows % GROUPS) * GROUP


@triton.jit
def load_mix(ptr, offset, there):
    """A mix of each row, 0 where not ``there``."""
    return tl.load(ptr + offset, mask=there, other=0.0)


@triton.jit
def _stream(ptr, columns, channels, there, ALIGNED: tl.constexpr):
    """Addresses of ``columns`` of a stream that starts at ``ptr``, of each row, and which of them exist."""
    pointers, inside = ptr + columns, there & (columns < channels)
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, columns.shape[1]))
        inside = tl.max_constancy(inside, (1, 128 // ptr.dtype.scalar.element_ty.primitive_bitwidth))
    return pointers, inside


@triton.jit
def load_stream(ptr, columns, channels, there, ALIGNED: tl.constexpr):
    """``columns`` of a stream of each row, in its dtype, 0 where not ``there`` and from ``channels`` on.

    ALIGNED: streams start on 16 bytes and are made of whole vectors of as many.
    """
    pointers, inside = _stream(ptr, columns, channels, there, ALIGNED)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_stream(ptr, columns, channels, there, values, ALIGNED: tl.constexpr):
    """The mirror of :func:`load_stream`, of float32, rounded once."""
    pointers, inside = _stream(ptr, columns, channels, there, ALIGNED)
    tl.store(pointers, narrow(values, ptr.dtype.scalar.element_ty), mask=inside)
