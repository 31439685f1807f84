"""Bad input to Sinkhorn attention: the error's type, and that it says what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdsm

BAD = [
    ({"is_causal": True}, ValueError, "triangular doubly-stochastic matrix is the identity"),
    ({"query": torch.zeros(1, 2, 3, 4, dtype=torch.int64)}, TypeError, "query must be float16"),
    ({"key": [1.0]}, TypeError, "key must be a torch.Tensor"),
    ({"value": torch.zeros(1, 2, 5, 4, dtype=torch.float64)}, TypeError, "one dtype, got query torch.float32 and value"),
    ({"key": torch.zeros(2, 5, 4)}, ValueError, "same number of dimensions"),
    ({"key": torch.zeros(1, 2, 5, 3)}, ValueError, "query and key must have the same number of features"),
    (
        {"value": torch.zeros(1, 2, 6, 4)},
        ValueError,
        r"key and value must have the same number of lines, got query \(1, 2, 3, 4\)",
    ),
    ({"query": torch.zeros(2, 2, 3, 4)}, ValueError, "same batch dimensions"),
    ({"query": torch.zeros(1, 4, 3, 4)}, ValueError, "unless enable_gqa=True"),
    ({"query": torch.zeros(1, 3, 3, 4), "enable_gqa": True}, ValueError, "must divide the query's, got 3 and 2"),
    ({"attn_mask": torch.zeros(3, 4)}, ValueError, "attn_mask must be broadcastable"),
    ({"attn_mask": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "attn_mask must be a bool or floating-point"),
    ({"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)}, ValueError, r"key_padding_mask must have shape \(..., 5\)"),
    ({"query_padding_mask": torch.zeros(1, 3, dtype=torch.int32)}, TypeError, "query_padding_mask must be a bool tensor"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a float in \[0, 1\)"),
    ({"dropout_p": torch.tensor(0.5)}, ValueError, r"dropout_p must be a float in \[0, 1\), got tensor\(0.5000\)"),
    ({"scale": torch.tensor(0.5)}, TypeError, r"scale must be a float, got a tensor of shape \(\).*give scale=1.0"),
    ({"n_iters": -1}, ValueError, "n_iters must be >= 0"),
    ({"first": "both"}, ValueError, "first must be one of"),
    ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
    ({"grad": "implicit"}, ValueError, "needs tol"),
    ({"grad": "exact"}, ValueError, "grad must be one of"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"query": torch.zeros(1, 2, 3, 4), "key": torch.zeros(1, 2, 5, 4), "value": torch.zeros(1, 2, 5, 4)}
    with pytest.raises(error, match=message):
        fastdsm.sinkhorn_attention(**{**good, **change})


def test_bad_accuracy_and_steps() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="accuracy must be > 0"):
        fastdsm.sinkhorn_attention_sigma2(x, x, accuracy=0.0)
    with pytest.raises(ValueError, match="max_steps must be an int >= 1"):
        fastdsm.sinkhorn_attention_sigma2(x, x, max_steps=0)
