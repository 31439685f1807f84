"""``pre`` of an mHC layer and its backward, interpreted, against the layer's definition in float64.

Errors are judged by the one policy (``fastdsm._verify.sinkhorn``), of a sum over T tokens with s at least sqrt(T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastdsm._ops.mixing import Mixing
from fastdsm._verify.sinkhorn import budget
from fastdsm.kernels.common.configuration import recorded
from fastdsm.kernels.mhc import launch, launch_pre, table_pre

DEEPSEEK = Mixing()
PLAIN = Mixing(sinkhorn_eps=0.0)
NAMES = ("h", "pre", "post", "comb", "info")
SPECTRUM = Mixing(spectrum=True)


class Inputs(NamedTuple):
    X: Tensor
    fn: Tensor
    scale: Tensor
    base: Tensor
    given: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """All in ``dtype``, as leaves of a graph."""
        return Inputs(*(None if x is None else x.to(dtype).requires_grad_() for x in self))


@dataclass(frozen=True)
class Case:
    """std: of the logits of the matrix. strided: X has gaps behind its lines and between its streams."""

    n: int = 4
    channels: int = 64
    tokens: int = 3
    dtype: torch.dtype = torch.float32
    mixing: Mixing = DEEPSEEK
    std: float = 1.0
    head: bool = False
    given: bool = False
    strided: bool = False

    def __str__(self) -> str:
        named = zip(self.__dataclass_fields__, vars(self).values(), strict=True)
        return " ".join(f"{name}={x}" for name, x in named if name not in ("mixing", "dtype"))

    def inputs(self) -> Inputs:
        n, channels = self.n, self.channels
        rows = n if self.head else n * (n + 2)
        gaps = (8, 2) if self.strided else (0, 0)
        X = torch.randn(self.tokens, n + gaps[1], channels + gaps[0]).to(self.dtype)[:, :n, :channels]
        fn = torch.randn(rows, n * channels) / math.sqrt(n * channels)
        scale = torch.tensor([1.0, 0.5, self.std])[: 1 if self.head else 3].contiguous()
        return Inputs(X, fn, scale, 0.3 * torch.randn(rows), torch.rand(self.tokens, n) if self.given else None)


CASES = [
    Case(tokens=37, channels=200),
    Case(dtype=torch.bfloat16, tokens=37, strided=True),
    Case(dtype=torch.float16, given=True, mixing=Mixing(transposed=False)),
    Case(n=1, tokens=1, channels=5, dtype=torch.bfloat16),
    Case(n=3, tokens=3, channels=1, std=4.0, mixing=Mixing(columns_first=True, pre_eps=0.0, post_mult=1.0)),
    Case(n=5, tokens=37, channels=5, dtype=torch.float16, std=0.1, strided=True, mixing=Mixing(7, True, transposed=False)),
    Case(n=8, tokens=3, channels=64, dtype=torch.bfloat16, std=2.0, given=True, mixing=Mixing(n_iters=5)),
    Case(tokens=37, channels=8, std=16.0),
    Case(tokens=37, channels=8, std=16.0, mixing=PLAIN),
    Case(n=3, tokens=37, channels=8, std=4.0, mixing=PLAIN._replace(columns_first=True, n_iters=25)),
    Case(n=8, tokens=3, channels=5, std=2.0, mixing=PLAIN._replace(transposed=False)),
    Case(n=2, tokens=3, std=5.0, mixing=PLAIN._replace(columns_first=True, transposed=False, n_iters=1)),
    Case(tokens=3, channels=5, mixing=PLAIN._replace(n_iters=0)),
    Case(tokens=3, channels=5, mixing=Mixing(n_iters=1, norm_eps=0.1)),
    Case(n=16, tokens=3, channels=5, dtype=torch.bfloat16),
    Case(n=9, tokens=9, channels=8, std=5.0, mixing=PLAIN._replace(columns_first=True)),
    Case(n=11, tokens=3, channels=5, given=True, mixing=Mixing(n_iters=3, transposed=False)),
    Case(n=16, tokens=3, channels=1, mixing=PLAIN._replace(n_iters=0, transposed=False)),
    Case(tokens=37, channels=8, std=2.0, mixing=SPECTRUM),
    Case(n=1, tokens=3, channels=8, mixing=SPECTRUM),
    Case(n=2, tokens=3, channels=8, mixing=SPECTRUM._replace(sinkhorn_eps=0.0, n_iters=1)),
    Case(n=3, tokens=5, channels=8, dtype=torch.bfloat16, given=True, std=8.0, mixing=SPECTRUM._replace(transposed=False)),
    Case(n=8, tokens=20, channels=8, std=0.1, mixing=SPECTRUM),
    Case(n=13, tokens=9, channels=8, dtype=torch.float16, std=3.0, mixing=SPECTRUM._replace(columns_first=True)),
    Case(n=16, tokens=3, channels=8, std=16.0, mixing=SPECTRUM._replace(n_iters=100)),
    Case(n=1, tokens=3, head=True),
    Case(n=16, tokens=3, channels=5, head=True),
    Case(n=4, tokens=37, channels=200, dtype=torch.bfloat16, head=True),
    Case(n=8, tokens=1, channels=5, head=True, given=True),
]  # fmt: skip


def divided(H: Tensor, dim: int, eps: float) -> Tensor:
    return H / (H.sum(dim, keepdim=True) + eps)


def projection(logits: Tensor, mixing: Mixing) -> Tensor:
    """DeepSeek's sweeps; without eps those of ``sinkhorn``, in the log domain."""
    first, second = (-2, -1) if mixing.columns_first else (-1, -2)
    if mixing.sinkhorn_eps == 0:
        for dim in (first, second) * mixing.n_iters or (second,):
            logits = logits.log_softmax(dim)
        return logits.exp()
    H = divided(logits.softmax(first) + mixing.sinkhorn_eps, second, mixing.sinkhorn_eps)
    for _ in range(mixing.n_iters - 1):
        H = divided(divided(H, first, mixing.sinkhorn_eps), second, mixing.sinkhorn_eps)
    return H


