"""Bits: logic, shifts, counts, fields, permutations of bytes."""

from __future__ import annotations

import re
from functools import partial

from ..elements import PTX_TYPE, SIZE
from ..parsing import Instruction, UnsupportedError
from ..translator import Handler, Translator


def _logic(t: Translator, i: Instruction, symbol: str) -> None:
    T = PTX_TYPE[i.parts[-1]]
    t.set(i.operands[0], T, f"{t.get(i.operands[1], T)} {symbol} {t.get(i.operands[2], T)}")


def _not(t: Translator, i: Instruction) -> None:
    T = PTX_TYPE[i.parts[-1]]
    t.set(i.operands[0], T, f"~{t.get(i.operands[1], T)}")


def _shift(t: Translator, i: Instruction, symbol: str) -> None:
    kind = i.parts[-1]
    if symbol == ">>":
        kind = kind.replace("b", "u")  # zeros come in
    T = PTX_TYPE[kind]
    bits = 8 * SIZE[T]
    keeps_sign = T[0] == "i" and symbol == ">>"
    dst, a, by = i.operands[0], t.get(i.operands[1], T), i.operands[2]
    if t.knows(by):
        by = t.get(by, "u4")
        shifted = f"{a} {symbol} np.minimum({by}, u4({bits - 1})).astype({T})"
        t.set(dst, T, shifted if keeps_sign else f"W({by} < u4({bits}), {shifted}, {T}(0))")
    else:
        count = min(int(by, 0), bits - 1 if keeps_sign else bits)
        t.set(dst, T, f"{a} {symbol} {T}({count})" if count < bits else f"{a} & {T}(0)")


def _popc(t: Translator, i: Instruction) -> None:
    T = f"u{SIZE[PTX_TYPE[i.parts[-1]]]}"
    t.set(i.operands[0], "i4", f"np.bitwise_count({t.get(i.operands[1], T)}).astype(i4)")


def _clz(t: Translator, i: Instruction) -> None:
    a = t.get(i.operands[1], "u4")
    t.set(i.operands[0], "i4", f"W({a} == 0, 32, 31 - np.floor(np.log2(np.maximum({a}, u4(1)).astype(f8)))).astype(i4)")


def _bfe(t: Translator, i: Instruction) -> None:
    T, dst = PTX_TYPE[i.parts[-1]], i.operands[0]
    if T == "i4" and all(re.fullmatch(r"\d+", x) for x in i.operands[2:]):
        at, length = map(int, i.operands[2:])
        if length == 0 or at + length > 32:
            raise UnsupportedError.of(i)
        t.set(dst, T, f"({t.get(i.operands[1], T)} << i4({32 - at - length})) >> i4({32 - length})")
        return
    if T != "u4":
        raise UnsupportedError.of(i)
    a = f"{t.get(i.operands[1], 'u4')}.astype(u8)"
    first, many = _field(t, i.operands[2:])
    t.set(dst, T, f"(({a} >> np.minimum({first}, u8(63))) & ((u8(1) << np.minimum({many}, u8(32))) - u8(1))).astype(u4)")


def _bfi(t: Translator, i: Instruction) -> None:
    a, b = (f"{t.get(x, 'u4')}.astype(u8)" for x in i.operands[1:3])
    first, many = _field(t, i.operands[3:])
    at = f"np.minimum({first}, u8(32))"
    m = t.keep(f"(((u8(1) << np.minimum({many}, u8(32))) - u8(1)) << {at}) & u8(0xFFFFFFFF)")
    t.set(i.operands[0], "u4", f"((({a} << {at}) & {m}) | ({b} & ~{m})).astype(u4)")


def _field(t: Translator, operands: list[str]) -> list[str]:
    """First bit and number of bits, of which 8 bits count."""
    return [f"({t.get(x, 'u4')} & u4(255)).astype(u8)" for x in operands]


def _prmt(t: Translator, i: Instruction) -> None:
    if len(i.parts) > 2:
        raise UnsupportedError.of(i)
    a, b, s = (t.get(x, "u4") for x in i.operands[1:])
    both = t.keep(f"{a}.astype(u8) | ({b}.astype(u8) << u8(32))")
    out = t.keep("u8(0)")
    for k in range(4):
        pick = t.keep(f"(({s} >> u4({4 * k})) & u4(15)).astype(u8)")
        byte = t.keep(f"({both} >> (({pick} & u8(7)) * u8(8))) & u8(255)")
        byte = t.keep(f"W(({pick} & u8(8)) != 0, W({byte} >= 128, u8(255), u8(0)), {byte})")
        out = t.keep(f"{out} | ({byte} << u8({8 * k}))")
    t.set(i.operands[0], "u4", f"{out}.astype(u4)")


def _lop3(t: Translator, i: Instruction) -> None:
    operands = [t.get(x, "i4") for x in i.operands[1:4]]
    table = int(i.operands[4], 0)
    terms = []
    for k in range(8):
        if table >> k & 1:
            terms.append("(" + " & ".join(x if k & bit else f"~{x}" for x, bit in zip(operands, (4, 2, 1), strict=True)) + ")")
    t.set(i.operands[0], "i4", " | ".join(terms) or f"{operands[0]} & i4(0)")


def _shf(t: Translator, i: Instruction) -> None:
    a, b = (f"{t.get(x, 'u4')}.astype(u8)" for x in i.operands[1:3])
    c = t.get(i.operands[3], "u4")
    n = f"({c} & u4(31)).astype(u8)" if "wrap" in i.parts else f"np.minimum({c}, u4(32)).astype(u8)"
    both = f"({a} | ({b} << u8(32)))"
    t.set(
        i.operands[0], "u4", f"({both} >> {n}).astype(u4)" if i.parts[1] == "r" else f"(({both} << {n}) >> u8(32)).astype(u4)"
    )


HANDLERS: dict[str, Handler] = {
    "and": partial(_logic, symbol="&"),
    "or": partial(_logic, symbol="|"),
    "xor": partial(_logic, symbol="^"),
    "not": _not,
    "shl": partial(_shift, symbol="<<"),
    "shr": partial(_shift, symbol=">>"),
    "popc": _popc,
    "clz": _clz,
    "bfe": _bfe,
    "bfi": _bfi,
    "prmt": _prmt,
    "lop3": _lop3,
    "shf": _shf,
}
