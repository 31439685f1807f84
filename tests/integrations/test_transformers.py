"""transformers' encoders: without sweeps they are the model, with sweeps the oracle's, padded or alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastdsm

from .models import (
    TEXT,
    bert,
    error,
    outputs,
    padded,
    positions_of,
    randomised,
    sinkhorn,
    transformers,
    vit,
    words,
)  # fmt: skip

SIDES = pytest.mark.parametrize("side", ["left", "right"])
MODELS = pytest.mark.parametrize("name", TEXT)
VALUE, GRADIENT = 2e-6, 1e-5


@pytest.mark.parametrize("origin", ["sdpa", "eager"])
@MODELS
def test_without_sweeps(name: str, origin: str) -> None:
    """Values, and gradients of all parameters."""
    model, ids, mask = TEXT[name](), words(3, 9), padded("right")
    found, right = (outputs(model, attention, ids, mask)[mask.bool()] for attention in ("softmax", origin))
    assert error(found, right) <= VALUE
    cotangent = torch.randn_like(right)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), cotangent, allow_unused=True) for x in (found, right))
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        assert x is None or error(x, y) <= GRADIENT * max(1.0, float(y.abs().max()))


def test_images_without_sweeps() -> None:
    model, images = vit(), torch.randn(2, 3, 16, 16)
    assert error(outputs(model, "softmax", images), outputs(model, "sdpa", images)) <= VALUE


@SIDES
@MODELS
def test_sweeps(name: str, side: str) -> None:
    """A padded batch in float32 is its sentences one by one, by the oracle in float64; and another than softmax's."""
    model, ids, mask = TEXT[name](), words(3, 9), padded(side)
    positions = positions_of(model, mask)
    together, alone = outputs(model, "sinkhorn", ids, mask, **positions), copy.deepcopy(model).double()
    for k in range(3):
        valid = mask[k].bool()
        own = {x: y[k, valid][None] for x, y in positions.items()}
        right = outputs(alone, "oracle", ids[k, valid][None], **own)[0]
        assert error(together[k, valid], right) <= VALUE
    assert error(together, outputs(model, "sdpa", ids, mask, **positions)) > 1e-3


def test_sweeps_of_images() -> None:
    model, images = vit(), torch.randn(2, 3, 16, 16)
    right = outputs(copy.deepcopy(model).double(), "oracle", images.double())
    assert error(outputs(model, "sinkhorn", images), right) <= VALUE


