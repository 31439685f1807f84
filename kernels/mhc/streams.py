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
    """A mix of each row, ``offset`` from where its token's begin; 0 where not ``there``."""
    return tl.load(ptr + offset, mask=there, other=0.0)


@triton.jit
def shifted(ptr, offset, ALIGNED: tl.constexpr):
    """Addresses ``offset`` on from ``ptr``, of adjacent columns; ALIGNED: streams are whole vectors of 16 bytes."""
    pointers = ptr + offset
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, pointers.shape[1]))
    return pointers


@triton.jit
def _inside(ptr, there, columns, channels, ALIGNED: tl.constexpr):
    """Which ``columns`` of the rows that are ``there`` exist."""
    inside = there & (columns < channels)
    if ALIGNED:
        inside = tl.max_constancy(inside, (1, 128 // ptr.dtype.scalar.element_ty.primitive_bitwidth))
    return inside


@triton.jit
def load_stream(ptr, offset, there, columns, channels, ALIGNED: tl.constexpr):
    """A stream's part of each row in its dtype, ``offset`` on from :func:`shifted`; 0 where there is none."""
    inside = _inside(ptr, there, columns, channels, ALIGNED)
    return tl.load(shifted(ptr, offset, ALIGNED), mask=inside, other=0.0)


@triton.jit
def store_stream(ptr, offset, there, columns, channels, values, ALIGNED: tl.constexpr):
    """The mirror of :func:`load_stream`, of float32, rounded once."""
    inside = _inside(ptr, there, columns, channels, ALIGNED)
    tl.store(shifted(ptr, offset, ALIGNED), narrow(values, ptr.dtype.scalar.element_ty), mask=inside)
