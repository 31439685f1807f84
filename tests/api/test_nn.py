"""fastdsm.nn against the functions its modules are made of, and nn.MultiheadAttention's interface."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import fastdsm
from fastdsm import reference
from fastdsm.nn import HyperConnection, SinkhornAttention, SinkhornProjection, SpectralFloor, spectral_penalty
from fastdsm.reference import mhc as oracle

from ..tolerances import assert_within


def test_projection_is_sinkhorn_with_its_options() -> None:
    logits = torch.randn(3, 5, 6)
    mask = torch.rand(3, 5, 6) > 0.2
    layer = SinkhornProjection(n_iters=7, temperature=0.5, first="row", tol=1e-3)
    assert torch.equal(
        layer(logits, mask), fastdsm.sinkhorn(logits, n_iters=7, temperature=0.5, first="row", tol=1e-3, mask=mask)
    )


def test_a_temperature_that_is_learnt() -> None:
    layer = SinkhornProjection(temperature=nn.Parameter(torch.tensor(2.0)))
    assert [name for name, _ in layer.named_parameters()] == ["temperature"]
    layer(torch.randn(3, 4, 4)).square().sum().backward()
    assert layer.temperature.grad.abs() > 0
    assert "temperature" in SinkhornProjection(temperature=torch.ones(3)).state_dict()


@pytest.mark.parametrize("floor", [0.3, 0.7])
def test_floor_holds_and_leaves_alone_what_is_above(floor: float) -> None:
    logits = torch.randn(300, 4, 4) * torch.linspace(0.1, 4, 300)[:, None, None]
    before = fastdsm.sinkhorn_sigma2(logits, temperature=1.5).sigma2
    temperature = SpectralFloor(floor)(logits, 1.5)
    after = fastdsm.sinkhorn_sigma2(logits, temperature=temperature).sigma2
    below = before < floor
    assert 30 < below.sum() < 270
    assert (temperature[~below] == 1.5).all()
    assert (temperature[below] < 1.5).all()
    assert after.min() > floor - 1e-3
    torch.testing.assert_close(after[below], torch.full_like(after[below], floor), atol=1e-3, rtol=0.0)
    plan = SinkhornProjection(temperature=1.5, sigma2_floor=floor)(logits)
    torch.testing.assert_close(plan, fastdsm.sinkhorn(logits, temperature=temperature))


def test_floor_keeps_the_temperature_of_what_cannot_reach_it() -> None:
    logits = torch.stack([torch.randn(4, 4), torch.zeros(4, 4)])
    temperature = SpectralFloor(0.6)(logits, torch.tensor([5.0, 3.0]))
    assert temperature[0] < 5.0
    assert temperature[1] == 3.0


def test_floor_is_differentiable() -> None:
    """On held matrices sigma2 stays at the floor, so that its gradient in the logits vanishes; the plan's does not."""
    logits = (0.3 * torch.randn(20, 4, 4, dtype=torch.float64)).requires_grad_()
    temperature = torch.ones(20, dtype=torch.float64, requires_grad=True)
    plan = fastdsm.sinkhorn(logits, temperature=SpectralFloor(0.5)(logits, temperature), n_iters=60)
    free = fastdsm.sinkhorn(logits, n_iters=60)
    held, unheld, of_plan = (
        torch.autograd.grad(x.sum(), logits, retain_graph=True)[0].abs().amax()
        for x in (fastdsm.sigma2(plan), fastdsm.sigma2(free), plan.square())
    )
    assert held < 1e-4 * unheld
    assert of_plan > 1e-3
    (d_temperature,) = torch.autograd.grad(plan.square().sum(), temperature)
    assert (d_temperature == 0).all()


def test_floor_under_a_mask() -> None:
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 5] = mask[5] = False
    logits = 0.2 * torch.randn(10, 6, 6)
    plan = SinkhornProjection(sigma2_floor=0.5)(logits, mask)
    assert (reference.sigma2(plan, mask=mask) - 0.5).abs().max() < 1e-3


