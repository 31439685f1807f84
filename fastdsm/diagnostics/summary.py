"""Everything that is to be known of a plan, in one call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..spectrum import sigma2, sigma2_bounds
from .distance import distance_to_identity, distance_to_uniform, leak, residual
from .entropy import chi2, entropy


class PlanSummary(NamedTuple):
    """Per plan (...,), no gradient; float32, or float64 for float64.

    sigma2 with its certified interval [lower, upper]; chi2 and mean normalised Shannon entropy; residual and leak, the
    errors of the marginals; distance_to_uniform, and distance_to_identity (None where the plan is not square).
    """

    sigma2: Tensor
    lower: Tensor
    upper: Tensor
    chi2: Tensor
    entropy: Tensor
    residual: Tensor
    leak: Tensor
    distance_to_uniform: Tensor
    distance_to_identity: Tensor | None


def summarize(plan: Tensor) -> PlanSummary:
    """Measure plans (..., n, m) of uniform marginals; each number as the function of its name defines it. Errors as there."""
    plan = plan.detach() if isinstance(plan, Tensor) else plan
    value = sigma2(plan)
    lower, upper = sigma2_bounds(plan)
    identity = distance_to_identity(plan) if plan.shape[-1] == plan.shape[-2] else None
    return PlanSummary(
        value, lower, upper, chi2(plan), entropy(plan), residual(plan), leak(plan), distance_to_uniform(plan), identity
    )
