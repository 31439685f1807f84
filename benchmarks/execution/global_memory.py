"""Loads and stores of global memory, and their checks: bounds, alignment, races."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import SIZE, TYPES, bits_of, i8, u1
from .lanes import Lanes
from .parsing import Instruction
from .regions import Region
from .shadow import Conflicts


class GlobalMemory:
    """What the lanes of a group see of the regions of a launch, which come in the order of their addresses."""

    def __init__(self, lanes: Lanes, regions: list[Region]) -> None:
        self.lanes, self.regions = lanes, regions
        self._bases = np.array([r.base for r in regions], i8)
        self._ends = np.array([r.end for r in regions], i8)

    def load(self, addr: Any, kind: str, count: int, mask: Any, i: Instruction) -> list[Any]:
        """``count`` values on end from each lane's address."""
        lanes, width = self.lanes.numbers(mask), SIZE[kind] * count
        if len(lanes) == 0:
            return [TYPES[kind](0)] * count
        a = self.lanes.spread(np.asarray(addr, i8))
        a = a if mask is None else a[lanes]
        self._check_alignment(a, lanes, width, i)
        parts = self.split(a, lanes, width, i)
        if len(parts) == 1 and parts[0][1] is None and len(lanes) == self.lanes.count:
            return self._values(parts[0][0], a, lanes, kind, count, i)
        out = [np.zeros(self.lanes.count, TYPES[kind]) for _ in range(count)]
        for region, which in parts:
            aa, ll = (a, lanes) if which is None else (a[which], lanes[which])
            for k, values in enumerate(self._values(region, aa, ll, kind, count, i)):
                out[k][ll] = values
        return out

    def _values(self, region: Region, a: np.ndarray, lanes: np.ndarray, kind: str, count: int, i: Instruction) -> list[Any]:
        size = SIZE[kind]
        self.check_read(region, a, lanes, size * count, i)
        off = a - region.origin
        if _misaligned(off, size):  # reported above
            width = size * count
            raw = region.bytes[(off[:, None] + np.arange(width))].reshape(len(a), width).copy().view(TYPES[kind])
            return [raw[:, k] for k in range(count)]
        view, index = region.views[kind], off // size
        return [view[index + k] for k in range(count)]

    def store(self, addr: Any, kind: str, values: list[Any], mask: Any, i: Instruction) -> None:
        """Values on end to each lane's address."""
        lanes, width = self.lanes.numbers(mask), SIZE[kind] * len(values)
        if len(lanes) == 0:
            return
        a = self.lanes.spread(np.asarray(addr, i8))[lanes]
        values = [self.lanes.spread(v)[lanes].astype(TYPES[kind], copy=False) for v in values]
        self._check_alignment(a, lanes, width, i)
        for region, which in self.split(a, lanes, width, i):
            if which is None:
                self._store(region, a, lanes, kind, values, i)
            else:
                self._store(region, a[which], lanes[which], kind, [v[which] for v in values], i)

    def _store(self, region: Region, a: np.ndarray, lanes: np.ndarray, kind: str, values: list[Any], i: Instruction) -> None:
        size = SIZE[kind]
        self._check_gaps(region, a, lanes, size * len(values), i)
        c, who = _cells(region, a, lanes, size * len(values))
        found = region.shadow.write(self.lanes, c, who)
        off = a - region.origin
        view, index = region.views[kind], off // size
        old = [view[index + k] for k in range(len(values))] if found.after_write is not None else []
        for k, v in enumerate(values):
            if _misaligned(off, size):
                region.bytes[off[:, None] + size * k + np.arange(size)] = np.ascontiguousarray(v).view(u1).reshape(-1, size)
            else:
                view[index + k] = v
        if found.met is not None:
            differs = any((bits_of(view[index + k]) != bits_of(v)).any() for k, v in enumerate(values))
            kind = "race in a store" if differs else "same value stored twice"
            shown = f"{_place(region, c, found.met)}, met in one instruction"
            self.lanes.issue(kind, i, f"{self.lanes.who(who, found.met)}: {shown}")
        if found.after_write is not None:
            changed = np.logical_or.reduce([bits_of(o) != bits_of(v) for o, v in zip(old, values, strict=True)])
            self._report_write_after_write(region, c, who, found, changed, i)
        if found.after_read is not None:
            shown = f"{_place(region, c, found.after_read)}, which other lanes or CTAs read with no barrier since"
            self.lanes.issue("race in global memory", i, f"{self.lanes.who(who, found.after_read)} write {shown}")

    def _report_write_after_write(
        self, region: Region, c: np.ndarray, who: np.ndarray, found: Conflicts, changed: np.ndarray, i: Instruction
    ) -> None:
        """Stores of what is there already are told apart."""
        assert found.after_write is not None
        differs = bool((np.repeat(changed, len(c) // len(changed)) & found.after_write).any())
        k = int(np.flatnonzero(found.after_write)[0])
        kind = self._race(int(found.before[k]), int(who[k])) if differs else "same value stored again"
        shown = f"{_place(region, c, found.after_write)} also written by {self.lanes.person(int(found.before[k]))}"
        self.lanes.issue(kind, i, f"{self.lanes.who(who, found.after_write)}: {shown}")

    def _race(self, writer: int, lane: int) -> str:
        """What to call a race of a lane with whom the shadow names."""
        across = self.lanes.cta(writer) != self.lanes.cta(int(self.lanes.ids[lane]))
        return "race between CTAs" if across else "race in global memory"

    def split(self, a: np.ndarray, lanes: np.ndarray, width: int, i: Instruction) -> list[tuple[Region, np.ndarray | None]]:
        """Regions of accesses and which they are, None for all; accesses outside are reported and left out."""
        low, high = int(a.min()), int(a.max()) + width
        first = int(np.searchsorted(self._bases, low, "right")) - 1
        if first >= 0 and high <= self.regions[first].end:
            return [(self.regions[first], None)]
        at = np.searchsorted(self._bases, a, "right") - 1
        good = (at >= 0) & (a + width <= self._ends[np.maximum(at, 0)])
        if not good.all():
            k = int(np.flatnonzero(~good)[0])
            near = self.regions[max(int(at[k]), 0)]
            shown = f"address {int(a[k]):#x}, {int(a[k]) - near.base} bytes from {near.name} of {near.size}"
            self.lanes.issue("out of bounds", i, f"{self.lanes.who(lanes, ~good)}: {shown}")
        return [(self.regions[k], np.flatnonzero(good & (at == k))) for k in np.unique(at[good])]

    def check_read(self, region: Region, a: np.ndarray, lanes: np.ndarray, width: int, i: Instruction) -> None:
        """Gaps between elements, and races."""
        self._check_gaps(region, a, lanes, width, i)
        c, who = _cells(region, a, lanes, width)
        bad, w = region.shadow.read(self.lanes, c, who)
        if bad is not None:
            k = int(np.flatnonzero(bad)[0])
            shown = f"{_place(region, c, bad)} written by {self.lanes.person(int(w[k]))}"
            self.lanes.issue(self._race(int(w[k]), int(who[k])), i, f"{self.lanes.who(who, bad)} read {shown}")

    def _check_gaps(self, region: Region, a: np.ndarray, lanes: np.ndarray, width: int, i: Instruction) -> None:
        if region.valid is None:
            return
        off = a - region.base
        good = np.logical_and.reduce(region.valid[off[:, None] + np.arange(width)], 1)
        if not good.all():
            self.lanes.issue("out of bounds", i, f"{self.lanes.who(lanes, ~good)}: between the elements of {region.name}")

    def _check_alignment(self, a: np.ndarray, lanes: np.ndarray, width: int, i: Instruction) -> None:
        if _misaligned(a, width):
            bad = a % width != 0
            self.lanes.issue("misaligned", i, f"{self.lanes.who(lanes, bad)}: {int(a[bad][0]):#x} for {width} bytes")


def _misaligned(a: np.ndarray, width: int) -> bool:
    return bool(int(np.bitwise_or.reduce(a)) & (width - 1))


def _cells(region: Region, a: np.ndarray, lanes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Shadow cells of accesses, and whose they are."""
    c, k = (a - region.base) // region.cell, width // region.cell
    return (c, lanes) if k <= 1 else ((c[:, None] + np.arange(k)).ravel(), np.repeat(lanes, k))


def _place(region: Region, c: np.ndarray, which: np.ndarray) -> str:
    """The first of the cells, in words."""
    return f"{region.name}+{int(c[which][0]) * region.cell}"
