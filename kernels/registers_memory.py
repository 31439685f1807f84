"""Matrices and lines between memory and the registers of one thread each: tuples of vectors of BLOCK values, one a thread.

They come and go by the machine's own instructions, packed matrices 16 bytes at a time where they fill such pieces (4, 8 and, in
float32, 6 lines), each thread its own. Triton's operations
on memory would need tensors taken apart into 64 vectors, and its compiler as much as half a second for each of them: it looks
for others of the same shape in all of the kernel.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRET, narrow

_LOAD_8 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, $3; @p ld.global.u8 $0, [$1];}")
_LOAD_16 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, $3; @p ld.global.b16 $0, [$1];}")
_LOAD_32 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, $3; @p ld.global.b32 $0, [$1];}")
_LOAD_64 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b64 $0, $3; @p ld.global.b64 $0, [$1];}")
_STORE_16 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0;}")
_STORE_32 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0;}")
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
def load_value(pointer, there, default):
    """One value for each thread, ``default`` where not ``there``; a byte as an integer."""
    T: tl.constexpr = pointer.dtype.element_ty
    if INTERPRET:
        value = tl.load(pointer, mask=there, other=default)
    else:
        at, some = pointer.to(tl.int64), there.to(tl.int32)
        if T.primitive_bitwidth == 8:
            other = tl.full(pointer.shape, default, tl.int32)
            value = tl.inline_asm_elementwise(_LOAD_8, "=r,l,r,r", [at, some, other], tl.int32, is_pure=False, pack=1)
        elif T.primitive_bitwidth == 16:
            other = tl.full(pointer.shape, default, T).to(tl.int16, bitcast=True)
            value = tl.inline_asm_elementwise(_LOAD_16, "=h,l,r,h", [at, some, other], tl.int16, is_pure=False, pack=1)
            value = value.to(T, bitcast=True)
        elif T.primitive_bitwidth == 32:
            other = tl.full(pointer.shape, default, T)
            value = tl.inline_asm_elementwise(_LOAD_32, "=f,l,r,f", [at, some, other], tl.float32, is_pure=False, pack=1)
        else:
            other = tl.full(pointer.shape, default, T)
            value = tl.inline_asm_elementwise(_LOAD_64, "=d,l,r,d", [at, some, other], tl.float64, is_pure=False, pack=1)
    return value


@triton.jit
def store_value(pointer, value, there):
    """The mirror of :func:`load_value`, of floats of 32 bits or 16."""
    if INTERPRET:
        tl.store(pointer, value, mask=there)
    else:
        at, some = pointer.to(tl.int64), there.to(tl.int32)
        if value.dtype.primitive_bitwidth == 16:
            bits = value.to(tl.int16, bitcast=True)
            tl.inline_asm_elementwise(_STORE_16, "=r,l,h,r", [at, bits, some], tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_STORE_32, "=r,l,f,r", [at, value, some], tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_16_bytes(pointer):
    """Four values of 32 bits, or eight of 16, from ``pointer`` on."""
    T: tl.constexpr = pointer.dtype.element_ty
    at = pointer.to(tl.int64)
    if T.primitive_bitwidth == 32:
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
    if len(x) == 4:
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
def load_packed(ptr, matrix, LINES: tl.constexpr):
    """Packed matrices, all of them there, as float32."""
    start = ptr + matrix * (LINES * LINES)
    x = []
    if INTERPRET:
        for e in tl.static_range(LINES * LINES):
            x = x + [tl.load(start + e)]
    elif LINES * LINES * ptr.dtype.element_ty.primitive_bitwidth % 128 == 0:
        WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        for first in tl.static_range(0, LINES * LINES, WIDTH):
            x = x + _load_16_bytes(start + first)
    else:
        there = tl.full(matrix.shape, 1, tl.int1)
        for e in tl.static_range(LINES * LINES):
            x = x + [load_value(start + e, there, 0.0)]
    return [value.to(tl.float32) for value in x]


@triton.jit
def store_packed(ptr, matrix, live, x, LINES: tl.constexpr):
    """The mirror of :func:`load_packed`, where ``live``."""
    start = ptr + matrix * (LINES * LINES)
    if INTERPRET:
        for e in tl.static_range(LINES * LINES):
            tl.store(start + e, narrow(x[e], ptr.dtype.element_ty), mask=live)
    elif LINES * LINES * ptr.dtype.element_ty.primitive_bitwidth % 128 == 0:
        WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        for first in tl.static_range(0, LINES * LINES, WIDTH):
            piece = []
            for e in tl.static_range(WIDTH):
                piece = piece + [narrow(x[first + e], ptr.dtype.element_ty)]
            _store_16_bytes(start + first, piece, live)
    else:
        for e in tl.static_range(LINES * LINES):
            store_value(start + e, narrow(x[e], ptr.dtype.element_ty), live)


@triton.jit
def load_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, default):
    """Any strides and any n, m <= 4, ``default`` beyond."""
    start = ptr + matrix * stride_b
    return [
        load_value(start + ((e // 4) * stride_n + (e % 4) * stride_m), live & (e // 4 < n) & (e % 4 < m), default)
        for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]


@triton.jit
def store_strided(ptr, matrix, live, n, m, stride_b, stride_n, stride_m, x):
    """The mirror of :func:`load_strided`."""
    start = ptr + matrix * stride_b
    for e in tl.static_range(16):
        value = narrow(x[e], ptr.dtype.element_ty)
        store_value(start + ((e // 4) * stride_n + (e % 4) * stride_m), value, live & (e // 4 < n) & (e % 4 < m))


@triton.jit
def load_logits(
    logits_ptr, mask_ptr, matrix, live, n, m,
    logits_stride_b, logits_stride_n, logits_stride_m, mask_stride_b, mask_stride_n, mask_stride_m, has_mask,
    PACKED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Logits in float32, -inf where an entry is masked or beyond n or m."""
    if PACKED:
        x = load_packed(logits_ptr, matrix, LINES)
    else:
        x = load_strided(logits_ptr, matrix, live, n, m, logits_stride_b, logits_stride_n, logits_stride_m, float("-inf"))
        take = load_strided(mask_ptr, matrix, live & (has_mask != 0), n, m, mask_stride_b, mask_stride_n, mask_stride_m, 1)
        x = [
            tl.where(take[e] != 0, x[e].to(tl.float32), float("-inf"))
            for e in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
        ]
    return x


@triton.jit
def load_line(start, stride, there, count, LINES: tl.constexpr):
    """Values ``stride`` apart from ``start`` on, one for each of ``count`` <= LINES lines, 0 beyond."""
    x = []
    for i in tl.static_range(LINES):
        x = x + [load_value(start + i * stride, there & (i < count), 0.0)]
    return x


@triton.jit
def store_line(start, stride, there, count, x):
    """The mirror of :func:`load_line`."""
    for i in tl.static_range(len(x)):
        store_value(start + i * stride, x[i], there & (i < count))
