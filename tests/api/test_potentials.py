"""f and g as results: their gradient, of sweeps and of fixed points, of projections and of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference, whole_attention
from fastdsm.pytorch import attention as pytorch_attention

from ..half_steps import half_steps, log_plan

DOUBLE = torch.float64
SOLVERS = ({"n_iters": 7}, {"n_iters": 0}, {"n_iters": 300, "grad": "implicit"}, {"n_iters": 40, "solver": "newton"})


def problem(option: str, shape: tuple[int, int, int], first: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves, the logits first, and options of a projection."""
    batch, n, m = shape
    logits = torch.randn(shape, dtype=DOUBLE)
    if option == "mask":
        mask = torch.rand(shape) > 0.15
        mask[:, 0], mask[:, 1:, 0] = False, True
        return [logits], {"mask": mask}
    if option == "marginals":
        row, col = torch.rand(batch, n, dtype=DOUBLE) + 0.2, torch.rand(batch, m, dtype=DOUBLE) + 0.2
        row, col = (x / x.sum(-1, keepdim=True) for x in (row, col))
        return [logits, row, col], {"row_marginal": row, "col_marginal": col}
    if option == "start":
        tau, f0 = torch.rand(batch, dtype=DOUBLE) + 0.7, torch.randn(batch, n if first == "col" else m, dtype=DOUBLE)
        return [logits, tau, f0], {"temperature": tau, "f0": f0}
    return [logits], {}


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("option", ["", "mask", "marginals", "start"])
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("shape", [(40, 4, 5), (3, 17, 9)])
def test_gradient(shape: tuple[int, int, int], first: str, option: str, solver: dict[str, Any]) -> None:
    leaves, options = problem(option, shape, first)
    for x in leaves:
        x.requires_grad_()
    cotangents = [torch.randn(s, dtype=DOUBLE) for s in (shape, shape[:2], (shape[0], shape[2]))]
    found = []
    for call in (fastdsm.sinkhorn, reference.sinkhorn):
        plan, info = call(leaves[0], first=first, return_info=True, **options, **solver)
        results = (plan, info.f + 0.0 * plan.sum(-1), info.g + 0.0 * plan.sum(-2))  # a constant is one that autograd knows
        # with the plan, and of one potential alone
        gradients = [
            torch.autograd.grad(of, leaves, like, retain_graph=True, allow_unused=True, materialize_grads=True)
            for of, like in ((results, cotangents), *zip(results[1:], cotangents[1:], strict=True))
        ]
        found.append([x for gradient in gradients for x in gradient])
    largest = max(float(x.abs().max()) for x in found[1])
    for x, truth in zip(*found, strict=True):
        assert (x - truth).abs().max() < 1e-9 * largest


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_cotangents_of_lines_that_take_no_part_are_ignored(solver: dict[str, Any]) -> None:
    leaves, options = problem("mask", (6, 4, 5), "col")
    logits = leaves[0].requires_grad_()
    _, info = fastdsm.sinkhorn(logits, return_info=True, **options, **solver)
    cotangent = torch.randn_like(info.f)
    found = []
    for x in (0.0, torch.nan):
        cotangent[:, 0] = x
        found.append(torch.autograd.grad(info.f, logits, cotangent, retain_graph=True)[0])
    assert torch.equal(*found)
    assert found[0].any()


def test_of_float32_and_of_kernels_is_the_oracles() -> None:
    logits = torch.randn(9, 6, 6) * 2
    for backend in ("torch", "triton"):
        leaf = logits.clone().requires_grad_()
        _, info = fastdsm.sinkhorn(leaf, return_info=True, backend=backend)
        of_f, of_g = torch.randn_like(info.f), torch.randn_like(info.g)
        (found,) = torch.autograd.grad((info.f, info.g), leaf, (of_f, of_g))
        wide = logits.double().requires_grad_()
        _, truth_info = reference.sinkhorn(wide, return_info=True)
        (truth,) = torch.autograd.grad((truth_info.f, truth_info.g), wide, (of_f.double(), of_g.double()))
        assert (found - truth).abs().max() < 3e-6 * truth.abs().max()


