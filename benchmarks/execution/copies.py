"""cp.async: from global to shared memory, to arrive by the time it is waited for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import i8, u1
from .global_memory import GlobalMemory
from .parsing import Instruction
from .shared_memory import SharedMemory


class AsyncCopies:
    """Copies between the memories of a group."""

    def __init__(self, memory: GlobalMemory, shared: SharedMemory) -> None:
        self.lanes, self.memory, self.shared = shared.lanes, memory, shared

    def copy(self, dst: Any, src: Any, size: int, filled: Any, mask: Any, i: Instruction) -> None:
        """``size`` bytes, all but the first ``filled`` of them zero; pending until waited for."""
        index, lanes = self.shared.index(dst, size, mask, i)
        if len(lanes) == 0:
            return
        data = np.zeros((len(lanes), size), u1)
        a = self.lanes.spread(np.asarray(src, i8))[lanes]
        some = np.full(len(lanes), size) if filled is None else self.lanes.spread(filled)[lanes]
        if int(np.bitwise_or.reduce(a[some > 0])) & (size - 1):
            self.lanes.issue("misaligned", i, f"{self.lanes.who(lanes)}: global source for {size} bytes")
        for width in map(int, np.unique(some[some > 0])):
            these = np.flatnonzero(some == width)
            for region, which in self.memory.split(a[these], lanes[these], width, i):
                rows = these if which is None else these[which]
                self.memory.check_read(region, a[rows], lanes[rows], width, i)
                data[rows[:, None], np.arange(width)] = region.bytes[(a[rows] - region.origin)[:, None] + np.arange(width)]
        self.shared.write(index, lanes, size, data, i)
        self.shared.filling.add(self.shared.cells(index, lanes, size))
