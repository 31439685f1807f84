"""``convert`` on torch's own layers: what they were without sweeps, the oracle's with them; what is left has a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdsm
from fastdsm.integrations import Report, convert

DIM, HEADS, LENGTHS = 32, 4, torch.tensor([9, 5, 2])
PADDING = torch.arange(9) >= LENGTHS[:, None]
VALUE, GRADIENT = 2e-6, 1e-5


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def error(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return float((found.detach().double() - right.detach().double()).abs().max())


def encoder(**options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True, **options)
    return randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first")))


def names(report: Report) -> tuple[list[str], list[str]]:
    return [x.name for x in report.changed], [x.name for x in report.left]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_without_sweeps(padded: bool, training: bool, grad: bool) -> None:
    """Also where the original takes its fast path, with nested tensors."""
    model = encoder().train(training)
    ours = copy.deepcopy(model)
    assert names(convert(ours, n_iters=0)) == (["layers.0.self_attn", "layers.1.self_attn"], [])
    assert all(layer.self_attn.training is training for layer in ours.layers)
    x, padding = torch.randn(3, 9, DIM), PADDING if padded else None
    valid = ~PADDING if padded else torch.ones(3, 9, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        found, right = (each(x, src_key_padding_mask=padding)[valid] for each in (ours, model))
    assert error(found, right) <= VALUE
    if grad:
        cotangent = torch.randn_like(found)
        gradients = (torch.autograd.grad(y, list(m.parameters()), cotangent) for y, m in ((found, ours), (right, model)))
        assert max(error(*pair) for pair in zip(*gradients, strict=True)) <= GRADIENT * 10


def test_encoder_with_sweeps() -> None:
    """A padded batch is its sequences one by one, their attention by the oracle in float64."""
    model = encoder(norm_first=True).eval()
    ours = copy.deepcopy(model)
    convert(ours)
    x = torch.randn(3, 9, DIM)
    found = ours(x, src_key_padding_mask=PADDING)
    for k, length in enumerate(LENGTHS.tolist()):
        y = x[k, :length].double()
        for layer in copy.deepcopy(model).double().layers:
            y = y + by_the_oracle(layer.self_attn, layer.norm1(y))
            y = y + layer.linear2(layer.linear1(layer.norm2(y)).relu())
        assert error(found[k, :length], y) <= VALUE


def by_the_oracle(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Attention of x (N, DIM) to itself by three sweeps."""
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, HEADS, DIM // HEADS)).permute(1, 2, 0, 3).unsqueeze(1)
    out = fastdsm.reference.sinkhorn_attention(q, k, v, n_iters=3)
    assert isinstance(out, Tensor)
    mixed: Tensor = attention.out_proj(out[0].transpose(0, 1).flatten(1))
    return mixed


def test_transformer() -> None:
    """Encoder, decoder and its attention to the memory; what is causal stays, and is replaced by request."""
    model = randomised(nn.Transformer(DIM, HEADS, 1, 1, 64, dropout=0.0, batch_first=True)).eval()
    ours = copy.deepcopy(model)
    found = convert(ours, n_iters=0)
    changed, left = ["encoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"], ["decoder.layers.0.self_attn"]
    assert names(found) == (changed, left)
    assert found.left[0].reason == "causal self-attention of a decoder keeps its own"
    x, y, causal = torch.randn(3, 9, DIM), torch.randn(3, 9, DIM), nn.Transformer.generate_square_subsequent_mask(9)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    assert error(ours(x, y, **options), model(x, y, **options)) <= VALUE
    again = convert(ours, causal="error")
    assert names(again) == (left, changed)
    assert {entry.reason for entry in again.left} == {"is Sinkhorn's already"}
    with pytest.raises(ValueError, match="is_causal=True has no Sinkhorn plan"):
        ours(x, y, **options)


def test_cross_attention_of_equal_lengths() -> None:
    """Padding of the memory is none of the decoder's, though it has as many lines."""
    model = randomised(nn.Transformer(DIM, HEADS, 1, 1, 64, dropout=0.0, batch_first=True)).eval()
    convert(model)
    x, y = torch.randn(3, 9, DIM), torch.randn(3, 9, DIM)
    found = model(x, y, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)
    for k, length in enumerate(LENGTHS.tolist()):
        assert error(found[k], model(x[k : k + 1, :length], y[k : k + 1])[0]) <= VALUE


