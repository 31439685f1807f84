"""timm: the attention of a vision transformer replaced, once by a module, once below the module.

timm imports torchvision, for transforms and data sets that play no part here: a stand-in serves while it is imported.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastdsm

from ..half_steps import half_steps, log_plan
from .parity import DTYPES, assert_same, leaves_of, randomised

pytest.importorskip("PIL", reason="the extra parity")
if importlib.util.find_spec("timm") is None:
    pytest.skip("timm, which make test installs without its dependencies", allow_module_level=True)
_PARTS = (
    "",
    ".transforms",
    ".transforms.functional",
    ".datasets",
    ".ops",
    ".ops.misc",
    ".models",
    ".models.feature_extraction",
)
with mock.patch.dict(sys.modules, {f"torchvision{part}": mock.MagicMock(__spec__=None) for part in _PARTS}):
    import timm
    import timm.layers


class SinkhornAttention(timm.layers.Attention):
    """What ``create_model(attn_layer=...)`` takes."""

    n_iters = 3

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = fastdsm.sinkhorn_attention(query, key, value, attn_mask, is_causal=is_causal, n_iters=self.n_iters)
        return self.proj(out.transpose(1, 2).flatten(2))


class WithoutSweeps(SinkhornAttention):
    """Softmax."""

    n_iters = 0


class HalfSteps(SinkhornAttention):
    """Three sweeps, one half step after the other."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = query.double() @ key.double().mT * self.scale
        plan = log_plan(scores, *half_steps(scores, 6, "col")).exp().to(x.dtype)
        return self.proj((plan @ value).transpose(1, 2).flatten(2))


class MultiheadAttention(nn.Module):
    """nn.SinkhornAttention where timm calls its attention by one tensor."""

    def __init__(self, attention: timm.layers.Attention, n_iters: int) -> None:
        super().__init__()
        dtype = attention.qkv.weight.dtype
        self.attention = fastdsm.nn.SinkhornAttention(
            attention.qkv.in_features, attention.num_heads, batch_first=True, n_iters=n_iters, dtype=dtype
        )
        weights = {"in_proj_weight": attention.qkv.weight, "in_proj_bias": attention.qkv.bias}
        weights |= {f"out_proj.{name}": weight for name, weight in attention.proj.state_dict().items()}
        self.attention.load_state_dict(weights)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False, **masks)[0]
        return out


def model_of(attention: type[nn.Module], dtype: torch.dtype) -> Any:
    """A small vision transformer with random weights."""
    make = partial(timm.create_model, "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_classes=5)
    return randomised(make(attn_layer=attention), 0.05).to(dtype)


def assert_same_models(swapped: nn.Module, origin: nn.Module, dtype: torch.dtype) -> None:
    (images,) = leaves_of((2, 3, 64, 64), dtype=dtype)
    leaves = ([images, *model.parameters()] for model in (swapped, origin))
    assert_same(swapped(images), origin(images), *leaves)


ORIGINS = {0: timm.layers.Attention, 3: HalfSteps}
SWEEPS = pytest.mark.parametrize("n_iters", [0, 3])


@DTYPES
@SWEEPS
def test_layers_class(n_iters: int, dtype: torch.dtype) -> None:
    origin, swapped = model_of(ORIGINS[n_iters], dtype), model_of(SinkhornAttention if n_iters else WithoutSweeps, dtype)
    swapped.load_state_dict(origin.state_dict())
    assert_same_models(swapped, origin, dtype)


@DTYPES
@SWEEPS
def test_modules(n_iters: int, dtype: torch.dtype) -> None:
    origin = model_of(ORIGINS[n_iters], dtype)
    swapped = copy.deepcopy(origin)
    for block in swapped.blocks:
        block.attn = MultiheadAttention(block.attn, n_iters)
    assert_same_models(swapped, origin, dtype)


@DTYPES
@SWEEPS
def test_below_the_module(n_iters: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a whole program; calls in torch's own fast paths do not come by it."""
    origin, swapped = (model_of(attention, dtype) for attention in (ORIGINS[n_iters], timm.layers.Attention))
    swapped.load_state_dict(origin.state_dict())
    (images,) = leaves_of((2, 3, 64, 64), dtype=dtype)
    right = origin(images)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", partial(fastdsm.sinkhorn_attention, n_iters=n_iters))
    assert_same(swapped(images), right, *([images, *model.parameters()] for model in (swapped, origin)))
