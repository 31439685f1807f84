"""Vectors kept from sweep to sweep, in memory that is taken once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Ring:
    """Vectors of one shape, handed out in turn and reused: a fresh one would cost a page fault per 4 kB at every use.

    Blocks stay outermost in memory, so that one thread works on all vectors of a block.
    """

    def __init__(self, flat: Tensor, count: int, shape: torch.Size) -> None:
        self.count = count
        blocks = shape[:-2]
        self._all = flat[: count * shape.numel()].view(*blocks, count, *shape[-2:]).movedim(len(blocks), 0)
        self._vectors = self._all.unbind(0)
        self._place = {vector.data_ptr(): k for k, vector in enumerate(self._vectors)}
        self._next = 0

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._vectors)

    def rewind(self) -> None:
        """Hand out the first vector next."""
        self._next = 0

    def take(self) -> Tensor:
        """The next vector, uninitialised."""
        vector = self._vectors[self._next]
        self._next = (self._next + 1) % len(self._vectors)
        return vector

    def from_end(self, k: int) -> Tensor:
        """The last vector in memory but ``k``."""
        return self._vectors[-1 - k]

    def last(self, count: int) -> Tensor:
        """The last ``count`` vectors in memory, as one tensor."""
        return self._all[self.count - count :]

    def together(self, vectors: list[Tensor]) -> Tensor:
        """The vectors as one tensor, a view if they lie here one after another."""
        places = [self._place.get(vector.data_ptr(), -1) for vector in vectors]
        start, end = places[0], places[0] + len(vectors)
        return self._all[start:end] if start >= 0 and places == list(range(start, end)) else torch.stack(vectors)
