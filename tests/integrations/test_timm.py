"""timm's vision transformers with Sinkhorn attention: the same weights, softmax without sweeps, the oracle's plan with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdsm import reference
from fastdsm.integrations import convert

from ..timm_package import import_timm

timm = import_timm()
from fastdsm.integrations import timm as sinkhorn  # noqa: E402

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "vit_small_patch16_224": (SMALL, "SinkhornAttention"),
    "deit3_small_patch16_224": (SMALL, "SinkhornAttention"),
    "vit_small_patch16_rope_224": (SMALL, "SinkhornAttentionRope"),
    "beit_base_patch16_224": (SMALL, "SinkhornBeitAttention"),
    "eva02_tiny_patch14_224": ({**SMALL, "img_size": 56}, "SinkhornEvaAttention"),
    "vit_relpos_small_patch16_224": (SMALL, "SinkhornRelPosAttention"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}, "SinkhornWindowAttention",
    ),
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", MODELS)
VALUE = 2e-6


def made(name: str, **options: Any) -> tuple[Any, Tensor]:
    """A small model with every parameter moved, in evaluation, and images for it."""
    model = timm.create_model(name, num_classes=5, **{**MODELS[name][0], **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    side = MODELS[name][0]["img_size"]
    return model.eval(), torch.randn(2, 3, side, side)


def error(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return float((found.detach().double() - right.detach().double()).abs().max())


def by_the_oracle(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Three sweeps in float64 where timm calls for softmax."""
    four = None if attn_mask is None else attn_mask.double()
    out = reference.sinkhorn_attention(q.double(), k.double(), v.double(), four, n_iters=3)
    assert isinstance(out, Tensor)
    return out.to(v.dtype)


@NAMES
def test_without_sweeps(name: str) -> None:
    """Values and gradients of all parameters, whose objects and names are the model's."""
    model, images = made(name)
    ours = copy.deepcopy(model)
    before = dict(ours.named_parameters())
    found = convert(ours, n_iters=0)
    assert {entry.reason for entry in found.changed} == {f"now {MODELS[name][1]}"}
    assert not found.left
    assert all(x is before[key] for key, x in ours.named_parameters())
    assert list(ours.state_dict()) == list(model.state_dict())
    out, right = ours(images), model(images)
    assert error(out, right) <= VALUE
    cotangent = torch.randn_like(out)
    gradients = (torch.autograd.grad(x, list(y.parameters()), cotangent) for x, y in ((out, ours), (right, model)))
    for x, y in zip(*gradients, strict=True):
        assert error(x, y) <= 1e-5 * max(1.0, float(y.abs().max()))


@NAMES
def test_sweeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = made(name)
    ours, softmax = copy.deepcopy(model), model(images)
    convert(ours)
    found = ours(images)
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # Swin's writes softmax out
            module.fused_attn = True
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", by_the_oracle)
        right = model.double()(images.double())
    assert error(found, right) <= 5e-6
    assert error(found, softmax) > 1e-3


def test_made_with_it() -> None:
    """By ``create_model``, and with a subclass's options."""

    class Five(sinkhorn.SinkhornAttention):
        sinkhorn_options = {"n_iters": 5, "temperature": 0.5}  # noqa: RUF012

    name = "vit_small_patch16_224"
    model, images = made(name)
    swapped = timm.create_model(name, num_classes=5, attn_layer=Five, **SMALL).eval()
    swapped.load_state_dict(model.state_dict())
    convert(model, n_iters=5, temperature=0.5)
    assert error(swapped(images), model(images)) <= VALUE
    assert "n_iters=5" in repr(swapped.blocks[0].attn)


def test_without_fused_attention() -> None:
    """A module whose softmax was written out takes the fused path, which alone is Sinkhorn's."""
    model, images = made("vit_small_patch16_224")
    right = copy.deepcopy(model)
    convert(right)
    for block in model.blocks:
        block.attn.fused_attn = False
    convert(model)
    assert error(model(images), right(images)) == 0


def test_compiled_checkpointed_pickled_and_in_16_bits() -> None:
    model, images = made("vit_small_patch16_224")
    convert(model)
    found = model(images)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(images), found) <= VALUE
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), found)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model.train()(images).sum(), parameters)
    model.set_grad_checkpointing()
    for x, y in zip(torch.autograd.grad(model(images).sum(), parameters), plain, strict=True):
        assert error(x, y) <= 1e-5 * max(1.0, float(y.abs().max()))
    assert error(model.eval().bfloat16()(images.bfloat16()), found) < 0.1 * found.abs().max().item()


def test_dropout() -> None:
    """Of the plan, in training."""
    attention = sinkhorn.SinkhornAttention(16, 2, attn_drop=0.5)
    x = torch.randn(1, 9, 16)
    assert torch.equal(attention.eval()(x), attention(x))
    assert error(attention.train()(x), attention(x)) > 1e-2


def test_padding() -> None:
    """A mask that takes keys alone, as NaFlexViT's may, takes their queries too: the others' plan is without them."""
    attention, x = sinkhorn.SinkhornAttention(16, 2), torch.randn(2, 9, 16)
    mask = torch.zeros(2, 1, 1, 9)
    mask[1, ..., 6:] = torch.finfo(torch.float32).min
    found = attention(x, attn_mask=mask)
    assert error(found[0], attention(x[:1])[0]) <= VALUE
    assert error(found[1, :6], attention(x[1:, :6])[0]) <= VALUE
    assert torch.equal(found, attention(x, attn_mask=mask > -1))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="is_causal=True has no Sinkhorn plan"):
        sinkhorn.SinkhornAttention(16, 2)(torch.randn(1, 9, 16), is_causal=True)
    with pytest.raises(TypeError, match=r"attention must be one of .*timm\.layers\.attention\.Attention,.* got torch\.nn"):
        sinkhorn.become_sinkhorn(nn.Linear(1, 1))

    class TwoSoftmaxes(sinkhorn.SinkhornAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    class Other(sinkhorn._Sinkhorn, nn.Linear):
        pass

    with pytest.raises(RuntimeError, match="Other called scaled_dot_product_attention 0 times, expected once"):
        Other(3, 3)(torch.randn(3))


def test_what_is_left() -> None:
    """Attention from one query (SigLIP's pool, CaiT's class token), talking heads: by name."""
    siglip = timm.create_model("vit_base_patch16_siglip_224", num_classes=5, **SMALL)
    found = convert(siglip)
    assert [entry.name for entry in found.changed] == ["blocks.0.attn", "blocks.1.attn"]
    assert [entry.name for entry in found.left] == ["attn_pool"]
    assert found.left[0].reason == "not known: timm.layers.attention_pool.AttentionPoolLatent"
    cait = convert(timm.create_model("cait_xxs24_224", num_classes=5, **SMALL))
    assert not cait.changed
    assert {entry.kind for entry in cait.left} == {"TalkingHeadAttn", "ClassAttn"}
    parallel = convert(timm.create_model("vit_base_patch16_plus_clip_240", num_classes=5, **SMALL))
    assert len(parallel.changed) == 2
    scaling = timm.models.vision_transformer.ParallelScalingBlock(16, 2)
    assert [entry.kind for entry in convert(nn.Sequential(scaling)).left] == ["ParallelScalingBlock"]
