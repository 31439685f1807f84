"""What the lanes of a warp do together: barriers, shuffles, votes, reductions."""

from __future__ import annotations

from ..elements import PTX_TYPE
from ..parsing import Instruction
from ..translator import Handler, Translator


def _bar(t: Translator, i: Instruction) -> None:
    """bar.warp.sync; the barriers of CTAs are blocks of their own."""
    t.emit(f"S.warps.sync({t.mask}, {t.get(i.operands[0], 'i4')}, {t.site})")


def _shfl(t: Translator, i: Instruction) -> None:
    dst = i.operands[0].split("|")
    T = t.canon(dst[0]) if t.knows(dst[0]) else "i4"
    a = t.get(i.operands[1], T)
    b, c, members = (t.get(x, "i4") for x in i.operands[2:])
    v = t.keep(f"S.warps.shuffle({i.parts[2]!r}, {a}, {b}, {c}, {members}, {t.mask}, {t.site})")
    t.set(dst[0], T, f"{v}[0]")
    if len(dst) > 1:
        t.set(dst[1], "b1", f"{v}[1]")


def _vote(t: Translator, i: Instruction) -> None:
    p, members = t.get(i.operands[1], "b1"), t.get(i.operands[2], "i4")
    T = "i4" if i.parts[2] == "ballot" else "b1"
    t.set(i.operands[0], T, f"S.warps.vote({i.parts[2]!r}, {p}, {members}, {t.mask}, {t.site})")


def _redux(t: Translator, i: Instruction) -> None:
    T = PTX_TYPE[i.parts[-1]]
    a, members = t.get(i.operands[1], T), t.get(i.operands[2], "i4")
    t.set(i.operands[0], T, f"S.warps.redux({i.parts[2]!r}, {a}, {members}, {t.mask}, {t.site})")


def _elect(t: Translator, i: Instruction) -> None:
    t.set(i.operands[0].split("|")[-1], "b1", "(S.lanes.laneid == 0)")


HANDLERS: dict[str, Handler] = {"bar": _bar, "shfl": _shfl, "vote": _vote, "redux": _redux, "elect": _elect}
