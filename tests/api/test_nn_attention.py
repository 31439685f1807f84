"""nn.SinkhornAttention in nn.MultiheadAttention's place: masks and padding, torch's own layers, made and copied modules."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fastdsm.nn import SinkhornAttention

LENGTHS = torch.tensor([6, 4, 1])
PADDING = torch.arange(6) >= LENGTHS[:, None]


def module(**options: Any) -> SinkhornAttention:
    """12 features, 3 heads, biases that show."""
    made = SinkhornAttention(12, 3, **{"batch_first": True, **options})
    with torch.no_grad():
        for name, x in made.named_parameters():
            if name.endswith("bias"):
                x.normal_()
    return made


def floating(mask: Tensor, dtype: torch.dtype = torch.float32, value: float | None = None) -> Tensor:
    """A mask that is added, of a bool one that takes out."""
    low = torch.finfo(dtype).min if value is None else value
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, low)


class TestPadding:
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("kind", ["bool", "float", "finfo.min", "half"])
    @pytest.mark.parametrize("mask", [None, "bool", "float", "heads"])
    def test_a_padded_batch_is_the_unpadded_one(
        self, mask: str | None, kind: str, batch_first: bool, need_weights: bool
    ) -> None:
        """Whatever lies on padded lines, in values and in every gradient."""
        layer = module(batch_first=batch_first, n_iters=7)
        x = torch.randn(3, 6, 12)
        padding = {
            "bool": PADDING,
            "float": floating(PADDING, value=-torch.inf),
            "finfo.min": floating(PADDING),
            "half": floating(PADDING, torch.float16),
        }[kind]
        heads = torch.randn(9, 6, 6)
        entries = {None: None, "bool": torch.eye(6).roll(1, 0) > 0, "float": torch.randn(6, 6), "heads": heads}[mask]
        if mask == "bool" and LENGTHS.min() == 1:
            entries = entries & (torch.arange(6) > 1)  # (0, 0) takes part
        results = []
        for fill in (0.0, 1e4, torch.nan, torch.inf):
            layer.zero_grad()
            filled = x.masked_fill(PADDING[..., None], fill).requires_grad_()
            given = filled if batch_first else filled.transpose(0, 1)
            out, weights = layer(given, given, given, padding, need_weights, entries)
            out = out if batch_first else out.transpose(0, 1)
            assert torch.equal(out[PADDING], layer.out_proj.bias.expand(int(PADDING.sum()), 12))
            out[~PADDING].square().sum().backward()
            assert (filled.grad[PADDING] == 0).all()
            assert weights is None or not bool(weights[PADDING].any() or weights.mT[PADDING].any())
            results.append((out.detach(), filled.grad, *(p.grad.clone() for p in layer.parameters())))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        for k, length in enumerate(LENGTHS.tolist()):
            alone = x[k, :length]
            part = entries if entries is None else entries[..., :length, :length]
            part = part[3 * k : 3 * k + 3] if mask == "heads" else part
            expected, _ = layer(alone, alone, alone, attn_mask=part, need_weights=need_weights)
            torch.testing.assert_close(results[0][0][k, :length], expected, rtol=1e-5, atol=1e-6)

    def test_who_is_found_to_be_one(self) -> None:
        """One tensor, and views of the same memory, but not what has other strides, places or a copy's."""
        layer, x = module(), torch.randn(3, 6, 12)
        padded = layer(x, x, x, PADDING)[0]
        as_is = layer(x, x.clone(), x, PADDING)[0]
        assert not torch.allclose(padded, as_is)
        for query in (x.detach(), x.view(3, 6, 12), x[:], x.transpose(0, 1).transpose(0, 1)):
            assert torch.equal(layer(query, x, x, PADDING)[0], padded)
        twice = torch.cat([x, x])
        assert torch.equal(layer(twice[3:], twice[:3], x, PADDING)[0], as_is)
        assert torch.equal(layer(x, x, x, PADDING, query_padding_mask=None)[0], as_is)
        assert torch.equal(layer(x.clone(), x, x, PADDING, query_padding_mask=PADDING)[0], padded)

    def test_the_constructor_decides(self) -> None:
        x = torch.randn(3, 6, 12)
        auto, yes, no = (module(self_attention=decides) for decides in (None, True, False))
        for layer in (yes, no):
            layer.load_state_dict(auto.state_dict())
        one, two = auto(x, x, x, PADDING)[0], auto(x, x.clone(), x, PADDING)[0]
        assert torch.equal(yes(x, x.clone(), x, PADDING)[0], one)
        assert torch.equal(no(x, x, x, PADDING)[0], two)
        with pytest.raises(ValueError, match="queries and keys of one length"):
            yes(x[:, :4], x, x, PADDING)
        assert torch.equal(yes(x[:, :4], x, x, PADDING, query_padding_mask=None)[0], auto(x[:, :4], x, x, PADDING)[0])

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoints(self, reentrant: bool) -> None:
        layer, x = module(), torch.randn(3, 6, 12, requires_grad=True)
        gradients = []
        for call in (layer, lambda *given: checkpoint(layer, *given, use_reentrant=reentrant)):
            layer.zero_grad()
            x.grad = None
            out = call(x, x, x, PADDING, False)[0]
            out.square().sum().backward()
            gradients.append((out, x.grad, *(p.grad.clone() for p in layer.parameters())))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)

    def test_vmap(self) -> None:
        """Where memory cannot be compared: one tensor is seen to be one, copies are the constructor's to decide."""
        x = torch.randn(3, 6, 12)
        layer = module()
        told = module(self_attention=True)
        told.load_state_dict(layer.state_dict())
        expected = layer(x, x, x, PADDING)[0]
        one = torch.vmap(lambda a, p: layer(a, a, a, p)[0])(x, PADDING)
        several = torch.vmap(lambda a, b, p: told(a, b, b, p)[0])(x, x, PADDING)
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(several, expected)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_compiled(self, kind: str) -> None:
        layer, x = module(), torch.randn(3, 6, 12)
        padding = PADDING if kind == "bool" else floating(PADDING)

        def call(a: Tensor) -> Tensor:
            return layer(a, a, a, padding, need_weights=False)[0]

        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))

    def test_a_floating_padding_mask_is_added(self) -> None:
        """As by nn.MultiheadAttention, of which no sweeps are the softmax."""
        theirs = nn.MultiheadAttention(12, 3, batch_first=True)
        ours = SinkhornAttention(12, 3, batch_first=True, n_iters=0)
        ours.load_state_dict(theirs.state_dict())
        query, key, padding = torch.randn(3, 5, 12), torch.randn(3, 6, 12), torch.randn(3, 6)
        padding[0, 2] = -torch.inf
        mask = torch.randn(5, 6)
        for need_weights in (True, False):
            out, weights = ours(query, key, key, padding, need_weights, mask)
            expected = theirs(query, key, key, padding, attn_mask=mask)
            torch.testing.assert_close(out, expected[0])
            assert weights is None or torch.allclose(weights, expected[1], atol=1e-6)

    @pytest.mark.parametrize("kind", ["bool", "float", "heads"])
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_lines_without_a_partner_are_never_used(self, need_weights: bool, kind: str) -> None:
        layer, x = module(), torch.randn(3, 6, 12)
        mask = torch.zeros(6, 6, dtype=torch.bool)
        mask[:, 2] = mask[4] = True
        mask = {"bool": mask, "float": floating(mask), "heads": mask.expand(9, 6, 6)}[kind]
        found = []
        for fill in (0.0, torch.nan):
            layer.zero_grad()
            query, key, value = (x.clone() for _ in range(3))
            query[:, 4] = key[:, 2] = value[:, 2] = fill
            out = layer(query, key, value, attn_mask=mask, need_weights=need_weights)[0]
            out.square().sum().backward()
            found.append((out, layer.out_proj.weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestRefused:
    @pytest.mark.parametrize("shape", [(6, 3), (8, 3), (6,), (1, 6), (3, 1), (3, 6, 1), (18,)])
    def test_shapes_of_padding(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(3, 6, 12)
        for given in ({"key_padding_mask": torch.zeros(shape, dtype=torch.bool)}, {"query_padding_mask": torch.zeros(shape)}):
            with pytest.raises(ValueError, match=r"padding_mask must have shape \(3, 6\), one entry per line, got"):
                module()(x, x, x, **given)

    @pytest.mark.parametrize("shape", [(3, 6, 6), (3, 3, 6, 6), (6, 5), (1, 6), (6,), (3, 6), (9, 1, 6)])
    def test_shapes_of_masks(self, shape: tuple[int, ...]) -> None:
        """(batch, N, M) with as many batches as heads would be one mask a head."""
        x = torch.randn(3, 6, 12)
        with pytest.raises(ValueError, match=r"attn_mask must have shape \(6, 6\) or \(9, 6, 6\) \(batch \* num_heads"):
            module()(x, x, x, attn_mask=torch.zeros(shape, dtype=torch.bool))

    def test_shapes_without_a_batch(self) -> None:
        x, layer = torch.randn(6, 12), module()
        layer(x, x, x, torch.zeros(6, dtype=torch.bool), attn_mask=torch.zeros(3, 6, 6))
        with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(6,\), one entry per line, got \(1, 6\)"):
            layer(x, x, x, torch.zeros(1, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"attn_mask must have shape \(6, 6\) or \(3, 6, 6\) \(num_heads"):
            layer(x, x, x, attn_mask=torch.zeros(6, 6, 6))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
    @pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask", "query_padding_mask"])
    def test_dtypes(self, name: str, dtype: torch.dtype) -> None:
        x = torch.randn(3, 6, 12)
        with pytest.raises(
            TypeError, match=f"{name} must be a bool tensor, .* got torch.{dtype}".replace("torch.torch", "torch")
        ):
            module()(x, x, x, **{name: torch.zeros(6 if name == "attn_mask" else 3, 6, dtype=dtype)})

    def test_operands(self) -> None:
        x, layer = torch.randn(3, 6, 12), module()
        with pytest.raises(ValueError, match="same number of lines"):
            layer(x, x, x[:, :5])
        with pytest.raises(ValueError, match="of one batch"):
            layer(x, x[:2], x[:2])
        with pytest.raises(ValueError, match="must be a tensor, None or \"auto\", got 'yes'"):
            layer(x, x, x, query_padding_mask="yes")
        nested = torch.nested.nested_tensor([torch.randn(4, 12), torch.randn(2, 12)])
        with pytest.raises(TypeError, match=r"encoder\.use_nested_tensor = False"):
            layer(nested, nested, nested)
        with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn must be False"):
            SinkhornAttention(12, 3, add_zero_attn=True)


def encoder_layer(batch_first: bool, n_iters: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch's with its softmax, and the same with a Sinkhorn attention of these sweeps."""
    theirs = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=batch_first, **options)
    ours = copy.deepcopy(theirs)
    ours.self_attn = SinkhornAttention(12, 3, batch_first=batch_first, n_iters=n_iters)
    ours.self_attn.load_state_dict(theirs.self_attn.state_dict())
    return theirs, ours


class TestTransformers:
    @pytest.mark.parametrize(
        ("around", "padded", "batch_first", "train"),
        [
            *itertools.product(("", "no_grad", "autocast"), (True, False), (True, False), (True, False)),
            ("compile", True, True, True),
            ("compile", True, True, False),
        ],
    )
    def test_an_encoder_layer(self, around: str, padded: bool, batch_first: bool, train: bool) -> None:
        """No sweeps are torch's softmax; with sweeps a padded sentence is the sentence alone."""
        theirs, zero = encoder_layer(batch_first, 0)
        ours = copy.deepcopy(zero)
        ours.self_attn.options["n_iters"] = 5
        x = torch.randn(3, 6, 12)
        given = x if batch_first else x.transpose(0, 1)
        padding = PADDING if padded else None

        def run(layer: nn.Module, *given: Tensor | None) -> Tensor:
            layer.train(train)
            call: Callable[..., Tensor] = torch.compile(layer, backend="aot_eager") if around == "compile" else layer
            with torch.set_grad_enabled(around != "no_grad"), torch.autocast("cpu", enabled=around == "autocast"):
                out: Tensor = call(given[0], src_key_padding_mask=given[1])
            return out if batch_first or given[0].dim() == 2 else out.transpose(0, 1)

        close = {"rtol": 2e-2, "atol": 5e-2} if around == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
        wanted = ~PADDING if padded else torch.ones_like(PADDING)
        torch.testing.assert_close(run(zero, given, padding)[wanted], run(theirs, given, padding)[wanted], **close)
        out = run(ours, given, padding)
        assert (out - run(zero, given, padding))[wanted].abs().max() > 0.05
        if padded:
            for k, length in enumerate(LENGTHS.tolist()):
                torch.testing.assert_close(out[k, :length], run(ours, x[k, :length], None), **close)

    @pytest.mark.parametrize("train", [True, False])
    def test_an_encoder_made_of_it(self, train: bool) -> None:
        _, layer = encoder_layer(True, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it takes its slow path, which is what we need
            encoder = nn.TransformerEncoder(layer, 2).train(train)
        x = torch.randn(3, 6, 12)
        with torch.set_grad_enabled(train):
            out = encoder(x, src_key_padding_mask=PADDING)
            for k, length in enumerate(LENGTHS.tolist()):
                torch.testing.assert_close(out[k, :length], encoder(x[k, None, :length])[0], rtol=1e-4, atol=1e-5)

    def test_put_into_an_encoder_that_exists(self) -> None:
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), 1).eval()
        encoder.layers[0].self_attn = SinkhornAttention(12, 3, batch_first=True)
        x = torch.randn(3, 6, 12)
        with torch.no_grad():
            encoder.use_nested_tensor = False
            out = encoder(x, src_key_padding_mask=PADDING)
            torch.testing.assert_close(out[1, :4], encoder(x[1:2, :4])[0], rtol=1e-4, atol=1e-5)

    def test_a_causal_mask_is_refused(self) -> None:
        _, layer = encoder_layer(True, 5)
        with pytest.raises(ValueError, match="is_causal"):
            layer(torch.randn(3, 6, 12), src_mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("padded", [True, False])
    def test_a_decoder_layer(self, padded: bool, batch_first: bool, train: bool) -> None:
        """Across, with the causal attention before it left as it is."""
        theirs = nn.TransformerDecoderLayer(12, 3, 24, dropout=0.0, batch_first=batch_first).train(train)
        ours = copy.deepcopy(theirs)
        ours.multihead_attn = SinkhornAttention(12, 3, batch_first=batch_first, n_iters=0)
        ours.multihead_attn.load_state_dict(theirs.multihead_attn.state_dict())
        target, memory = torch.randn(3, 5, 12), torch.randn(3, 6, 12)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        given = [x if batch_first else x.transpose(0, 1) for x in (target, memory)]
        keywords = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": PADDING if padded else None}
        torch.testing.assert_close(ours(*given, **keywords), theirs(*given, **keywords), rtol=1e-4, atol=1e-5)


class TestMade:
    def test_in_the_same_place_of_every_argument(self) -> None:
        given = (12, 3, 0.25, True, False, False, 7, 5, True)
        theirs, ours = nn.MultiheadAttention(*given), SinkhornAttention(*given)
        for name in ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "batch_first", "head_dim", "add_zero_attn"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.bias_k is ours.bias_v is ours.in_proj_weight is None
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        assert not isinstance(ours, nn.MultiheadAttention)

    @pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 5}, {"bias": False}], ids=str)
    def test_the_same_seed_draws_the_same_weights(self, options: dict[str, Any]) -> None:
        states = []
        for kind in (nn.MultiheadAttention, SinkhornAttention):
            torch.manual_seed(3)
            states.append(kind(12, 3, **options).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], x) for name, x in states[1].items())

    @pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 5}, {"separate_projections": True}], ids=str)
    def test_from_the_meta_device(self, options: dict[str, Any]) -> None:
        with torch.device("meta"):
            layer = SinkhornAttention(12, 3, dtype=torch.float64, **options)
        assert all(x.is_meta for x in layer.parameters())
        layer = layer.to_empty(device="cpu")
        for x in layer.parameters():
            x.data.fill_(torch.nan)
        layer.reset_parameters()
        assert all(x.isfinite().all() and x.dtype == torch.float64 for x in layer.parameters())
        assert all((x == 0).all() == name.endswith("bias") for name, x in layer.named_parameters())

    @pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 5}, {"separate_projections": True}], ids=str)
    def test_other_hands_on_its_weights(self, options: dict[str, Any]) -> None:
        """functional_call, parametrizations and pruning reach what the forward uses."""
        layer = module(**options)
        x, value = torch.randn(2, 6, 12), torch.randn(2, 6, layer.vdim)
        before = layer(x, x, value)[0]
        name = next(n for n, p in layer.named_parameters() if p.dim() == 2)
        replaced = {n: torch.zeros_like(p) if n == name else p for n, p in layer.named_parameters()}
        owner_name, _, weight = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        expected = torch.func.functional_call(layer, replaced, (x, x, value))[0]
        assert not torch.allclose(expected, before)
        pruned = copy.deepcopy(layer)
        prune.l1_unstructured(pruned.get_submodule(owner_name), weight, amount=1.0)
        assert torch.equal(pruned(x, x, value)[0], expected)
        parametrizations.weight_norm(owner, weight)
        torch.testing.assert_close(layer(x, x, value)[0], before)

    def test_separate_projections_are_the_packed_ones(self) -> None:
        packed, apart = module(), module(separate_projections=True)
        with torch.no_grad():
            for k, which in enumerate((apart.q_proj, apart.k_proj, apart.v_proj)):
                which.weight.copy_(packed.in_proj_weight.chunk(3)[k])
                which.bias.copy_(packed.in_proj_bias.chunk(3)[k])
        apart.out_proj.load_state_dict(packed.out_proj.state_dict())
        x = torch.randn(3, 6, 12)
        torch.testing.assert_close(apart(x, x, x, PADDING)[0], packed(x, x, x, PADDING)[0])

    def test_a_process_that_holds_a_part_of_the_heads(self) -> None:
        """As tensor parallelism leaves it: the sum over processes, each with two of its projections' six rows, is the whole."""
        whole = SinkhornAttention(12, 3, batch_first=True, separate_projections=True)
        x, total = torch.randn(2, 6, 12), torch.zeros(2, 6, 12)
        for head in range(3):
            part, rows = copy.deepcopy(whole), slice(4 * head, 4 * head + 4)
            for which in (part.q_proj, part.k_proj, part.v_proj):
                which.weight, which.bias = (nn.Parameter(p[rows]) for p in (which.weight, which.bias))
            part.out_proj.weight = nn.Parameter(part.out_proj.weight[:, rows])
            total = total + part(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(total, whole(x, x, x, need_weights=False)[0])

    def test_copies(self) -> None:
        layer, x = module(), torch.randn(2, 6, 12)
        expected = layer(x, x, x)[0]
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
            assert torch.equal(other(x, x, x)[0], expected)
