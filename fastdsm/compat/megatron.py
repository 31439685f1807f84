"""Megatron-LM: the router of a mixture of experts that balances them by Sinkhorn.

Source: NVIDIA/Megatron-LM, ``megatron/core/transformer/moe/moe_utils.py``, ``sinkhorn``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .._ops import arguments
from ..results import SinkhornInfo
from ._shared import Convention, sweeps_until

_MOST = 10_000  # sweeps; the origin has no end where its changes do not fall below tol


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """The plan of exp(cost), tokens of mass 1 / n and experts of mass 1 / m, until the experts' factors hardly change.

    Despite its name ``cost`` are logits: the larger, the more. Tokens first, then experts; after every sweep the factors of
    experts d1, 1 to begin with, are compared with those before, and a mean absolute change of at most tol is the end: a launch
    and a look at one number per sweep, as in the origin.

    Args:
        cost: (n, m) of n tokens and m experts.
        tol: >= 0.

    Returns:
        (n, m), like cost, differentiable: the sweeps done, unrolled. The origin adds 1e-8 to every sum, by which it errs
        relatively by about 1e-8 m; of a token whose logits are all below -18 it makes thousands of sweeps for less than its
        mass, and it overflows above 88. Here nothing is added, and logits may have any size.

    Raises:
        TypeError, ValueError: of another shape or dtype, or of a tol below 0.

    Warns:
        RuntimeWarning: where 10,000 sweeps are not enough; there the origin would go on.
    """
    arguments.check_matrices(cost, "cost", 0)
    if cost.dim() != 2:
        raise ValueError(f"cost must have shape (tokens, experts), got {tuple(cost.shape)}; flatten all but the experts")
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0 (a mean absolute change such as 1e-4), got {tol}")
    n, m = cost.shape
    factors = torch.ones(m, device=cost.device)

    def settled(plan: Tensor, info: SinkhornInfo) -> bool:
        nonlocal factors
        now = info.g.exp()
        factors, change = now, (now - factors).abs().mean()
        return not float(change) > tol

    masses: dict[str, Any] = {"row_marginal": 1.0 / max(n, 1), "col_marginal": 1.0 / max(m, 1)}
    found = sweeps_until(settled, _MOST, 1, cost, first="row", **masses)
    if not found.stopped:
        warnings.warn(
            f"{_MOST:,} sweeps left changes of more than tol = {tol}; choose a larger one", RuntimeWarning, stacklevel=2
        )
    return found.plan


CONVENTIONS = (Convention("sinkhorn", "rows", "columns", "a sweep, to tol", "1/n | 1/m", "none", "logits", "tokens x experts"),)
