"""Conversions between types of numbers."""

from __future__ import annotations

from ..elements import PTX_TYPE
from ..parsing import Instruction, UnsupportedError
from ..translator import Handler, Translator

_WHOLE = {"rni": "np.rint({})", "rzi": "np.trunc({})", "rmi": "np.floor({})", "rpi": "np.ceil({})"}


def _cvt(t: Translator, i: Instruction) -> None:
    to, of = i.parts[-2:]
    if len(i.operands) == 3:
        _pair(t, i)
    elif to == "tf32":
        _to_tf32(t, i)
    elif to == "bf16":
        if "relu" in i.parts or of not in ("f16", "bf16", "f32", "f64"):
            raise UnsupportedError.of(i)
        value = _source(t, i)
        t.set(i.operands[0], "i2", f"narrow_bf16({value})" if of != "f64" else f"narrow_bf16({value}.astype(f4))")
    elif to[0] == "f":
        _to_float(t, i)
    else:
        _to_integer(t, i)


def _source(t: Translator, i: Instruction) -> str:
    of = i.parts[-1]
    value = t.get(i.operands[1], "bf" if of == "bf16" else PTX_TYPE[of])
    return f"flush({value})" if of == "f32" and "ftz" in i.parts else value


def _pair(t: Translator, i: Instruction) -> None:
    """cvt.rn.f16x2.f32 d, upper, lower."""
    narrow = {"bf16x2": "narrow_bf16({})", "f16x2": "np.asarray({}).astype(f2).view(i2)"}.get(i.parts[-2])
    if narrow is None:
        raise UnsupportedError.of(i)
    upper, lower = (narrow.format(t.get(x, "f4")) for x in i.operands[1:])
    t.set(i.operands[0], "i4", f"np.stack(np.broadcast_arrays({lower}, {upper}), -1).view(i4)[..., 0]")


def _to_tf32(t: Translator, i: Instruction) -> None:
    a = t.get(i.operands[1], "u4")
    half = "u4(0x1000)" if "rna" in i.parts else f"(u4(0xFFF) + (({a} >> u4(13)) & u4(1)))"
    t.set(i.operands[0], "u4", f"W(np.isnan({a}.view(f4)), {a}, ({a} + {half}) & u4(0xFFFFE000))")


def _to_float(t: Translator, i: Instruction) -> None:
    T, value = PTX_TYPE[i.parts[-2]], _source(t, i)
    mode = next((m for m in i.parts if m in _WHOLE), None)
    if mode:
        value = _WHOLE[mode].format(value)
    expression = f"np.asarray({value}).astype({T})"
    if "sat" in i.parts:
        expression = f"np.clip({expression}, {T}(0), {T}(1))"
    if T == "f4" and "ftz" in i.parts:
        expression = f"flush({expression})"
    t.set(i.operands[0], T, expression)


def _to_integer(t: Translator, i: Instruction) -> None:
    T, value = PTX_TYPE[i.parts[-2]], _source(t, i)
    if i.parts[-1] in ("f16", "bf16", "f32", "f64"):
        mode = next((m for m in i.parts if m in _WHOLE), "rzi")
        t.set(i.operands[0], T, f"to_int({_WHOLE[mode].format(value)}, {T!r})")
    elif "sat" in i.parts:
        raise UnsupportedError.of(i)
    else:
        t.set(i.operands[0], T, f"{value}.astype({T})")


HANDLERS: dict[str, Handler] = {"cvt": _cvt}
