"""fastdsm.pytorch: what its sweeps record, what stopping leaves alone, how a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdsm
from fastdsm._ops.problem import Problem
from fastdsm.pytorch.chunk import parts
from fastdsm.pytorch.sweeps import run, tame_range


@pytest.mark.parametrize(("batch", "n", "m"), [(3, 16, 16), (2, 24, 9), (600, 12, 12), (700, 4, 4)])
@pytest.mark.parametrize("scale", [0.5, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_factors_belong_to_their_sweeps(batch: int, n: int, m: int, scale: float, dtype: torch.dtype) -> None:
    logits = scale * torch.randn(batch, n, m, dtype=dtype)
    for part in parts(Problem(logits, 100), backward=True):
        chunk, at, swept = part.chunk, part.chunk.layout, run(part.chunk, 100, record=True)
        assert sum(len(segment.u) - 1 for segment in swept.segments) == 100
        for segment in swept.segments:
            if not chunk.tame:  # who keeps one K throughout
                chunk.set_kernel(segment.f, segment.g)
            for k in range(len(segment.u) - 1):
                v = chunk.c / (chunk.K * at.down(segment.u[k])).sum(at.rows)
                if segment.v:
                    torch.testing.assert_close(segment.v[k], v)
                torch.testing.assert_close(segment.u[k + 1], chunk.r / (chunk.K * at.across(v)).sum(at.cols))


@pytest.mark.parametrize("n", [12, 32])
@pytest.mark.parametrize("uneven", [False, True])
def test_how_long_others_go_on_changes_no_bit(n: int, uneven: bool) -> None:
    logits = torch.randn(3, n, n) * torch.tensor([1.0, 8.0, 60.0])[:, None, None]
    logits[0, 0] += 40.0  # wild, but soon done
    marginal = torch.ones(n)
    if uneven:
        marginal[0] = 1e-14  # every sweep is in the log domain
    options = {"n_iters": 60, "tol": 1e-5, "row_marginal": marginal}
    plan, info = fastdsm.sinkhorn(logits, return_info=True, **options)
    assert info.sweeps[0] < 20
    assert info.sweeps[2] == 60
    assert torch.equal(fastdsm.sinkhorn(logits[:1], **options)[0], plan[0])


def test_no_piece_is_too_small_for_its_calls() -> None:
    for batch in (1, 2, 13121, 13250, 65536, 65537, 100_000):
        logits = torch.zeros(batch, 4, 4)
        for backward in (False, True):
            sizes = [part.where.stop - part.where.start for part in parts(Problem(logits, 3), backward)]
            assert sum(sizes) == batch
            assert max(sizes[:-1], default=batch) == min(sizes[:-1], default=batch)
            assert sizes[-1] >= sizes[0] / 2 - 64 * len(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 4, 7, 8, 9, 12, 16, 17, 24, 33])
def test_what_neighbours_are_changes_no_bit(n: int, dtype: torch.dtype) -> None:
    """Tame or wild, or not finite: those that are fewer of a piece come by themselves."""
    batch = 32 * n + 8 if n <= 16 else 40
    tame, wild, cotangent = torch.randn(3, batch, n, n, dtype=dtype).unbind(0)
    wild = wild.sign() * (wild.abs() + 30.0)
    found = []
    for count in (1, 2, 7, batch // 2, batch - 1):
        for value in (0.0, torch.nan):
            logits = torch.cat([wild[:count], tame[count:]])
            logits[max(count // 2, 1), 0, 0] += value
            leaf = logits.requires_grad_()
            plan = fastdsm.sinkhorn(leaf)
            (slope,) = torch.autograd.grad(plan, leaf, cotangent)
            assert bool(plan[[0, -1]].isfinite().all())
            found.append(torch.stack([plan.detach(), slope])[:, [0, -1]])
    assert all(torch.equal(some, found[0]) for some in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wild", [3, 47])
def test_the_fewer_of_a_piece_are_put_back(wild: int, dtype: torch.dtype) -> None:
    logits = torch.randn(50, 5, 6)
    logits[torch.randperm(50)[:wild]] *= 30.0
    logits = logits.to(dtype)
    for tol in (None, 1e-3):
        plan, info = fastdsm.sinkhorn(logits, tol=tol, return_info=True)
        for k in range(50):
            alone, known = fastdsm.sinkhorn(logits[k : k + 1], tol=tol, return_info=True)
            torch.testing.assert_close(plan[k], alone[0])
            assert info.sweeps[k] == known.sweeps[0]
            torch.testing.assert_close(info.f[k] + info.g[k, 0], known.f[0] + known.g[0, 0])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("options", ["none", "every", "tolerance"])
def test_pieces_in_blocks(options: str) -> None:
    batch, n, m = 27_000, 4, 3
    scale = torch.linspace(0.1, 10.0, batch, dtype=torch.float64)  # tame and wild
    logits = torch.randn(batch, n, m, dtype=torch.float64) * scale[:, None, None]
    inputs: dict[str, Any] = {"n_iters": 12}
    if options == "every":
        inputs |= {
            "temperature": 0.5 + torch.rand(batch, dtype=torch.float64),
            "f0": torch.randn(batch, n, dtype=torch.float64),
            "row_marginal": 0.5 + torch.rand(batch, n, dtype=torch.float64),
            "mask": torch.rand(batch, n, m) < 0.9,
        }
    elif options == "tolerance":
        inputs |= {"tol": 1e-3}
    blocks = {part.blocks for part in parts(Problem(logits, 12), backward=True)}
    assert blocks == {2, None}  # the last piece cannot be halved
    cotangent, found = torch.randn_like(logits), []
    for call in (fastdsm.sinkhorn, fastdsm.reference.sinkhorn):
        leaves = [logits.clone().requires_grad_()]
        given = dict(inputs)
        for name in ("temperature", "f0", "row_marginal"):
            if name in given:
                given[name] = given[name].clone().requires_grad_()
                leaves.append(given[name])
        plan = call(leaves[0], **given)
        found.append([plan.detach(), *torch.autograd.grad(plan, leaves, cotangent)])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.usefixtures("two_threads")
def test_info_of_pieces_in_blocks() -> None:
    logits = torch.randn(16384, 4, 4) * torch.linspace(0.1, 10.0, 16384)[:, None, None]
    results = []
    for some in (logits, logits[:16000:16]):  # the second is too small for blocks
        plan, info = fastdsm.sinkhorn(some, n_iters=9, tol=1e-3, return_info=True)
        results.append((plan, info.f, info.g, info.residual, info.sweeps, fastdsm.sinkhorn_sigma2(some)[1]))
    for whole, alone in zip(*results, strict=True):
        torch.testing.assert_close(whole[:16000:16], alone)


@pytest.mark.parametrize(("batch", "n", "m"), [(700, 4, 4), (600, 12, 12), (5, 24, 24), (40, 3, 13), (40, 13, 3)])
@pytest.mark.parametrize(("temperature", "hardest"), [(1.0, 10.0), (0.5, 10.0), (1.0, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_a_piece_with_tame_and_wild_matrices(
    batch: int, n: int, m: int, temperature: float, hardest: float, dtype: torch.dtype
) -> None:
    n_iters = 30
    logits = torch.randn(batch, n, m, dtype=dtype) * torch.linspace(0.1, hardest, batch, dtype=dtype)[:, None, None]
    logits[-1, 0, 0] = 60.0
    logits *= tame_range(n_iters, n, m, dtype) / tame_range(n_iters, n, m, torch.float32)
    fewer, others = parts(Problem(logits, n_iters, temperature), backward=True)
    assert isinstance(fewer.where, torch.Tensor) == fewer.chunk.layout.movable(n * m * dtype.itemsize)
    assert not isinstance(fewer.where, torch.Tensor) or 0 < 2 * len(fewer.where) <= batch
    assert (fewer.chunk.tame is None) == (others.chunk.tame is not None)
    cotangent = torch.randn_like(logits)
    gradients = []
    for call in (fastdsm.sinkhorn, fastdsm.reference.sinkhorn):
        leaf = logits.clone().requires_grad_()
        call(leaf, temperature=temperature, n_iters=n_iters).backward(cotangent)
        assert torch.equal(leaf, logits)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
