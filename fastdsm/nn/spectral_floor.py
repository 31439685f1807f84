"""Keeping sigma2 above a floor: by the temperature (``SpectralFloor``), or by a penalty (``spectral_penalty``).

What passes through a stack of doubly-stochastic matrices keeps at most the product of their sigma2 ("The Homogeneity Trap",
arXiv 2601.02080, by its abstract). A floor s on each of L layers therefore allows detail of s^L to survive; the same floor on
what the layers are, by the temperature that has it, is derived in :mod:`fastdsm._ops.temperature_search`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._ops import arguments
from ..projection import sinkhorn_sigma2
from ..temperature import temperature_where


class SpectralFloor(nn.Module):
    """Temperatures at which no plan's sigma2 lies below ``floor``.

    A matrix whose plan of ``n_iters`` sweeps has sigma2 >= floor keeps the temperature it came with. The others get
    :func:`fastdsm.temperature_for_sigma2` of the floor: on them sigma2 of the converged plan is the floor whatever the logits
    do, and the gradient flows through that condition. A matrix that cannot reach the floor (constant logits, ties) keeps its
    temperature too. Where sigma2 is not monotone the temperature may be higher than the one that came.

    Args:
        floor: in (0, 1).
        n_iters: sweeps of the layer whose temperature this is. With s the floor a plan has converged to about s^(2 n_iters),
            so that 20 sweeps hold floors up to 0.8 to 1e-4.

    Shapes: logits (..., n, m), temperature a float or (...,); returns (...,), float32 (float64 for float64), differentiable in
    logits and temperature. On a CPU the search runs for matrices below the floor alone; on a GPU, where looking would stall the
    host, for all, which then costs some dozens of projections.
    """

    def __init__(self, floor: float, n_iters: int = 20) -> None:
        super().__init__()
        if not 0 < floor < 1:
            raise ValueError(f"floor must lie in (0, 1), between the uniform plan and a permutation, got {floor}")
        self.floor = floor
        self.n_iters = arguments.count_of(n_iters, "n_iters")

    def forward(self, logits: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None) -> Tensor:
        """The temperatures (...,) for :func:`fastdsm.sinkhorn` on ``logits`` under ``mask``."""
        arguments.check_matrices(logits, "logits")
        given = arguments.temperature_of(temperature, logits)
        with torch.no_grad():
            below = sinkhorn_sigma2(logits, temperature=temperature, n_iters=self.n_iters, mask=mask).sigma2 < self.floor
        held, reached = temperature_where(below, logits, self.floor, mask=mask)
        if not isinstance(given, Tensor):
            given = arguments.filled(given, held.shape, logits)
        return torch.where(reached, held, given)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"floor={self.floor}, n_iters={self.n_iters}"


def spectral_penalty(sigma2: Tensor, floor: float) -> Tensor:
    """Mean of relu(floor - sigma2)^2: a scalar penalty on plans whose sigma2 is below the floor.

    Args:
        sigma2: any shape, as from :func:`fastdsm.sinkhorn_sigma2` or :func:`fastdsm.sinkhorn_attention_sigma2`.
        floor: in (0, 1].

    Returns:
        A scalar of sigma2's dtype, 0 for an empty tensor. Differentiable; the gradient is 0 at and above the floor. Where
        sigma2 is 0 its gradient is that of an arbitrary singular vector: start from logits that are not constant.

    Raises:
        ValueError: a floor outside (0, 1].
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1], got {floor}")
    short = torch.relu(floor - sigma2).square()
    return short.sum() / max(short.numel(), 1)
