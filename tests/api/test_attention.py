"""fastdsm.sinkhorn_attention on the PyTorch path against the oracle: values, gradients, masks, integration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastdsm
from fastdsm import reference, whole_attention
from fastdsm._verify.sinkhorn import budget, gradient_size
from fastdsm.pytorch import attention as pytorch_attention
from fastdsm.pytorch import blocks

B, H, G, N, M, D, E = 2, 4, 2, 9, 7, 5, 3


@pytest.fixture(params=["whole", "stored", "streamed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plans of all heads stored, or of some at a time, or streamed in blocks of two or three lines."""
    if request.param != "whole":
        monkeypatch.setattr(whole_attention, "WHOLE_ENTRIES", 0)
    if request.param == "streamed":
        monkeypatch.setattr(pytorch_attention, "DENSE_ENTRIES", 0)
        monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 20)
    return str(request.param)


def operands(dtype: torch.dtype = torch.float64, scale: float = 1.0, batch: int = B) -> tuple[Tensor, ...]:
    """Query, key, value and a cotangent of the output, with half as many key heads as query heads."""
    shapes = ((batch, H, N, D), (batch, G, M, D), (batch, G, M, E), (batch, H, N, E))
    query, key, value, cotangent = (torch.randn(shape) for shape in shapes)
    return tuple(x.to(dtype) for x in (query * scale, key, value, cotangent))