class Two(nn.Module):
    """Attention with keys and values of other widths, once in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(DIM, HEADS, dropout=0.5, kdim=8, vdim=12, bias=False, dtype=torch.float64)
        self.second = nn.ModuleDict({"again": self.first})
        self.first.q_proj_weight.requires_grad_(False)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = self.second["again"](x, key, value)[0]
        return out


def test_what_is_kept() -> None:
    """Parameter objects with dtype and requires_grad, mode, options; a shared module is one again; no random draws."""
    model = Two().eval()
    operands = [torch.randn(5, 3, DIM, dtype=torch.float64), *(torch.randn(7, 3, n, dtype=torch.float64) for n in (8, 12))]
    right, parameters, keys = model(*operands), list(model.parameters()), list(model.state_dict())
    state = torch.get_rng_state()
    assert names(convert(model, n_iters=0)) == (["first"], [])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.first is model.second["again"]
    assert isinstance(model.first, fastdsm.nn.SinkhornAttention)
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    assert sorted(model.state_dict()) == sorted(keys)
    assert not model.first.training
    assert (model.first.dropout, model.first.batch_first) == (0.5, False)
    assert not model.first.q_proj_weight.requires_grad
    assert error(model(*operands), right) <= 1e-12


class Pool(nn.Module):
    """Attention from one learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, DIM))
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(self.probe.expand(len(x), 1, DIM), key=x, value=x)[0]
        return out


def test_one_query() -> None:
    """Its plan is the uniform one: an error that says how to leave it."""
    model, x = Pool(), torch.randn(3, 9, DIM)
    right = model(x)
    found = convert(model, leave=["att*"])
    assert names(found) == ([], ["attention"])
    assert found.left[0].reason == "left by request"
    assert torch.equal(model(x), right)
    convert(model)
    with pytest.raises(ValueError, match=r"from one query to 9 keys.*leave=\[\.\.\.\]"):
        model(x)
    assert model(x[:, :1]).shape == (3, 1, DIM)


class Mine(nn.MultiheadAttention):
    """A subclass."""


class HomemadeAttention(nn.Module):
    """A class that nobody knows."""


class Fused(nn.Module):
    """Attention under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_what_is_left() -> None:
    hooked = nn.MultiheadAttention(DIM, HEADS)
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.MultiheadAttention(DIM, HEADS)
    replaced.out_proj = nn.Sequential()  # type: ignore[assignment]
    parametrised = nn.MultiheadAttention(DIM, HEADS)
    nn.utils.parametrizations.weight_norm(parametrised, "in_proj_weight")
    model = nn.ModuleDict(
        {
            "subclass": Mine(DIM, HEADS), "kv": nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True),
            "zero": nn.MultiheadAttention(DIM, HEADS, add_zero_attn=True), "hooked": hooked, "replaced": replaced,
            "parametrised": parametrised, "homemade": HomemadeAttention(), "fused": Fused(), "linear": nn.Linear(1, 1),
            "served": nn.MultiheadAttention(DIM, HEADS),
        }
    )  # fmt: skip
    found = convert(model)
    assert names(found)[0] == ["served"]
    reasons = {entry.name: entry.reason for entry in found.left}
    for name, part in {
        "subclass": "a subclass of", "kv": "without a query", "zero": "without a query", "hooked": "hooks",
        "replaced": "out_proj", "parametrised": "a subclass of", "homemade": "not known: ", "fused": "not known: ",
    }.items():  # fmt: skip
        assert part in reasons.pop(name), name
    assert not reasons
    lines = str(found).splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["name", "class", "what"]
    assert lines[1].split() == ["changed", "served", "MultiheadAttention", "now", "SinkhornAttention"]
    assert len({line.index(kind) for line, kind in zip(lines[1:3], ("MultiheadAttention", "Mine"), strict=True)}) == 1
    assert str(convert(nn.Linear(1, 1))) == "no attention modules"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"n_iters": -1}, ValueError, "n_iters must be >= 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a float"),
        ({"first": "rows"}, ValueError, "first must be one of"),
        ({"causal": "left"}, ValueError, "causal must be one of 'own', 'error'"),
        ({"tol": -1.0}, ValueError, "tol must be None or"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Before anything is changed."""
    model = encoder()
    with pytest.raises(kind, match=message):
        convert(model, **options)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_a_module_without_a_holder() -> None:
    with pytest.raises(TypeError, match="cannot be replaced in place"):
        convert(nn.MultiheadAttention(DIM, HEADS))


def test_compiled_and_trained() -> None:
    model = encoder().train()
    convert(model, temperature=0.7, first="row", tol=None, n_iters=2)
    x = torch.randn(3, 9, DIM)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert error(compiled(x, src_key_padding_mask=PADDING), model(x, src_key_padding_mask=PADDING)) <= VALUE
    assert model.layers[1].self_attn.options == {"n_iters": 2, "first": "row", "tol": None, "backend": "auto"}
    assert model.layers[1].self_attn.temperature == 0.7
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model(x, src_key_padding_mask=PADDING)[~PADDING].square().sub(0.3).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
