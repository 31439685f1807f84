"""Small random models of transformers, and attention as the oracle computes it, registered as "oracle"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdsm import reference

transformers = pytest.importorskip("transformers", minversion="5.20", reason="the extra parity")
from transformers.masking_utils import sdpa_mask  # noqa: E402

from fastdsm.integrations import transformers as sinkhorn  # noqa: E402

WORDS = 50
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": WORDS, "max_position_embeddings": 32, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
}  # fmt: skip


def randomised(model: Any, scale: float = 0.1) -> Any:
    """In evaluation, with every parameter moved by random numbers, so that none of its terms is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=32, **{**SIZES, **options})
    return randomised(transformers.BertModel(config, add_pooling_layer=False))


def roberta() -> Any:
    config = transformers.RobertaConfig(vocab_size=WORDS, max_position_embeddings=32, **SIZES)
    return randomised(transformers.RobertaModel(config, add_pooling_layer=False))


def vit() -> Any:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    return randomised(transformers.ViTModel(config, add_pooling_layer=False))


def t5_encoder() -> Any:
    return randomised(transformers.T5EncoderModel(transformers.T5Config(**T5)))


def modernbert() -> Any:
    """Every other layer has a window of 2 on either side."""
    config = transformers.ModernBertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, local_attention=4,
        global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        attention_dropout=0.0, embedding_dropout=0.0, mlp_dropout=0.0,
    )  # fmt: skip
    return randomised(transformers.ModernBertModel(config))


TEXT = {"bert": bert, "roberta": roberta, "t5": t5_encoder, "modernbert": modernbert}


def padded(side: str) -> Tensor:
    """Attention masks (3, 9), 1 on sequences of 9, 6 and 2 tokens, padded on one side."""
    mask = (torch.arange(9) < torch.tensor([9, 6, 2])[:, None]).long()
    return mask if side == "right" else mask.flip(-1)


def words(*shape: int) -> Tensor:
    """Token ids that no model takes for padding."""
    return torch.randint(3, WORDS, shape)


def outputs(model: Any, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The last hidden states by one attention."""
    model.set_attn_implementation(name)
    hidden: Tensor = model(*args, **kwargs).last_hidden_state
    return hidden


def positions_of(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Positions from the first token on that is no padding, for models that are given any."""
    kind = type(model).__name__
    if kind.startswith("T5"):
        return {}
    first = 2 if kind.startswith("Roberta") else 0
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0) + first}


def error(found: Tensor, right: Tensor) -> float:
    """The largest difference, of values of about 1."""
    assert found.shape == right.shape
    return float((found.detach().double() - right.detach().double()).abs().max())


def oracle(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Three sweeps by fastdsm.reference, in float64; a mask is a pattern among queries that all take part."""
    mask = attention_mask
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias.masked_fill(~mask, -torch.inf)
    out = reference.sinkhorn_attention(query.double(), key.double(), value.double(), mask, scale=scaling, n_iters=3)
    assert isinstance(out, Tensor)
    return out.to(value.dtype).transpose(1, 2).contiguous(), None


sinkhorn.register("softmax", n_iters=0)
sinkhorn.register("sinkhorn")
sinkhorn.register("own", causal="own")
sinkhorn.register("softmax-own", n_iters=0, causal="own")
transformers.AttentionInterface.register("oracle", oracle)
transformers.AttentionMaskInterface.register("oracle", sdpa_mask)