def run(
    call: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Output, information and the gradients of all floating operands."""
    leaves = {"query": query, "key": key, "value": value}
    leaves |= {name: x for name, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out, info = call(**{**options, **leaves}, enable_gqa=True, return_info=True)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach()} | info._asdict() | dict(zip(leaves, gradients, strict=True))


def option_sets() -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    key_padding, query_padding = torch.zeros(B, M, dtype=torch.bool), torch.zeros(B, N, dtype=torch.bool)
    key_padding[0, -2:], query_padding[1, :3] = True, True
    mask = rand(N, M) < 0.7
    mask[2], mask[:, 4] = False, False
    bias = 2.0 * rand(B, 1, 1, M)
    bias[0, 0, 0, 1] = -torch.inf
    yield "plain", {}
    yield "bias per head", {"attn_mask": rand(1, H, N, M)}
    yield "bias per key", {"attn_mask": bias}
    yield "mask", {"attn_mask": mask}
    yield "padding", {"key_padding_mask": key_padding, "query_padding_mask": query_padding}
    yield "all at once", {"attn_mask": rand(N, M), "key_padding_mask": key_padding, "temperature": rand(B, H) + 0.5}
    yield "temperature", {"temperature": 0.5}
    yield "tol", {"tol": 3e-2}
    yield "scale", {"scale": 0.3}


OPTIONS = dict(option_sets())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("n_iters", [0, 1, 3, 10])
def test_values_and_gradients_are_the_oracles(path: str, name: str, first: str, n_iters: int) -> None:
    inputs, options = operands(), {**OPTIONS[name], "first": first, "n_iters": n_iters}
    found = run(fastdsm.sinkhorn_attention, *inputs, **options)
    expected = run(reference.sinkhorn_attention, *inputs, **options)
    assert found.keys() == expected.keys()
    for quantity, x in found.items():
        torch.testing.assert_close(x, expected[quantity], rtol=1e-9, atol=1e-11, msg=quantity)
    if name == "tol" and n_iters == 10:
        assert found["sweeps"].unique().numel() > 1


def usual_loop(query: Tensor, key: Tensor, value: Tensor, n_iters: int) -> Tensor:
    """What one would write: float32 log-sum-exps of the stored logits."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    S = query @ key.mT / math.sqrt(query.shape[-1])
    f, g = torch.zeros_like(S[..., 0]), torch.zeros_like(S[..., 0, :])
    if n_iters == 0:
        f = -torch.logsumexp(S, -1)
    for _ in range(n_iters):
        g = math.log(S.shape[-2] / S.shape[-1]) - torch.logsumexp(S + f.unsqueeze(-1), -2)
        f = -torch.logsumexp(S + g.unsqueeze(-2), -1)
    return (S + f.unsqueeze(-1) + g.unsqueeze(-2)).exp() @ value


@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
@pytest.mark.parametrize("n_iters", [0, 1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_within_budget_of_the_usual_loop(path: str, scale: float, n_iters: int, dtype: torch.dtype) -> None:
    inputs = operands(dtype, scale, batch=16)  # enough heads for a largest error to mean something

    def evaluate(call: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        query, key, value = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
        out = call(query, key, value, n_iters=n_iters, **options)
        return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3].to(dtype))]

    found = evaluate(fastdsm.sinkhorn_attention, dtype, enable_gqa=True)
    plain, truth = evaluate(usual_loop, torch.float32), evaluate(reference.sinkhorn_attention, torch.float64)
    for i, (x, usual, exact) in enumerate(zip(found, plain, truth, strict=True)):
        size = gradient_size(exact, inputs[3]) if i else max(1.0, exact.abs().max().item())
        error = (x.double() - exact).abs()
        assert (error <= budget(exact, usual, dtype, size=size)).all(), (i, error.max().item())


def test_padding_is_as_if_it_were_not_there(path: str) -> None:
    query, key, value, cotangent = operands()
    queries, keys = torch.zeros(B, N, dtype=torch.bool), torch.zeros(B, M, dtype=torch.bool)
    queries[:, :4], keys[:, -2:] = True, True
    cut = run(fastdsm.sinkhorn_attention, query[:, :, 4:], key[:, :, :-2], value[:, :, :-2], cotangent[:, :, 4:])
    query[:, :, :4], key[:, :, -2:], value[:, :, -2:] = torch.nan, torch.nan, torch.nan
    options = {"query_padding_mask": queries, "key_padding_mask": keys}
    padded = run(fastdsm.sinkhorn_attention, query, key, value, cotangent, **options)
    for name, lines in (("out", queries), ("query", queries), ("key", keys), ("value", keys)):
        assert (padded[name].movedim(1, 2)[lines] == 0).all()
        kept = padded[name][:, :, ~lines[0]]
        torch.testing.assert_close(kept, cut[name], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(padded["f"][:, :, 4:], cut["f"])


def test_zero_sweeps_are_scaled_dot_product_attention(path: str) -> None:
    query, key, value, _ = operands()
    mask = torch.rand(N, M) < 0.8
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(fastdsm.sinkhorn_attention(query, key, value, mask, n_iters=0, enable_gqa=True), expected)


def test_implicit_gradient_is_the_unrolled_one_of_many_sweeps(path: str) -> None:
    query, key, value, cotangent = operands()
    options = {"n_iters": 300, "tol": 1e-13}
    implicit = run(fastdsm.sinkhorn_attention, query, key, value, cotangent, grad="implicit", **options)
    unrolled = run(reference.sinkhorn_attention, query, key, value, cotangent, n_iters=300)
    for name in ("out", "query", "key", "value"):
        torch.testing.assert_close(implicit[name], unrolled[name], rtol=1e-8, atol=1e-10)


def test_long_runs_of_wild_logits_have_the_oracles_gradient(path: str) -> None:
    inputs = operands(scale=40.0)
    found, expected = (run(call, *inputs, n_iters=120) for call in (fastdsm.sinkhorn_attention, reference.sinkhorn_attention))
    for name in ("out", "query", "key", "value"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-9)


def test_dropout_drops_the_same_entries_forward_and_backward(path: str) -> None:
    query, key, value, cotangent = operands()
    p = 0.3
    identity = torch.eye(M, dtype=torch.float64).expand(B, G, M, M)
    call = {"enable_gqa": True}
    torch.manual_seed(7)
    factors = fastdsm.sinkhorn_attention(query, key, identity, dropout_p=p, **call)
    factors = factors / fastdsm.sinkhorn_attention(query, key, identity, **call)
    kept = factors != 0
    torch.testing.assert_close(factors, kept.double() / (1 - p))
    torch.manual_seed(7)
    found = run(fastdsm.sinkhorn_attention, query, key, value, cotangent, dropout_p=p)

    def stored(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Any]:
        logits, _ = reference.attention_logits(query, key, None, D**-0.5, None, None)
        plan, info = reference.sinkhorn(logits, n_iters=3, return_info=True)
        return (plan * kept / (1 - p)) @ value.repeat_interleave(H // G, 1), info

    expected = run(stored, query, key, value, cotangent)
    for name in ("out", "query", "key", "value"):
        torch.testing.assert_close(found[name], expected[name])


def test_dropout_has_its_rate() -> None:
    one = torch.zeros(1, 1, 400, 8)
    identity = torch.eye(400).expand(1, 1, 400, 400)
    dropped = fastdsm.sinkhorn_attention(one, one, identity, dropout_p=0.25) == 0
    assert abs(dropped.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / dropped.numel())
    assert (dropped.double().mean(-1) - 0.25).abs().max() < 0.15
    assert not torch.equal(dropped, fastdsm.sinkhorn_attention(one, one, identity, dropout_p=0.25) == 0)


@pytest.mark.parametrize("shape", [(N, D), (B, N, D), (2, B, H, N, D)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape[-2], shape[-2]) < 0.9
    out, info = fastdsm.sinkhorn_attention(query, key, value, mask, return_info=True)
    plan, known = fastdsm.sinkhorn(query @ key.mT / math.sqrt(D), n_iters=3, mask=mask, return_info=True)
    torch.testing.assert_close(out, plan @ value)
    torch.testing.assert_close(info.f, known.f)
    assert info.residual.shape == known.residual.shape == shape[:-2]


def test_views_of_other_layouts_give_the_same(path: str) -> None:
    query, key, value, cotangent = operands()
    expected = run(fastdsm.sinkhorn_attention, query, key, value, cotangent)
    laid_out = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value, cotangent)]
    found = run(fastdsm.sinkhorn_attention, *laid_out)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("lines", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 5)])
