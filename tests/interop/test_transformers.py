"""transformers: encoders whose attention is fastdsm's, by fastdsm.integrations.transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..half_steps import half_steps, log_plan
from .parity import DTYPES, assert_same, randomised

transformers = pytest.importorskip("transformers", minversion="5.20", reason="the extra parity")
from transformers.masking_utils import sdpa_mask  # noqa: E402

from fastdsm.integrations import transformers as sinkhorn  # noqa: E402

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def looped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The same in plain half steps, of sequences without padding."""
    assert attention_mask is None
    scores = query.double() @ key.double().mT * scaling
    plan = log_plan(scores, *half_steps(scores, 6, "col")).exp().to(value.dtype)
    return (plan @ value).transpose(1, 2).contiguous(), None


sinkhorn.register("fastdsm")
sinkhorn.register("fastdsm-softmax", n_iters=0)
transformers.AttentionInterface.register("half-steps", looped)
transformers.AttentionMaskInterface.register("half-steps", sdpa_mask)


def bert() -> Any:
    """A random BERT of 50 words."""
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **SIZES)
    return randomised(transformers.BertModel(config, add_pooling_layer=False), 0.1).eval()


def vit() -> Any:
    """A random ViT for images of 16 x 16."""
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    return randomised(transformers.ViTModel(config, add_pooling_layer=False), 0.1).eval()


def padded(side: str) -> Tensor:
    """Attention masks (3, 9), 1 on sequences of 9, 6 and 2 tokens, padded on one side."""
    mask = (torch.arange(9) < torch.tensor([9, 6, 2])[:, None]).long()
    return mask if side == "right" else mask.flip(-1)


def assert_same_models(model: Any, attentions: tuple[str, str], *inputs: Tensor, where: Any = ...) -> None:
    """The model by two attentions: the hidden states, and the gradients of every parameter.

    Softmax is float32 in some eager attentions, whatever the model is.
    """
    tolerances = {"value": 1e-6, "gradient": 1e-5} if "eager" in attentions else {}
    inputs = tuple(x.to(model.dtype) if x.is_floating_point() else x for x in inputs)
    results = []
    for name in attentions:
        model.set_attn_implementation(name)
        results.append(model(*inputs).last_hidden_state[where])
    assert_same(*results, list(model.parameters()), **tolerances)


@DTYPES
@pytest.mark.parametrize("origin", ["eager", "sdpa"])
def test_without_sweeps(origin: str, dtype: torch.dtype) -> None:
    assert_same_models(bert().to(dtype), ("fastdsm-softmax", origin), torch.randint(50, (3, 9)))
    assert_same_models(vit().to(dtype), ("fastdsm-softmax", origin), torch.randn(2, 3, 16, 16))


@DTYPES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_sweeps(side: str, dtype: torch.dtype) -> None:
    mask = padded(side)
    assert_same_models(bert().to(dtype), ("fastdsm-softmax", "sdpa"), torch.randint(50, (3, 9)), mask, where=mask.bool())


@DTYPES
def test_sweeps(dtype: torch.dtype) -> None:
    """Against a loop of half steps."""
    assert_same_models(bert().to(dtype), ("fastdsm", "half-steps"), torch.randint(50, (3, 9)))
    assert_same_models(vit().to(dtype), ("fastdsm", "half-steps"), torch.randn(2, 3, 16, 16))


@DTYPES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_sweeps(side: str, dtype: torch.dtype) -> None:
    """A padded batch is its sequences one by one."""
    model = bert().to(dtype)
    model.set_attn_implementation("fastdsm")
    ids, mask = torch.randint(50, (3, 9)), padded(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(ids, mask, position_ids=positions).last_hidden_state
    alone = torch.cat([model(row[valid][None]).last_hidden_state[0] for row, valid in zip(ids, mask.bool(), strict=True)])
    assert_same(together[mask.bool()], alone, list(model.parameters()))