def test_a_held_layer_trains_under_compile() -> None:
    layer = SinkhornProjection(sigma2_floor=0.5)
    logits = 0.3 * torch.randn(5, 4, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (layer, compiled):
        leaf = logits.clone().requires_grad_()
        call(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_modules_compile_whole() -> None:
    x = torch.randn(2, 6, 8)
    attention, connection = SinkhornAttention(8, 2, batch_first=True), HyperConnection(nn.Linear(8, 8), 8)

    def network(x: Tensor) -> Tensor:
        x = x + attention(x, x, x, need_weights=False)[0]
        return connection.reduce(connection(connection.expand(x)))

    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


def test_penalty() -> None:
    sigma2 = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)
    value = spectral_penalty(sigma2, 0.4)
    assert value.item() == pytest.approx(0.09 / 3)
    value.backward()
    torch.testing.assert_close(sigma2.grad, torch.tensor([-0.2, 0.0, 0.0]))
    assert spectral_penalty(torch.ones(0), 0.4) == 0
    logits = (0.2 * torch.randn(40, 4, 4)).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        spectral_penalty(fastdsm.sinkhorn_sigma2(logits).sigma2, 0.5).backward()
        optimiser.step()
    assert fastdsm.sinkhorn_sigma2(logits).sigma2.min() > 0.45


class TestAttention:
    def operands(self, batch_first: bool) -> tuple[Tensor, Tensor]:
        query, key = torch.randn(2, 7, 12), torch.randn(2, 5, 12)
        return (query, key) if batch_first else (query.transpose(0, 1), key.transpose(0, 1))

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("kind", [None, "bool", "float", "heads"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_softmax_is_its_zero_sweeps(self, batch_first: bool, kind: str | None, padded: bool) -> None:
        theirs = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        nn.init.normal_(theirs.in_proj_bias)
        ours = SinkhornAttention(12, 3, batch_first=batch_first, n_iters=0)
        ours.load_state_dict(theirs.state_dict())
        query, key = self.operands(batch_first)
        mask = {None: None, "bool": torch.rand(7, 5) > 0.7, "float": torch.randn(7, 5), "heads": torch.rand(6, 7, 5) > 0.7}[
            kind
        ]
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False
        padding = (torch.arange(5) == torch.tensor([[4], [3]])) if padded else None
        if padded and kind == "float":
            padding = None  # nn.MultiheadAttention wants both masks of one type
        expected = theirs(query, key, key, key_padding_mask=padding, attn_mask=mask)
        for need_weights in (True, False):
            out, weights = ours(query, key, key, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
            torch.testing.assert_close(out, expected[0])
            if need_weights:
                torch.testing.assert_close(weights, expected[1])
            else:
                assert weights is None

    def test_sweeps_unbatched_and_separate_widths(self) -> None:
        ours = SinkhornAttention(12, 3, kdim=6, vdim=4, n_iters=200)
        query, key, value = torch.randn(5, 12), torch.randn(5, 6), torch.randn(5, 4)
        out, weights = ours(query, key, value, average_attn_weights=False)
        assert out.shape == (5, 12)
        assert weights.shape == (3, 5, 5)
        torch.testing.assert_close(weights.sum(-2), torch.ones(3, 5), rtol=1e-4, atol=1e-4)
        without, _ = ours(query, key, value, need_weights=False)
        torch.testing.assert_close(out, without, rtol=1e-4, atol=1e-5)

    def test_floor(self) -> None:
        ours = SinkhornAttention(12, 3, batch_first=True, n_iters=40, sigma2_floor=0.5)
        x = torch.randn(2, 6, 12, requires_grad=True)
        out, weights = ours(x, x, x, average_attn_weights=False)
        assert fastdsm.sigma2(weights).min() > 0.5 - 1e-3
        without, _ = ours(x, x, x, need_weights=False)
        torch.testing.assert_close(out, without, rtol=1e-4, atol=1e-5)
        without.square().sum().backward()
        assert x.grad.isfinite().all()

    def test_dropout_only_in_training(self) -> None:
        ours = SinkhornAttention(12, 3, dropout=0.5)
        x = torch.randn(4, 2, 12)
        assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
        ours.eval()
        assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="multiple of num_heads, both >= 1, got 12 and 5"):
            SinkhornAttention(12, 5)
        x = torch.randn(4, 2, 12)
        with pytest.raises(ValueError, match="is_causal=True has no Sinkhorn plan"):
            SinkhornAttention(12, 3)(x, x, x, is_causal=True)
        with pytest.raises(ValueError, match="must all be"):
            SinkhornAttention(12, 3)(x, x[0], x)


def mixes_of(layer: HyperConnection, x: Tensor) -> tuple[Tensor, ...]:
    """pre, post and comb, by the oracle."""
    return oracle.split(oracle.mixes(x, layer.fn, layer.mixing.norm_eps), layer.scale, layer.base, 4, layer.mixing)


class TestHyperConnection:
    def test_against_the_formula(self) -> None:
        n, dim = 4, 8
        layer = HyperConnection(nn.Linear(dim, dim), dim).double()
        with torch.no_grad():
            layer.scale.fill_(0.7)
        x = torch.randn(2, 3, n, dim, dtype=torch.float64)
        out = layer(x)
        for b in range(2):
            for t in range(3):
                token = x[b, t]
                z = token.flatten() / (token.square().mean() + 1e-6).sqrt()
                raw = 0.7 * layer.fn @ z + layer.base
                pre, post = raw[:n].sigmoid(), 2 * raw[n : 2 * n].sigmoid()
                H = reference.sinkhorn(raw[2 * n :].view(n, n), n_iters=20)
                torch.testing.assert_close(out[b, t], H @ token + post[:, None] * layer.branch(pre @ token))

    def test_equal_streams_start_as_a_residual_connection(self) -> None:
        layer = HyperConnection(nn.Linear(8, 8), 8)
        with torch.no_grad():
            layer.scale.zero_()
        x = torch.randn(5, 8)
        torch.testing.assert_close(layer.reduce(layer(layer.expand(x))), x + layer.branch(x))

    def test_one_stream_floor_and_errors(self) -> None:
        assert HyperConnection(nn.Identity(), 8, streams=1)(torch.randn(2, 1, 8)).shape == (2, 1, 8)
        layer = HyperConnection(nn.Identity(), 8, offset=0.1, sigma2_floor=0.5)
        plans = []
        layer.projection.register_forward_hook(lambda _, __, plan: plans.append(plan))
        layer(torch.randn(6, 4, 8)).sum().backward()
        assert (fastdsm.sigma2(plans[0]) - 0.5).abs().max() < 1e-3
        with pytest.raises(ValueError, match=r"must have shape \(\.\.\., 4, 8\), got \(6, 8\)"):
            layer(torch.randn(6, 8))

    def test_from_the_meta_device(self) -> None:
        with torch.device("meta"):
            layer = HyperConnection(nn.Linear(8, 8), 8, dtype=torch.float64)
        layer = layer.to_empty(device="cpu")
        for x in layer.parameters():
            x.data.fill_(torch.nan)
        for owner in layer.modules():
            if hasattr(owner, "reset_parameters"):
                owner.reset_parameters()
        torch.manual_seed(0)
        again = HyperConnection(nn.Linear(8, 8), 8, dtype=torch.float64)
        assert all(torch.equal(layer.state_dict()[name], again.state_dict()[name]) for name in ("scale", "base"))
        assert 0.9 < layer.fn.std() / again.fn.std() < 1.1
        held = SinkhornProjection(temperature=nn.Parameter(torch.tensor(2.0)), dtype=torch.float64)
        held.to_empty(device="cpu").reset_parameters()
        assert held.temperature.item() == 2.0
        assert held.temperature.dtype == torch.float64

    @pytest.mark.parametrize("module_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_mixed_precision(self, dtype: torch.dtype, autocast: bool, module_dtype: torch.dtype) -> None:
        """Everything but the branch in float32, rounded once: to half a unit of the result of float64."""

        class Branch(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                assert x.dtype == dtype
                self.came = x.detach()
                self.left = (2.0 * x).to(torch.bfloat16 if autocast else dtype)
                return self.left

        layer = HyperConnection(Branch(), 16).to(module_dtype)
        with torch.no_grad():
            layer.scale.fill_(0.7)
        exact = copy.deepcopy(layer).double()
        plans: list[Tensor] = []
        layer.projection.register_forward_hook(lambda _, __, plan: plans.append(plan))
        x = torch.randn(5, 4, 16).to(dtype)
        with torch.autocast("cpu", enabled=autocast):
            out = layer(x)
        assert out.dtype == dtype
        assert plans[0].dtype == torch.float32
        assert (plans[0].sum(-1) - 1).abs().max() < 1e-6
        reads, results = [], []
        for like in (exact, copy.deepcopy(exact).float()):
            streams = x.to(like.fn.dtype)
            pre, post, comb = mixes_of(like, streams)
            reads.append(oracle.collapse(streams, pre))
            results.append(oracle.post(layer.branch.left.to(streams.dtype), streams, post, comb))
        assert_within(layer.branch.came, *reads)
        assert_within(out, *results)

    def test_gradients_in_mixed_precision(self) -> None:
        layer, x = HyperConnection(nn.Linear(16, 16).bfloat16(), 16), torch.randn(5, 4, 16).bfloat16().requires_grad_()
        layer(x).float().square().sum().backward()
        exact, wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
        exact.zero_grad()
        exact(wide).square().sum().backward()
        assert layer.fn.grad.dtype == torch.float32
        assert (x.grad.double() - wide.grad).norm() < 1e-2 * wide.grad.norm()
        assert (layer.fn.grad.double() - exact.fn.grad).norm() < 2e-2 * exact.fn.grad.norm()

    def test_options(self) -> None:
        """first, transposed and eps against the formulas; channels beside streams."""
        x = torch.randn(3, 4, 8, dtype=torch.float64)
        for first, transposed, eps in itertools.product(("col", "row"), (False, True), (0.0, 1e-3)):
            layer = HyperConnection(
                nn.Identity(), 8, first=first, transposed=transposed, eps=eps, n_iters=3, dtype=torch.float64
            )
            with torch.no_grad():
                layer.scale.fill_(0.7)
            pre, post, comb = mixes_of(layer, x)
            plan = comb if transposed else comb.mT
            raw = (0.7 * oracle.mixes(x, layer.fn, 1e-6) + layer.base)[..., 8:].unflatten(-1, (4, 4))
            out = layer(x)
            expected = raw.softmax(-1 if first == "row" else -2) + eps
            side, other = (-1, -2) if first == "row" else (-2, -1)
            expected = expected / (expected.sum(other, keepdim=True) + eps)
            for _ in range(2):
                expected = expected / (expected.sum(side, keepdim=True) + eps)
                expected = expected / (expected.sum(other, keepdim=True) + eps)
            torch.testing.assert_close(plan, expected)
            mixed = (expected.mT if transposed else expected) @ x
            torch.testing.assert_close(out, mixed + post.unsqueeze(-1) * (pre.unsqueeze(-2) @ x))
            beside = HyperConnection(
                nn.Identity(), 8, first=first, transposed=transposed, eps=eps, n_iters=3, channels_first=True
            )
            beside.to(torch.float64).load_state_dict(layer.state_dict())
            torch.testing.assert_close(beside(x.mT), out.mT)
            torch.testing.assert_close(beside.reduce(beside.expand(x[:, 0])), x[:, 0])
        with pytest.raises(ValueError, match="with eps there are n_iters >= 1 sweeps"):
            HyperConnection(nn.Identity(), 8, eps=1e-6, sigma2_floor=0.5)

    def test_branches_with_arguments_and_tuples(self) -> None:
        class Branch(nn.Module):
            def forward(self, x: Tensor, scale: float, *, more: Tensor) -> tuple[Tensor, Tensor]:
                return scale * x, more + 1

        x = torch.randn(2, 4, 8)
        layer, plain = HyperConnection(Branch(), 8), HyperConnection(nn.Identity(), 8)
        plain.load_state_dict(layer.state_dict())
        out, other = layer(x, 1.0, more=torch.ones(2))
        torch.testing.assert_close(out, plain(x))
        assert torch.equal(other, torch.full((2,), 2.0))
