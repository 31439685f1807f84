"""wgmma: products of a warpgroup, of matrices in shared memory described by 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import cut_tf32, widen_bf16
from .elements import WARP, f4, f8, i8
from .matrices import COLUMN, ROW, rows_of_fragments, shape_of
from .parsing import Instruction, UnsupportedError
from .shared_memory import BASE, SharedMemory
from .warps import Warps

_THREADS = 4 * WARP
_SPAN = {1: 128, 2: 64, 3: 32}  # bytes of a swizzled row, by mode


class Warpgroups:
    """The groups of four warps of a group of CTAs."""

    def __init__(self, shared: SharedMemory, warps: Warps) -> None:
        self.lanes, self.shared, self.warps = shared.lanes, shared, warps

    def multiply(
        self,
        shape: str,
        kinds: str,
        a: Any,
        b: Any,
        c: list[Any],
        keep: Any,
        across: tuple[bool, bool],
        mask: Any,
        i: Instruction,
    ) -> list[Any]:
        """wgmma.mma_async: a b, and c where ``keep``. a: registers, a list, or a descriptor; across: depth is not contiguous.

        Reads of shared memory last until they are waited for.
        """
        self.warps.check_converged(mask, -1, i)
        m = self.lanes.there(mask).reshape(-1, _THREADS)
        here = np.flatnonzero(m.any(1))
        if not m[here].all():
            self.lanes.issue("divergence", i, "a warpgroup without some of its warps")
        rows, cols, depth = shape_of(shape)
        groups = self.lanes.count // _THREADS
        if isinstance(a, list):
            A = rows_of_fragments(self.lanes, kinds, a, rows // 4, depth).reshape(groups, rows, depth)
        else:
            A = self._described(a, rows, depth, kinds, across[0], here, i)
        B = self._described(b, cols, depth, kinds, across[1], here, i)
        D = (A @ B.swapaxes(1, 2)).reshape(groups * 4, rows // 4, cols)
        found = []
        for r, x in enumerate(c):
            product = D[:, ROW + 8 * ((r // 2) % 2), 8 * (r // 4) + 2 * COLUMN + r % 2].reshape(-1)
            found.append((product + np.where(keep, self.lanes.spread(x), f4(0)).astype(f8)).astype(f4))
        return found

    def _described(
        self, desc: Any, rows: int, depth: int, kinds: str, across: bool, here: np.ndarray, i: Instruction
    ) -> np.ndarray:
        """(groups, rows, depth) in float64: a matrix in shared memory by its descriptor, of the warpgroups ``here``."""
        size = 4 if kinds == "tf32" else 2
        d = self.lanes.spread(desc).reshape(-1, _THREADS)[here, 0].astype(i8)
        a = _addresses(d, rows, depth, size, across)
        who = (here[:, None] * _THREADS + np.arange(rows * depth)[None, :] % _THREADS).ravel()
        good = self.shared.inside(a, size)
        if not good.all():
            shown = f"first {int(a[~good][0]) - BASE} of {self.shared.size}"
            self.lanes.issue("out of bounds", i, f"{int((~good).sum())} entries of a matrix, {shown}")
            a = np.where(good, a, BASE)
        index = self.shared.offsets(a, who)
        self.shared.check_read(index, who, size, i)
        self.shared.reading.add(self.shared.cells(index, who, size))
        if kinds == "tf32":
            found = cut_tf32(self.shared.views["u4"][index // 4])
        elif kinds == "bf16":
            found = widen_bf16(self.shared.views["u2"][index // 2]).astype(f8)
        else:
            found = self.shared.views["f2"][index // 2].astype(f8)
        whole = np.zeros((self.lanes.count // _THREADS, rows, depth))
        whole[here] = found.reshape(len(here), rows, depth)
        return whole


def _addresses(d: np.ndarray, rows: int, depth: int, size: int, across: bool) -> np.ndarray:
    """Where the entries of each group's matrix lie, row by row, by start, leading and stride offsets of its descriptor."""
    d = d[:, None, None]
    start, leading, stride = (((d >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    if ((d >> 49) & 7).any():
        raise UnsupportedError("base offset of a descriptor")
    swizzle = int((d.ravel()[0] >> 62) & 3)
    r, k = np.arange(rows)[None, :, None], np.arange(depth)[None, None, :]
    if swizzle == 0:
        if across:
            raise UnsupportedError("descriptor without swizzle, transposed")
        return (start + (r // 8) * stride + (k * size // 16) * leading + (r % 8) * 16 + k * size % 16).ravel()
    span = _SPAN[swizzle]
    if across:
        many = span // size
        at = start + (r // many) * leading + (k // 8) * stride + (k % 8) * span + (r % many) * size
    else:
        at = start + (r // 8) * stride + (r % 8) * span + k * size
    return (at ^ (((at >> 7) & (span // 16 - 1)) << 4)).ravel()
