"""What goes wrong in silence where attention is registered by hand, or is an error here that says what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdsm.integrations.transformers import report

from .models import (
    BART,
    SIZES,
    T5,
    WORDS,
    bert,
    error,
    outputs,
    padded,
    positions_of,
    randomised,
    sinkhorn,
    t5_encoder,
    transformers,
    vit,
    words,
)  # fmt: skip

VALUE = 2e-6


def bart() -> Any:
    return randomised(transformers.BartModel(transformers.BartConfig(**BART)))


def t5() -> Any:
    return randomised(transformers.T5Model(transformers.T5Config(**T5, num_decoder_layers=2)))


def bert_decoder() -> Any:
    """A BERT that looks at an encoder, by BertCrossAttention."""
    return bert(is_decoder=True, add_cross_attention=True)


def attend(name: str, module: Any, *operands: Tensor, **options: Any) -> Tensor:
    """A registered attention called as a module would."""
    registered = transformers.AttentionInterface._global_mapping[name]
    out: Tensor = registered(module, *operands, **options)[0]
    return out


class Encoder(nn.Module):
    """Attention to one sequence."""

    is_causal = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> None: ...


class Either(Encoder):
    """Attention to a sequence or to another."""

    def forward(self, hidden_states: Tensor, context: Tensor | None = None) -> None:  # type: ignore[override]
        ...


def operands(queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, queries, 8), torch.randn(2, 4, keys, 8), torch.randn(2, 4, keys, 8)


def test_registered_in_both_places() -> None:
    """Pitfall 1: under a name without a mask function padding would be attended to."""
    assert "sinkhorn" in transformers.AttentionMaskInterface._global_mapping
    model, ids, mask = bert(), words(3, 9), padded("right")
    other = torch.where(mask.bool(), ids, ids.flip(0))
    assert error(outputs(model, "sinkhorn", ids, mask)[mask.bool()], outputs(model, "sinkhorn", other, mask)[mask.bool()]) == 0


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf, -1e9, -1e4])
def test_masks_of_four_dimensions(lowest: float) -> None:
    """Pitfall 2: a user's mask comes as it is, floating with what softmax takes for minus infinity, or bool."""
    model, ids, mask = bert(), words(3, 9), padded("left")
    right = outputs(model, "sinkhorn", ids, mask)[mask.bool()]
    entries = mask.bool()[:, None, None].expand(3, 1, 9, 9)
    floating = torch.zeros(3, 1, 9, 9).masked_fill(~entries, lowest)
    for given in (entries, floating, floating[:, :, :1]):
        assert error(outputs(model, "sinkhorn", ids, given)[mask.bool()], right) <= VALUE


def test_a_floating_mask_is_also_a_bias() -> None:
    """Logits as low as Swin's -100 are added, with gradient."""
    q, k, v = operands()
    bias = torch.randn(2, 1, 5, 5) * 20
    bias[..., 2] -= 100
    bias.requires_grad_()
    right = attend("oracle", Encoder(), q, k, v, bias.double(), scaling=0.5)
    found = attend("sinkhorn", Encoder(), q, k, v, bias, scaling=0.5)
    assert error(found, right) <= VALUE * 10
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad(x, bias, cotangent)[0] for x in (found, right)]
    assert error(*gradients) <= 1e-4


def test_one_mask_for_all() -> None:
    """Pitfall 3: a mask of batch 1; a key that one head may see is no padding."""
    q, k, v = operands()
    mask = torch.ones(1, 4, 5, 5, dtype=torch.bool)
    mask[:, :, :, 4] = False
    found = attend("sinkhorn", Encoder(), q, k, v, mask)
    assert error(found[:, :4], attend("oracle", Encoder(), q[:, :, :4], k[:, :, :4], v[:, :, :4], None)) <= VALUE
    assert not found[:, 4].any()
    mask[:, 1, :, 4] = True
    assert attend("sinkhorn", Encoder(), q, k, v, mask)[:, 4].all()


