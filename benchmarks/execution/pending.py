"""Shared memory under way: what a cp.async still fills, what a wgmma still reads, until it is waited for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import i4
from .lanes import Lanes
from .shadow import Shadow

Cells = tuple[np.ndarray, np.ndarray]
"""Shadow cells, and the lanes whose they are."""


class Filling:
    """Copies of cp.async. What arrives counts as written when it is waited for, by the lane that waits."""

    def __init__(self, lanes: Lanes, shadow: Shadow) -> None:
        self._lanes, self._shadow = lanes, shadow
        self._copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # cells, lanes, and the group of each
        self._cells = np.zeros(len(shadow.writer), bool)
        self._group = np.zeros(lanes.count, i4)  # committed by each lane

    def add(self, cells: Cells) -> None:
        """Begin a copy."""
        c, who = cells
        self._copies.append((c, who, self._group[who].copy()))
        self._cells[c] = True

    def touched(self, c: np.ndarray) -> np.ndarray | None:
        """Which cells are still filled; None if none is."""
        touched = self._cells[c] if self._copies else None
        return touched if touched is not None and touched.any() else None

    def commit(self, mask: Any) -> None:
        """cp.async.commit_group."""
        self._group[self._lanes.numbers(mask)] += 1

    def wait(self, left: int | None, mask: Any) -> None:
        """cp.async.wait_group ``left``, or, with None, wait_all."""
        here = self._lanes.there(mask)
        kept = []
        for c, who, group in self._copies:
            done = here[who]
            if left is not None:
                done = done & (group < self._group[who] - left)
            self._cells[c[done]] = False
            self._shadow.written[c[done]] = self._lanes.epoch[who[done]]
            if not done.all():
                kept.append((c[~done], who[~done], group[~done]))
        self._copies = kept
        for c, _, _ in kept:
            self._cells[c] = True


class Reading:
    """Matrices that wgmma reads."""

    def __init__(self, lanes: Lanes, shadow: Shadow) -> None:
        self._lanes, self._shadow = lanes, shadow
        self._open: list[Cells] = []  # not committed
        self._groups: list[list[Cells]] = []
        self._cells = np.zeros(len(shadow.writer), bool)

    def add(self, cells: Cells) -> None:
        """Begin to read."""
        self._open.append(cells)
        self._cells[cells[0]] = True

    def touched(self, c: np.ndarray) -> np.ndarray | None:
        """Which cells are still read; None if none is."""
        touched = self._cells[c] if self._open or self._groups else None
        return touched if touched is not None and touched.any() else None

    def commit(self) -> None:
        """wgmma.commit_group."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, left: int) -> None:
        """wgmma.wait_group: reads of all but the last ``left`` groups end now."""
        kept = max(len(self._groups) - left, 0)
        done, self._groups = self._groups[:kept], self._groups[kept:]
        for c, who in (cells for group in done for cells in group):
            self._cells[c] = False
            self._shadow.reader[c] = -1
            self._shadow.seen[c] = self._lanes.epoch[who]
        for c, _ in (cells for group in [*self._groups, self._open] for cells in group):
            self._cells[c] = True
