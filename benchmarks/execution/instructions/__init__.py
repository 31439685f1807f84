"""How each instruction is translated, by its name: a file for each kind of them."""

from __future__ import annotations

from ..translator import Handler
from . import approximate, arithmetic, bits, control, conversions, matrices, moves, predicates, warps

HANDLERS: dict[str, Handler] = {
    **control.HANDLERS,
    **moves.HANDLERS,
    **arithmetic.HANDLERS,
    **approximate.HANDLERS,
    **bits.HANDLERS,
    **predicates.HANDLERS,
    **conversions.HANDLERS,
    **warps.HANDLERS,
    **matrices.HANDLERS,
}