CROSS = {"bart": (bart, "input_ids"), "t5": (t5, "input_ids")}


@pytest.mark.parametrize("length", [9, 7])
@pytest.mark.parametrize("name", CROSS)
def test_cross_attention(name: str, length: int) -> None:
    """Pitfall 4: with as many queries as keys, padding of an encoder's output is not padding of the decoder's input."""
    model, ids, decoded, mask = CROSS[name][0](), words(3, 9), words(3, length), padded("right")
    model.set_attn_implementation("own")
    together = model(ids, mask, decoder_input_ids=decoded).last_hidden_state
    for k in range(3):
        alone = model(ids[k, mask[k].bool()][None], decoder_input_ids=decoded[k : k + 1]).last_hidden_state
        assert error(together[k], alone[0]) <= VALUE


@pytest.mark.parametrize("length", [9, 7])
def test_cross_attention_of_bert(length: int) -> None:
    model, memory, decoded, mask = bert_decoder(), torch.randn(3, 9, 32), words(3, length), padded("left")
    model.set_attn_implementation("own")
    together = model(decoded, encoder_hidden_states=memory, encoder_attention_mask=mask).last_hidden_state
    for k in range(3):
        alone = model(decoded[k : k + 1], encoder_hidden_states=memory[k, mask[k].bool()][None]).last_hidden_state
        assert error(together[k], alone[0]) <= VALUE


def test_modules_that_may_be_either() -> None:
    """What cannot be known is asked for, where it matters: with padding and as many keys as queries."""
    q, k, v = operands()
    mask = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, None]
    module: Any = Either()
    with pytest.raises(ValueError, match=r"Either can attend to its own .* is_cross_attention = True or False"):
        attend("sinkhorn", module, q, k, v, mask)
    assert attend("softmax", module, q, k, v, mask).shape == (2, 5, 4, 8)
    assert attend("sinkhorn", module, q, k, v, None).shape == (2, 5, 4, 8)
    module.is_cross_attention = True
    assert (
        error(attend("sinkhorn", module, q, k, v, mask)[1], attend("oracle", module, q, k[:, :, :3], v[:, :, :3], None)[1])
        <= VALUE
    )
    module.is_cross_attention = False
    alone = attend("oracle", module, q[:, :, :3], k[:, :, :3], v[:, :, :3], None)
    assert error(attend("sinkhorn", module, q, k, v, mask)[1, :3], alone[1]) <= VALUE


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    return randomised(transformers.LlamaModel(config))


def clip_text() -> Any:
    """Causal by argument, although its modules say that they are not."""
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, eos_token_id=2
    )
    return randomised(transformers.CLIPTextModel(config))


@pytest.mark.parametrize(
    ("make", "module"),
    [(llama, "LlamaAttention"), (clip_text, "CLIPAttention"), (lambda: bert(is_decoder=True), "BertSelfAttention")],
    ids=["llama", "clip", "bert"],
)
def test_causal_modules(make: Any, module: str) -> None:
    """Pitfall 5: an error that names the module; by request they keep their own, with padding."""
    model, ids, mask = make(), words(3, 9), padded("right")
    with pytest.raises(ValueError, match=rf'{module} is causal.*causal="own"'):
        outputs(model, "sinkhorn", ids)
    assert error(outputs(model, "own", ids, mask), outputs(model, "sdpa", ids, mask)) <= VALUE


@pytest.mark.parametrize("name", CROSS)
def test_encoder_and_decoder_without_sweeps(name: str) -> None:
    model, ids, mask, decoded = CROSS[name][0](), words(3, 9), padded("right"), words(3, 9)
    right = outputs(model, "sdpa", ids, mask, decoder_input_ids=decoded)
    assert error(outputs(model, "softmax-own", ids, mask, decoder_input_ids=decoded), right) <= VALUE
    with pytest.raises(ValueError, match=r"Attention is causal"):
        outputs(model, "softmax", ids, mask, decoder_input_ids=decoded)


