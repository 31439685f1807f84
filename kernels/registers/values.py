"""A value for each thread, between memory and the registers of the register family, by the machine's own instructions.

Triton's operations on memory would take its compiler as much as half a second for each of the 64 values of a matrix: it looks
for others of the same shape in all of the kernel.
"""

import triton
import triton.language as tl

from ..common.arithmetic import INTERPRET

_LOAD_8 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, $3; @p ld.global.u8 $0, [$1];}")
_LOAD_16 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, $3; @p ld.global.b16 $0, [$1];}")
_LOAD_32 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, $3; @p ld.global.b32 $0, [$1];}")
_LOAD_64 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b64 $0, $3; @p ld.global.b64 $0, [$1];}")
_STORE_16 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0;}")
_STORE_32 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0;}")


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
