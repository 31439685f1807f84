"""What forwards of few matrices leave to their adjoints, which then need not make the sweeps again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Within = Tensor | bool
"""The matrices (B,) of a batch that a way serves, or whether it serves all or none."""


class Recorded(NamedTuple):
    """What an adjoint goes back through, and how that is laid out: nothing of it may be decided again in a backward."""

    layout: Any
    tensors: Sequence[Tensor]


class Part(NamedTuple):
    """What a way recorded, and of which matrices that counts."""

    way: Any
    within: Within
    recorded: Recorded


class Tape(list[Part]):
    """The parts of a batch, the way of first choice first; empty where nothing was recorded."""

    def taken(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tape]]:
        """All tensors, for autograd to keep, and what makes a tape again of what it gives back for them."""
        tensors: list[Tensor] = []
        places = []
        for way, within, recorded in self:
            begin = len(tensors)
            tensors += recorded.tensors
            places.append((way, within, recorded.layout, slice(begin, len(tensors))))

        def again(kept: Sequence[Tensor]) -> Tape:
            return Tape(Part(way, within, Recorded(layout, kept[at])) for way, within, layout, at in places)

        return tensors, again
