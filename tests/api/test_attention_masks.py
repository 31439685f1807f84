"""fastdsm.sinkhorn_attention where entries and lines are taken out, beside a bias, and where plans are uniform."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastdsm
from fastdsm._ops import attention_gradients

from ..tolerances import assert_within
from .test_nn_attention import floating


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_rule_for_minus_infinity(dtype: torch.dtype, backend: str) -> None:
    """A floating mask takes out at -inf and at most half the lowest number of its dtype, and what lies there is never used."""
    operands = [torch.randn(2, 3, lines, 8) for lines in (5, 7, 7)]
    out = torch.zeros(5, 7, dtype=torch.bool)
    out[:, 2] = out[1, 3] = True
    expected, truth = (
        fastdsm.sinkhorn_attention(*(x.to(kind) for x in operands), ~out, n_iters=5, backend="reference")
        for kind in (torch.float32, torch.float64)
    )
    low = torch.finfo(dtype)
    for value in (-torch.inf, low.min, low.min / 2):
        found = fastdsm.sinkhorn_attention(*operands, floating(out, dtype, value), n_iters=5, backend=backend)
        assert_within(found, truth, expected)
    above = fastdsm.sinkhorn_attention(*operands, floating(out, dtype, -1e4), n_iters=5, backend=backend)
    assert above.isfinite().all()
    assert (above - expected).abs().max() > 0.1
    for name, lines in (("key_padding_mask", 7), ("query_padding_mask", 5)):
        padding = torch.arange(lines) >= lines - 2
        one, other = (
            fastdsm.sinkhorn_attention(*operands, **{name: mask.expand(2, lines)}, n_iters=5, backend=backend)
            for mask in (padding, floating(padding, dtype))
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "shape", "backend"),
    [
        *itertools.product(
            ("bool", "float"), ((5, 7), (2, 1, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7), (7,), (5, 1)), ("torch", "reference")
        ),
        ("bool", (5, 7), "triton"),
        ("float", (2, 4, 5, 7), "triton"),
    ],
    ids=str,
)
def test_what_lies_under_a_mask_is_never_used(kind: str, shape: tuple[int, ...], backend: str) -> None:
    """Lines that no partner meets, of a mask for all heads or of each, beside padding: any value, in value and gradient."""
    mask = torch.rand(shape) > 0.2
    if len(shape) > 1:
        mask[..., 3, :] = False
    if shape[-1] > 1:
        mask[..., 2] = False
    queries_out, keys_out = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    queries_out[1, 4] = keys_out[0, 6] = True
    if shape[-2:] == (5, 7):
        mask[..., :4, 5] = False  # met by a padded query alone
    unmet = torch.zeros(2, 7, dtype=torch.bool)
    unmet[:, 2] = shape[-1] > 1
    unmet[1, 5] = shape[-2:] == (5, 7)
    unmet |= keys_out
    query, key, value, cotangent = (torch.randn(2, heads, lines, 8) for heads, lines in ((4, 5), (2, 7), (2, 7), (4, 5)))
    found = []
    for fill in (0.0, 1e30, torch.nan):
        q = query.masked_fill(queries_out[:, None, :, None], fill)
        if len(shape) > 1:
            q[:, :, 3] = fill
        k, v = (x.masked_fill(unmet[:, None, :, None], fill) for x in (key, value))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = fastdsm.sinkhorn_attention(
            *leaves, mask if kind == "bool" else floating(~mask), enable_gqa=True, query_padding_mask=queries_out,
            key_padding_mask=keys_out, backend=backend,
        )  # fmt: skip
        found.append((out.detach(), *torch.autograd.grad(out, leaves, cotangent)))
    assert all(x.isfinite().all() for x in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("at_once", "shape", "backend"),
    [
        *itertools.product((1, 100, 1 << 24), ((5, 7), (1, 4, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7), (7,)), ("torch",)),
        (100, (2, 4, 5, 7), "triton"),
    ],
    ids=str,
)
def test_gradient_of_a_temperature_beside_a_bias(
    at_once: int, shape: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few heads at a time, whatever the bias is shared by; with NaN on padded lines."""
    monkeypatch.setattr(attention_gradients, "_ENTRIES", at_once)
    query, key, value, cotangent = (torch.randn(2, heads, lines, 8) for heads, lines in ((4, 5), (2, 7), (2, 7), (4, 5)))
    bias, temperature = torch.randn(shape), 0.5 + torch.rand(2, 4)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    found = []
    for call, dtype in ((backend, torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        given = query.masked_fill(padding[:, None, :, None], torch.nan if call == backend else 0.0)
        leaves = [x.to(dtype).requires_grad_() for x in (given, key, value, bias, temperature)]
        out = fastdsm.sinkhorn_attention(
            *leaves[:4], enable_gqa=True, temperature=leaves[4], query_padding_mask=padding, n_iters=4, backend=call
        )
        found.append(torch.autograd.grad(out, leaves, cotangent.to(dtype)))
    for ours, truth, plain in zip(*found, strict=True):
        assert_within(ours, truth, plain, cotangent=cotangent)


def test_sigma2_of_uniform_plans() -> None:
    """Zero, with its bounds, at any size: there Lanczos sees rounding alone, of any sign."""
    for n, m in ((3, 197), (13, 35), (22, 22), (27, 27), (35, 13), (197, 197)):
        query, key = torch.zeros(2, 6, n, 4), torch.zeros(2, 6, m, 4)
        value, lower, upper = fastdsm.sinkhorn_attention_sigma2(query, key, return_bounds=True)
        assert value.max() < 1e-5
        assert (lower <= value).all()
        assert (value <= upper).all()
        assert upper.max() < 1e-2


def test_gradient_of_a_temperature_in_an_empty_batch() -> None:
    query, temperature = torch.randn(0, 2, 3, 4), torch.ones(0, 2, requires_grad=True)
    for bias in (None, torch.randn(3, 3)):
        out = fastdsm.sinkhorn_attention(query, query, query, bias, temperature=temperature)
        assert torch.autograd.grad(out.sum(), temperature)[0].shape == (0, 2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_bool_mask_and_a_floating_padding_mask_hold_both(backend: str) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = (torch.rand(2, 3, 5, 5) > 0.3) | torch.eye(5, dtype=torch.bool)
    added = torch.randn(2, 5, dtype=torch.float64)
    added[1, 4] = -torch.inf
    both = added[:, None, None, :].masked_fill(~mask, -torch.inf)

    def loss(query: torch.Tensor, *masks: torch.Tensor | None) -> torch.Tensor:
        attn_mask, padding = masks
        return (
            fastdsm.sinkhorn_attention(query, key, value, attn_mask, key_padding_mask=padding, backend=backend).square().sum()
        )

    (found, truth) = (
        torch.autograd.grad(loss(query, *given), query, create_graph=True)[0] for given in ((mask, added), (both, None))
    )
    assert (found - truth).abs().max() < 1e-12
    # and the second derivative, which is the oracle's
    direction = torch.randn_like(query)
    found, truth = (torch.autograd.grad((x * direction).sum(), query)[0] for x in (found, truth))
    assert (found - truth).abs().max() < 1e-12
