"""What tests allow beyond the policy is what was derived: errors of that size pass, and twice that size do not."""

from __future__ import annotations

import pytest
import torch

from fastdsm import reference

from .tolerances import drift


def test_reciprocals_that_are_a_unit_off_drift_as_derived() -> None:
    """Sweeps of 1x4 matrices in float64, all reciprocals too large on one side and too small on the other."""
    logits = torch.randn(20, 1, 4, dtype=torch.float64)
    off = {}
    for n_iters in (10, 30, 100):
        u, K, c = torch.ones(20, 1, dtype=torch.float64), logits.exp(), 0.25
        for _ in range(n_iters):
            v = (1 - 2.0**-23) * c / (K.mT @ u[..., None])[..., 0]
            u = (1 + 2.0**-23) / (K @ v[..., None])[..., 0]
        _, info = reference.sinkhorn(logits, n_iters=n_iters, return_info=True)
        off[n_iters] = (u.log() - info.f).abs().max().item()
    for n_iters, found in off.items():
        assert found == pytest.approx(drift(n_iters), rel=1e-6)
