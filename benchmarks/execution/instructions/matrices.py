"""Matrix instructions: ldmatrix, stmatrix, mma.sync, wgmma."""

from __future__ import annotations

import re

from ..parsing import Instruction, UnsupportedError
from ..translator import Handler, Translator, vector


def _ldmatrix(t: Translator, i: Instruction) -> None:
    dst = vector(i.operands[0])
    transposed = "trans" in i.parts
    v = t.keep(f"S.matrices.load({t.address(i.operands[1], True)}, {len(dst)}, {transposed}, {t.mask}, {t.site})")
    t.set_all(dst, "i4", v)


def _stmatrix(t: Translator, i: Instruction) -> None:
    values = _values(t, i.operands[1], "i4")
    t.emit(f"S.matrices.store({t.address(i.operands[0], True)}, {values}, {'trans' in i.parts}, {t.mask}, {t.site})")


def _values(t: Translator, operand: str, kind: str) -> str:
    return f"[{', '.join(t.get(x, kind) for x in vector(operand))}]"


def _mma(t: Translator, i: Instruction) -> None:
    shape = next(x for x in i.parts if re.fullmatch(r"m\d+n\d+k\d+", x))
    kinds = i.parts[-3]
    if kinds not in ("f16", "bf16", "tf32", "f64") or i.parts[-1] not in ("f32", "f64"):
        raise UnsupportedError.of(i)
    of, result = ("f8", "f8") if kinds == "f64" else ("i4", "f4")
    a, b, c = (_values(t, x, kind) for x, kind in zip(i.operands[1:4], (of, of, result), strict=True))
    v = t.keep(f"S.matrices.multiply({shape!r}, {kinds!r}, {a}, {b}, {c}, {t.mask}, {t.site})")
    t.set_all(vector(i.operands[0]), result, v)


def _wgmma(t: Translator, i: Instruction) -> None:
    if i.parts[1] == "fence":
        return
    if i.parts[1] == "commit_group":
        t.emit("S.shared.reading.commit()")
    elif i.parts[1] == "wait_group":
        t.emit(f"S.shared.reading.wait({int(i.operands[-1], 0)})")
    else:
        _wgmma_async(t, i)


def _wgmma_async(t: Translator, i: Instruction) -> None:
    """Operands: d, a (registers, or descriptor), b (descriptor), whether d is added to, scales, whether a and b lie across."""
    d, a, b, keep, *rest = i.operands
    if i.parts[5] != "f32" or i.parts[-1] not in ("f16", "bf16", "tf32") or any(x != "1" for x in rest[:2]):
        raise UnsupportedError.of(i)
    across = [x == "1" for x in rest[2:]]
    across = [False] * (2 - len(across)) + across
    left = _values(t, a, "i4") if a.startswith("{") else t.get(a, "u8")
    right, kept, before = t.get(b, "u8"), t.get(keep, "b1"), _values(t, d, "f4")
    operands = f"{left}, {right}, {before}, {kept}, {tuple(across)}"
    v = t.keep(f"S.warpgroups.multiply({i.parts[4]!r}, {i.parts[-1]!r}, {operands}, {t.mask}, {t.site})")
    t.set_all(vector(d), "f4", v)


HANDLERS: dict[str, Handler] = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma, "wgmma": _wgmma}
