"""Comparisons, and selections by what they found."""

from __future__ import annotations

from ..elements import PTX_TYPE
from ..parsing import Instruction
from ..translator import Handler, Translator
from .moves import kept_as

_COMPARISON = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_JOINING = {"and": "&", "or": "|", "xor": "^"}
_FLOATING = {  # what NaN makes true, and what not
    "num": "(({a} == {a}) & ({b} == {b}))",
    "nan": "~(({a} == {a}) & ({b} == {b}))",
    "ne": "(({a} < {b}) | ({a} > {b}))",
    "neu": "({a} != {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
}


def _selp(t: Translator, i: Instruction) -> None:
    T, dst = PTX_TYPE[i.parts[-1]], i.operands[0]
    if i.parts[-1][0] == "b":
        T = kept_as(t, [dst], T)
    t.set(dst, T, f"W({t.get(i.operands[3], 'b1')}, {t.get(i.operands[1], T)}, {t.get(i.operands[2], T)})")


def _compared(comparison: str, a: str, b: str, floating: bool) -> str:
    if floating and comparison in _FLOATING:
        return _FLOATING[comparison].format(a=a, b=b)
    return f"({a} {_COMPARISON[comparison]} {b})"


def _setp(t: Translator, i: Instruction) -> None:
    comparison, kind = i.parts[1], i.parts[-1]
    dst = i.operands[0].split("|")
    if kind in ("f16x2", "bf16x2"):
        view = "widen_bf16({}.view(u2))" if kind == "bf16x2" else "{}.view(f2)"
        wholes = [f"np.ascontiguousarray({t.get(x, 'i4')}).reshape(-1, 1)" for x in i.operands[1:3]]
        a, b = [t.keep(view.format(whole)) for whole in wholes]
        for k, name in enumerate(dst):
            t.set(name, "b1", _compared(comparison, f"{a}[:, {k}]", f"{b}[:, {k}]", True))
        return
    T = "bf" if kind == "bf16" else PTX_TYPE[kind]
    a, b = t.get(i.operands[1], T), t.get(i.operands[2], T)
    found = t.keep(_compared(comparison, a, b, T[0] == "f" or T == "bf"))
    if dst[0] in t.module.deciding and T in ("f4", "f8"):
        t.emit(f"S.check_condition({a}, {b}, m, {t.site})")
    joined = next((x for x in i.parts[2:-1] if x in _JOINING), None)
    joins = f" {_JOINING[joined]} {t.get(i.operands[3], 'b1')}" if joined else ""
    for name, form in zip(dst, (found, f"(~{found})"), strict=False):
        t.set(name, "b1", form + joins)


HANDLERS: dict[str, Handler] = {"selp": _selp, "setp": _setp}