def test_options() -> None:
    """Temperature, the side that is exact and a tolerance arrive; one name with others, again."""
    model, ids = bert(num_hidden_layers=1), words(1, 9)
    expected = {"n_iters": 2, "temperature": 0.5, "first": "row"}
    sinkhorn.register("tuned", **expected)
    model.set_attn_implementation("tuned")
    plan = model(ids, output_attentions=True).attentions[0]
    layer = model.encoder.layer[0].attention.self
    hidden = model.embeddings(ids)
    q, k = (x(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for x in (layer.query, layer.key))
    right = fastdsm.reference.sinkhorn((q @ k.mT / 8**0.5).double(), **expected)
    assert error(plan, right) <= VALUE
    sinkhorn.register("tuned", tol=1e-3, n_iters=50)
    assert error(model(ids, output_attentions=True).attentions[0].sum(-2), torch.ones(1, 4, 9)) <= 2e-3


def test_attention_that_is_returned() -> None:
    """Plans, of the lines that are no padding, and the same hidden states as without."""
    model, ids, mask = bert(), words(3, 9), padded("left")
    alone = outputs(model, "sinkhorn", ids, mask)
    found = model(ids, mask, output_attentions=True)
    assert error(found.last_hidden_state, alone) <= VALUE
    assert len(found.attentions) == 2
    for plan in found.attentions:
        assert plan.shape == (3, 4, 9, 9)
        assert error(plan.sum(-1), mask[:, None].expand(3, 4, 9)) <= VALUE
        assert error(plan[1, :, 3:, 3:].sum(-2), torch.ones(4, 6)) < 0.1


def test_dropout() -> None:
    """Of the plan, in training alone; what is returned is what was used."""
    model = bert(attention_probs_dropout_prob=0.5, num_hidden_layers=1)
    model.set_attn_implementation("sinkhorn")
    layer, ids = model.encoder.layer[0].attention.self, words(2, 9)
    hidden = model.embeddings(ids)
    whole = layer(hidden, output_attentions=True)[1]
    assert bool((whole > 0).all())
    layer.train()
    out, plan = layer(hidden, output_attentions=True)
    dropped = plan == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert error(plan[~dropped], 2 * whole[~dropped]) <= VALUE
    values = layer.value(hidden).unflatten(-1, (4, 8)).transpose(1, 2)
    assert error(out, (plan @ values).transpose(1, 2).flatten(2)) <= VALUE


def test_training() -> None:
    """A few steps lower the loss; gradients with checkpointing are those without."""
    torch.manual_seed(1)
    model = bert().train()
    model.set_attn_implementation("sinkhorn")
    ids, mask, target = words(3, 9), padded("right"), torch.randn(3, 9, 32)

    def loss() -> torch.Tensor:
        return (model(ids, mask).last_hidden_state - target).square().mean()

    plain = torch.autograd.grad(loss(), list(model.parameters()))
    model.activation_checkpointing_enable()
    for x, y in zip(torch.autograd.grad(loss(), list(model.parameters())), plain, strict=True):
        assert error(x, y) <= GRADIENT
    first, optimiser = loss().item(), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss().item() < 0.9 * first


@pytest.mark.parametrize("name", ["bert", "t5", "modernbert"])
def test_compiled(name: str) -> None:
    """In one graph, padding and all."""
    model, ids, mask = TEXT[name](), words(3, 9), padded("right")
    eager = outputs(model, "sinkhorn", ids, mask)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(ids, mask).last_hidden_state, eager) <= VALUE


def test_bfloat16() -> None:
    """Within what rounding the model to 16 bits does to its softmax."""
    model, ids, mask = bert(), words(3, 9), padded("right")
    valid, halved = mask.bool(), copy.deepcopy(model).bfloat16()
    of_softmax, of_plans = (
        error(outputs(halved, name, ids, mask)[valid], outputs(model, name, ids, mask)[valid]) for name in ("sdpa", "sinkhorn")
    )
    assert outputs(halved, "sinkhorn", ids, mask).dtype == torch.bfloat16
    assert 0 < of_plans <= 2 * of_softmax + 1e-2


def test_saved_and_loaded(tmp_path: Any) -> None:
    """Weights are the model's; the name is not saved, and is given again."""
    model, ids = bert(), words(2, 9)
    found = outputs(model, "sinkhorn", ids)
    model.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False, attn_implementation="sinkhorn").eval()
    assert torch.equal(again(ids).last_hidden_state, found)
    forgotten = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert forgotten.config._attn_implementation == "sdpa"


def test_fewer_heads_of_keys() -> None:
    """A Llama that looks both ways, as embedding models make of it, with two key heads for four query heads."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )
    model, ids = randomised(transformers.LlamaModel(config)), words(2, 9)
    both = torch.ones(2, 1, 9, 9, dtype=torch.bool)  # in a mask of four dimensions nothing is added
    options = {"is_causal": False, "use_cache": False}
    assert error(outputs(model, "softmax", ids, both, **options), outputs(model, "sdpa", ids, both, **options)) <= VALUE
    right = copy.deepcopy(model).double()
    found = outputs(model, "sinkhorn", ids, both, **options)
    for name in ("q_proj", "k_proj", "v_proj"):  # the same with the heads of keys written out
        for layer in right.layers:
            if name != "q_proj":
                weight = getattr(layer.self_attn, name).weight
                weight.data = weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1).data
    for layer in right.layers:
        layer.self_attn.num_key_value_groups = 1
    assert error(found, outputs(right, "oracle", ids, both, **options)) <= VALUE
