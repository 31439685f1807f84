"""What mHC layers do to their streams, layer by layer: spectra of the mixes and of their product over depth, and likeness.

A mix M is what streams are multiplied by, [new, old]: H of the layer, or H^T where it is transposed. Over depth streams go
through M_l ... M_1, whose second singular value says how much of their differences is left, and the last whether any is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .arriving import Arriving
from .distance import distance_to_identity, distance_to_uniform


class StreamRow(NamedTuple):
    """One mHC layer at one step, means over the tokens sampled there.

    singular_values: of the mix, from the second on, descending (the first is 1 or nearly so); through_depth: those of the
    product of all mixes up to this layer's. cosine: of two streams that come in, mean over their pairs; NaN of one stream.
    to_identity, to_uniform: distances of the mix, as in :class:`fastdsm.diagnostics.Row`.
    """

    step: int
    layer: str
    singular_values: tuple[float, ...]
    through_depth: tuple[float, ...]
    cosine: float
    to_identity: float
    to_uniform: float


class Mixed(NamedTuple):
    """A layer's mixes M (S, n, n) and the cosine of its streams, of the tokens sampled."""

    layer: str
    mixes: Tensor
    cosine: Tensor


@torch.no_grad()
def cosine_of(streams: Tensor) -> Tensor:
    """Mean cosine over the pairs of different streams (..., n, C), and over all tokens; NaN for one stream."""
    x = torch.nn.functional.normalize(streams.float(), dim=-1)
    n = x.shape[-2]
    if n == 1:
        return x.new_full((), torch.nan)
    together = x.sum(-2).square().sum(-1) - x.square().sum((-2, -1))
    return together.mean() / (n * (n - 1))


@dataclass(frozen=True)
class PendingStreams:
    """Layers of one step, in the order of their calls, their mixes and cosines on their way to the host."""

    step: int
    names: list[str]
    measured: Arriving

    @classmethod
    def of(cls, step: int, layers: list[Mixed]) -> PendingStreams:
        """Start the copy."""
        return cls(step, [x.layer for x in layers], Arriving.of([*(x.mixes for x in layers), *(x.cosine for x in layers)]))

    @property
    def arrived(self) -> bool:
        """Whether the host may read, without waiting."""
        return self.measured.arrived

    @torch.no_grad()
    def rows(self) -> list[StreamRow]:
        """The rows; waits for the copy if need be. The product over depth begins anew where there are other tokens."""
        tensors, count = self.measured.tensors(), len(self.names)
        rows, product = [], None
        for layer, mixes, cosine in zip(self.names, tensors[:count], tensors[count:], strict=True):
            mixes = mixes.double()
            product = mixes if product is None or product.shape != mixes.shape else mixes @ product
            own, through = (torch.linalg.svdvals(x).mean(0)[1:].tolist() for x in (mixes, product))
            distances = (f(mixes).mean().item() for f in (distance_to_identity, distance_to_uniform))
            rows.append(StreamRow(self.step, layer, tuple(own), tuple(through), cosine.item(), *distances))
        return rows