def test_empty_and_single_lines(lines: tuple[int, int]) -> None:
    query = torch.randn(2, 2, lines[0], 4, requires_grad=True)
    key, value = (torch.randn(2, 2, lines[1], 4, requires_grad=True) for _ in range(2))
    out = fastdsm.sinkhorn_attention(query, key, value)
    assert out.shape == (2, 2, lines[0], 4)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()
    assert fastdsm.sinkhorn_attention(torch.empty(0, 2, 3, 4), torch.empty(0, 2, 5, 4), torch.empty(0, 2, 5, 4)).shape == (
        0,
        2,
        3,
        4,
    )


@pytest.mark.parametrize("lines", [(1, 5), (5, 1)])
@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_plan_of_one_line_has_no_derivative(path: str, lines: tuple[int, int], grad: str) -> None:
    """Differences of terms, times a large scale, are beyond the budget."""
    n, m = lines
    query, key, value, bias = (
        torch.randn(shape).requires_grad_() for shape in ((2, 2, n, 4), (2, 2, m, 4), (2, 2, m, 4), (n, m))
    )
    options: dict[str, Any] = {} if grad == "unrolled" else {"tol": 1e-6, "grad": "implicit"}
    out = fastdsm.sinkhorn_attention(query, key, value, bias, scale=20.0, **options)
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out.square().sum(), (query, key, bias, value))
    assert [x.abs().max().item() for x in found[:3]] == [0.0, 0.0, 0.0]
    assert found[3].abs().min() > 0


def test_nan_stays_in_its_head(path: str) -> None:
    query, key, value, _ = operands(torch.float32)
    clean = fastdsm.sinkhorn_attention(query, key, value, enable_gqa=True)
    query[1, 2, 3, 0] = torch.nan
    out = fastdsm.sinkhorn_attention(query, key, value, enable_gqa=True)
    assert out[1, 2].isnan().all()
    others = torch.ones(B, H, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out[others], clean[others])


def small() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((1, 2, 4, 3), (1, 2, 3, 3), (1, 2, 3, 2))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_gradcheck_and_double_backward(path: str) -> None:
    bias = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([[0.7, 1.3]], dtype=torch.float64, requires_grad=True)

    def call(*x: Tensor) -> Tensor:
        out = fastdsm.sinkhorn_attention(*x[:4], temperature=x[4])
        assert isinstance(out, Tensor)
        return out

    assert gradcheck(call, (*small(), bias, temperature))
    assert gradgradcheck(lambda *x: call(*x, 1.0), (*small(), bias))


def test_second_derivative_of_dropout_is_a_clear_error() -> None:
    query, key, value = small()
    out = fastdsm.sinkhorn_attention(query, key, value, dropout_p=0.5)
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'dropout_p=0.*backend="reference"'):
        first.sum().backward()


