"""lucidrains' hyper-connections: the projections of its mHC modules.

Source: hyper-connections 0.4.11, ``hyper_connections/mHCv2.py`` (and ``manifold_constrained_hyper_connections.py``); mHC, arXiv
2512.24880. In a module: ``mHC(..., residual_mix_constraint_fn=fastdsm.compat.hyper_connections.log_domain_sinkhorn_knopps)``.
"""

from __future__ import annotations

from torch import Tensor

from .._ops import arguments
from ..projection import sinkhorn
from ._shared import Convention


def sinkhorn_knopps(log_alpha: Tensor, iters: int = 20) -> Tensor:
    """Columns, then rows divided by their sums, ``iters`` times: ``fastdsm.sinkhorn(log_alpha, n_iters=iters)``.

    Args:
        log_alpha: (..., n, n), float16, bfloat16, float32 or float64. The origin computes float64 in float32, which here is
            float64, and loses what underflows in a column of logits, from a standard deviation of about 20 on: here nothing is
            lost. Rectangular matrices are served as by the origin's first version: rows of mass 1 at the end.
        iters: >= 0; 0 returns ``log_alpha``, as mHCv2 does (the first version returned its exponential).

    Returns:
        The plan, like log_alpha, with the exact gradient of the sweeps; the origin's Triton path (``triton_sinkhorn``) has an
        approximate one, off by 1e-3 to 1e-1.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    iters = arguments.count_of(iters, "iters")
    return log_alpha if iters == 0 else sinkhorn(log_alpha, n_iters=iters)


def log_domain_sinkhorn_knopps(log_alpha: Tensor, iters: int = 20) -> Tensor:
    """The same in the origin's log domain; here one call, :func:`sinkhorn_knopps`, is right at logits of any size."""
    return sinkhorn_knopps(log_alpha, iters)


def triton_sinkhorn(log_alpha: Tensor, iters: int = 20) -> Tensor:
    """The same by the origin's Triton kernel, ``hyper_connections.triton_sinkhorn``; here :func:`sinkhorn_knopps`."""
    return sinkhorn_knopps(log_alpha, iters)


CONVENTIONS = tuple(
    Convention(name, "columns", "rows", "iters: a sweep", "1 | 1", "none", "logits", "as given")
    for name in ("sinkhorn_knopps", "log_domain_sinkhorn_knopps", "triton_sinkhorn")
)
