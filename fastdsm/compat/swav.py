"""SwAV: scores of samples against prototypes made assignments, in which every prototype has the same mass.

Source: facebookresearch/swav, ``main_swav.py`` (``distributed_sinkhorn``), and the paper's listing, arXiv 2006.09882, A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import arguments
from ._shared import Convention, assignments, check_scale


def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assignments of samples to prototypes: prototypes, then samples normalised, ``iterations`` times.

    In a process group of several, scores are this process's samples, and prototypes are normalised over those of all.

    Args:
        scores: (B, K) of B samples and K prototypes, or of any batch shape before; float16, bfloat16, float32 or float64. The
            origin, which takes exp(scores / epsilon), is NaN where that overflows, in float32 above 88; here it is right.
        epsilon: > 0, what scores are divided by.
        iterations: sweeps, >= 0; 0 is a softmax over prototypes.

    Returns:
        (B, K), float32 (float64 for float64), rows of sum 1; without a gradient, as in the origin.

    Raises:
        TypeError, ValueError: as :func:`fastdsm.sinkhorn`.
    """
    arguments.check_matrices(scores, "scores", 0)
    check_scale(epsilon, "epsilon")
    return assignments(scores.to(torch.promote_types(scores.dtype, torch.float32)), iterations, epsilon)


def distributed_sinkhorn(out: Tensor, epsilon: float = 0.05, sinkhorn_iterations: int = 3) -> Tensor:
    """:func:`sinkhorn` under the name in the training script, whose global arguments ``epsilon`` and so on are these."""
    return sinkhorn(out, epsilon, sinkhorn_iterations)


_SAMPLES = "samples x prototypes"
CONVENTIONS = (
    Convention("sinkhorn", "columns", "rows", "iterations: a sweep", "1 | B / K", "epsilon=0.05", "scores", _SAMPLES),
    Convention(
        "distributed_sinkhorn",
        "columns",
        "rows",
        "sinkhorn_iterations: a sweep",
        "1 | B / K",
        "epsilon=0.05",
        "scores",
        _SAMPLES,
    ),
)
