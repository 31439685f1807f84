"""Potentials as the passes of streamed attention see them: a base, and what has been added to it.

Passes form their exponents in a unit (1, or ln 2 where exp is 2^x): each part of a potential is divided by it and rounded
before it is added, so that a potential *counts* as a number next to the exact one, which would have given its lines their
mass. Sums are those of potentials as counted: the sweeps go on from these, and the adjoint divides by the sums that lines
really have, exp(counted - exact) of their mass. With logits of hundreds the two are 3e-5 apart, and the gradient of a nearly
saturated plan, a difference of terms, is less than that of its terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Potential:
    """One side's, (B, H, lines): ``exact``, float64; ``base`` and ``fine`` in the compute dtype.

    ground, counted: what the base alone and both count as, float64.
    """

    exact: Tensor
    base: Tensor
    fine: Tensor
    ground: Tensor
    counted: Tensor

    @classmethod
    def near(cls, exact: Tensor, unit: float, dtype: torch.dtype) -> Potential:
        """A base alone, near ``exact``; what it counts as is the exact one. Of a base's ground this is the same again."""
        base = base_near(exact, unit, dtype)
        ground = counted(base, unit)
        return cls(ground, base, torch.zeros_like(base), ground, ground)

    def moved(self, exact: Tensor, unit: float) -> Potential:
        """The exact one on the same base."""
        fine = (exact - self.ground).to(self.base.dtype)
        return Potential(exact, self.base, fine, self.ground, self.ground + counted(fine, unit))


def counted(part: Tensor, unit: float) -> Tensor:
    """What a base or a fine part counts as, float64."""
    return part.double() if unit == 1 else (part * (1 / unit)).double() * unit


def base_near(exact: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """The base whose quotient by the unit, rounded, is next to ``exact`` / unit.

    The reciprocal of the unit is a rounded number too. Divided by it, a quotient q is next to its base or, where bases lie
    closer than quotients, next to one that leads to q again: so a base is found again in its ground.
    """
    return exact.to(dtype) if unit == 1 else (exact / (unit * torch.tensor(1 / unit, dtype=dtype).item())).to(dtype)
