"""SuperGlue: the logarithm of a transport plan with a dustbin on each side.

Source: magicleap/SuperGluePretrainedNetwork, ``models/superglue.py``; arXiv 1911.11763, section 3.2. The same in glue-factory,
and in transformers' ``models/superglue/modeling_superglue.py``, which calls its ``log_optimal_transport`` with the keyword
``iterations`` and so needs ``lambda scores, alpha, iterations: log_optimal_transport(scores, alpha, iterations)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import arguments
from ..log_projection import log_sinkhorn
from ._shared import Convention, balanced


def log_optimal_transport(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    """log of the plan of scores with dustbins of score ``alpha``: keypoints have a mass of 1, a dustbin that of all opposite.

    Args:
        scores: (..., m, n), of any batch shape where the origin has one dimension.
        alpha: the dustbins' score, a tensor that broadcasts to (..., 1, 1): a parameter (), (1,), or one for each pair.
        iters: sweeps, rows first, >= 0.

    Returns:
        (..., m + 1, n + 1), like scores, -inf where nothing may be; columns sum to their masses. Differentiable
        in scores and alpha, right where the plan underflows.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.log_sinkhorn`.
    """
    arguments.check_matrices(scores, "scores", 0)
    arguments.check_floating(alpha, "alpha", "() or (..., 1, 1)")
    *batch, m, n = scores.shape
    alpha = arguments.broadcast(alpha, "alpha", (*batch, 1, 1)).to(scores.dtype)
    bins = (alpha.expand(*batch, m, 1), alpha.expand(*batch, 1, n))
    couplings = torch.cat([torch.cat([scores, bins[0]], -1), torch.cat([bins[1], alpha], -1)], -2)
    rows, columns = _keypoints(m, n, couplings), _keypoints(n, m, couplings)
    if arguments.count_of(iters, "iters") == 0:
        return couplings + torch.tensor(float(m + n), dtype=torch.float64).log().to(couplings)
    return log_sinkhorn(couplings, first="row", n_iters=iters, row_marginal=rows, col_marginal=columns)


def log_sinkhorn_iterations(Z: Tensor, log_mu: Tensor, log_nu: Tensor, iters: int) -> Tensor:
    """log of the plan of Z with masses exp(log_mu) and exp(log_nu) after ``iters`` sweeps, rows first.

    Args:
        Z: (..., m, n). log_mu: (..., m), log_nu: (..., n), of any totals: columns are exact at the end. A mass that is 0 in the
            dtype of the arithmetic, log_mu below -103 in float32, takes no part.
        iters: >= 0; 0 returns Z.

    Returns:
        Like Z, differentiable in all three.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.log_sinkhorn`.
    """
    if arguments.count_of(iters, "iters") == 0:
        return Z
    arguments.check_matrices(Z, "Z", 0)
    for x, name, lines in ((log_mu, "log_mu", Z.shape[-2]), (log_nu, "log_nu", Z.shape[-1])):
        arguments.check_floating(x, name, f"(..., {lines})")
    nu = log_nu.exp()
    mu, _ = balanced(log_mu.exp(), nu)
    return log_sinkhorn(Z, first="row", n_iters=iters, row_marginal=mu, col_marginal=nu)


def _keypoints(count: int, opposite: int, like: Tensor) -> Tensor:
    """(count + 1,): masses 1 of keypoints and of a dustbin for as many as there are opposite."""
    masses = like.new_ones(count + 1, dtype=torch.promote_types(like.dtype, torch.float32))
    masses[-1] = opposite
    return masses


CONVENTIONS = (
    Convention(
        "log_optimal_transport",
        "rows",
        "columns",
        "iters: a sweep",
        "1..1, n | 1..1, m",
        "none",
        "scores",
        "as given, dustbins last",
    ),
    Convention(
        "log_sinkhorn_iterations",
        "rows",
        "columns",
        "iters: a sweep",
        "exp(log_mu) | exp(log_nu)",
        "none",
        "logits",
        "as given",
    ),
)
