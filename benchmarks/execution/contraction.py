"""Where the compiler has joined a lane's own product to a sum across lanes, so that copies of the sum differ.

Of a sum over lanes of products p = a b it makes

    mul p, a, b;    shfl.bfly q, p;    fma s, a, b, q

with q = a' b' rounded, of the lane exchanged with, which makes fma s', a', b', p of it: the product that came is rounded and a
lane's own is not. s and s', copies of one sum, differ in the last place, and a comparison may come out either way in them.
Every other step of such a sum adds the same two numbers in both lanes. So copies agree, bit by bit, where there is no such fma.
"""

from __future__ import annotations

import re

from .module import Module
from .parsing import Instruction, split_operands

_MOVING = ("mov", "cvt", "shl", "or")  # 64 bits are exchanged as two halves


def joined(module: Module) -> list[Instruction]:
    """Those fma. Registers of Triton's are written once."""
    products: dict[str, frozenset[str]] = {}  # what a register is the product of, pairs and halves of 64 bits included
    came: dict[str, frozenset[str]] = {}  # of which own product a register holds another lane's
    found = []
    for i in module.instructions:
        out, *read = i.operands or [""]
        if i.parts[0] == "mul" and i.parts[-1] in ("f32", "f64", "f32x2"):
            products[out] = frozenset(read)
        elif i.parts[0] == "shfl" and read[0] in products:
            came[re.split(r"\|", out)[0]] = products[read[0]]
        elif i.parts[0] in _MOVING:
            for of in (products, came):
                parts = [of[name] for operand in read for name in _registers(operand) if name in of]
                of.update(dict.fromkeys(_registers(out), parts[0]) if parts else {})
        elif i.parts[0] == "fma" and came.get(read[2]) == frozenset(read[:2]):
            found.append(i)
    return found


def _registers(operand: str) -> list[str]:
    """A register, or those in braces."""
    return split_operands(operand.strip("{} "))
