"""The threads of a group of CTAs ("lanes"): who they are, how many barriers each has passed, and what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import WARP, i4
from .module import Module
from .parsing import Instruction
from .report import Report


class Lanes:
    """Lanes of the CTAs ``ctas``. ids count from 1 over the whole grid; epoch: barriers passed; warp_epoch: bar.warp.sync."""

    def __init__(self, module: Module, ctas: np.ndarray, grid: int, report: Report) -> None:
        self.kernel, self.report = module.name, report
        self.threads = t = module.threads
        self.ctas = ctas
        self.count = n = len(ctas) * t
        self.all = np.arange(n)
        self.tid = np.tile(np.arange(t, dtype=i4), len(ctas))
        self.ctaid: Any = i4(ctas[0]) if len(ctas) == 1 else np.repeat(ctas.astype(i4), t)
        self.laneid, self.warpid = self.tid & i4(WARP - 1), self.tid >> i4(5)
        self.grid, self.ntid = i4(grid), i4(t)
        self.cta_of = np.repeat(np.arange(len(ctas)), t)  # within the group
        self.ids = (np.repeat(ctas, t) * t + np.tile(np.arange(t), len(ctas)) + 1).astype(i4)
        self.epoch, self.warp_epoch = np.zeros(n, i4), np.zeros(n, i4)

    def spread(self, x: Any) -> np.ndarray:
        """A value for each lane."""
        return np.broadcast_to(np.asarray(x), self.count)

    def there(self, mask: Any) -> np.ndarray:
        """Of each lane whether it is there; a mask of None means that all are."""
        return np.ones(self.count, bool) if mask is None else np.broadcast_to(mask, self.count)

    def numbers(self, mask: Any) -> np.ndarray:
        """Those that are there."""
        return self.all if mask is None else np.flatnonzero(self.there(mask))

    def cta(self, ids: Any) -> Any:
        """CTA of the grid."""
        return (ids - 1) // self.threads

    def warp(self, ids: Any) -> Any:
        """Warp of the grid."""
        return (ids - 1) // WARP

    def issue(self, kind: str, i: Instruction, detail: str) -> None:
        """Record an issue."""
        self.report.add(kind, self.kernel, i, detail)

    def who(self, lanes: np.ndarray, bad: np.ndarray | None = None) -> str:
        """The first lanes, in words."""
        ids = self.ids[lanes if bad is None else lanes[bad]]
        return f"{len(ids)} lanes, first {', '.join(self._thread(int(x)) for x in ids[:3])}"

    def person(self, number: int) -> str:
        """A shadow's writer or reader, in words."""
        return "several" if number < 0 else self._thread(number)

    def _thread(self, number: int) -> str:
        return f"cta {self.cta(number)} thread {(number - 1) % self.threads}"
