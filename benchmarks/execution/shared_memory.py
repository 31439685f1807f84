"""Loads and stores of shared memory, and their checks: bounds, alignment, initialisation, races, what is under way."""

from __future__ import annotations

from typing import Any

import numpy as np

from .elements import SIZE, TYPES, bits_of, f4, f8, i8, u1
from .lanes import Lanes
from .module import Module
from .parsing import Instruction
from .pending import Cells, Filling, Reading
from .shadow import Shadow

BASE = 0x1000  # so that address 0 is none


class SharedMemory:
    """Shared memory of a group's CTAs: of each, static variables and then ``dynamic`` bytes.

    symbols: the address of each variable. size: bytes of one CTA.
    """

    def __init__(self, lanes: Lanes, module: Module, dynamic: int) -> None:
        self.lanes = lanes
        self.size = module.static_shared
        self.symbols = {name: BASE + at for name, at in module.shared.items()}
        for name, align in module.dynamic.items():
            align = max(align, 16)
            at = -(-module.static_shared // align) * align
            self.symbols[name] = BASE + at
            self.size = at + dynamic
        self._granule = module.granule
        self._stride = -(-(self.size + 16) // 1024) * 1024  # from one CTA to the next
        memory = np.full(self._stride * len(lanes.ctas), 0xFF, u1)
        self.views = {name: memory.view(kind) for name, kind in TYPES.items()}
        self._offset = (lanes.cta_of * self._stride - BASE).astype(i8)
        self._shadow = Shadow(len(memory) // self._granule, False)
        self.filling, self.reading = Filling(lanes, self._shadow), Reading(lanes, self._shadow)

    def load(self, addr: Any, kind: str, count: int, mask: Any, i: Instruction) -> list[Any]:
        """``count`` values on end from each lane's address."""
        size = SIZE[kind]
        index, lanes = self.index(addr, size * count, mask, i)
        if len(lanes) == 0:
            return [TYPES[kind](0)] * count
        self.check_read(index, lanes, size * count, i)
        view, place = self.views[kind], index // size
        values = [view[place + k] for k in range(count)]
        if len(lanes) == self.lanes.count:
            return values
        out = [np.zeros(self.lanes.count, TYPES[kind]) for _ in range(count)]
        for k in range(count):
            out[k][lanes] = values[k]
        return out

    def store(self, addr: Any, kind: str, values: list[Any], mask: Any, i: Instruction) -> None:
        """Values on end to each lane's address."""
        width = SIZE[kind] * len(values)
        index, lanes = self.index(addr, width, mask, i)
        if len(lanes):
            stacked = np.stack([self.lanes.spread(v)[lanes] for v in values], 1).astype(TYPES[kind], copy=False)
            self.write(index, lanes, width, stacked, i)

    def index(self, addr: Any, width: int, mask: Any, i: Instruction) -> tuple[np.ndarray, np.ndarray]:
        """Byte offsets within the group's shared memory, and the lanes; what lies outside is reported and left out."""
        lanes = self.lanes.numbers(mask)
        a = self.lanes.spread(addr).astype(i8)[lanes]
        if len(lanes) == 0:
            return a, lanes
        if int(np.bitwise_or.reduce(a)) & (width - 1):
            bad = a % width != 0
            self.lanes.issue("misaligned", i, f"{self.lanes.who(lanes, bad)}: shared {int(a[bad][0]):#x} for {width} bytes")
        good = self.inside(a, width)
        if not good.all():
            first = int(a[~good][0]) - BASE
            self.lanes.issue("out of bounds", i, f"{self.lanes.who(lanes, ~good)}: shared {first} of {self.size} bytes")
            a, lanes = a[good], lanes[good]
        return self.offsets(a, lanes), lanes

    def inside(self, a: np.ndarray, width: int) -> np.ndarray:
        """Which accesses lie within what a CTA has."""
        return (a >= BASE) & (a + width <= BASE + self.size)

    def offsets(self, a: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Byte offsets within the group's shared memory of addresses that lanes name."""
        return a + self._offset[lanes]

    def cells(self, index: np.ndarray, lanes: np.ndarray, width: int) -> Cells:
        """Shadow cells of accesses."""
        c, k = index // self._granule, width // self._granule
        return (c, lanes) if k <= 1 else ((c[:, None] + np.arange(k)).ravel(), np.repeat(lanes, k))

    def _place(self, c: np.ndarray, which: np.ndarray) -> int:
        """Byte of its CTA's shared memory where the first of the cells lies."""
        return int(c[which][0]) * self._granule % self._stride

    def check_read(self, index: np.ndarray, lanes: np.ndarray, width: int, i: Instruction) -> None:
        """Checks of a load."""
        c, who = self.cells(index, lanes, width)
        filled = self.filling.touched(c)
        if filled is not None:
            self.lanes.issue("pending", i, f"{self.lanes.who(who, filled)} read what a cp.async still fills")
        bad, writer = self._shadow.read(self.lanes, c, who)
        empty = writer == 0
        if empty.any():
            shown = f"shared +{self._place(c, empty)} of {self.size}"
            self.lanes.issue("uninitialised", i, f"{self.lanes.who(who, empty)}: {shown}")
        if bad is not None:
            by = self.lanes.person(int(writer[bad][0]))
            shown = f"shared +{self._place(c, bad)} written by {by} with no barrier since"
            self.lanes.issue("race in shared memory", i, f"{self.lanes.who(who, bad)} read {shown}")

    def write(self, index: np.ndarray, lanes: np.ndarray, width: int, values: np.ndarray, i: Instruction) -> None:
        """Checks of a store and the store: ``values`` (lanes, count), of which ``width`` bytes each lane."""
        c, who = self.cells(index, lanes, width)
        for under_way, does in ((self.filling, "a cp.async still fills"), (self.reading, "a wgmma still reads")):
            touched = under_way.touched(c)
            if touched is not None:
                self.lanes.issue("pending", i, f"{self.lanes.who(who, touched)} write what {does}")
        view = self.views[values.dtype.str[1:]]
        place = (index // values.dtype.itemsize)[:, None] + np.arange(values.shape[1])
        found = self._shadow.write(self.lanes, c, who)
        old = view[place] if found.after_write is not None else values
        for k in range(values.shape[1]):  # of lanes that meet, the last one's
            view[place[:, k]] = values[:, k]
        if found.met is not None:
            kind, shown = self._meeting(view[place], values, lanes)
            self.lanes.issue(kind, i, f"{self.lanes.who(who, found.met)}: shared +{self._place(c, found.met)}{shown}")
        if found.after_write is not None:
            changed = (bits_of(old) != bits_of(values)).any(1)
            differs = bool((np.repeat(changed, len(c) // len(changed)) & found.after_write).any())
            by = self.lanes.person(int(found.before[found.after_write][0]))
            shown = f"shared +{self._place(c, found.after_write)} also written by {by} with no barrier since"
            kind = "race in shared memory" if differs else "same value stored again"
            self.lanes.issue(kind, i, f"{self.lanes.who(who, found.after_write)}: {shown}")
        if found.after_read is not None:
            shown = f"shared +{self._place(c, found.after_read)}, which other lanes read with no barrier since"
            self.lanes.issue("race in shared memory", i, f"{self.lanes.who(who, found.after_read)} write {shown}")

    def _meeting(self, now: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> tuple[str, str]:
        """What it is that lanes stored to one place, and how it is shown."""
        wrong = (bits_of(now) != bits_of(values)).any(1)
        if not wrong.any():
            return "same value stored twice", ""
        shown = f": {now[wrong][0]} over {values[wrong][0]}, {self.lanes.who(lanes, wrong)}"
        kind: Any = {"f4": f4, "i4": f4, "f8": f8}.get(values.dtype.str[1:])
        if kind is not None:  # sums that lanes add up in different orders
            x, y = (np.ascontiguousarray(z[wrong]).view(kind).astype(f8) for z in (now, values))
            both = np.isnan(x) & np.isnan(y)
            x, y = np.where(both, 0.0, x), np.where(both, 0.0, y)
            apart, scale = np.abs(x - y).max(), max(np.abs(x).max(), np.abs(y).max())
            if apart <= 32 * np.finfo(kind).eps * scale:
                return "copies differ", f"{shown}, by {apart:.1e} of {scale:.1e}"
        return "race in a store", shown