def test_compile_opcheck_and_autocast() -> None:
    query, key, value = (x.detach().float().requires_grad_() for x in small())
    mask = torch.tensor([[True, True, False]])
    compiled = torch.compile(fastdsm.sinkhorn_attention, fullgraph=True, backend="aot_eager")
    for options in ({}, {"attn_mask": mask, "return_info": True}, {"temperature": torch.tensor([[0.5, 2.0]])}):
        found, expected = (call(query, key, value, **options) for call in (compiled, fastdsm.sinkhorn_attention))
        pair = [x[0] if isinstance(x, tuple) else x for x in (found, expected)]
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), query)[0] for x in pair))
    tail = (None, None, None, None, None, None, 0.5, 1.0, 3, True, -1.0, 0.0, False, "torch")
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        torch.library.opcheck(torch.ops.fastdsm.sinkhorn_attention.default, (*leaves, *tail, True, True))
    torch.library.opcheck(
        torch.ops.fastdsm.sinkhorn_attention_sigma2.default, (*(x.detach() for x in leaves), *tail, 1e-4, 5, True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = fastdsm.sinkhorn_attention(query, key.bfloat16(), value)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fastdsm.sinkhorn_attention(query, key, value), rtol=0.02, atol=0.02)


def test_vmap_and_functional_gradients() -> None:
    query, key, value = (torch.randn(3, *x.shape, dtype=torch.float64) for x in small())
    bias = torch.randn(4, 3, dtype=torch.float64)
    padding = torch.zeros(1, 3, dtype=torch.bool)
    padding[0, 0] = True

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        out = fastdsm.sinkhorn_attention(query, key, value, bias, key_padding_mask=padding)
        assert isinstance(out, Tensor)
        return out

    def loss(*x: Tensor) -> Tensor:
        return call(*x).square().sum()

    expected = torch.stack([call(*x, bias) for x in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.vmap(call, in_dims=(0, 0, 0, None))(query, key, value, bias), expected)
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims=(0, 0, 0, None))(query, key, value, bias)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (query, key, value)] + [bias.clone().requires_grad_()]
        for found, known in zip(gradients, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(found[i], known)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first", ["col", "row"])
def test_sigma2_its_bounds_and_its_gradient(path: str, dtype: torch.dtype, first: str) -> None:
    query, key, _, _ = operands(scale=2.0)
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[0, -2:] = True
    options = {"enable_gqa": True, "key_padding_mask": padding, "n_iters": 5, "first": first}
    results = []
    for cast, extra in ((dtype, {"accuracy": 1e-10}), (torch.float64, {"backend": "reference"})):
        leaves = [x.to(cast).requires_grad_() for x in (query, key)]
        value, lower, upper = fastdsm.sinkhorn_attention_sigma2(*leaves, return_bounds=True, **options, **extra)
        weights = torch.arange(1.0, 1.0 + B * H, dtype=cast).view(B, H)
        results.append((value, lower, upper, torch.autograd.grad((value * weights).sum(), leaves)))
    (value, lower, upper, gradients), (truth, _, _, expected) = results
    rounding = 1e-12 if dtype == torch.float64 else 2e-6
    assert (value - truth).abs().max() < rounding
    assert (lower <= truth).all()
    assert (truth <= upper).all()
    assert (upper <= truth * (1 + 50 * rounding)).all()
    for x, known in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x.double(), known, rtol=0, atol=10 * rounding)


def test_sigma2_bounds_hold_after_few_steps(path: str) -> None:
    query, key = (torch.randn(2, 3, 40, 8) for _ in range(2))
    truth = fastdsm.sinkhorn_attention_sigma2(query.double(), key.double(), backend="reference")
    for steps in (1, 2, 6):
        value, lower, upper = fastdsm.sinkhorn_attention_sigma2(query, key, max_steps=steps, return_bounds=True)
        assert (lower <= value).all()
        assert (lower <= truth).all()
        assert (truth <= upper).all()


def test_shapes_without_data_and_recomputation() -> None:
    out = fastdsm.sinkhorn_attention(*(torch.empty(2, 3, 9, 8, device="meta") for _ in range(3)))
    assert isinstance(out, Tensor)
    assert (out.shape, out.device.type) == ((2, 3, 9, 8), "meta")
    operands = [torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3)]
    gradients = []
    for call in (fastdsm.sinkhorn_attention, partial(checkpoint, fastdsm.sinkhorn_attention, use_reentrant=False)):
        gradients.append(torch.autograd.grad(call(*operands).square().sum(), operands))
    for x, known in zip(*gradients, strict=True):
        assert torch.equal(x, known)


@pytest.mark.parametrize("grad", [None, "implicit"])
def test_what_no_kernel_serves_takes_the_pytorch_path(grad: str | None) -> None:
    query, key, value, cotangent = operands()
    options = {"tol": 1e-6, "n_iters": 40, "grad": grad}
    found = run(fastdsm.sinkhorn_attention, query, key, value, cotangent, backend="triton", **options)  # float64
    expected = run(fastdsm.sinkhorn_attention, query, key, value, cotangent, **options)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-11)


def test_logits_of_ten_thousand_give_a_finite_plan(path: str) -> None:
    query, key, value = (1e2 * torch.randn(1, 1, 9, 8, requires_grad=True) for _ in range(3))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = fastdsm.sinkhorn_attention(*leaves, n_iters=10)
    truth = reference.sinkhorn_attention(*(x.detach().double() for x in leaves), n_iters=10)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in (out, *gradients))
    plain = reference.sinkhorn_attention(*(x.detach() for x in leaves), n_iters=10)
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()
