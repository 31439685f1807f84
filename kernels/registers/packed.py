"""Packed matrices between memory and the registers of one thread each, 16 bytes at a time.

Where matrices are made of such pieces (4, 8 and, in float32, 6 lines) each thread takes its own. All others cross over
together, by way of shared memory. Both are the machine's own instructions, for the reason in ``values.py``.
"""

import triton
import triton.language as tl

from ..common.arithmetic import INTERPRET, narrow
from .shared import by_itself, drain, fill, filled

_LOAD_FOUR = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD_EIGHT = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    ld.global.v4.b32 {a, b, c, d}, [$8];
    mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
}""")
_STORE_FOUR = tl.constexpr("""{
    .reg .pred p;
    setp.ne.s32 p, $6, 0;
    @p st.global.v4.b32 [$1], {$2, $3, $4, $5};
    mov.b32 $0, 0;
}""")
_STORE_EIGHT = tl.constexpr("""{
    .reg .pred p; .reg .b32 a, b, c, d;
    setp.ne.s32 p, $10, 0;
    mov.b32 a, {$2, $3}; mov.b32 b, {$4, $5}; mov.b32 c, {$6, $7}; mov.b32 d, {$8, $9};
    @p st.global.v4.b32 [$1], {a, b, c, d};
    mov.b32 $0, 0;
}""")


@triton.jit
def _load_16_bytes(pointer):
    """Four values of 32 bits, or eight of 16, from ``pointer`` on."""
    T: tl.constexpr = pointer.dtype.element_ty
    at = pointer.to(tl.int64)
    if INTERPRET:
        x = []
        for e in tl.static_range(128 // T.primitive_bitwidth):
            x = x + [tl.load(pointer + e)]
    elif T.primitive_bitwidth == 32:
        x = tl.inline_asm_elementwise(
            _LOAD_FOUR, "=f,=f,=f,=f,l", [at], (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1
        )
    else:
        x = tl.inline_asm_elementwise(
            _LOAD_EIGHT,
            "=h,=h,=h,=h,=h,=h,=h,=h,l",
            [at],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=False,
            pack=1,
        )
    return [value.to(T, bitcast=True) for value in x]


@triton.jit
def _store_16_bytes(pointer, x, live):
    """The mirror of :func:`_load_16_bytes`, of values in the type they are kept in."""
    at, there = pointer.to(tl.int64), live.to(tl.int32)
    if INTERPRET:
        for e in tl.static_range(len(x)):
            tl.store(pointer + e, x[e], mask=live)
    elif len(x) == 4:
        tl.inline_asm_elementwise(
            _STORE_FOUR, "=r,l,f,f,f,f,r", [at, x[0], x[1], x[2], x[3], there], tl.int32, is_pure=False, pack=1
        )
    else:
        y = [value.to(tl.int16, bitcast=True) for value in x]
        tl.inline_asm_elementwise(
            _STORE_EIGHT,
            "=r,l,h,h,h,h,h,h,h,h,r",
            [at, y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7], there],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_packed(ptr, first, batch, workspace, LINES: tl.constexpr):
    """The matrices from ``first`` on as float32, one a thread; the last one of the batch where there is none."""
    if not by_itself(LINES, ptr.dtype.element_ty.primitive_bitwidth):
        fill(ptr, first, batch, workspace, LINES)
    return load_again(ptr, first, batch, workspace, LINES)


@triton.jit
def load_again(ptr, first, batch, workspace, LINES: tl.constexpr):
    """What :func:`load_packed` of the same arguments has returned, with no use of ``workspace`` since."""
    T: tl.constexpr = ptr.dtype.element_ty
    if by_itself(LINES, T.primitive_bitwidth):
        matrix = tl.minimum(first + tl.arange(0, workspace.shape[0]), batch - 1)
        start = ptr + matrix * (LINES * LINES)
        x = []
        for piece in tl.static_range(0, LINES * LINES, 128 // T.primitive_bitwidth):
            x = x + _load_16_bytes(start + piece)
    else:
        x = filled(first, batch, workspace, T, LINES)
    return [value.to(tl.float32) for value in x]


@triton.jit
def store_packed(ptr, first, batch, x, workspace, LINES: tl.constexpr):
    """The mirror of :func:`load_packed`."""
    T: tl.constexpr = ptr.dtype.element_ty
    if by_itself(LINES, T.primitive_bitwidth):
        matrix = first + tl.arange(0, workspace.shape[0])
        start = ptr + tl.minimum(matrix, batch - 1) * (LINES * LINES)
        for piece in tl.static_range(0, LINES * LINES, 128 // T.primitive_bitwidth):
            values = []
            for e in tl.static_range(128 // T.primitive_bitwidth):
                values = values + [narrow(x[piece + e], T)]
            _store_16_bytes(start + piece, values, matrix < batch)
    else:
        drain(ptr, first, batch, x, workspace, LINES)
