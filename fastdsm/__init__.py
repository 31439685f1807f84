"""fastdsm: doubly-stochastic matrices, projected, measured and differentiated.

plan = fastdsm.sinkhorn(logits)                      # (..., n, m), rows and columns normalised
plan, sigma2, *_ = fastdsm.sinkhorn_sigma2(logits)   # and its second singular value, in the same launch
"""

from . import reference
from .projection import sinkhorn, sinkhorn_sigma2
from .results import SinkhornInfo, SinkhornSpectrum
from .spectrum import sigma2, sigma2_bounds

__version__ = "0.1.0"
__all__ = [
    "SinkhornInfo",
    "SinkhornSpectrum",
    "reference",
    "sigma2",
    "sigma2_bounds",
    "sinkhorn",
    "sinkhorn_sigma2",
]
