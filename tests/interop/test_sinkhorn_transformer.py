"""sinkhorn-transformer: its layers with the sorting operator replaced; the operator is compared in tests/compat."""

from __future__ import annotations

import pytest
import torch

from fastdsm import compat

from .parity import assert_same, leaves_of, randomised

pytest.importorskip("sinkhorn_transformer", reason="the extra parity")
from sinkhorn_transformer import SinkhornTransformer, sinkhorn_transformer


def test_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SinkhornTransformer(dim=32, depth=2, heads=4, bucket_size=8, max_seq_len=32, sinkhorn_iter=6, non_permutative=False)
    randomised(model, 0.05).double().eval()
    (x,) = leaves_of((2, 32, 32), dtype=torch.float64)
    torch.manual_seed(1)
    origin = model(x)
    torch.manual_seed(1)  # its Gumbel noise is drawn in evaluation as well
    swap = compat.sinkhorn_transformer.sinkhorn_sorting_operator
    monkeypatch.setattr(sinkhorn_transformer, "sinkhorn_sorting_operator", swap)
    assert_same(model(x), origin, [x, *(p for p in model.parameters() if p.requires_grad)])
