"""The mHC layer around the projection (manifold-constrained hyper-connections, arXiv 2512.24880), as calls that mHC code makes.

n residual streams X (n, C) of a token are collapsed to the input of a branch F, mixed, and written to:

    mixes = fn vec X / rms(vec X)                                        mhc_mixes
    pre, post = sigmoids, comb = Sinkhorn(...) of mixes                  hc_split_sinkhorn
    h = sum_i pre_i X_i                                                  mhc_pre: all three
    X'_new = post_new F(h) + sum_old comb[old, new] X_old                mhc_post; with the next layer's pre: mhc_post_pre
    h = sum_i pre_i X_i, of n mixes alone, before the last projection    mhc_head

All are differentiable in every floating argument, any number of times and in forward mode, take any leading shape, n from 1 to
16, and compute in float32 (float64 for float64), rounded once. ``VARIANTS`` names whose layer it is.
"""

from ..results import MixInfo
from .coefficients import hc_split_sinkhorn, mhc_mixes, sinkhorn_normalize
from .layer import mhc_head, mhc_post, mhc_post_pre, mhc_pre
from .variants import VARIANTS

__all__ = [
    "VARIANTS",
    "MixInfo",
    "hc_split_sinkhorn",
    "mhc_head",
    "mhc_mixes",
    "mhc_post",
    "mhc_post_pre",
    "mhc_pre",
    "sinkhorn_normalize",
]
