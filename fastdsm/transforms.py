"""Calls of the operators, inside functorch's transforms as well as outside.

Inside ``torch.func`` an operator's own autograd registration is not composable, so that there the same operator and the
same gradient are wrapped once more in an ``autograd.Function`` that generates its rule for vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import operators  # noqa: F401  (registers torch.ops.fastdsm)

_ops = torch.ops.fastdsm


def sinkhorn(*inputs: Any) -> Tensor:
    """``torch.ops.fastdsm.sinkhorn``."""
    return _ops.sinkhorn(*inputs)


def sinkhorn_info(*inputs: Any) -> tuple[Tensor, ...]:
    """``torch.ops.fastdsm.sinkhorn_info``."""
    return _ops.sinkhorn_info(*inputs)


def sigma2(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.fastdsm.sigma2``."""
    return _ops.sigma2(*inputs)


def sigma2_bounds(*inputs: Any) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastdsm.sigma2_bounds``."""
    return _ops.sigma2_bounds(*inputs)
