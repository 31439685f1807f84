"""Arithmetic shared by the kernels: each function is one machine instruction where the hardware has it.

The float32 forms flush denormals and err by a few units in the last place (PTX ISA, ``rcp``, ``ex2``, ``lg2`` with
``.approx.ftz``), less than the rounding of the arguments they are given here. The interpreter and float64 take the
plain operations instead, so results there are those of NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x):
    """1 / x."""
    if INTERPRET or x.dtype != tl.float32:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def reciprocals(x, y):
    """(1 / x, 1 / y) for one reciprocal and three products; x y must not overflow or underflow."""
    both = reciprocal(x * y)
    return both * y, both * x


@triton.jit
def rounded_product(x, y):
    """x y, rounded by itself, as a term of sums across lanes whose copies decide something.

    Elsewhere the compiler makes of a product and a sum one fma: fma(x, y, p) where p came from another lane, whose own sum is
    fma(x', y', x y). Each has rounded the product of the other, and the two copies of their sum differ in the last place.
    """
    if INTERPRET:
        z = x * y
    elif x.dtype == tl.float64:
        z = tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [x, y], dtype=tl.float64, is_pure=True, pack=1)
    else:
        z = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    return z


@triton.jit
def quotient(x, y):
    """x / y to the last place, unless x or y is near the ends of its range."""
    inverse = reciprocal(y)
    z = x * inverse
    return tl.fma(tl.fma(-z, y, x), inverse, z)


@triton.jit
def exp2(x):
    """2^x."""
    if INTERPRET or x.dtype != tl.float32:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def log2(x):
    """log2 x."""
    if INTERPRET or x.dtype != tl.float32:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def rsqrt(x):
    """1 / sqrt(x)."""
    if INTERPRET or x.dtype != tl.float32:
        y = 1.0 / tl.sqrt(x)
    else:
        y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in ``dtype``, to nearest; the interpreter cuts float32 off to bfloat16, hence is given it rounded."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)
