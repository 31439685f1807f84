"""timm: the attention of a vision transformer replaced by a class, by fastdsm.integrations.convert, and below the module."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fastdsm
from fastdsm.integrations import convert

from ..half_steps import half_steps, log_plan
from ..timm_package import import_timm
from .parity import DTYPES, assert_same, leaves_of, randomised

timm = import_timm()
from fastdsm.integrations import timm as sinkhorn  # noqa: E402


class WithoutSweeps(sinkhorn.SinkhornAttention):
    """Softmax."""

    sinkhorn_options: ClassVar[dict[str, Any]] = {"n_iters": 0}


class HalfSteps(timm.layers.Attention):
    """Three sweeps, one half step after the other."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = query.double() @ key.double().mT * self.scale
        plan = log_plan(scores, *half_steps(scores, 6, "col")).exp().to(x.dtype)
        return self.proj((plan @ value).transpose(1, 2).flatten(2))


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
    origin, swapped = (
        model_of(ORIGINS[n_iters], dtype),
        model_of(sinkhorn.SinkhornAttention if n_iters else WithoutSweeps, dtype),
    )
    swapped.load_state_dict(origin.state_dict())
    assert_same_models(swapped, origin, dtype)


@DTYPES
@SWEEPS
def test_converted(n_iters: int, dtype: torch.dtype) -> None:
    origin, swapped = (model_of(attention, dtype) for attention in (ORIGINS[n_iters], timm.layers.Attention))
    swapped.load_state_dict(origin.state_dict())
    assert len(convert(swapped, n_iters=n_iters).changed) == 2
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
