"""What doubly-stochastic matrices do to the signals they mix: spectrum, entropy, depth, noise."""

from .depth import depth_bound, effective_depth, product_sigma2, residual_contraction, stagnation_index
from .distance import distance_to_identity, distance_to_uniform, leak, residual
from .entropy import chi2, entropy
from .measured import Row
from .monitor import SpectralMonitor
from .noise import (
    cosine_with_layernorm,
    critical_depth,
    layernorm_cosine,
    layernorm_cosine_tail,
    layernorm_helps,
    snr_threshold,
    snr_without_layernorm,
)
from .prior import logit_diameter, random_sigma2, sigma2_prior_bound
from .report import spectral_report
from .streams import StreamRow
from .summary import PlanSummary, summarize

__all__ = [
    "PlanSummary",
    "Row",
    "SpectralMonitor",
    "StreamRow",
    "chi2",
    "cosine_with_layernorm",
    "critical_depth",
    "depth_bound",
    "distance_to_identity",
    "distance_to_uniform",
    "effective_depth",
    "entropy",
    "layernorm_cosine",
    "layernorm_cosine_tail",
    "layernorm_helps",
    "leak",
    "logit_diameter",
    "product_sigma2",
    "random_sigma2",
    "residual",
    "residual_contraction",
    "sigma2_prior_bound",
    "snr_threshold",
    "snr_without_layernorm",
    "spectral_report",
    "stagnation_index",
    "summarize",
]
