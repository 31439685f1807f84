"""Gumbel-Sinkhorn: samples of nearly permutation matrices, and of permutations by Hungarian matching.

Source: perrying/gumbel-sinkhorn, ``utils/gumbel_sinkhorn_ops.py``; Mena et al., arXiv 1802.08665.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import arguments
from ..projection import sinkhorn
from ._shared import Convention, check_scale, gumbel_of, positive_logits

_EPS = 1e-20


def sinkhorn_norm(alpha: Tensor, n_iter: int = 20) -> Tensor:
    """Rows, then columns of a matrix of numbers >= 0 divided by their sums, ``n_iter`` times.

    Args:
        alpha: (..., n, m), >= 0. Entries of 0 stay 0, with a gradient of 0, which in the origin is what a positive number in
            their place would change. A line of zeros, NaN there, is zero.
        n_iter: >= 1.

    Returns:
        Like alpha, columns of sum 1, whatever the shape; differentiable.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    arguments.check_matrices(alpha, "alpha", 0)
    if arguments.may_read(alpha) and alpha.numel() and bool((alpha < 0).any()):
        raise ValueError(f"alpha must be >= 0 everywhere, got {float(alpha.min())}; log_sinkhorn_norm takes logarithms")
    return log_sinkhorn_norm(positive_logits(alpha), n_iter)


def log_sinkhorn_norm(log_alpha: Tensor, n_iter: int = 20) -> Tensor:
    """The same of its logarithm: ``n_iter`` sweeps, >= 1, rows first, of log_alpha (..., n, m); like it, differentiable."""
    n_iter = arguments.count_of(n_iter, "n_iter", 1)
    return sinkhorn(log_alpha, n_iters=n_iter, first="row", col_marginal=1.0)


def gumbel_sinkhorn(log_alpha: Tensor, tau: float | Tensor = 1.0, n_iter: int = 20, noise: bool = True) -> Tensor:
    """The plan of (log_alpha + Gumbel noise) / tau, a sample of a permutation as tau goes to 0.

    Args:
        log_alpha: (..., n, m).
        tau: > 0. The origin leaves it out where there is no noise, which the paper does not; give 1 for that.
        n_iter: sweeps, >= 1, rows first.
        noise: of one seed the origin's: one draw of ``rand_like(log_alpha)``.

    Returns:
        Like log_alpha, columns of sum 1; differentiable in log_alpha and tau.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    n_iter = arguments.count_of(n_iter, "n_iter", 1)
    check_scale(tau, "tau")
    arguments.check_matrices(log_alpha, "log_alpha", 0)
    logits = log_alpha + gumbel_of(torch.rand_like(log_alpha), _EPS) if noise else log_alpha
    return sinkhorn(logits, n_iters=n_iter, temperature=tau, first="row", col_marginal=1.0)


def gumbel_matching(log_alpha: Tensor, noise: bool = True) -> Tensor:
    """The matching of the largest sum of log_alpha + Gumbel noise: a sample of a permutation matrix.

    Args:
        log_alpha: (..., n, m), of any batch shape where the origin has one dimension. In rectangular ones all of the shorter
            side are matched (the origin cuts off what is not).
        noise: as for :func:`gumbel_sinkhorn`.

    Returns:
        (..., n, m), float32, 0 and 1, on log_alpha's device, without a gradient. Computed on the CPU, by
        scipy.optimize.linear_sum_assignment.

    Raises:
        ImportError: without SciPy. TypeError, ValueError: of no matrices.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("gumbel_matching needs scipy.optimize.linear_sum_assignment; pip install scipy") from error
    arguments.check_matrices(log_alpha, "log_alpha", 0)
    with torch.no_grad():
        scores = log_alpha + gumbel_of(torch.rand_like(log_alpha), _EPS) if noise else log_alpha
    n, m = log_alpha.shape[-2:]
    matched = torch.zeros(log_alpha.shape[:-2].numel(), n, m)
    for found, matrix in zip(matched, scores.detach().double().cpu().reshape(matched.shape), strict=True):
        rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
        found[torch.from_numpy(rows), torch.from_numpy(columns)] = 1.0
    return matched.reshape(log_alpha.shape).to(log_alpha.device)


CONVENTIONS = (
    Convention("sinkhorn_norm", "rows", "columns", "n_iter: a sweep", "- | 1", "none", "log(alpha)", "as given"),
    Convention("log_sinkhorn_norm", "rows", "columns", "n_iter: a sweep", "- | 1", "none", "log_alpha", "as given"),
    Convention("gumbel_sinkhorn", "rows", "columns", "n_iter: a sweep", "- | 1", "tau=1", "log_alpha + noise", "as given"),
    Convention("gumbel_matching", "-", "both", "-", "1 | 1", "none", "log_alpha + noise", "as given"),
)
