"""fastdsm: doubly-stochastic matrices, projected, measured and differentiated.

plan = fastdsm.sinkhorn(logits)                      # (..., n, m), rows and columns normalised
plan, sigma2, *_ = fastdsm.sinkhorn_sigma2(logits)   # and its second singular value, in the same launch
out = fastdsm.sinkhorn_attention(query, key, value)  # scaled_dot_product_attention with such a plan, never stored
"""

from . import _interrupts, compat, diagnostics, integrations, mhc, nn, reference  # the first before torch
from .attention import sinkhorn_attention
from .attention_spectrum import sinkhorn_attention_sigma2
from .log_projection import log_sinkhorn
from .projection import sinkhorn, sinkhorn_sigma2
from .results import AttentionInfo, SinkhornInfo, SinkhornSpectrum
from .rounding import round_to_birkhoff
from .spectrum import sigma2, sigma2_bounds
from .temperature import temperature_for_sigma2
from .warmup import warmup

_interrupts.over()

__version__ = "0.2.0"
__all__ = [
    "AttentionInfo",
    "SinkhornInfo",
    "SinkhornSpectrum",
    "compat",
    "diagnostics",
    "integrations",
    "log_sinkhorn",
    "mhc",
    "nn",
    "reference",
    "round_to_birkhoff",
    "sigma2",
    "sigma2_bounds",
    "sinkhorn",
    "sinkhorn_attention",
    "sinkhorn_attention_sigma2",
    "sinkhorn_sigma2",
    "temperature_for_sigma2",
    "warmup",
]
