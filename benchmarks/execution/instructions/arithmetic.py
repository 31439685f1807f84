"""Sums, products, quotients and extremes, of numbers and of packed pairs of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..elements import PACKED, PTX_TYPE, SIZE
from ..parsing import Instruction
from ..translator import Handler, Translator


def _add(t: Translator, i: Instruction, symbol: str) -> None:
    kind = i.parts[-1]
    if kind in PACKED:
        _packed(t, i, lambda a, b: f"({a} {symbol} {b})")
        return
    T = PTX_TYPE[kind]
    if T[0] == "u":
        T = "i" + T[1]
    a, b = (t.get(x, T) for x in i.operands[1:3])
    if _contracts(t, i):
        _add_contracted(t, i, symbol)
        return
    expression = f"{a} {symbol} {b}"
    if "ftz" in i.parts:
        expression = f"flush(flush({a}) {symbol} flush({b}))"
    if "sat" in i.parts:
        expression = f"np.clip({expression}, f4(0), f4(1))"
    t.set(i.operands[0], T, expression)


def _contracts(t: Translator, i: Instruction) -> bool:
    return t.module.contract and i.parts[1:] == ["f32"]


def _add_contracted(t: Translator, i: Instruction, symbol: str) -> None:
    """A sum or difference of float32, of exact products where there are any; a product that is put aside as one."""
    dst, *src = i.operands
    a, b = (t.get(x, "f4") for x in src)
    if symbol == "*":
        left, right = (t.get(x, "w8") for x in src)
        t.set(dst, "f4", f"{a} * {b}")
        if t.module.uses[dst] == 1 and t.predicate is None:
            t.factors[dst] = f"{left} * {right}"
        return
    x, y = (t.factors.get(name) for name in src)
    expression = f"{a} {symbol} {b}"
    if x:
        expression = f"({x} {symbol} {t.get(src[1], 'w8')}).astype(f4)"
    elif y:
        expression = f"({t.get(src[0], 'w8')} {symbol} {y}).astype(f4)"
    t.set(dst, "f4", expression)


def _packed(t: Translator, i: Instruction, make: Callable[..., str]) -> None:
    """Arithmetic of bfloat16, or pairs: in float32, rounded."""
    kind, src = i.parts[-1], i.operands[1:]
    if kind == "bf16":
        t.set(i.operands[0], "i2", f"narrow_bf16({make(*(t.get(x, 'bf') for x in src))})")
        return
    view = {"f32x2": "{}.view(f4)", "bf16x2": "widen_bf16({}.view(u2))", "f16x2": "{}.view(f2).astype(f4)"}[kind]
    names = []
    for x in src:
        whole = f"np.ascontiguousarray({t.get(x, 'i8' if kind == 'f32x2' else 'i4')}).reshape(-1, 1)"
        names.append(t.keep(view.format(whole)))
    result = make(*names)
    if kind == "f32x2":
        t.set(i.operands[0], "i8", f"np.ascontiguousarray({result}).view(i8)[:, 0]")
        return
    result = f"narrow_bf16({result})" if kind == "bf16x2" else f"({result}).astype(f2)"
    t.set(i.operands[0], "i4", f"{result}.view(i4)[:, 0]")


def _mul(t: Translator, i: Instruction) -> None:
    kind = i.parts[-1]
    if kind[0] in "fb" or kind in PACKED:
        _add(t, i, "*")
    else:
        t.set(i.operands[0], *_product(t, PTX_TYPE[kind], i.parts[1], *i.operands[1:3]))


def _product(t: Translator, T: str, mode: str, x: str, y: str) -> tuple[str, str]:
    """Type and expression of an integer product: its lower or upper half, or all of it."""
    if mode == "lo":
        T = "i" + T[1]
        return T, f"({t.get(x, T)} * {t.get(y, T)})"
    a, b = t.get(x, T), t.get(y, T)
    if T[1] == "8" and mode == "hi":
        if T == "u8":
            return "u8", f"mul_hi8({a}, {b})"
        return "i8", f"(mul_hi8({a}, {b}).view(i8) - W({a} < 0, {b}, i8(0)) - W({b} < 0, {a}, i8(0)))"
    wide = {"2": "4", "4": "8"}[T[1]]
    product = f"({a}.astype({T[0]}{wide}) * {b}.astype({T[0]}{wide}))"
    if mode == "wide":
        return f"i{wide}", product if T[0] == "i" else f"{product}.view(i{wide})"
    return T, f"({product} >> {T[0]}{wide}({8 * SIZE[T]})).astype({T})"


def _mad(t: Translator, i: Instruction) -> None:
    T, product = _product(t, PTX_TYPE[i.parts[-1]], i.parts[1], *i.operands[1:3])
    if T[0] == "u":
        T, product = "i" + T[1], f"{product}.view(i{T[1]})"
    t.set(i.operands[0], T, f"{product} + {t.get(i.operands[3], T)}")


def _fma(t: Translator, i: Instruction) -> None:
    kind, dst = i.parts[-1], i.operands[0]
    if kind == "f32" and "ftz" in i.parts:
        a, b, c = (f"flush({t.get(x, 'f4')}).astype(f8)" for x in i.operands[1:])
        t.set(dst, "f4", f"flush(({a} * {b} + {c}).astype(f4))")
    elif kind == "f32":
        a, b, c = (t.get(x, "w8") for x in i.operands[1:])
        t.set(dst, "f4", f"({a} * {b} + {c}).astype(f4)")
    elif kind == "f64":
        a, b, c = (t.get(x, "f8") for x in i.operands[1:])
        t.set(dst, "f8", f"fma8({a}, {b}, {c})")
    elif kind == "f16":
        a, b, c = (f"{t.get(x, 'f2')}.astype(f8)" for x in i.operands[1:])
        t.set(dst, "f2", f"({a} * {b} + {c}).astype(f2)")
    else:
        _packed(t, i, lambda a, b, c: f"({a}.astype(f8) * {b}.astype(f8) + {c}.astype(f8)).astype(f4)")


def _sign(t: Translator, i: Instruction, form: str) -> None:
    """neg and abs."""
    kind = i.parts[-1]
    if kind in PACKED:
        _packed(t, i, form.format)
    else:
        T = PTX_TYPE[kind]
        t.set(i.operands[0], T, form.format(t.get(i.operands[1], T)))


def _extreme(t: Translator, i: Instruction, which: str) -> None:
    kind = i.parts[-1]
    number = f"np.f{which}"  # of a number and NaN, the number
    if "NaN" in i.parts or (kind not in PACKED and PTX_TYPE[kind][0] != "f"):
        number = f"np.{which}imum"
    if kind in PACKED:
        _packed(t, i, lambda a, b: f"{number}({a}, {b})")
        return
    T = PTX_TYPE[kind]
    expression = f"{number}({t.get(i.operands[1], T)}, {t.get(i.operands[2], T)})"
    if len(i.operands) > 3:
        expression = f"{number}({expression}, {t.get(i.operands[3], T)})"
    t.set(i.operands[0], T, expression)


def _div(t: Translator, i: Instruction) -> None:
    T = PTX_TYPE[i.parts[-1]]
    a, b = t.get(i.operands[1], T), t.get(i.operands[2], T)
    if "full" in i.parts or "approx" in i.parts:
        t.set(i.operands[0], T, f"S.approximate.div({a}, {b})")
    elif T[0] == "f":
        t.set(i.operands[0], T, f"{a} / {b}")
    elif T[0] == "u":
        t.set(i.operands[0], T, f"{a} // {b}")
    else:
        t.set(i.operands[0], T, f"({a} - np.fmod({a}, {b})) // {b}")


def _rem(t: Translator, i: Instruction) -> None:
    T = PTX_TYPE[i.parts[-1]]
    t.set(i.operands[0], T, f"np.fmod({t.get(i.operands[1], T)}, {t.get(i.operands[2], T)})")


HANDLERS: dict[str, Handler] = {
    "add": partial(_add, symbol="+"),
    "sub": partial(_add, symbol="-"),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "neg": partial(_sign, form="(-{})"),
    "abs": partial(_sign, form="np.abs({})"),
    "max": partial(_extreme, which="max"),
    "min": partial(_extreme, which="min"),
    "div": _div,
    "rem": _rem,
}
