"""compat.sinkhorn_transformer, against the package; tests/interop has it inside its transformer."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastdsm.compat import sinkhorn_transformer as compat

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of
from .oracles import log_projection

pytest.importorskip("sinkhorn_transformer", reason="the extra parity")
from sinkhorn_transformer import sinkhorn_transformer as origin

SHAPES = pytest.mark.parametrize("shape", [(6, 8, 8), (1, 8, 5), (6, 5, 8)])


@DTYPES
@SHAPES
@pytest.mark.parametrize("sweeps", [1, 8])
def test_sorting_operator(sweeps: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (scores,) = leaves_of(shape, dtype=dtype, scale=2.0)
    found, theirs = (module.sinkhorn_sorting_operator(scores, sweeps) for module in (compat, origin))
    assert_same(found, theirs, [scores])


@DTYPES
@SHAPES
@pytest.mark.parametrize("temperature", [0.7, 0.2])
def test_samples_of_one_seed(temperature: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    r = torch.rand(shape, dtype=dtype, requires_grad=True)
    results = []
    for module in (compat, origin):
        torch.manual_seed(1)
        results.append(module.gumbel_sinkhorn(r, 8, temperature))
    assert_same(*results, [r])


@pytest.mark.parametrize("name", ["sinkhorn_sorting_operator", "gumbel_sinkhorn", "sample_gumbel"])
def test_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (compat, origin))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_large_scores_and_strides() -> None:
    scores = torch.randn(8, 6, 16).permute(1, 0, 2)[..., ::2] * 30
    assert_close(compat.sinkhorn_sorting_operator(scores), log_projection(scores, 16, "row").exp(), 2e-6)
    assert compat.sinkhorn_sorting_operator(scores[:0]).shape == (0, 8, 8)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n_iters must be >= 1, got 0"):
        compat.sinkhorn_sorting_operator(torch.randn(1, 4, 4), 0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        compat.gumbel_sinkhorn(torch.rand(1, 4, 4), 8, 0.0)
