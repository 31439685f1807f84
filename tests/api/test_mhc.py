"""``fastdsm.mhc`` and ``HyperConnection``: values and gradients against the oracle, the doors, and how they live in PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import fastdsm
from fastdsm import mhc
from fastdsm.nn import HyperConnection
from fastdsm.reference import mhc as oracle

from ..tolerances import assert_within

Leaves = dict[str, Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def problem(n: int, channels: int, tokens: tuple[int, ...] = (2, 5), spread: float = 1.0, dtype: Any = torch.float32) -> Leaves:
    """Streams, a branch's output, and parameters; the logits of the mix have about this standard deviation."""
    new = torch.Generator().manual_seed(n + channels)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=new, dtype=torch.float64)

    rows = n * (n + 2)
    found = {"residual": noise(*tokens, n, channels), "x": noise(*tokens, channels)}
    found = {name: value.to(dtype) for name, value in found.items()}
    wide = torch.promote_types(dtype, torch.float32)
    found |= {"fn": noise(rows, n * channels).to(wide) / (n * channels) ** 0.5, "base": noise(rows).to(wide)}
    return found | {"scale": torch.tensor([0.7, 1.2, spread], dtype=wide)}


def leaves(values: Leaves, dtype: torch.dtype | None = None) -> Leaves:
    return {name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for name, x in values.items()}


def by_oracle(given: Leaves, variant: str) -> tuple[Tensor, ...]:
    """h, post, comb and the streams after a branch that adds ``x`` to its input."""
    mixing, n = mhc.VARIANTS[variant], given["residual"].shape[-2]
    mixes = oracle.mixes(given["residual"], given["fn"], mixing.norm_eps)
    pre, post, comb = oracle.split(mixes, given["scale"], given["base"], n, mixing)
    h = oracle.collapse(given["residual"], pre)
    return h, post.unsqueeze(-1), comb, oracle.post(given["x"], given["residual"], post, comb)


def by_calls(given: Leaves, variant: str) -> tuple[Tensor, ...]:
    h, (post, comb) = mhc.mhc_pre(*(given[name] for name in ("residual", "fn", "scale", "base")), variant=variant)
    return h, post, comb, mhc.mhc_post(given["x"], given["residual"], post, comb)


def assert_same(given: Leaves, found: Any, expected: Any) -> None:
    """Results and gradients of ``found`` within the budget of a float32 run of ``expected``, in all leaves."""
    single, double, plain = leaves(given), leaves(given, torch.float64), leaves(given, torch.float32)
    results, truths, plains = found(single), expected(double), expected(plain)
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    for result, truth, usual in zip(results, truths, plains, strict=True):
        assert_within(result, truth, usual)
    gradients = [
        torch.autograd.grad(ys, list(xs.values()), [c.to(y.dtype) for c, y in zip(cotangents, ys, strict=True)])
        for ys, xs in ((results, single), (truths, double), (plains, plain))
    ]
    for name, gradient, truth, usual in zip(single, *gradients, strict=True):
        size = max(1.0, float(truth.abs().max()))
        allowed = 2 * (usual.double() - truth).abs().max() + 1e-6 * size
        if gradient.dtype not in (torch.float32, torch.float64):  # two gradients of streams are rounded, and their sum
            allowed = allowed + 1.5 * torch.finfo(gradient.dtype).eps * size
        error = (gradient.double() - truth).abs().max()
        assert error <= allowed, f"{name}: {error:.2e} over {allowed:.2e}"


@pytest.mark.parametrize("variant", mhc.VARIANTS)
@pytest.mark.parametrize("n", [1, 3, 4, 8, 16])
def test_variants_against_the_oracle(variant: str, n: int) -> None:
    given = problem(n, 6)
    assert_same(given, lambda x: by_calls(x, variant), lambda x: by_oracle(x, variant))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 4.0, 16.0])
def test_dtypes_and_spreads(dtype: torch.dtype, spread: float) -> None:
    given = problem(4, 33, (7,), spread, dtype)
    assert_same(given, lambda x: by_calls(x, "deepseek"), lambda x: by_oracle(x, "deepseek"))


def test_streams_that_are_widened_piece_by_piece() -> None:
    given = problem(4, 1024, (150,), dtype=torch.bfloat16)
    assert_same(given, lambda x: by_calls(x, "paper"), lambda x: by_oracle(x, "paper"))


