"""Moves: between registers, to and from memory, and the asynchronous copies of cp.async."""

from __future__ import annotations

import re

from ..elements import PTX_TYPE, SIZE
from ..parsing import Instruction, UnsupportedError
from ..translator import Handler, Translator, vector


def _mov(t: Translator, i: Instruction) -> None:
    kind = PTX_TYPE[i.parts[1]]
    dst, src = i.operands
    if dst.startswith("{"):
        parts = vector(dst)
        whole = t.get(src, "i4" if kind[1] == "4" else "i8")
        part = f"i{SIZE[kind] // len(parts)}"
        view = t.keep(f"np.ascontiguousarray({whole}).reshape(-1, 1).view({part})")
        for k, name in enumerate(parts):
            t.set(name, part, f"{view}[:, {k}].copy()")
    elif src.startswith("{"):
        parts = vector(src)
        pieces = ", ".join(t.get(name, f"i{SIZE[kind] // len(parts)}") for name in parts)
        t.set(dst, kind, f"np.stack(np.broadcast_arrays({pieces}), -1).view({kind})[..., 0]")
    else:
        kind = kept_as(t, [dst], kind)
        saved, t.votes = t.votes, None  # a copy says nothing about the type
        try:
            t.set(dst, kind, t.get(src, kind))
        finally:
            t.votes = saved


def kept_as(t: Translator, operands: list[str], kind: str) -> str:
    """The type in which the first is kept, if all are registers of the width of ``kind``."""
    fit = all(t.knows(name) and SIZE[t.canon(name)] == SIZE[kind] for name in operands)
    return t.canon(operands[0]) if fit else kind


def _space(i: Instruction) -> bool:
    """Whether the memory is shared; if not, it is global."""
    shared = "shared" in i.parts or "shared::cta" in i.parts
    if not shared and "global" not in i.parts:
        raise UnsupportedError.of(i)
    return shared


def _ld(t: Translator, i: Instruction) -> None:
    kind, T = i.parts[-1], PTX_TYPE[i.parts[-1]]
    if "param" in i.parts:
        _ld_param(t, i, T)
        return
    shared, dst = _space(i), vector(i.operands[0])
    if kind[0] == "b":
        T = kept_as(t, dst, T)
    memory = "shared" if shared else "memory"
    out = t.keep(f"S.{memory}.load({t.address(i.operands[1], shared)}, {T!r}, {len(dst)}, {t.mask}, {t.site})")
    for k, name in enumerate(dst):
        if name == "_":
            continue
        canon = t.canon(name)
        if SIZE[canon] > SIZE[T]:  # sign-extended if that is what it says
            signed = kind[0] == "s"
            wide = ("i" if T[0] == "i" and signed else "u") + canon[1]
            source = f"{out}[{k}]" if T[0] != "i" or signed else f"{out}[{k}].view(u{T[1]})"
            t.set(name, wide, f"{source}.astype({wide})")
        else:
            t.set(name, T, f"{out}[{k}]")


def _ld_param(t: Translator, i: Instruction, T: str) -> None:
    dst, src = i.operands
    match = re.fullmatch(r"\[([\w$]+)\]", src.strip())
    if match is None:  # its address was taken
        t.set(dst, T, f"S.load_param({t.address(src, False)}, {T!r})")
    else:
        T = kept_as(t, [dst], T)
        t.set(dst, T, f"S.values[{match.group(1)!r}].view({T})")


def _st(t: Translator, i: Instruction) -> None:
    shared, kind, T = _space(i), i.parts[-1], PTX_TYPE[i.parts[-1]]
    src = vector(i.operands[1])
    registers = [name for name in src if t.knows(name)]
    if kind[0] == "b" and registers:
        T = kept_as(t, registers[:1], T)
    values = ", ".join(t.get(name, T) for name in src)
    memory = "shared" if shared else "memory"
    t.emit(f"S.{memory}.store({t.address(i.operands[0], shared)}, {T!r}, [{values}], {t.mask}, {t.site})")


def _cvta(t: Translator, i: Instruction) -> None:
    t.set(i.operands[0], "i8", t.get(i.operands[1], "i8"))


def _cp(t: Translator, i: Instruction) -> None:
    if i.parts[1] != "async" or i.parts[2] == "bulk":
        raise UnsupportedError.of(i)
    if i.parts[2] == "wait_all":
        t.emit(f"S.shared.filling.wait(None, {t.mask})")
    elif i.parts[2] == "wait_group":
        t.emit(f"S.shared.filling.wait({int(i.operands[0], 0)}, {t.mask})")
    elif i.parts[2] == "commit_group":
        t.emit(f"S.shared.filling.commit({t.mask})")
    else:
        filled = t.get(i.operands[3], "i4") if len(i.operands) > 3 and "L2::cache_hint" not in i.parts else "None"
        t.emit(
            f"S.copies.copy({t.address(i.operands[0], True)}, {t.address(i.operands[1], False)}, "
            f"{int(i.operands[2], 0)}, {filled}, {t.mask}, {t.site})"
        )


HANDLERS: dict[str, Handler] = {"mov": _mov, "ld": _ld, "st": _st, "cvta": _cvta, "cp": _cp}