def test_matrices_that_stop_by_themselves() -> None:
    logits = (torch.randn(30, 4, 4, dtype=DOUBLE) * 2).requires_grad_()
    found = []
    for call in (fastdsm.sinkhorn, reference.sinkhorn):
        _, info = call(logits, tol=1e-3, n_iters=50, return_info=True)
        found.append((info.sweeps, torch.autograd.grad((info.f * info.f).sum() + info.g.exp().sum(), logits)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() < 1e-10 * found[1][1].abs().max()


def test_neighbours_of_a_bad_matrix() -> None:
    logits = torch.randn(3, 4, 4, dtype=DOUBLE)
    logits[1, 0, 0] = torch.nan
    logits.requires_grad_()
    for solver in SOLVERS:
        _, info = fastdsm.sinkhorn(logits, return_info=True, **solver)
        (found,) = torch.autograd.grad(info.f.square().sum(), logits)
        assert found[::2].isfinite().all()
        assert found[1].isnan().all()


@pytest.mark.parametrize("solver", [{"n_iters": 3}, {"solver": "newton"}], ids=str)
def test_second_derivatives_and_transforms(solver: dict[str, Any]) -> None:
    logits = torch.randn(2, 3, 3, dtype=DOUBLE)

    def loss(x: Tensor) -> Tensor:
        plan, info = fastdsm.sinkhorn(x, return_info=True, **solver)
        shared = info.f[..., 0] + info.g[..., 1]  # as a plan's entry, free of what a fixed point leaves to f and g
        return (plan.square().sum((-2, -1)) + shared.square()).sum()

    assert torch.autograd.gradgradcheck(loss, logits.clone().requires_grad_())
    leaf = logits.clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(leaf), leaf)
    assert (torch.func.grad(loss)(logits) - truth).abs().max() < 1e-12
    assert (torch.vmap(torch.func.grad(loss))(logits) - truth).abs().max() < 1e-12
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert (torch.autograd.grad(compiled(leaf), leaf)[0] - truth).abs().max() < 1e-12


def attention_logits(query: Tensor, key: Tensor, mask: Tensor | None, tau: Tensor | float, groups: int) -> Tensor:
    scores = query @ key.repeat_interleave(groups, 1).mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores / (tau[..., None, None] if isinstance(tau, Tensor) else tau)


@pytest.mark.parametrize("path", ["whole", "stored", "streamed"])
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("option", ["", "bool", "bias", "temperature", "one line"])
@pytest.mark.parametrize("count", [{"n_iters": 0}, {"n_iters": 2}, {"half_steps": 1}, {"half_steps": 3}], ids=str)
def test_attention_from_a_potential(
    count: dict[str, int], option: str, first: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path != "whole":
        monkeypatch.setattr(whole_attention, "WHOLE_ENTRIES", 0)
    if path == "streamed":
        monkeypatch.setattr(pytorch_attention, "DENSE_ENTRIES", 0)
    n, m = 7, 1 if option == "one line" else 5
    query, key, value = (torch.randn(2, heads, lines, 8, dtype=DOUBLE) for heads, lines in ((4, n), (2, m), (2, m)))
    f0 = torch.randn(2, 4, n if first == "col" else m, dtype=DOUBLE)
    leaves, mask, tau = [query, key, value, f0], None, 1.0
    if option == "bool":
        mask = (torch.rand(2, 4, n, m) > 0.2) | (torch.arange(m) == 0) | (torch.arange(n) == 0).unsqueeze(-1)
        mask[:, 0, 2] = False
        f0[:, 0, 2] = torch.nan if first == "col" else 0.3
    if option == "bias":
        mask = torch.randn(4, n, m, dtype=DOUBLE)
        mask[1, 3:, 2] = -torch.inf
        leaves.append(mask)
    if option == "temperature":
        tau = torch.rand(2, 4, dtype=DOUBLE) + 0.5
        leaves.append(tau)
    for x in leaves:
        x.requires_grad_()
    out, info = fastdsm.sinkhorn_attention(
        query, key, value, mask, enable_gqa=True, temperature=tau, first=first, f0=f0, return_info=True, **count
    )
    S = attention_logits(query, key, mask, tau, 2)
    if count == {"n_iters": 0}:
        f, g = half_steps(S, 1, "row" if first == "col" else "col")
    else:
        f, g = half_steps(S, count.get("half_steps", 2 * count.get("n_iters", 0)), first, f0)
    truth = log_plan(S, f, g).exp() @ value.repeat_interleave(2, 1)
    cotangents = [torch.randn_like(x) for x in (truth, f, g)]
    pulled = [
        torch.autograd.grad(results, leaves, cotangents, allow_unused=True, materialize_grads=True)
        for results in ((out, info.f, info.g), (truth, f, g))
    ]
    for found, right in zip((out, info.f, info.g, *pulled[0]), (truth, f, g, *pulled[1]), strict=True):
        assert (found - right).abs().max() < 1e-10 * right.abs().max().clamp(min=1)


def test_attention_by_kernels_from_a_potential() -> None:
    query, key, value = (torch.randn(1, 2, lines, 16) for lines in (20, 12, 12))
    f0, of_f = torch.randn(1, 2, 20), torch.randn(1, 2, 20)
    for count in ({"n_iters": 2}, {"half_steps": 3}):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, f0)]
        out, info = fastdsm.sinkhorn_attention(*leaves[:3], f0=leaves[3], return_info=True, backend="triton", **count)
        found = torch.autograd.grad(out.sum() + (info.f * of_f).sum(), leaves)
        wide = [x.detach().double().requires_grad_() for x in leaves]
        S = attention_logits(wide[0], wide[1], None, 1.0, 1)
        f, g = half_steps(S, count.get("half_steps", 4), "col", wide[3])
        truth = torch.autograd.grad((log_plan(S, f, g).exp() @ wide[2]).sum() + (f * of_f).sum(), wide)
        assert (info.f - f).abs().max() < 1e-5
        for x, y in zip(found, truth, strict=True):
            assert (x - y).abs().max() < 1e-5 * y.abs().max().clamp(min=1)


