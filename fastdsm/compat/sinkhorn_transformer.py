"""lucidrains' sinkhorn-transformer: the sorting operator of its attention.

Source: sinkhorn-transformer 0.11.4, ``sinkhorn_transformer/sinkhorn_transformer.py``; arXiv 2002.11296.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import arguments
from ..projection import sinkhorn
from ._shared import Convention, gumbel_of

_EPS = 1e-6


def sinkhorn_sorting_operator(r: Tensor, n_iters: int = 8) -> Tensor:
    """Rows, then columns to a mass of 1, ``n_iters`` times; differentiable, as :func:`fastdsm.sinkhorn`, whose errors it has.

    Args:
        r: (..., n, m), logits; columns have a mass of 1 at the end, whatever the shape.
        n_iters: sweeps, >= 1; the origin returns exp(r) after none.
    """
    n_iters = arguments.count_of(n_iters, "n_iters", 1)
    return sinkhorn(r, n_iters=n_iters, first="row", col_marginal=1.0)


def gumbel_sinkhorn(r: Tensor, n_iters: int = 8, temperature: float | Tensor = 0.7) -> Tensor:
    """The sorting operator of log(r + 1e-6) with Gumbel noise, over ``temperature``.

    Args:
        r: (..., n, m), >= 0. Of one seed the noise is the origin's: a draw of r's shape and dtype from torch's generator.
        n_iters, temperature: as for :func:`sinkhorn_sorting_operator`; > 0.
    """
    n_iters = arguments.count_of(n_iters, "n_iters", 1)
    noise = sample_gumbel(r.shape, r.device, r.dtype)
    return sinkhorn((r + _EPS).log() + noise, n_iters=n_iters, temperature=temperature, first="row", col_marginal=1.0)


def sample_gumbel(
    shape: torch.Size | tuple[int, ...], device: torch.device | str, dtype: torch.dtype, eps: float = _EPS
) -> Tensor:
    """-log(-log(U + eps) + eps), U uniform in [0, 1)."""
    return gumbel_of(torch.empty(shape, device=device, dtype=dtype).uniform_(0, 1), eps)


CONVENTIONS = (
    Convention("sinkhorn_sorting_operator", "rows", "columns", "n_iters: a sweep", "- | 1", "none", "logits", "as given"),
    Convention(
        "gumbel_sinkhorn",
        "rows",
        "columns",
        "n_iters: a sweep",
        "- | 1",
        "temperature=0.7",
        "log(r + 1e-6) + noise",
        "as given",
    ),
)
