"""Products with fn, which is float32, as exact as that on tensor cores.

Where streams are bfloat16, fn is the sum of three bfloat16 pieces; else both are float32 and go to tensor cores as TF32 in two
pieces each, float16 in one.
"""

import triton
import triton.language as tl

from ..attention.tile import dot
from ..common.arithmetic import INTERPRET, narrow


@triton.jit
def kept(x):
    """x, which the compiler takes for something that it cannot make once more in another layout."""
    if INTERPRET:
        y = x
    elif x.dtype.primitive_bitwidth == 32:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=1)
    else:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=2)
    return y


@triton.jit
def exact_product(x, w):
    """x w^T to float32's accuracy, w in float32."""
    total = tl.zeros([x.shape[0], w.shape[0]], tl.float32)
    if x.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            piece = kept(narrow(w, tl.bfloat16))
            total = dot(x, tl.trans(piece), total, "ieee")
            w -= piece.to(tl.float32)
    else:
        total = dot(x.to(tl.float32), tl.trans(w), total, "tf32x3")
    return total
