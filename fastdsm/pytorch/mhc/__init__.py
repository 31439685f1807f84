"""The PyTorch path of ``fastdsm.mhc``, of tokens in one row: sweeps with eps, mixes, and what they do to streams."""

from .layer import post, post_backward, pre, pre_backward
from .sweeps import sweeps_with_eps, sweeps_with_eps_backward

__all__ = ["post", "post_backward", "pre", "pre_backward", "sweeps_with_eps", "sweeps_with_eps_backward"]
