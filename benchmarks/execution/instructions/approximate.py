"""Reciprocals, roots, exponentials and logarithms, exact or ``.approx``."""

from __future__ import annotations

from functools import partial

from ..elements import PTX_TYPE
from ..parsing import Instruction
from ..translator import Handler, Translator


def _function(t: Translator, i: Instruction, exact: str) -> None:
    T = PTX_TYPE[i.parts[-1]]
    a = t.get(i.operands[1], T)
    if "approx" not in i.parts:
        t.set(i.operands[0], T, exact.format(a))
    elif T == "f8":
        t.set(i.operands[0], T, f"S.approximate.upper_half({exact.format(a)})")
    else:
        t.set(i.operands[0], T, f"S.approximate.{i.parts[0]}({a})")


def _tanh(t: Translator, i: Instruction) -> None:
    t.set(i.operands[0], "f4", f"np.tanh({t.get(i.operands[1], 'f4')})")


HANDLERS: dict[str, Handler] = {
    "rcp": partial(_function, exact="(1 / {0})"),
    "rsqrt": partial(_function, exact="(1 / np.sqrt({0}))"),
    "sqrt": partial(_function, exact="np.sqrt({0})"),
    "ex2": partial(_function, exact="np.exp2({0})"),
    "lg2": partial(_function, exact="np.log2({0})"),
    "tanh": _tanh,
}
