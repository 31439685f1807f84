"""Matrices and lines between memory and the registers of one thread each: tuples of vectors of BLOCK values, one a thread.

A tensor whose first axis counts what a thread holds, and whose last one counts threads, is split into such vectors, or joined
from them, without an instruction. Matrices of 8 lines come and go in one operation for all entries, as the compiler takes time
for each operation on memory that grows with the square of the kernel; packed ones of 4 lines in pieces of 16 bytes.
"""

import triton
import triton.language as tl

from .arithmetic import narrow
from .memory import load_entries, store_entries
from .tile_sweeps import unrelated


@triton.jit
def vectors(x):
    """The vectors of x (a power of two, BLOCK)."""
    COUNT: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    parts = [x]
    for k in tl.static_range(6):
        halves = []
        if 2 ** (k + 1) < COUNT:
            for i in tl.static_range(2**k):
                left, right = tl.split(tl.permute(tl.reshape(parts[i], (2, COUNT // 2 ** (k + 1), BLOCK)), (1, 2, 0)))
                halves = halves + [left, right]
            parts = halves
        elif 2 ** (k + 1) == COUNT:
            for i in tl.static_range(2**k):
                left, right = tl.split(tl.permute(parts[i], (1, 0)))
                halves = halves + [left, right]
            parts = halves
    return [tl.reshape(x, (BLOCK,))] if COUNT == 1 else parts


@triton.jit
def stacked(x):
    """The mirror of :func:`vectors`."""
    COUNT: tl.constexpr = len(x)
    BLOCK: tl.constexpr = x[0].shape[0]
    parts = x
    for k in tl.static_range(6):
        if 2**k < COUNT:
            pairs = []
            for i in tl.static_range(COUNT // 2 ** (k + 1)):
                pair = tl.join(parts[2 * i], parts[2 * i + 1])
                if k == 0:
                    pairs = pairs + [tl.permute(pair, (1, 0))]
                else:
                    pairs = pairs + [tl.reshape(tl.permute(pair, (2, 0, 1)), (2 ** (k + 1), BLOCK))]
            parts = pairs
    return tl.reshape(parts[0], (COUNT, BLOCK))


@triton.jit
def _pieces(ptr, block, batch, START: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """Pointers to pieces of 16 bytes of each matrix, a vector of (PIECES, BLOCK, values of one), and which there are."""
    WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    at = tl.arange(0, PIECES * BLOCK * WIDTH)
    if LINES == 8:
        block = unrelated(block)
    matrix = block.to(tl.int64) * BLOCK + at // WIDTH % BLOCK
    piece = at // (BLOCK * WIDTH)
    start = tl.multiple_of(ptr + (matrix * (LINES * LINES) + (START + piece * WIDTH)), 16)
    return start + at % WIDTH, matrix < batch


@triton.jit
def load_packed(ptr, block, batch, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """Contiguous, aligned matrices of a block of BLOCK, 16 bytes at a time, as float32."""
    WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    PIECES: tl.constexpr = 1 if LINES == 4 else LINES * LINES // WIDTH
    x = []
    for start in tl.static_range(0, LINES * LINES, PIECES * WIDTH):
        pointers, there = _pieces(ptr, block, batch, start, PIECES, BLOCK, LINES)
        values = tl.reshape(tl.load(pointers, mask=there, other=0.0), (PIECES, BLOCK, WIDTH))
        x = x + vectors(tl.reshape(tl.permute(values, (0, 2, 1)), (PIECES * WIDTH, BLOCK)))
    return [value.to(tl.float32) for value in x]


@triton.jit
def store_packed(ptr, block, batch, x, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """The mirror of :func:`load_packed`."""
    WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    PIECES: tl.constexpr = 1 if LINES == 4 else LINES * LINES // WIDTH
    for start in tl.static_range(0, LINES * LINES, PIECES * WIDTH):
        piece = []
        for e in tl.static_range(PIECES * WIDTH):
            piece = piece + [narrow(x[start + e], ptr.dtype.element_ty)]
        values = tl.permute(tl.reshape(stacked(piece), (PIECES, WIDTH, BLOCK)), (0, 2, 1))
        pointers, there = _pieces(ptr, block, batch, start, PIECES, BLOCK, LINES)
        tl.store(pointers, tl.reshape(values, (PIECES * BLOCK * WIDTH,)), mask=there)


@triton.jit
def load_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, default):
    """Any strides and any n, m <= 4, ``default`` beyond."""
    start = ptr + matrix * stride_b
    return [
        tl.load(start + (e // 4) * stride_n + (e % 4) * stride_m, mask=live & (e // 4 < n) & (e % 4 < m), other=default)
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]


@triton.jit
def store_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, x):
    """The mirror of :func:`load_strided`."""
    start = ptr + matrix * stride_b
    for e in tl.static_range(16):
        tl.store(
            start + (e // 4) * stride_n + (e % 4) * stride_m,
            narrow(x[e], ptr.dtype.element_ty),
            mask=live & (e // 4 < n) & (e % 4 < m),
        )


@triton.jit
def load_logits(
    logits_ptr, mask_ptr, matrix, live, batch, n, m,
    logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Logits in float32, -inf where an entry is masked or beyond n or m."""
    if PACKED:
        x = load_packed(logits_ptr, tl.program_id(0), batch, BLOCK, LINES)
    else:
        x = load_strided(logits_ptr, matrix, live, n, m, logits_stride_b, logits_stride_n, logits_stride_m, float("-inf"))
        take = load_strided(mask_ptr, matrix, live & (has_mask != 0), n, m, mask_stride_b, mask_stride_n, mask_stride_m, 1)
        x = [
            tl.where(take[e] != 0, x[e].to(tl.float32), float("-inf"))
            for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
        ]
    return x


@triton.jit
def _line_part(ptr, matrix, live, count, stride_b, stride, FIRST: tl.constexpr, PART: tl.constexpr):
    """Pointers (PART, BLOCK) to values of lines from FIRST on, and which of these there are."""
    line = FIRST + tl.arange(0, PART)[:, None]
    return ptr + (matrix[None, :] * stride_b + line * stride), live[None, :] & (line < count)


@triton.jit
def load_line(ptr, matrix, live, count, stride_b, stride, BLOCK: tl.constexpr, LINES: tl.constexpr):
    """A value for each of the ``count`` <= LINES lines of a matrix, 0 beyond."""
    PART: tl.constexpr = 1 if LINES == 4 else LINES
    x = []
    for first in tl.static_range(0, LINES, PART):
        pointers, there = _line_part(ptr, matrix, live, count, stride_b, stride, first, PART)
        x = x + vectors(load_entries(pointers, there, 0.0))
    return x


@triton.jit
def store_line(ptr, matrix, live, count, x, BLOCK: tl.constexpr):
    """A value for each of the ``count`` lines of a matrix, one after the other."""
    LINES: tl.constexpr = len(x)
    PART: tl.constexpr = 1 if LINES == 4 else LINES
    for first in tl.static_range(0, LINES, PART):
        part = []
        for i in tl.static_range(PART):
            part = part + [x[first + i]]
        pointers, there = _line_part(ptr, matrix, live, count, count, 1, first, PART)
        store_entries(pointers, stacked(part), there)