def definition(inputs: Inputs, mixing: Mixing) -> dict[str, Tensor]:
    X, fn, scale, base, given = inputs
    n, flat = X.shape[1], X.flatten(1)
    mixes = flat @ fn.T * torch.rsqrt(flat.square().mean(1, keepdim=True) + mixing.norm_eps)
    pre = torch.sigmoid(scale[0] * mixes[:, :n] + base[:n]) + mixing.pre_eps
    found = {"h": torch.einsum("tn,tnc->tc", pre if given is None else given, X), "pre": pre}
    if len(base) > n:
        found["post"] = mixing.post_mult * torch.sigmoid(scale[1] * mixes[:, n : 2 * n] + base[n : 2 * n])
        H = projection((scale[2] * mixes[:, 2 * n :] + base[2 * n :]).unflatten(1, (n, n)), mixing)
        found["comb"] = H if mixing.transposed else H.mT
        if mixing.spectrum:
            found["info"] = spectrum(H).detach()
    return found


def spectrum(H: Tensor) -> Tensor:
    """Singular values, of what is left without the mean of rows and columns the largest, the worst sum."""
    uniform = torch.full_like(H, 1 / H.shape[-1])
    rest = torch.linalg.svdvals(H - uniform @ H - H @ uniform + uniform @ H @ uniform)
    off = torch.maximum((H.sum(-1) - 1).abs().amax(-1), (H.sum(-2) - 1).abs().amax(-1))
    return torch.cat([torch.linalg.svdvals(H), rest[:, :1], off[:, None]], 1)


