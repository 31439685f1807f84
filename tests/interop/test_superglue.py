"""SuperGlue as in transformers, whose call names its last argument ``iterations``, by position the same."""

from __future__ import annotations

import pytest
import torch

from fastdsm.compat import superglue

from .parity import DTYPES, assert_close, assert_same, leaves_of

pytest.importorskip("transformers", reason="the extra parity")
from transformers.models.superglue import modeling_superglue


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sweeps", [1, 100])
def test_optimal_transport(sweeps: int, scale: float, dtype: torch.dtype) -> None:
    scores, bin_score = leaves_of((3, 7, 9), (1,), dtype=dtype, scale=scale)
    origin = modeling_superglue.log_optimal_transport(scores, bin_score, sweeps)
    found = superglue.log_optimal_transport(scores, bin_score, sweeps)
    assert_same(found, origin, [scores, bin_score], value=2e-6 if dtype == torch.float32 else None)


def test_where_the_plan_underflows() -> None:
    """Scores of a standard deviation of 50: the logarithms reach -300, and their gradients are right."""
    scores, bin_score = leaves_of((3, 7, 9), (1,), dtype=torch.float32, scale=50.0)
    wide = [x.detach().double().requires_grad_() for x in (scores, bin_score)]
    truth = modeling_superglue.log_optimal_transport(*wide, 100)
    found = superglue.log_optimal_transport(scores, bin_score, 100)
    assert truth.min() < -150
    assert_close(found.detach(), truth.detach(), 1e-6)
    cotangent = torch.randn_like(found)
    pulled = torch.autograd.grad(found, [scores, bin_score], cotangent)
    for ours, right in zip(pulled, torch.autograd.grad(truth, wide, cotangent.double()), strict=True):
        assert_close(ours, right, 1e-5)
