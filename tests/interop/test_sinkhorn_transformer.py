"""sinkhorn-transformer: its sorting operator, rows first, so that columns end at a mass of 1, whatever the shape."""

from __future__ import annotations

import functools

import pytest
import torch

import fastdsm

from .parity import DTYPES, assert_same, leaves_of, randomised

pytest.importorskip("sinkhorn_transformer", reason="the extra parity")
from sinkhorn_transformer import SinkhornTransformer, sinkhorn_transformer


@DTYPES
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 5), (6, 5, 8)])
@pytest.mark.parametrize("sweeps", [1, 8])
def test_sorting_operator(sweeps: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (scores,) = leaves_of(shape, dtype=dtype, scale=2.0)
    origin = sinkhorn_transformer.sinkhorn_sorting_operator(scores, sweeps)
    found = fastdsm.sinkhorn(scores, n_iters=sweeps, first="row", col_marginal=1.0)
    assert_same(found, origin, [scores])


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_gumbel_noise(temperature: float, dtype: torch.dtype) -> None:
    (scores,) = leaves_of((6, 8, 8), dtype=dtype)
    torch.manual_seed(1)
    origin = sinkhorn_transformer.gumbel_sinkhorn(scores.relu(), 8, temperature)
    torch.manual_seed(1)
    noisy = (scores.relu() + 1e-6).log() + sinkhorn_transformer.sample_gumbel(scores.shape, "cpu", dtype)
    found = fastdsm.sinkhorn(noisy, n_iters=8, temperature=temperature, first="row")
    assert_same(found, origin, [scores])


def test_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SinkhornTransformer(dim=32, depth=2, heads=4, bucket_size=8, max_seq_len=32, sinkhorn_iter=6, non_permutative=False)
    randomised(model, 0.05).double().eval()
    (x,) = leaves_of((2, 32, 32), dtype=torch.float64)
    torch.manual_seed(1)
    origin = model(x)
    torch.manual_seed(1)  # its Gumbel noise is drawn in evaluation as well
    swap = functools.partial(fastdsm.sinkhorn, first="row", col_marginal=1.0)
    monkeypatch.setattr(sinkhorn_transformer, "sinkhorn_sorting_operator", lambda r, n_iters: swap(r, n_iters=n_iters))
    assert_same(model(x), origin, [x, *(p for p in model.parameters() if p.requires_grad)])
