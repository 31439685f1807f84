"""torch's own layers converted, nn.SinkhornAttention in their attention's place: without sweeps they are the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdsm.integrations import convert

from ..half_steps import half_steps, log_plan
from .parity import DTYPES, assert_close, assert_same, leaves_of, randomised, value_tolerance

DIM, HEADS = 32, 4


def swapped_of(origin: nn.Module, n_iters: int) -> Any:
    """A copy, converted."""
    swapped = copy.deepcopy(origin)
    assert convert(swapped, n_iters=n_iters).changed
    return swapped


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first: bool, padded: bool, training: bool, dtype: torch.dtype) -> None:
    origin = nn.TransformerEncoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=dtype)
    origin = randomised(origin, 0.1).train(training)
    swapped = swapped_of(origin, n_iters=0)
    (x,) = leaves_of((3, 9, DIM), dtype=dtype)
    padding = torch.arange(9) >= torch.tensor([9, 5, 2])[:, None] if padded else torch.zeros(3, 9, dtype=torch.bool)
    found, theirs = (layer(x, src_key_padding_mask=padding if padded else None) for layer in (swapped, origin))
    assert_same(found[~padding], theirs[~padding], [x, *swapped.parameters()], [x, *origin.parameters()])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_encoder_without_gradient(padded: bool) -> None:
    """The original's fast path, with nested tensors, and ours, which has neither."""
    origin = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True), 2)
    origin = randomised(origin, 0.1).eval()
    swapped = swapped_of(origin, n_iters=0)
    x = torch.randn(3, 9, DIM)
    padding = torch.arange(9) >= torch.tensor([9, 5, 2])[:, None] if padded else torch.zeros(3, 9, dtype=torch.bool)
    with torch.no_grad():
        found, theirs = (model(x, src_key_padding_mask=padding if padded else None) for model in (swapped, origin))
    assert_close(found[~padding], theirs[~padding], 2e-6)


@DTYPES
def test_decoder_layer(dtype: torch.dtype) -> None:
    """Attention to the memory alone: a causal plan would be the identity."""
    origin = randomised(nn.TransformerDecoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True, dtype=dtype), 0.1)
    swapped = swapped_of(origin, n_iters=0)
    x, memory = leaves_of((3, 9, DIM), (3, 7, DIM), dtype=dtype)
    causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=dtype)
    padding = torch.arange(7) >= torch.tensor([7, 5, 2])[:, None]
    found, theirs = (
        layer(x, memory, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=True) for layer in (swapped, origin)
    )
    assert_same(found, theirs, *([x, memory, *layer.parameters()] for layer in (swapped, origin)))


@DTYPES
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_and_its_weights(batch_first: bool, dtype: torch.dtype) -> None:
    origin = randomised(nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, dtype=dtype), 0.1)
    (ours,) = swapped_of(nn.ModuleList([origin]), n_iters=0)
    (x,) = leaves_of((3, 9, DIM), dtype=dtype)
    lines = 9 if batch_first else 3
    mask = torch.rand(lines, lines) < 0.3
    mask.fill_diagonal_(False)
    (found, weights), (theirs, softmax) = (layer(x, x, x, attn_mask=mask, need_weights=True) for layer in (ours, origin))
    assert_close(weights.detach(), softmax.detach(), value_tolerance(dtype))
    assert_same(found, theirs, *([x, *layer.parameters()] for layer in (ours, origin)))


@DTYPES
def test_sweeps_in_an_encoder_layer(dtype: torch.dtype) -> None:
    """Three sweeps, against the layer with a loop of half steps where its softmax was; a padded batch is the unpadded one."""
    origin = nn.TransformerEncoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True, dtype=dtype)
    origin = randomised(origin, 0.1)
    swapped = swapped_of(origin, n_iters=3)
    (x,) = leaves_of((3, 9, DIM), dtype=dtype)
    lengths = [9, 5, 2]
    padding = torch.arange(9) >= torch.tensor(lengths)[:, None]
    mixed = [origin.norm1(y + looped(origin.self_attn, y)) for y in (row[:n] for row, n in zip(x, lengths, strict=True))]
    alone = nn.utils.rnn.pad_sequence([origin.norm2(y + origin.linear2(origin.linear1(y).relu())) for y in mixed], True)
    found = swapped(x, src_key_padding_mask=padding)
    assert_same(found[~padding], alone[~padding], [x, *swapped.parameters()], [x, *origin.parameters()])


def looped(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Attention of x (N, DIM) to itself by three sweeps, one half step after the other."""
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, HEADS, DIM // HEADS)).permute(1, 2, 0, 3)
    scores = q.double() @ k.double().mT / (DIM // HEADS) ** 0.5
    plan = log_plan(scores, *half_steps(scores, 6, "col")).exp().to(x.dtype)
    mixed: Tensor = attention.out_proj((plan @ v).transpose(0, 1).flatten(1))
    return mixed
