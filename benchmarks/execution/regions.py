"""Global memory that a launch may touch: the exact bytes of its tensors, at their real addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .elements import TYPES, i8
from .shadow import Shadow


class Region:
    """A run of bytes. ``valid``: which of them may be touched, None for all; ``cell``: bytes to a shadow cell.

    It does not keep the memory alive.
    """

    def __init__(self, base: int, size: int, cell: int = 1, name: str = "", valid: np.ndarray | None = None) -> None:
        self.base, self.size, self.cell, self.name, self.valid = base, size, cell, name, valid
        self.end = base + size
        self.origin = base & ~15
        length = -(-(self.end - self.origin) // 16) * 16
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.origin))
        self.views = {name: self.bytes.view(kind) for name, kind in TYPES.items()}
        self.shadow = Shadow(-(-size // cell), True)


@dataclass
class _Extent:
    name: str
    tensor: torch.Tensor

    @property
    def base(self) -> int:
        return self.tensor.data_ptr()

    @property
    def item(self) -> int:
        return self.tensor.element_size()

    @property
    def size(self) -> int:
        x = self.tensor
        return (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * self.item

    @property
    def end(self) -> int:
        return self.base + self.size

    def bytes(self) -> np.ndarray:
        """Where its elements are, in bytes from its base."""
        where = np.zeros(1, i8)
        for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True):
            where = (where[:, None] + (np.arange(n) * s * self.item)[None, :]).ravel()
        return (np.unique(where)[:, None] + np.arange(self.item)).ravel()


def regions_of(tensors: Mapping[str, torch.Tensor]) -> list[Region]:
    """Regions of tensors, those that overlap merged, in the order of their addresses."""
    extents = [_Extent(name, x) for name, x in tensors.items() if x.numel()]
    groups: list[list[_Extent]] = []
    for extent in sorted(extents, key=lambda e: (e.base, -e.size)):
        if groups and extent.base < max(e.end for e in groups[-1]):
            groups[-1].append(extent)
        else:
            groups.append([extent])
    return [_region(group) for group in groups]


def _region(group: list[_Extent]) -> Region:
    base = group[0].base
    size = max(e.end for e in group) - base
    valid = None
    if not any(e.base == base and e.size == size and e.tensor.numel() * e.item == size for e in group):
        valid = np.zeros(size, bool)
        for e in group:
            valid[e.bytes() + (e.base - base)] = True
    return Region(base, size, min(e.item for e in group), "/".join(e.name for e in group), valid)
