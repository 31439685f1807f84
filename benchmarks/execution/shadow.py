"""Shadow memory: races between lanes, seen by who touched each cell last, and when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .elements import WARP, i4
from .lanes import Lanes


@dataclass
class Conflicts:
    """Of a store, for each cell: before: who wrote it last; which race with a write and with a read, and which met another
    of the same instruction (None: none)."""

    before: np.ndarray
    after_write: np.ndarray | None
    after_read: np.ndarray | None
    met: np.ndarray | None


class Shadow:
    """Who wrote and read each cell last, and at which barrier of the CTA. Lanes count from 1; 0 is nobody, -1 several.

    crossing: whether several CTAs may meet, as they do in global memory, where nothing orders them.
    """

    def __init__(self, cells: int, crossing: bool) -> None:
        self.writer, self.reader = np.zeros(cells, i4), np.zeros(cells, i4)
        self.written, self.seen = np.full(cells, -1, i4), np.full(cells, -1, i4)
        self.warp_written = np.zeros(cells, i4)
        self.crossing = crossing
        self.reading_cta = np.zeros(cells if crossing else 0, i4)

    def read(self, lanes: Lanes, c: np.ndarray, who: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Which accesses to cells ``c`` by ``who`` race with a write, None if none does, and who wrote each cell."""
        me, epoch = lanes.ids[who], lanes.epoch[who]
        w = self.writer[c]
        bad = self._after_write(lanes, c, who)
        r = self.reader[c]
        new = np.where((self.seen[c] != epoch) | (r == me) | (r == 0), me, -1)
        if self.crossing:
            cta = lanes.cta(me) + 1
            rc = self.reading_cta[c]
            self.reading_cta[c] = np.where((rc == 0) | (rc == cta), cta, -1)
            twice = self.reading_cta[c] != cta
            self.reading_cta[c[twice]] = -1
        self.reader[c] = new
        self.seen[c] = epoch
        twice = self.reader[c] != new
        self.reader[c[twice]] = -1
        return bad, w

    def write(self, lanes: Lanes, c: np.ndarray, who: np.ndarray) -> Conflicts:
        """The same of a store."""
        me, epoch = lanes.ids[who], lanes.epoch[who]
        before = self.writer[c]
        after_write = self._after_write(lanes, c, who)
        after_read = self._after_read(lanes, c, who)
        self.writer[c], self.written[c], self.warp_written[c] = me, epoch, lanes.warp_epoch[who]
        met = self.writer[c] != me
        return Conflicts(before, after_write, after_read, met if met.any() else None)

    def _after_write(self, lanes: Lanes, c: np.ndarray, who: np.ndarray) -> np.ndarray | None:
        """Accesses to what another lane wrote with no barrier since."""
        me, w = lanes.ids[who], self.writer[c]
        other = (w != me) & (w != 0)
        if not other.any():
            return None
        conflict = other & (self.written[c] >= lanes.epoch[who])
        if self.crossing:
            same = lanes.cta(w) == lanes.cta(me)
            conflict = (conflict & same) | (other & ~same)
        if conflict.any():
            conflict &= ~((lanes.warp(w) == lanes.warp(me)) & (self.warp_written[c] < lanes.warp_epoch[who]))
        return conflict if conflict.any() else None

    def _after_read(self, lanes: Lanes, c: np.ndarray, who: np.ndarray) -> np.ndarray | None:
        """Stores to what another lane read with no barrier since."""
        me, r = lanes.ids[who], self.reader[c]
        other = (r != me) & (r != 0) & (self.seen[c] >= lanes.epoch[who])
        if self.crossing:
            rc, cta = self.reading_cta[c], lanes.cta(me) + 1
            other = (other & (rc == cta)) | ((rc != 0) & (rc != cta))
        # several lanes of one warp, ordered by bar.warp.sync, are not told apart; with one warp there is nobody else
        alone = lanes.threads == WARP
        if other.any() and (alone or bool((lanes.warp_epoch > 0).any())):
            other &= ~((lanes.warp(r) == lanes.warp(me)) | ((r == -1) & alone & (lanes.warp_epoch[who] > 0)))
        return other if other.any() else None