def test_modules_that_do_not_say_whether_they_are_causal() -> None:
    """LayoutLM's and Doge's: softmax attention in eager mode takes them for no, by sdpa for yes."""
    with pytest.raises(ValueError, match=r"Linear does not say whether it is causal.*Linear\.is_causal = False"):
        attend("sinkhorn", nn.Linear(1, 1), *operands(), None)


def test_generation() -> None:
    """One query has no plan but the uniform one; without sweeps it is softmax."""
    q, k, v = operands(1, 5)
    with pytest.raises(ValueError, match=r"Encoder attends from one query to 5 keys"):
        attend("sinkhorn", Encoder(), q, k, v, None)
    assert error(attend("softmax", Encoder(), q, k, v, None), attend("sdpa", Encoder(), q, k, v, None)) <= VALUE


def test_a_report_instead_of_no_effect() -> None:
    """Pitfall 7: MPNet's attention asks for nothing, and is named; so are the causal ones, and those set otherwise."""
    config = transformers.MPNetConfig(vocab_size=WORDS, max_position_embeddings=32, **SIZES)
    mpnet = transformers.MPNetModel(config)
    assert [entry.name for entry in report(mpnet).left] == [f"encoder.layer.{k}.attention.attn" for k in range(2)]
    assert "does not ask for an attention implementation" in str(report(mpnet))
    model = bart()
    assert {entry.reason for entry in report(model).left} == {"attn_implementation is 'sdpa'"}
    model.set_attn_implementation("own")
    found = report(model)
    assert [entry.name for entry in found.left] == [f"decoder.layers.{k}.self_attn" for k in range(2)]
    assert {entry.reason for entry in found.left} == {"causal, keeps its own"}
    assert {entry.name.split(".", 1)[0] for entry in found.changed} == {"encoder", "decoder"}
    assert len(found.changed) == 4
    assert not report(bert()).changed
    config = transformers.LayoutLMConfig(vocab_size=WORDS, **SIZES)
    silent = transformers.LayoutLMModel(config)
    silent.set_attn_implementation("own")
    assert {entry.reason for entry in report(silent).left} == {"does not say whether it is causal, will be an error"}
    assert not report(vit()).changed


def test_swin() -> None:
    """Pitfall 7: biases per window and head, and -100 between parts of a shifted one, which are logits."""
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0
    )
    model, images = randomised(transformers.SwinModel(config, add_pooling_layer=False)), torch.randn(2, 3, 32, 32)
    assert error(outputs(model, "softmax", images), outputs(model, "sdpa", images)) <= 1e-5
    right = outputs(copy.deepcopy(model).double(), "oracle", images.double())
    assert error(outputs(model, "sinkhorn", images), right) <= 1e-5


def test_position_biases() -> None:
    """T5's relative positions have a part in the plan, and their gradient."""
    model, ids, mask = t5_encoder(), words(3, 9), padded("right")
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    found = outputs(model, "sinkhorn", ids, mask)
    assert float(torch.autograd.grad(found.square().sum(), table)[0].abs().max()) > 1e-3
    with torch.no_grad():
        table.zero_()
    assert error(outputs(model, "sinkhorn", ids, mask), found) > 1e-3


