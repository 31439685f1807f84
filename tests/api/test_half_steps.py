"""half_steps: normalisations counted one by one, against their definition, as Sinkformers count them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdsm

from ..half_steps import half_steps, log_plan
from ..tolerances import assert_within

DOUBLE = torch.float64


def sinkformers(scores: Tensor, max_iter: int) -> Tensor:
    """The projection of Sinkformers' SinkhornDistance (eps = 1, cost -scores), mass 1 in all, rows first, in log space."""
    n, m = scores.shape[-2:]
    u, v = torch.zeros_like(scores[..., 0]), torch.zeros_like(scores[..., 0, :])
    for k in range(max_iter):
        if k % 2 == 0:
            u = -math.log(n) - (scores + v.unsqueeze(-2)).logsumexp(-1)
        else:
            v = -math.log(m) - (scores + u.unsqueeze(-1)).logsumexp(-2)
    return (scores + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()


@pytest.mark.parametrize("max_iter", range(1, 22))
def test_projections_of_sinkformers(max_iter: int) -> None:
    scores = torch.randn(3, 6, 6, dtype=DOUBLE) * 2
    found = fastdsm.sinkhorn(scores, half_steps=max_iter, first="row")
    assert (found - sinkformers(scores, max_iter) * 6).abs().max() < 1e-12


@pytest.mark.parametrize("max_iter", range(1, 22))
def test_attention_of_sinkformers(max_iter: int) -> None:
    query, key, value = (torch.randn(2, 3, 6, 8, dtype=DOUBLE) for _ in range(3))
    plan = sinkformers(query @ key.mT / 8**0.5, max_iter) * 6
    found = fastdsm.sinkhorn_attention(query, key, value, half_steps=max_iter, first="row")
    assert (found - plan @ value).abs().max() < 1e-12


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("start", [False, True])
def test_every_operand_and_its_gradient(count: int, first: str, start: bool) -> None:
    logits, temperature = torch.randn(3, 5, 4, dtype=DOUBLE) * 2, torch.rand(3, dtype=DOUBLE) + 0.5
    row, col = torch.rand(3, 5, dtype=DOUBLE) + 0.1, torch.rand(3, 4, dtype=DOUBLE) + 0.1
    row, col = row / row.sum(-1, keepdim=True), col / col.sum(-1, keepdim=True)
    mask = (torch.rand(3, 5, 4) > 0.2) | (torch.arange(4) == 0) | (torch.arange(5) == 0).unsqueeze(-1)
    f0 = torch.randn(3, 5 if first == "col" else 4, dtype=DOUBLE) if start else None
    leaves = [x.requires_grad_() for x in (logits, temperature, *([f0] if f0 is not None else []))]
    plan, info = fastdsm.sinkhorn(
        logits.masked_fill(~mask, torch.nan), half_steps=count, first=first, temperature=temperature, f0=f0,
        row_marginal=row, col_marginal=col, mask=mask, return_info=True,
    )  # fmt: skip
    S = (logits / temperature[:, None, None]).masked_fill(~mask, -torch.inf)
    f, g = half_steps(S, count, first, f0, row, col)
    truth = log_plan(S, f, g).exp()
    for found, right in ((plan, truth), (info.f, f), (info.g, g)):
        assert (found - right).abs().max() < 1e-10
    exact, target = (plan.sum(-2), col) if (first == "col") == (count % 2 == 1) else (plan.sum(-1), row)
    assert (exact - target).abs().max() < 1e-12  # the side that was normalised last
    other, mass = (plan.sum(-1), row) if (first == "col") == (count % 2 == 1) else (plan.sum(-2), col)
    assert (info.residual - (other / mass - 1).abs().amax(-1)).abs().max() < 1e-12
    assert (info.sweeps == (count + 1) // 2).all()
    cotangents = [torch.randn_like(x) for x in (truth, f, g)]
    pulled = [
        torch.autograd.grad(results, leaves, cotangents, materialize_grads=True, allow_unused=True)
        for results in ((plan, info.f, info.g), (truth, f, g))
    ]
    for found, right in zip(*pulled, strict=True):
        assert (found - right).abs().max() < 1e-9 * right.abs().max().clamp(min=1)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_whatever_projects(count: int) -> None:
    logits = torch.randn(7, 5, 6, dtype=DOUBLE)
    f, g = half_steps(logits, count, "col")
    spectrum = fastdsm.sinkhorn_sigma2(logits, half_steps=count)
    assert (spectrum.plan - log_plan(logits, f, g).exp()).abs().max() < 1e-12
    assert (spectrum.sigma2 - fastdsm.sigma2(spectrum.plan)).abs().max() < 1e-6
    assert (spectrum.sweeps == (count + 1) // 2).all()
    assert (fastdsm.log_sinkhorn(logits, half_steps=count) - log_plan(logits, f, g)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_backends_and_dtypes(backend: str, dtype: torch.dtype) -> None:
    logits, start = (torch.randn(3, 6, 4) * 2).to(dtype), torch.randn(3, 6)
    for count in (1, 3):
        plan = fastdsm.sinkhorn(logits, half_steps=count, f0=start, backend=backend)
        truth = log_plan(logits, *half_steps(logits, count, "col", start)).exp()
        plain = fastdsm.sinkhorn(logits.float(), half_steps=count, f0=start, backend="reference")
        assert plan.dtype == dtype
        assert_within(plan, truth, plain)


def test_a_tolerance_looks_after_every_second_step() -> None:
    logits = torch.randn(20, 4, 4, dtype=DOUBLE) * 2
    _, info = fastdsm.sinkhorn(logits, half_steps=101, tol=1e-4, return_info=True)
    assert (info.residual <= 1e-4).all()
    assert (info.sweeps < 51).any()
    for matrix, sweeps in zip(logits, info.sweeps.tolist(), strict=True):
        counts = [2 * sweeps - 1, 2 * sweeps - 3]
        errors = [(log_plan(matrix, *half_steps(matrix, k, "col")).exp().sum(-1) - 1).abs().max() for k in counts]
        assert errors[0] <= 1e-4
        assert sweeps == 2 or errors[1] > 1e-4


def test_compiled() -> None:
    logits = torch.randn(4, 5, 5)
    call = torch.compile(lambda x: fastdsm.sinkhorn(x, half_steps=3), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(logits), fastdsm.sinkhorn(logits, half_steps=3))


def test_what_excludes_each_other_is_an_error() -> None:
    logits, query = torch.randn(2, 4, 4), torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="give one of them, got n_iters=20 too"):
        fastdsm.sinkhorn(logits, half_steps=3, n_iters=20)
    with pytest.raises(ValueError, match="give one of them, got n_iters=0 too"):
        fastdsm.sinkhorn_attention(query, query, query, half_steps=3, n_iters=0)
    with pytest.raises(ValueError, match="solver='newton'"):
        fastdsm.log_sinkhorn(logits, half_steps=3, solver="newton")
    with pytest.raises(ValueError, match="grad='implicit'"):
        fastdsm.sinkhorn_sigma2(logits, half_steps=3, grad="implicit")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="half_steps must be >= 1"):
            fastdsm.sinkhorn(logits, half_steps=wrong)
    with pytest.raises(TypeError, match="half_steps must be an int"):
        fastdsm.sinkhorn(logits, half_steps=2.0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"f0 must have shape \(..., 4\)"):
        fastdsm.sinkhorn(logits, half_steps=1, f0=torch.zeros(3))
