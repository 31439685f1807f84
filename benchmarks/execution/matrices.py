"""Matrices of a warp: ldmatrix, stmatrix, mma.sync."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .arithmetic import cut_tf32, widen_bf16
from .elements import WARP, f2, f4, f8, i4, i8, u2, u4
from .lanes import Lanes
from .parsing import Instruction, UnsupportedError
from .shared_memory import SharedMemory
from .warps import Warps

LANE = np.arange(WARP)
ROW, COLUMN = LANE // 4, LANE % 4
"""Which row of 8, and which of its 4 pieces, a lane holds of a fragment."""


def shape_of(name: str) -> tuple[int, int, int]:
    """Rows, columns and depth of ``m16n8k16``."""
    match = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", name)
    if match is None:
        raise UnsupportedError(f"shape {name!r}")
    rows, cols, depth = map(int, match.groups())
    return rows, cols, depth


def values_a_register(kinds: str) -> int:
    """How many values one register of a matrix operand holds."""
    return 1 if kinds in ("tf32", "f64") else 2


def fragment(lanes: Lanes, kinds: str, x: Any) -> np.ndarray:
    """(warps, 32, values of a register of a matrix operand) in float64."""
    x = np.ascontiguousarray(lanes.spread(x))
    if kinds == "f64":
        values = x
    elif kinds == "tf32":
        values = cut_tf32(x.view(u4))
    else:
        values = (widen_bf16(x.view(u2)) if kinds == "bf16" else x.view(f2)).astype(f8)
    return values.reshape(-1, WARP, values_a_register(kinds))


def rows_of_fragments(lanes: Lanes, kinds: str, registers: list[Any], rows: int, depth: int) -> np.ndarray:
    """(warps, rows, depth) in float64: the left operand, 8 or 16 rows, in the registers of a warp."""
    per, high = values_a_register(kinds), rows // 8
    A = np.zeros((lanes.count // WARP, rows, depth))
    for r, x in enumerate(registers):
        v = fragment(lanes, kinds, x)
        for h in range(per):
            A[:, ROW + 8 * (r % high), per * COLUMN + h + 4 * per * (r // high)] = v[:, :, h]
    return A


class Matrices:
    """Matrix instructions of the warps of a group."""

    def __init__(self, shared: SharedMemory, warps: Warps) -> None:
        self.lanes, self.shared, self.warps = shared.lanes, shared, warps

    def _rows(self, addr: Any, count: int, name: str, mask: Any, i: Instruction) -> np.ndarray:
        """(warps, 32): addresses of rows, of which a warp's first 8 ``count`` count."""
        self.warps.check_converged(mask, -1, i)
        a = self.lanes.spread(addr).astype(i8).reshape(-1, WARP)
        here = a[self.lanes.there(mask).reshape(-1, WARP).any(1)]
        if int(np.bitwise_or.reduce(here[:, : 8 * count].ravel())) & 15:
            self.lanes.issue("misaligned", i, f"rows of {name}")
        return a

    def load(self, addr: Any, count: int, transposed: bool, mask: Any, i: Instruction) -> list[Any]:
        """ldmatrix.m8n8 of 16-bit values."""
        a = self._rows(addr, count, "ldmatrix", mask, i)
        found = []
        for j in range(count):
            if transposed:
                low, high = (self.shared.load(at, "u2", 1, mask, i)[0].astype(u4) for at in _across(a, j))
                found.append((low | (high << u4(16))).view(i4))
            else:
                found.append(self.shared.load(_along(a, j), "i4", 1, mask, i)[0])
        return found

    def store(self, addr: Any, values: list[Any], transposed: bool, mask: Any, i: Instruction) -> None:
        """stmatrix.m8n8 of 16-bit values."""
        a = self._rows(addr, len(values), "stmatrix", mask, i)
        for j, v in enumerate(values):
            if transposed:
                pair = np.ascontiguousarray(self.lanes.spread(v)).view(u2).reshape(-1, 2)
                for k, at in enumerate(_across(a, j)):
                    self.shared.store(at, "u2", [pair[:, k]], mask, i)
            else:
                self.shared.store(_along(a, j), "i4", [v], mask, i)

    def multiply(
        self, shape: str, kinds: str, a: list[Any], b: list[Any], c: list[Any], mask: Any, i: Instruction
    ) -> list[Any]:
        """mma.sync row.col; products and sums in float64, rounded at the end."""
        self.warps.check_converged(mask, -1, i)
        rows, cols, depth = shape_of(shape)
        per = values_a_register(kinds)
        A = rows_of_fragments(self.lanes, kinds, a, rows, depth)
        B = np.zeros((self.lanes.count // WARP, depth, cols))
        for r, x in enumerate(b):
            v = fragment(self.lanes, kinds, x)
            for h in range(per):
                B[:, per * COLUMN + h + 4 * per * r, ROW] = v[:, :, h]
        D = A @ B
        kind = f8 if kinds == "f64" else f4
        found = []
        for r, x in enumerate(c):
            product = D[:, ROW + 8 * (r // 2), 2 * COLUMN + r % 2].reshape(-1)
            found.append((product + self.lanes.spread(x).astype(f8)).astype(kind))
        return found


def _along(a: np.ndarray, j: int) -> np.ndarray:
    """Where the pairs of matrix j lie that lanes hold."""
    return (a[:, 8 * j + ROW] + 4 * COLUMN).ravel()


def _across(a: np.ndarray, j: int) -> list[np.ndarray]:
    """Where the first and the second value of each pair lie of matrix j transposed."""
    return [(a[:, 8 * j + 2 * COLUMN + k] + 2 * ROW).ravel() for k in (0, 1)]
