"""Logits of any size near 0, without a rounding of their own size: what the sweeps of every family begin with.

Potentials of large logits are large, and k x + f + g, formed one sum after the other, errs by the rounding of the largest, for
each entry its own. So each potential has a base, and bases lie on a common grid so coarse that the sum of two is exact:

    y_ij = fma(k, x_ij, G_j + F_i),   |y_ij| small wherever it matters, rounded once at its own size,

k = 1 / temperature: where that is a power of two, and y_ij not below what x_ij is a multiple of, not at all.

With h at least the largest |k x_ij|, q = max(1, h 2^-23 rounded down to a power of two): multiples of q up to 2^24 q are
exact, which G_j + F_i, near -k x_ij where y_ij is near 0, is there; elsewhere e^y is 0 anyhow. What a maximum differs from its
base by, q / 2 at most, goes into the fine part of the potential. Up to h = 2^24 bases are integers and y_ij is as exact as that
of logits near 0; beyond, it errs by 2^-25 q: 4e-6 at logits of 1e9, 5e-4 at 1e11.

Bases and maxima are in units of 2^16 nats, so that k x may reach 2^142 before it overflows: logits to the end of float32 at
any temperature above 1e-4. Sweeps are in base 2.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRET, LOG2_E

UNIT = tl.constexpr(2.0**16)
BITS = tl.constexpr(UNIT * LOG2_E)  # of base 2


@triton.jit
def spacing(largest):
    """q of h, both in units of UNIT."""
    if largest.dtype == tl.float64:
        exponent = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        q = tl.maximum(exponent - (52 << 52), (1023 - 16) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        q = tl.maximum(exponent - (23 << 23), (127 - 16) << 23).to(tl.float32, bitcast=True)
    return q


@triton.jit
def on_grid(x, q):
    """The multiple of q, a power of two, nearest to x."""
    if q.dtype == tl.float64:
        inverse = ((2046 << 52) - q.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)
    else:
        inverse = ((254 << 23) - q.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.floor(x * inverse + 0.5) * q


@triton.jit
def fused(x, y, z):
    """x y + z, rounded once: in the interpreter, whose own rounds twice, by way of float64."""
    if INTERPRET and x.dtype == tl.float32:
        total = (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        total = tl.fma(x, y, z)
    return total
