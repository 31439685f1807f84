"""What the lanes of a warp do together, which all that are named must reach together."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import WARP, i4, i8, u4
from .lanes import Lanes
from .parsing import Instruction

_REDUCTIONS = {
    "max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


class Warps:
    """The warps of a group."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes

    def check_converged(self, mask: Any, members: Any, i: Instruction) -> None:
        """Whether all lanes that ``members`` names (-1: all of the warp) are there."""
        if mask is None:
            return
        m = self._by_warp(mask)
        named = self._by_warp(np.asarray(members).astype(i8) & 0xFFFFFFFF)[:, :1]
        wanted = ((named >> np.arange(WARP)) & 1).astype(bool)
        bad = m.any(1) & (wanted & ~m).any(1)
        if bad.any():
            self.lanes.issue("divergence", i, f"{int(bad.sum())} warps without all lanes of the mask")

    def _by_warp(self, x: Any) -> np.ndarray:
        return self.lanes.spread(x).reshape(-1, WARP)

    def sync(self, mask: Any, members: Any, i: Instruction) -> None:
        """bar.warp.sync."""
        self.check_converged(mask, members, i)
        self.lanes.warp_epoch[self.lanes.numbers(mask)] += 1

    def shuffle(self, mode: str, a: Any, b: Any, c: Any, members: Any, mask: Any, i: Instruction) -> tuple[Any, Any]:
        """shfl.sync: the value, and whether the source was in range."""
        self.check_converged(mask, members, i)
        lane, c = self.lanes.laneid, self.lanes.spread(c)
        b = self.lanes.spread(b) & 31
        clamp, segment = c & 31, (c >> 8) & 31
        low = lane & segment
        high = low | (clamp & ~segment)
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
        p = j >= high if mode == "up" else j <= high
        source = (self.lanes.all & ~31) + np.where(p, j, lane)
        if mask is not None:
            m = self.lanes.there(mask)
            if not m[source[m]].all():
                self.lanes.issue("divergence", i, "a shuffle reads from a lane that is not there")
        return self.lanes.spread(a)[source], p

    def vote(self, mode: str, p: Any, members: Any, mask: Any, i: Instruction) -> Any:
        """vote.sync."""
        self.check_converged(mask, members, i)
        p, here = self._by_warp(p), self._by_warp(self.lanes.there(mask))
        some, every = (p & here).any(1), (p | ~here).all(1)
        if mode == "ballot":
            found = ((p & here) * (1 << np.arange(WARP, dtype=i8))).sum(1).astype(u4).view(i4)
        else:
            found = {"any": some, "all": every, "uni": every | ~some}[mode]
        return np.repeat(found, WARP)

    def redux(self, mode: str, a: Any, members: Any, mask: Any, i: Instruction) -> Any:
        """redux.sync over whole warps."""
        self.check_converged(mask, members, i)
        a = self._by_warp(a)
        if mask is not None:
            m = self._by_warp(mask)
            neutral = np.take_along_axis(a, m.argmax(1)[:, None], 1) if mode in ("min", "max", "and", "or") else 0
            a = np.where(m, a, neutral)
        return np.repeat(_REDUCTIONS[mode].reduce(a, 1, dtype=a.dtype), WARP)
