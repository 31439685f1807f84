"""Branches, ends, and what has no effect here."""

from __future__ import annotations

from ..parsing import Instruction
from ..translator import Handler, Translator


def _bra(t: Translator, i: Instruction) -> None:
    target = t.module.labels[i.operands[-1]]
    if i.predicate is None:
        t.end = f"return {target}"
        return
    name, negated = i.predicate
    t.end = f"return ({'~' if negated else ''}{t.register(name, 'b1')}, {target}, {t.next})"


def _ret(t: Translator, i: Instruction) -> None:
    out = len(t.module.blocks)
    t.end = f"return {out}" if t.predicate is None else f"return ({t.predicate}, {out}, {t.next})"


def _trap(t: Translator, i: Instruction) -> None:
    t.emit(f"S.lanes.issue('trap', {t.site}, '')")


def _nothing(t: Translator, i: Instruction) -> None:
    """Orders or hurries what is in order here."""


HANDLERS: dict[str, Handler] = {
    "bra": _bra,
    "ret": _ret,
    "exit": _ret,
    "trap": _trap,
    **dict.fromkeys(("membar", "fence", "nanosleep", "prefetch", "griddepcontrol", "setmaxnreg", "discard"), _nothing),
}