def gradients(inputs: Inputs, mixing: Mixing, cotangents: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = inputs.to(dtype)
    found = definition(leaves, mixing)
    total = sum((found[name] * cotangent.to(dtype)).sum() for name, cotangent in cotangents.items())
    return list(torch.autograd.grad(total, [x for x in leaves if x is not None]))


def assert_close(found: Tensor, truth: Tensor, plain: Tensor, terms: int = 1) -> None:
    """Within the budget of a quantity of the truth's size, a sum of ``terms``; where it is a gradient of 16 bits and of X's
    form, made of pieces that leave 2^-17 of fn and of ds, by as much more."""
    assert found.shape == truth.shape
    assert found.is_contiguous()
    size = max(truth.abs().max().item(), math.sqrt(terms))
    error = (found.double() - truth).abs()
    pieces = 2.0**-16 * size if found.dim() == 3 and found.dtype != torch.float32 else 0.0
    assert bool((error <= budget(truth, plain, found.dtype, size=size) + pieces).all()), f"{error.max():.2e} of {size:.2e}"


def random_cotangents(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn(x.shape).to(x.dtype) for name, x in found.items() if x is not None and name != "info"}


def backward(case: Case, inputs: Inputs, cotangents: dict[str, Tensor], sums: Tensor, add: Tensor | None) -> list[Tensor]:
    X, fn, scale, base, given = inputs
    rest = (cotangents.get(name) for name in NAMES[1:4])
    dX, dfn, dscale, dbase, dgiven = launch.pre_backward(
        cotangents["h"], *rest, X, fn, scale, base, sums, case.mixing, given, add
    )
    assert dX.dtype == X.dtype
    assert (dgiven is None) == (given is None)
    return [dX, dfn, dscale, dbase] + ([] if dgiven is None else [dgiven])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    *outputs, sums = launch.pre(*inputs[:4], case.mixing, inputs.given)
    found = {name: x for name, x in zip(NAMES, outputs, strict=True) if x is not None}
    truth, plain = (definition(inputs.to(dtype), case.mixing) for dtype in (torch.float64, torch.float32))
    assert found["h"].dtype == case.dtype
    assert found.keys() == truth.keys()
    for name, x in found.items():
        assert_close(x, truth[name], plain[name])
    cotangents = random_cotangents(found)
    true, rough = (gradients(inputs, case.mixing, cotangents, dtype) for dtype in (torch.float64, torch.float32))
    ours = backward(case, inputs, cotangents, sums, None)
    for at, (x, y, z) in enumerate(zip(ours, true, rough, strict=True)):
        assert_close(x, y, z, 1 if at in (0, 4) else case.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 4, 9])