def test_implicit_gradient_of_attentions_potentials() -> None:
    leaves = [torch.randn(1, 2, lines, 8, dtype=DOUBLE, requires_grad=True) for lines in (6, 5, 5)]
    of_f, of_g = torch.randn(1, 2, 6, dtype=DOUBLE), torch.randn(1, 2, 5, dtype=DOUBLE)
    _, info = fastdsm.sinkhorn_attention(*leaves, n_iters=500, tol=1e-14, grad="implicit", return_info=True)
    found = torch.autograd.grad((info.f, info.g), leaves[:2], (of_f, of_g))
    S = attention_logits(leaves[0], leaves[1], None, 1.0, 1)
    col = torch.full((1, 2, 5), 6 / 5, dtype=DOUBLE)
    _, truth_info = reference.sinkhorn(S, solver="newton", col_marginal=col, return_info=True)
    truth = torch.autograd.grad((truth_info.f, truth_info.g), leaves[:2], (of_f, of_g))
    for x, y in zip(found, truth, strict=True):
        assert (x - y).abs().max() < 1e-8 * y.abs().max()


def test_a_potential_that_would_take_a_line_out_is_nan() -> None:
    query = torch.randn(1, 1, 4, 8)
    start = torch.tensor([[[0.0, -torch.inf, 0.0, 0.0]]])
    assert fastdsm.sinkhorn_attention(query, query, query, f0=start).isnan().all()
    with pytest.raises(ValueError, match=r"f0 must have shape \(..., 4\)"):
        fastdsm.sinkhorn_attention(query, query, query, f0=torch.zeros(3))
