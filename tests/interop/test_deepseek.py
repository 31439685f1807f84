"""DeepSeek-V4's hyper-connection as in transformers, and :class:`fastdsm.nn.HyperConnection` in its place.

Its projection has an eps under every entry and sum, rows first, it mixes by the transposed matrix, and to the weights that read
the streams it adds that eps as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastdsm

from .parity import assert_same, leaves_of

pytest.importorskip("transformers.models.deepseek_v4", reason="the extra parity")
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

STREAMS, DIM = 4, 16


def connections(scale: float) -> tuple[fastdsm.nn.HyperConnection, DeepseekV4HyperConnection]:
    """Ours with random weights, whose matrix of logits has about this standard deviation, and the origin."""
    origin = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=DIM, hc_mult=STREAMS))
    ours = fastdsm.nn.HyperConnection(nn.Linear(DIM, DIM), DIM, STREAMS, variant="deepseek", norm_eps=origin.input_norm.eps)
    with torch.no_grad():
        ours.fn.mul_(scale)
        ours.scale.uniform_(0.5, 1.0)
        ours.base.normal_(std=0.5)
    return ours, origin


def called(ours: fastdsm.nn.HyperConnection, origin: DeepseekV4HyperConnection, x: Tensor) -> tuple[Tensor, ...]:
    """post, comb and what the branch reads, of the origin with our weights."""
    weights = {"fn": ours.fn, "base": ours.base, "scale": ours.scale}
    found: tuple[Tensor, ...] = torch.func.functional_call(origin, weights, x)
    return found


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_layer(scale: float) -> None:
    """With the text of the decoder layer around the module."""
    ours, origin = connections(scale)
    (x,) = leaves_of((2, 7, STREAMS, DIM), dtype=torch.float32)
    post, comb, read = called(ours, origin, x)
    theirs = post.unsqueeze(-1) * ours.branch(read).unsqueeze(-2) + comb.mT @ x
    assert_same(ours(x), theirs, [x, *ours.parameters()])


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_projection(scale: float) -> None:
    """The matrix alone, to the last digits."""
    ours, origin = connections(scale)
    (x,) = leaves_of((2, 7, STREAMS, DIM), dtype=torch.float32)
    weights = nn.functional.linear(origin.input_norm(x.flatten(-2)), ours.fn[2 * STREAMS :])
    logits = (weights * ours.scale[2] + ours.base[2 * STREAMS :]).unflatten(-1, (STREAMS, STREAMS))
    found = fastdsm.nn.SinkhornProjection(first="row", eps=origin.hc_eps)(logits)
    assert_same(found, called(ours, origin, x)[1], [x, ours.fn])