def test_gaps() -> None:
    """Padding in the middle of a sentence is padding, too."""
    model, ids, mask = bert(), words(1, 9), torch.ones(1, 9, dtype=torch.long)
    mask[0, 3:5] = 0
    positions = positions_of(model, mask)
    found = outputs(model, "sinkhorn", ids, mask, **positions)[mask.bool()]
    valid = mask[0].bool()
    assert error(found, outputs(model, "oracle", ids[:, valid], position_ids=positions["position_ids"][:, valid])[0]) <= VALUE


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "cu_seq_lens_q", "max_length_k", "seq_idx", "novel"])
def test_arguments_are_not_swallowed(name: str) -> None:
    for registered in ("sinkhorn", "own"):
        with pytest.raises(ValueError, match=f'calls its attention with {name}, which .*ignore=."{name}"'):
            attend(registered, Encoder(), *operands(), None, **{name: torch.ones(4)})
    assert attend("sinkhorn", Encoder(), *operands(), None, **{name: None}).shape == (2, 5, 4, 8)
    sinkhorn.register("ignoring", ignore=[name])
    assert attend("ignoring", Encoder(), *operands(), None, **{name: torch.ones(4)}).shape == (2, 5, 4, 8)


def test_arguments_without_effect() -> None:
    q, k, v = operands()
    harmless = {"position_ids": torch.arange(5)[None], "use_cache": False, "deterministic": True}
    assert torch.equal(attend("sinkhorn", Encoder(), q, k, v, None, **harmless), attend("sinkhorn", Encoder(), q, k, v, None))


def test_attention_sinks() -> None:
    module: Any = Encoder()
    module.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="has attention sinks"):
        attend("sinkhorn", module, *operands(), None)


def test_plans_of_fewer_heads_of_keys() -> None:
    """Pitfall 8: one for each head of the query."""
    q, k, v = operands()
    registered = transformers.AttentionInterface._global_mapping["sinkhorn"]
    out, plan = registered(Encoder(), q, k[:, :2], v[:, :2], None, output_attentions=True)
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    right = registered(Encoder(), q, k, v, None, output_attentions=True)
    assert plan.shape == (2, 4, 5, 5)
    assert max(error(out, right[0]), error(plan, right[1])) <= VALUE
    assert error(out, (plan @ v).transpose(1, 2)) <= VALUE


def test_windows() -> None:
    """A window that no mask holds is an error, unless it is as wide as the sequence."""
    q, k, v = operands()
    with pytest.raises(ValueError, match="a sliding window of 3 over 5 keys"):
        attend("sinkhorn", Encoder(), q, k, v, None, sliding_window=3)
    plain = attend("sinkhorn", Encoder(), q, k, v, None)
    assert torch.equal(attend("sinkhorn", Encoder(), q, k, v, None, sliding_window=4), plain)


def test_learned_queries() -> None:
    """One set of queries for a batch of keys."""
    q, k, v = operands(3, 5)
    found = attend("sinkhorn", Encoder(), q[:1], k, v, None)
    assert error(found, attend("oracle", Encoder(), q[:1].expand(2, -1, -1, -1), k, v, None)) <= VALUE


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"name": "sdpa"}, ValueError, "that of another attention"),
        ({"name": "eager"}, ValueError, "that of another attention"),
        ({"name": "my_flash"}, ValueError, "must not contain 'flash'"),
        ({"name": "me/sinkhorn"}, ValueError, "must not contain '/'"),
        ({"name": ""}, TypeError, "not empty"),
        ({"n_iters": -1}, ValueError, "n_iters must be >= 0"),
        ({"n_iters": 2.5}, TypeError, "n_iters must be an int"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"first": "rows"}, ValueError, "first must be one of"),
        ({"causal": "raise"}, ValueError, "causal must be one of 'error', 'own'"),
        ({"tol": -1.0}, ValueError, "tol must be None or"),
    ],
    ids=str,
)
def test_registrations_that_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    before = dict(transformers.AttentionInterface._global_mapping)
    with pytest.raises(kind, match=message):
        sinkhorn.register(**options)
    assert before == transformers.AttentionInterface._global_mapping


def test_masks_of_integers() -> None:
    with pytest.raises(TypeError, match=r"an attention mask must be bool.*torch\.int64"):
        attend("sinkhorn", Encoder(), *operands(), torch.ones(2, 1, 5, 5, dtype=torch.long))
