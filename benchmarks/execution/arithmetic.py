"""Arithmetic that NumPy does not have: fused multiply-add, bfloat16, conversions that saturate, high halves of products."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import TYPES, f4, f8, i2, u2, u4, u8


def flush(x: Any) -> Any:
    """Subnormals to zero of the same sign."""
    return np.where(np.abs(x) < f4(1.1754943508222875e-38), x * f4(0), x)


def fma8(a: Any, b: Any, c: Any) -> Any:
    """a b + c in float64, rounded once but for rare ties: error-free product and sum, then their errors."""
    p = a * b
    ta, tb = a * 134217729.0, b * 134217729.0
    ah, bh = ta - (ta - a), tb - (tb - b)
    al, bl = a - ah, b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    z = s - p
    t = (p - (s - z)) + (c - z)
    better = s + (t + e)
    return np.where(np.isfinite(better) & np.isfinite(e), better, s)


def narrow_bf16(x: Any) -> Any:
    """float32 to the bits of bfloat16, to nearest even; int16."""
    x = np.asarray(x, f4)
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2).view(i2)


def widen_bf16(x: Any) -> Any:
    """Bits of bfloat16 to float32."""
    return (np.asarray(x).astype(u2).astype(u4) << u4(16)).view(f4)


def cut_tf32(x: Any) -> Any:
    """Bits of float32 to what tensor cores read of them, in float64."""
    return (x & u4(0xFFFFE000)).view(f4).astype(f8)


def to_int(x: Any, kind: str) -> Any:
    """A whole float to an integer type: saturated, NaN is 0."""
    info = np.iinfo(TYPES[kind])
    wide = np.asarray(x, f8)
    wide = np.where(np.isnan(wide), 0.0, wide)
    found = np.clip(wide, float(info.min), float(info.max)).astype(TYPES[kind])
    found = np.where(wide <= float(info.min), info.min, found)
    return np.where(wide >= float(info.max), info.max, found).astype(TYPES[kind])


def mul_hi8(a: Any, b: Any) -> Any:
    """High half of a product of unsigned 64-bit integers."""
    a, b = np.asarray(a).view(u8), np.asarray(b).view(u8)
    low = u8(0xFFFFFFFF)
    al, ah, bl, bh = a & low, a >> u8(32), b & low, b >> u8(32)
    mid = ah * bl + ((al * bl) >> u8(32))
    other = al * bh + (mid & low)
    return ah * bh + (mid >> u8(32)) + (other >> u8(32))
