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
def pieces_of(w, dtype: tl.constexpr):
    """What float32 w is multiplied as where the other factor is of this dtype."""
    if dtype == tl.bfloat16:
        pieces = []
        for _ in tl.static_range(3):
            piece = kept(narrow(w, tl.bfloat16))
            pieces = pieces + [piece]
            w -= piece.to(tl.float32)
    else:
        pieces = [w]
    return pieces


@triton.jit
def product_of_pieces(x, pieces):
    """x w^T to float32's accuracy, w in its :func:`pieces_of` the dtype of x."""
    total = tl.zeros([x.shape[0], pieces[0].shape[0]], tl.float32)
    if x.dtype == tl.bfloat16:
        for place in tl.static_range(3):
            total = dot(x, tl.trans(pieces[place]), total, "ieee")
    else:
        total = dot(x.to(tl.float32), tl.trans(pieces[0]), total, "tf32x3")
    return total


@triton.jit
def exact_product(x, w):
    """x w^T to float32's accuracy, w in float32."""
    return product_of_pieces(x, pieces_of(w, x.dtype))