def test_many_tokens_are_multiplied_in_larger_blocks(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(n=n, tokens=37, channels=40, dtype=dtype)
    X, fn, *_ = case.inputs()
    few = launch_pre.product(X, fn)
    monkeypatch.setattr(table_pre, "FEW_TOKENS", 36)
    with recorded() as launches:
        launch_pre.product(X, fn)
    assert launches[0].configuration.matrices >= 64
    many = launch_pre.product(X, fn)
    exact = X.double().flatten(1) @ fn.double().T
    size = X.double().flatten(1).abs() @ fn.double().abs().T
    for partials in (few, many):
        assert ((partials.double().sum(0)[:, : len(fn)] - exact).abs() <= 3e-7 * size).all()


@pytest.mark.parametrize("parts", [1, 7, 8, 9, 17])
def test_parts_are_added_up_in_their_order(parts: int) -> None:
    """Whatever their number, eight of them are on their way together."""
    case = Case(tokens=5, channels=16)
    X, fn, scale, base, _ = case.inputs()
    partials = launch_pre.product(X, fn)
    shares = torch.rand(parts, *partials.shape[1:])
    *_rest, sums = launch_pre.mix(shares, X, scale, base, case.mixing)
    expected = torch.zeros_like(shares[0])
    for share in shares:
        expected = expected + share
    assert torch.equal(sums, expected[:, : sums.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_added_is_rounded_once(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, channels=24, tokens=5)
    inputs = case.inputs()
    *_outputs, sums = launch.pre(*inputs[:4], case.mixing)
    cotangents = random_cotangents({"h": torch.empty(5, 24, dtype=dtype)})
    add = torch.randn(5, 6, 32).to(dtype)[:, :4, :24]
    true, rough = (gradients(inputs, case.mixing, cotangents, x)[0] + add.to(x) for x in (torch.float64, torch.float32))
    assert_close(backward(case, inputs, cotangents, sums, add)[0], true, rough)


@pytest.mark.parametrize("name", NAMES[:4])
def test_each_cotangent_may_come_alone(name: str) -> None:
    case = Case(channels=16)
    inputs = case.inputs()
    *outputs, sums = launch.pre(*inputs[:4], case.mixing)
    alone = {name: torch.randn_like(outputs[NAMES.index(name)])}
    true, rough = (gradients(inputs, case.mixing, alone, dtype)[:2] for dtype in (torch.float64, torch.float32))
    found = backward(case, inputs, {"h": torch.zeros_like(outputs[0]), **alone}, sums, None)
    for x, y, z in zip(found, true, rough, strict=False):
        assert_close(x, y, z)


@pytest.mark.parametrize("n", [3, 4, 12])
def test_a_broken_token_leaves_the_others_their_bits(n: int) -> None:
    case = Case(n=n, tokens=7, channels=16, mixing=SPECTRUM)
    inputs = case.inputs()
    broken = inputs._replace(X=inputs.X.index_fill(0, torch.tensor([2]), 1.0))
    broken.X[2, 1, 3] = torch.nan
    cotangents, runs = None, []
    for given in (inputs, broken):
        *outputs, sums = launch.pre(*given[:4], case.mixing)
        cotangents = cotangents or random_cotangents(dict(zip(NAMES, outputs, strict=True)))
        runs.append([*outputs, sums, backward(case, given, cotangents, sums, None)[0]])
    others = torch.arange(7) != 2
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x[others], y[others])
        assert y[2].isnan().any()


def test_parts_are_added_in_order_and_mixed_without_collapse() -> None:
    case = Case(channels=16, tokens=5)
    X, fn, scale, base, _given = case.inputs()
    partials = torch.stack([launch_pre.product(X, fn).sum(0) * weight for weight in (0.5, -0.25, 0.75)])
    partials[..., 25:] = torch.nan
    h, pre, _post, comb, _info, sums = launch_pre.mix(partials, X, scale, base, case.mixing, collapse=False)
    _h, other_pre, _post, other_comb, _info, other_sums = launch.pre(X, fn, scale, base, case.mixing)
    assert h is None
    assert torch.equal(sums, (partials[0] + partials[1] + partials[2])[:, :25])
    for x, y in ((pre, other_pre), (comb, other_comb), (sums, other_sums)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_spectrum_of_columns_of_one_norm(n: int) -> None:
    """A circulant mix: the two columns of every pair have the same bits of norm, and must still be turned to opposite sides."""
    X, fn, scale, base, _given = Case(n=n, channels=8).inputs()
    steps = torch.arange(n)
    base[2 * n :] = torch.linspace(0.0, 2.0, n)[(steps[:, None] - steps) % n].flatten()
    _h, _pre, _post, comb, info, _sums = launch.pre(torch.zeros_like(X), fn, scale, base, SPECTRUM)
    assert comb is not None
    assert info is not None
    torch.testing.assert_close(info.double(), spectrum(comb.double()), rtol=0, atol=1e-6)


def test_launches() -> None:
    X, fn, scale, base, _given = Case().inputs()
    with recorded() as launches:
        *_outputs, sums = launch.pre(X, fn, scale, base, Mixing())
        assert len(launches) == 2
        launch.pre_backward(X[:, 0].contiguous(), None, None, None, X, fn, scale, base, sums, Mixing())
    assert len(launches) == 6
    table = launch.configurations()
    assert len(set(map(id, table))) == len(table)
    assert all(any(x.configuration is y for y in table) for x in launches)