def deepseek_split(mixes: Tensor, scale: Tensor, base: Tensor, n: int, iters: int, eps: float) -> tuple[Tensor, ...]:
    """One token, number by number, as DeepSeek's kernel is written."""
    raw = [float(x) for x in mixes]
    pre = [1 / (1 + (-raw[i] * scale[0] - base[i]).exp()) + eps for i in range(n)]
    post = [2 / (1 + (-raw[n + i] * scale[1] - base[n + i]).exp()) for i in range(n)]
    comb = torch.zeros(n, n, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(n)):
        comb[i, j] = raw[2 * n + i * n + j] * scale[2] + base[2 * n + i * n + j]
    for i in range(n):
        row = (comb[i] - comb[i].max()).exp()
        comb[i] = row / row.sum() + eps
    for sweep in range(iters):
        if sweep > 0:
            comb = torch.stack([comb[i] / (comb[i].sum() + eps) for i in range(n)])
        comb = torch.stack([comb[:, j] / (comb[:, j].sum() + eps) for j in range(n)], 1)
    return torch.stack(pre), torch.stack(post), comb


@pytest.mark.parametrize("std", [0.1, 1.0, 2.0, 5.0, 16.0])
def test_hc_split_sinkhorn_is_deepseeks(std: float) -> None:
    mixes, base = std * torch.randn(3, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    scale = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    found = mhc.hc_split_sinkhorn(mixes, scale, base)
    single = mhc.hc_split_sinkhorn(mixes.float(), scale.float(), base.float())
    for token in range(3):
        for x, y, expected in zip(found, single, deepseek_split(mixes[token], scale, base, 4, 20, 1e-6), strict=True):
            torch.testing.assert_close(x[token], expected, rtol=1e-12, atol=1e-14)
            assert y.dtype == torch.float32
    plain = oracle.split(mixes.float(), scale.float(), base.float(), 4, mhc.VARIANTS["deepseek"])
    for x, y, usual in zip(found, single, plain, strict=True):
        assert_within(y, x, usual)
    assert [tuple(x.shape) for x in found] == [(3, 4), (3, 4), (3, 4, 4)]


def test_without_eps_the_projection_is_sinkhorns() -> None:
    x = torch.randn(5, 4, 4)
    assert torch.equal(mhc.sinkhorn_normalize(x, 7, eps=0.0), fastdsm.sinkhorn(x, n_iters=7, first="row"))
    wide = torch.randn(2, 20, 17, dtype=torch.float64)
    torch.testing.assert_close(mhc.sinkhorn_normalize(wide, 5), oracle.sweeps_with_eps(wide, 5, False, 1e-6))


@pytest.mark.parametrize("n", [1, 4, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_head(n: int, weighted: bool) -> None:
    given = problem(n, 9)
    given = {"residual": given["residual"], "fn": given["fn"][:n], "scale": given["scale"][:1], "base": given["base"][:n]}
    given |= {"norm_weight": 1 + 0.1 * torch.randn(n * 9)} if weighted else {}

    def expected(x: Leaves) -> tuple[Tensor]:
        fn = x["fn"] * x["norm_weight"] if weighted else x["fn"]
        mixing = mhc.VARIANTS["deepseek"]
        pre = oracle.split(oracle.mixes(x["residual"], fn, 1e-6), x["scale"], x["base"], n, mixing)[0]
        return (oracle.collapse(x["residual"], pre),)

    assert_same(given, lambda x: (mhc.mhc_head(**x),), expected)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_post_with_the_next_pre(shifted: bool, dtype: torch.dtype) -> None:
    given = problem(4, 10, dtype=dtype)
    given |= {"post": torch.rand(2, 5, 4, 1), "comb": torch.rand(2, 5, 4, 4)}
    given |= {"mixes": torch.randn(2, 5, 24)} if shifted else {}

    def found(x: Leaves) -> tuple[Tensor, ...]:
        names = ("x", "residual", "post", "comb", "fn", "scale", "base")
        mixed, h, (post, comb) = mhc.mhc_post_pre(*(x[name] for name in names), mixes=x.get("mixes"))
        return mixed, h, post, comb

    def expected(x: Leaves, rounded: Tensor | None = None) -> tuple[Tensor, ...]:
        mixed = oracle.post(x["x"], x["residual"], x["post"].squeeze(-1), x["comb"])
        read = mixed if rounded is None else rounded.to(mixed.dtype)  # the next pre is of streams as they are rounded
        mixing = mhc.VARIANTS["deepseek"]
        pre, post, comb = oracle.split(oracle.mixes(read, x["fn"], 1e-6), x["scale"], x["base"], 4, mixing)
        if shifted:
            pre = oracle.split(x["mixes"], x["scale"], x["base"], 4, mixing)[0]
        return mixed, oracle.collapse(read, pre), post.unsqueeze(-1), comb

    if dtype == torch.float32:
        return assert_same(given, found, expected)
    results = found(given)
    truths, plains = (
        expected({k: v.to(wide) for k, v in given.items()}, results[0]) for wide in (torch.float64, torch.float32)
    )
    for x, truth, plain in zip(results, truths, plains, strict=True):
        assert_within(x, truth, plain)
    parts = mhc.mhc_post(given["x"], given["residual"], given["post"], given["comb"])
    assert torch.equal(results[0], parts)


def test_orders_of_the_mix() -> None:
    """comb is [old, new] in every variant, and H, of which the rows are exact at the end, its transpose or itself."""
    given = problem(4, 8)
    inputs = [given[name] for name in ("residual", "fn", "scale", "base")]
    for variant in mhc.VARIANTS:
        plans = [mhc.mhc_pre(*inputs, variant=variant, transposed=flag)[1][1] for flag in (True, False)]
        assert torch.equal(plans[0], plans[1].mT)
        assert torch.equal(plans[0 if mhc.VARIANTS[variant].transposed else 1], mhc.mhc_pre(*inputs, variant=variant)[1][1])


@pytest.mark.parametrize("variant", ["paper", "transformer_engine"])
def test_a_converged_mix(variant: str) -> None:
    """Newton's is that of 400 sweeps, gradients too."""
    given, found = problem(4, 8, spread=2.0, dtype=torch.float64), []
    for options in ({"solver": "newton"}, {"sinkhorn_repeat": 400}):
        xs = leaves({name: given[name] for name in ("residual", "fn", "scale", "base")})
        h, (post, comb) = mhc.mhc_pre(*xs.values(), variant=variant, **options)
        mixed = mhc.mhc_post(h, xs["residual"], post, comb)
        found.append([mixed, comb, *torch.autograd.grad(mixed.square().sum(), list(xs.values()))])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[0][1].sum(-1), torch.ones(2, 5, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="converges a projection without eps"):
        mhc.mhc_pre(*xs.values(), solver="newton")


def test_a_broken_token_stays_alone() -> None:
    given = problem(4, 8, (6,))
    clean = by_calls(given, "deepseek")
    for value in (torch.nan, torch.inf):
        broken = {name: x.clone() for name, x in given.items()}
        broken["residual"][2, 1, 3] = value
        for x, y in zip(by_calls(broken, "deepseek"), clean, strict=True):
            assert not x[2].isfinite().all()
            others = [0, 1, 3, 4, 5]
            assert torch.equal(x[others], y[others])


def test_shapes_strides_and_no_tokens() -> None:
    given = problem(4, 8, (3, 2))
    inputs = [given[name] for name in ("fn", "scale", "base")]
    residual = given["residual"]
    expected = mhc.mhc_pre(residual, *inputs)[0]
    turned = residual.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(mhc.mhc_pre(turned, *inputs)[0], expected)
    torch.testing.assert_close(mhc.mhc_pre(residual.mT.contiguous().mT, *inputs)[0], expected)
    torch.testing.assert_close(mhc.mhc_pre(residual[:1].expand(3, 2, 4, 8), *inputs)[0], expected[:1].expand(3, 2, 8))
    assert mhc.mhc_pre(residual[0, 0], *inputs)[0].shape == (8,)
    h, (post, comb) = mhc.mhc_pre(residual[:0], *inputs)
    assert [tuple(x.shape) for x in (h, post, comb)] == [(0, 2, 8), (0, 2, 4, 1), (0, 2, 4, 4)]
    assert mhc.mhc_post(h, residual[:0], post, comb).shape == (0, 2, 4, 8)
    post = torch.rand(3, 2, 4)
    comb, x = torch.rand(3, 2, 4, 4), given["x"]
    assert torch.equal(mhc.mhc_post(x, residual, post, comb), mhc.mhc_post(x, residual, post.unsqueeze(-1), comb))


def test_errors_name_roles() -> None:
    given = problem(4, 8)
    residual, fn, scale, base = (given[name] for name in ("residual", "fn", "scale", "base"))
    with pytest.raises(ValueError, match=r"fn must have shape \(24, 32\), for n=4, C=8, got \(32, 24\)"):
        mhc.mhc_pre(residual, fn.mT, scale, base)
    with pytest.raises(ValueError, match=r"scale must have shape \(3,\)"):
        mhc.mhc_pre(residual, fn, scale[:2], base)
    with pytest.raises(ValueError, match=r"base must have shape \(24,\)"):
        mhc.mhc_pre(residual, fn, scale, base[:3])
    with pytest.raises(ValueError, match=r"residual must have shape .* 1 to 16 streams"):
        mhc.mhc_pre(torch.randn(2, 17, 8), fn, scale, base)
    with pytest.raises(ValueError, match=r"mhc_mult=3 streams"):
        mhc.mhc_pre(residual, fn, scale, base, mhc_mult=3)
    with pytest.raises(ValueError, match="variant must be one of 'deepseek', 'liger'"):
        mhc.mhc_pre(residual, fn, scale, base, variant="deepsek")
    with pytest.raises(ValueError, match="projects without eps"):
        mhc.mhc_pre(residual, fn, scale, base, variant="paper", sinkhorn_eps=1e-6)
    with pytest.raises(ValueError, match="sinkhorn_repeat must be >= 1"):
        mhc.mhc_pre(residual, fn, scale, base, sinkhorn_repeat=0)
    with pytest.raises(TypeError, match="residual must be float16"):
        mhc.mhc_pre(residual.long(), fn, scale, base)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 5, 8\)"):
        mhc.mhc_post(residual[..., 0, :4], residual, torch.rand(2, 5, 4), torch.rand(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"comb_res_mix must have shape \(2, 5, 4, 4\)"):
        mhc.mhc_post(residual[..., 0, :], residual, torch.rand(2, 5, 4), torch.rand(4, 4))
    with pytest.raises(ValueError, match=r"mixes must have shape"):
        mhc.hc_split_sinkhorn(torch.randn(2, 24), scale, base, hc_mult=3)


class TestInPyTorch:
    def inputs(self) -> list[Tensor]:
        given = leaves(problem(2, 3, (2,), dtype=torch.float64))
        return [given[name] for name in ("residual", "fn", "scale", "base", "x")]

    @staticmethod
    def layer(residual: Tensor, fn: Tensor, scale: Tensor, base: Tensor, x: Tensor, variant: str = "deepseek") -> Tensor:
        h, (post, comb) = mhc.mhc_pre(residual, fn, scale, base, variant=variant, sinkhorn_repeat=3)
        mixed, h, (post, comb) = mhc.mhc_post_pre(
            h * x, residual, post, comb, fn, scale, base, variant=variant, sinkhorn_repeat=3
        )
        return mhc.mhc_post(h, mixed, post, comb)

    @pytest.mark.parametrize("variant", ["deepseek", "megatron", "paper"])
    def test_derivatives_of_either_mode_and_order(self, variant: str) -> None:
        def function(*inputs: Tensor) -> Tensor:
            return self.layer(*inputs, variant=variant)

        inputs = self.inputs()
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=variant != "paper")
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)

    def test_transforms(self) -> None:
        inputs = [x.detach() for x in self.inputs()]
        expected = self.layer(*inputs)
        residual, x = inputs[0], inputs[4]
        found = torch.vmap(lambda r, y: self.layer(r, *inputs[1:4], y))(residual, x)
        torch.testing.assert_close(found, expected)
        loss = torch.func.grad(lambda r: self.layer(r, *inputs[1:]).square().sum())(residual)
        leaf = residual.clone().requires_grad_()
        torch.testing.assert_close(loss, torch.autograd.grad(self.layer(leaf, *inputs[1:]).square().sum(), leaf)[0])

    def test_compiles_as_one_graph_for_all_token_counts(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (4, 7):
            given = leaves(problem(3, 4, (tokens,)))
            inputs = [given[name] for name in ("residual", "fn", "scale", "base", "x")]
            found, expected = compiled(*inputs), self.layer(*inputs)
            torch.testing.assert_close(found, expected)
            for x, y in zip(*(torch.autograd.grad(z.square().sum(), inputs) for z in (found, expected)), strict=True):
                torch.testing.assert_close(x, y)

    def test_opcheck(self) -> None:
        given = leaves(problem(4, 6, (5,)))
        residual, fn, scale, base, x = (given[name] for name in ("residual", "fn", "scale", "base", "x"))
        ops, mixing = torch.ops.fastdsm, (*mhc.VARIANTS["deepseek"], "torch")
        weights, comb = torch.rand(5, 4, requires_grad=True), torch.rand(5, 4, 4, requires_grad=True)
        opcheck(ops.mhc_pre.default, (residual, fn, scale, base, None, *mixing))
        opcheck(ops.mhc_pre.default, (residual, fn[:4], scale[:1], base[:4], weights, *mixing))
        opcheck(ops.mhc_post.default, (x, residual, weights, comb, "torch"))
        opcheck(ops.mhc_post_pre.default, (x, residual, weights, comb, fn, scale, base, None, *mixing))
        opcheck(ops.sinkhorn_with_eps.default, (comb, 5, True, 1e-6, True))


class TestHyperConnection:
    @pytest.mark.parametrize("variant", mhc.VARIANTS)
    def test_is_the_calls(self, variant: str) -> None:
        layer = HyperConnection(nn.Tanh(), 6, 3, variant=variant, n_iters=20, dtype=torch.float64)
        x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
        nn.init.constant_(layer.scale, 0.7)
        h, (post, comb) = mhc.mhc_pre(x, layer.fn, layer.scale, layer.base, variant=variant)
        expected = mhc.mhc_post(h.tanh(), x, post, comb)
        found, cotangent, inputs = layer(x), torch.randn_like(x), [x, *layer.parameters()]
        torch.testing.assert_close(found, expected)
        for y, z in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (found, expected)), strict=True):
            torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-13)

    def test_gradients_of_streams_that_also_go_elsewhere(self) -> None:
        layer = HyperConnection(nn.Tanh(), 3, 2, n_iters=3).double()
        x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: layer(x) * x, (x, *layer.parameters()))
        assert torch.autograd.gradgradcheck(lambda x, *_: layer(x) * x, (x, *layer.parameters()), fast_mode=True)

    def test_weights_of_others(self) -> None:
        n, channels = 4, 6
        given = problem(n, channels)
        fn, scale, base, x = (given[name] for name in ("fn", "scale", "base", "residual"))
        state = {"phi": fn.mT, "b": base, "alpha_pre": scale[0], "alpha_post": scale[1], "alpha_res": scale[2]}
        h, (post, comb) = mhc.mhc_pre(x, fn, scale, base, variant="liger")
        torch.testing.assert_close(HyperConnection.from_liger(nn.Tanh(), state)(x), mhc.mhc_post(h.tanh(), x, post, comb))
        weight = 1 + 0.1 * torch.randn(n * channels)
        beside = [y.unflatten(-1, (n, channels)).mT.flatten(-2) for y in (fn, weight)]  # of streams as (C, n)
        layer = HyperConnection.from_transformer_engine(nn.Tanh(), beside[0], scale, base[None], beside[1])
        h, (post, comb) = mhc.mhc_pre(x, fn, scale, base, variant="transformer_engine", norm_weight=weight)
        torch.testing.assert_close(layer(x.mT), mhc.mhc_post(h.tanh(), x, post, comb).mT)
        with pytest.raises(ValueError, match="got none of alpha_pre"):
            HyperConnection.from_liger(nn.Identity(), {name: x for name, x in state.items() if name != "alpha_pre"})
        with pytest.raises(ValueError, match="fn must have shape"):
            HyperConnection.from_deepseek(nn.Identity(), fn[:23], scale, base)

    def test_temperatures_and_hooks(self) -> None:
        x, plans = torch.randn(5, 4, 6), []
        given = [HyperConnection(nn.Tanh(), 6, temperature=t, offset=1.0) for t in (2.0, torch.tensor(2.0))]
        given[1].load_state_dict(given[0].state_dict(), strict=False)
        results = []
        for layer in given:
            layer.projection.register_forward_hook(lambda _, __, plan: plans.append(plan))
            results.append(layer(x))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*plans)
