"""Attention of heads that fit on chip, interpreted: results and gradients against float64, of every option."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm._ops import attention_operators
from fastdsm._ops.plain import Kept
from fastdsm._ops.problem import Attention, Dropout
from fastdsm._ops.streamed import gradient as streamed_gradient
from fastdsm._ops.streamed import sweeps as streamed
from fastdsm._ops.streamed.gradient import AttentionGradients, Cotangents
from fastdsm._ops.streamed.sweeps import State, Sweeps
from fastdsm._verify.sinkhorn import budget
from fastdsm.kernels.attention import launch, launch_short
from fastdsm.kernels.common.configuration import recorded

HALF, BRAIN = torch.float16, torch.bfloat16
Operands = dict[str, Tensor]


def operands(
    n: int = 37, m: int = 30, d: int = 24, e: int = 20, heads: int = 2, groups: int = 2, dtype: Any = BRAIN, std: float = 1.0
) -> Operands:
    """Logits of this standard deviation."""
    shapes = {"query": (2, heads, n, d), "key": (2, groups, m, d), "value": (2, groups, m, e)}
    sizes = {"query": std**0.5, "key": std**0.5, "value": 1.0}
    return {name: (sizes[name] * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


def pulled(given: Operands, cotangent: Tensor, backend: str, dtype: Any = None, **options: Any) -> dict[str, Tensor]:
    """Result and gradients in ``dtype``; of options the tensors that are floating, too."""
    leaves = {k: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for k, x in given.items()}
    for name, x in options.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[name] = options[name] = (x if dtype is None else x.to(dtype)).detach().requires_grad_()
    qkv = [leaves[name] for name in given]
    out = fastdsm.sinkhorn_attention(*qkv, **options, backend=backend, enable_gqa=True)
    found = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def check(given: Operands, **options: Any) -> None:
    """By few launches, within the budget."""
    shape = (*given["query"].shape[:3], given["value"].shape[3])
    cotangent = torch.randn(shape).to(given["query"].dtype)
    with recorded() as launches:
        pulled(given, cotangent, "triton", **options)
    names = [x.configuration.kernel.fn.__name__ for x in launches]
    expected = [f"_attention_short_{name}_kernel" for name in ("fwd", "adjoint_bwd", "gradient_bwd")]
    assert names == expected
    found = pulled(given, cotangent, "triton", **options)
    truth, plain = (pulled(given, cotangent, "reference", dtype, **options) for dtype in (torch.float64, torch.float32))
    for name, x in found.items():
        size = max(1.0, truth[name].abs().max().item())
        assert x.dtype == (options.get(name, given["query"]).dtype if name != "out" else given["query"].dtype)
        assert ((x.double() - truth[name]).abs() <= budget(truth[name], plain[name], x.dtype, size=size)).all(), name


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("n_iters", [0, 1, 3, 20])
def test_sweeps(n_iters: int, first: str, dtype: torch.dtype) -> None:
    check(operands(dtype=dtype), n_iters=n_iters, first=first)


@pytest.mark.parametrize("std", [0.1, 8.0, 30.0])
@pytest.mark.parametrize("first", ["col", "row"])
def test_logits_of_any_size(std: float, first: str) -> None:
    check(operands(std=std), n_iters=12, first=first)


@pytest.mark.parametrize(
    ("n", "m", "d", "e"), [(2, 2, 1, 1), (2, 64, 64, 64), (64, 3, 8, 40), (64, 64, 33, 7), (63, 33, 64, 64), (17, 17, 16, 16)]
)
def test_sizes(n: int, m: int, d: int, e: int) -> None:
    check(operands(n, m, d, e))


def _masks() -> dict[str, Any]:
    mask = torch.rand(2, 1, 37, 30) < 0.7
    mask[..., 3, :] = mask[..., 5] = False
    bias = torch.randn(1, 2, 37, 30).to(BRAIN)
    bias[..., 4] = -torch.inf
    padding = torch.arange(30).expand(2, -1) >= torch.tensor([[29], [20]])
    queries = torch.arange(37).expand(2, -1) >= torch.tensor([[37], [11]])
    return {
        "mask": {"attn_mask": mask},
        "bias": {"attn_mask": bias},
        "float32 bias": {"attn_mask": bias.float()},
        "bias for all": {"attn_mask": bias[:, :, :1]},
        "padding": {"key_padding_mask": padding, "query_padding_mask": queries},
        "all": {"attn_mask": bias, "key_padding_mask": padding},
        "tol": {"tol": 1e-2, "n_iters": 20},
        "temperature": {"temperature": 0.3},
        "half steps": {"half_steps": 4},
        "no column": {"half_steps": 1},
    }


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("name", list(_masks()))
def test_options(name: str, first: str) -> None:
    check(operands(), **_masks()[name], first=first)


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("name", ["padding", "all"])
def test_query_heads_that_share_a_key_head(name: str, first: str) -> None:
    check(operands(heads=4, groups=2), **({"key_padding_mask": _masks()["padding"]["key_padding_mask"]}), first=first)
    check(operands(heads=6, groups=1, dtype=HALF), first=first)


def test_strides() -> None:
    """Heads last, as projections leave them; features that are no whole vectors; expanded queries."""
    given = operands(20, 20, 16, 16)
    check({name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.items()})
    check({name: torch.cat([x, x], -1)[..., 3:19] for name, x in given.items()})
    check({**given, "query": given["query"][:1].expand(2, -1, -1, -1)})


def test_info() -> None:
    """Potentials, residual and sweeps, and cotangents of the potentials."""
    given = operands(std=2.0)
    weights = torch.randn(2, 2, 37), torch.randn(2, 2, 30)
    found = []
    for backend, dtype in (("triton", BRAIN), ("reference", torch.float64), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in given.values()]
        _out, info = fastdsm.sinkhorn_attention(*leaves, n_iters=4, return_info=True, backend=backend)
        total = (info.f * weights[0]).sum() + (info.g * weights[1]).sum()
        found.append([info.f, info.g, info.residual, *torch.autograd.grad(total, leaves[:2]), info.sweeps])
    for x, truth, plain in zip(*(y[:-1] for y in found), strict=True):
        size = max(1.0, truth.abs().max().item())
        assert ((x.double() - truth.double()).abs() <= budget(truth.double(), plain, x.dtype, size=size)).all()
    assert torch.equal(found[0][-1], found[1][-1])


@pytest.mark.parametrize("first", [True, False])
def test_what_is_dropped_is_what_the_passes_drop(first: bool) -> None:
    """The entries, by value and gradient."""
    torch.manual_seed(3)
    given = operands(20, 33, 16, 16)
    query, key, value = given.values()
    problem, dropout = Attention(query, key, 0.25), Dropout(0.4, torch.tensor([11]))
    cotangent, results = Cotangents(torch.randn(2, 2, 20, 16).to(BRAIN)), []
    for short in (True, False):
        sweeps = Sweeps(3, first, -1.0, keep=not short)
        slots = streamed.slots(sweeps)
        f, g = (torch.empty(2, 2, slots, lines, dtype=torch.float64) for lines in (20, 33))
        state = State(f, g, torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int32))
        out, gradients = torch.empty_like(query), AttentionGradients(*map(torch.empty_like, given.values()), None)
        if short:
            launch_short.forward(problem, value, sweeps, dropout, out, state)
            launch_short.backward(problem, value, sweeps, dropout, cotangent, state.sweeps, gradients)
        else:
            streamed.attention_forward(launch, problem, value, sweeps, dropout, out, state, False)
            streamed_gradient.attention_backward(launch, problem, value, sweeps, dropout, cotangent, state, gradients, False)
        results.append([out, gradients.query, gradients.key, gradients.value])
    for x, y in zip(*results, strict=True):  # each within half a unit of the last place, and the float32 before it
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("name", ["three", "one", "two", "temperature", "dropout", "unaligned", "info"])
def test_a_call_that_is_known_takes_what_it_is_given(name: str, first: str) -> None:
    """Launches are prepared for a form of tensors, and then made for others: also where several operands are one."""

    def called(i: int) -> list[Tensor]:
        torch.manual_seed(i)
        x, y, z = (torch.randn(2, 2, 17, 16).to(BRAIN) for _ in range(3))
        if name == "unaligned" and i >= 2:
            x, y, z = (torch.randn(2, 2, 17, 17).to(BRAIN)[..., 1:] for _ in range(3))
        leaves = [t.detach().requires_grad_() for t in {"one": (x,), "two": (x, y)}.get(name, (x, y, z))]
        options: dict[str, Any] = {"first": first, "backend": "triton"}
        if name == "temperature":
            leaves.append((0.5 + torch.rand(2, 2)).requires_grad_())
            options["temperature"] = leaves[-1]
        if name == "dropout":
            options["dropout_p"] = 0.3
        query, key, value = {"one": leaves[:1] * 3, "two": [*leaves, leaves[-1]]}.get(name, leaves[:3])
        out, info = fastdsm.sinkhorn_attention(query, key, value, return_info=True, **options)
        total = (out.float() * torch.randn(out.shape)).sum() + (info.f.sum() if name == "info" else 0.0)
        return [out.detach(), info.f.detach(), info.g.detach(), info.residual, *torch.autograd.grad(total, leaves)]

    Kept.forget()
    known = [called(i) for i in range(4)]
    for i, found in enumerate(known):
        Kept.forget()
        for x, y in zip(found, called(i), strict=True):
            assert torch.equal(x, y)


def test_a_broken_head_leaves_the_others_their_bits() -> None:
    given = operands(20, 20, 16, 16)
    cotangent = torch.randn(2, 2, 20, 16).to(BRAIN)
    before = pulled(given, cotangent, "triton")
    given["query"][1, 0, 3, 2] = torch.nan
    after = pulled(given, cotangent, "triton")
    for name, x in after.items():
        assert torch.equal(x[0], before[name][0])
        assert torch.equal(x[1, 1], before[name][1, 1])
        assert x[1, 0].isnan().all() or name == "value"


def test_many_lines_without_a_gradient() -> None:
    given = operands(128, 100, 64, 64, heads=1, groups=1)
    for first in ("col", "row"):
        with torch.no_grad(), recorded() as launches:
            fastdsm.sinkhorn_attention(*given.values(), first=first, backend="triton")
        assert [x.configuration.constants["BLOCK_L"] for x in launches] == [128]
        with torch.no_grad():
            found, truth, plain = (
                fastdsm.sinkhorn_attention(*(x.to(dtype) for x in given.values()), first=first, backend=backend)
                for backend, dtype in (("triton", BRAIN), ("reference", torch.float64), ("reference", torch.float32))
            )
        assert ((found.double() - truth).abs() <= budget(truth, plain, BRAIN, size=1.0)).all()


def test_what_is_served() -> None:
    """Of 2 to 64 lines and 64 features with a gradient; what is not goes by the passes."""

    def served(n: int, m: int, d: int, e: int, dtype: Any = BRAIN, entries: bool = False, saving: bool = True) -> bool:
        query, key, value = torch.empty(1, 1, n, d, dtype=dtype), torch.empty(1, 1, m, d), torch.empty(1, 1, m, e, dtype=dtype)
        return launch_short.serves(query, key, value, entries, saving)

    for entries, saving in itertools.product((False, True), repeat=2):
        assert served(2, 64, 64, 1, HALF, entries, saving)
        assert not served(1, 64, 64, 64, BRAIN, entries, saving)
        assert not served(2, 64, 64, 64, torch.float32, entries, saving)
        assert not served(2, 129, 64, 64, BRAIN, entries, saving)
        assert not served(0, 64, 64, 64, BRAIN, entries, saving)
        assert served(64, 64, 65, 64, BRAIN, entries, saving) == (not saving)
        assert served(65, 64, 64, 64, BRAIN, entries, saving) == (not saving and not entries)
    assert not served(65, 64, 65, 64, saving=False)
    assert attention_operators.backends.short(*[torch.empty(1, 1, 8, 8, dtype=HALF)] * 3, False, True, True, "triton") is False
