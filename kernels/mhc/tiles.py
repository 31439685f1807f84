"""Tiles of tokens by channels or coefficients: pointers and loads that move whole 16-byte vectors."""

from typing import NamedTuple

import triton
import triton.language as tl


class Strides(NamedTuple):
    """Of a tensor (tokens, streams, channels), from token to token and from stream to stream."""

    token: tl.int64
    stream: tl.int64


@triton.jit
def tokens_from(first, tokens, BLOCK_T: tl.constexpr):
    """The tokens of a block, the last one again beyond it, and which of them are there."""
    token = first + tl.arange(0, BLOCK_T)
    return tl.minimum(token, tokens - 1), token < tokens


@triton.jit
def vectors(ptr, stride, rows, first, COLS: tl.constexpr):
    """Pointers (rows, COLS) from column ``first`` on; lines are made of whole 16-byte vectors."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    pointers = ptr + first + (rows[:, None] * stride + tl.arange(0, COLS)[None, :])
    return tl.max_contiguous(tl.multiple_of(pointers, (16, 16)), (1, VECTOR))


@triton.jit
def inside(there, first, count, like, COLS: tl.constexpr):
    """Mask of :func:`vectors`: rows that are ``there``, columns below ``count``, in whole vectors of ``like``."""
    VECTOR: tl.constexpr = 128 // like.dtype.element_ty.primitive_bitwidth
    return tl.max_constancy(there[:, None] & (first + tl.arange(0, COLS) < count)[None, :], (1, VECTOR))


@triton.jit
def load_tile(ptr, stride, rows, there, first, count, COLS: tl.constexpr):
    """Columns from ``first`` on of rows, 0 where they are not ``there`` and from ``count`` on."""
    return tl.load(vectors(ptr, stride, rows, first, COLS), mask=inside(there, first, count, ptr, COLS), other=0.0)


@triton.jit
def partly_summed(x):
    """Sums over runs of 8 columns, which a thread has to itself."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), 2)
