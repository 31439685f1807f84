"""solver="newton" on the PyTorch path: converged plans against the float64 oracle, steps, safeguards, isolation, edge cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import pytorch, reference
from fastdsm._ops import newton as first_step
from fastdsm._ops.problem import Gradients, Outputs, Problem
from fastdsm._verify.sinkhorn import half_ulp
from fastdsm.pytorch import laplacian, newton, system
from fastdsm.pytorch.layout import BatchFirst, BatchLast, choose_layout

SIZES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 6), (7, 7), (16, 16), (3, 20), (40, 9), (64, 64))


def check(logits: Tensor, *, n_iters: int = 30, **options: object) -> fastdsm.SinkhornInfo:
    """The plan that is found has converged, and is where it may be."""
    plan, info = fastdsm.sinkhorn(logits, solver="newton", n_iters=n_iters, return_info=True, **options)
    check_found(logits, plan, info, **options)
    return info


def check_found(logits: Tensor, plan: Tensor, info: fastdsm.SinkhornInfo, **options: object) -> None:
    """The plan has converged, and is where a residual of tol and logits off by their rounding leave it.

    Either moves the potentials by up to its size times 1 / (1 - sigma2^2), and entries of a row sum r by r times twice that.
    """
    wide: dict[str, Any] = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}
    if {"row_marginal", "col_marginal"} <= wide.keys():  # totals that agree to float32 only
        wide["col_marginal"] *= wide["row_marginal"].sum(-1, keepdim=True) / wide["col_marginal"].sum(-1, keepdim=True)
    truth, known = reference.sinkhorn(logits.double(), solver="newton", tol=1e-9, return_info=True, **wide)
    assert bool(known.converged.all())
    assert bool(info.converged.all()), f"residual {info.residual.max():.1e} after {info.sweeps.max()} steps"
    lines = {k: x for k, x in wide.items() if k in ("row_marginal", "col_marginal", "mask")}
    gap = 1 - reference.sigma2(truth, **lines).clamp(max=1 - 1e-9) ** 2
    dtype = info.residual.dtype
    tau = wide.get("temperature", 1.0)
    tau = tau[..., None, None] if isinstance(tau, Tensor) else tau
    size = (logits.double() / tau).masked_fill(logits == -torch.inf, 0.0).abs().amax((-2, -1)) + known.g.abs().amax(-1)
    noise = (1e-12 if dtype == torch.float64 else 1e-6) + 2 * torch.finfo(dtype).eps * size
    allowed = 2 * (noise / gap)[..., None, None] * truth.sum(-1).amax(-1)[..., None, None]
    error = (plan.double() - truth).abs()
    assert bool((error <= allowed + half_ulp(truth, plan.dtype)).all()), f"{(error / allowed).max():.2f}"


def of(info: fastdsm.SinkhornInfo, index: Tensor | slice) -> fastdsm.SinkhornInfo:
    return fastdsm.SinkhornInfo(*(x[index] for x in info))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [0.1, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_scales(size: tuple[int, int], std: float, dtype: torch.dtype) -> None:
    check(torch.randn(6, *size, dtype=dtype) * std)
    check(torch.randn(2, *size, dtype=dtype) * std, first="row")


@pytest.mark.parametrize(("std", "steps", "share"), [(4.0, 12, 0.999), (8.0, 15, 0.99)])
def test_steps_that_random_matrices_take(std: float, steps: int, share: float) -> None:
    _, info = fastdsm.sinkhorn(torch.randn(65536, 4, 4) * std, solver="newton", return_info=True)
    assert bool((info.residual <= 1e-6).all())
    assert (info.sweeps <= steps).double().mean() >= share


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    for size in ((4, 4), (9, 12)):
        plan = fastdsm.sinkhorn((torch.randn(5, *size) * 2).to(dtype), solver="newton")
        assert plan.dtype == dtype
        check((torch.randn(5, *size) * 2).to(dtype))


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("size", [(5, 6), (12, 9)])
def test_options_together(size: tuple[int, int], first: str) -> None:
    n, m = size
    logits = torch.randn(20, n, m) * 2
    row, col = torch.rand(20, n) * 5 + 0.1, torch.rand(m) + 0.1
    row[:, 2], col[1] = 0.0, 0.0
    col = col * row.sum(-1, keepdim=True) / col.sum()
    temperature = torch.rand(20) + 0.5
    both = {"row_marginal": row, "col_marginal": col}
    for marginals in (both, {"row_marginal": row * 1e-20}, {"col_marginal": col[0]}):
        check(logits, first=first, temperature=temperature, **marginals)
    mask = (torch.rand(20, n, m) > 0.15) | torch.eye(n, m, dtype=torch.bool)
    mask[:, 3], mask[:, :, 0] = False, False
    support = fastdsm.sinkhorn(logits.double(), mask=mask, n_iters=3000, return_info=True)[1].residual < 1e-9
    assert support.sum() > 10
    check(logits[support], first=first, mask=mask[support], temperature=0.7)
    check(logits[support].masked_fill(~mask[support], -torch.inf), first=first)


@pytest.mark.parametrize("size", [(4, 4), (12, 9), (40, 40)])
def test_totals_that_differ(size: tuple[int, int]) -> None:
    """As far as they may. Columns have their shares of the rows' total, to the tolerance."""
    n, m = size
    row, col = torch.rand(4, n) + 0.3, torch.rand(4, m) + 0.3
    col *= (1 + 9e-5) * row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True)
    plan = fastdsm.sinkhorn(torch.randn(4, n, m) * 2, row_marginal=row, col_marginal=col, solver="newton")
    share = col.double() * (row.double().sum(-1, keepdim=True) / col.double().sum(-1, keepdim=True))
    assert ((plan.double().sum(-2) / share - 1).abs() <= 1e-6).all()


def test_blocks_that_nothing_connects() -> None:
    for size in (3, 6):
        mask = torch.block_diag(*[torch.ones(size, size)] * 2).bool()
        logits = torch.randn(8, 2 * size, 2 * size) * 3
        check(logits, mask=mask)
        plan = fastdsm.sinkhorn(logits, mask=mask, solver="newton")
        alone = fastdsm.sinkhorn(logits[:, :size, :size], solver="newton")
        torch.testing.assert_close(plan[:, :size, :size], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [4, 12])
def test_f0_is_a_warm_start(size: int) -> None:
    logits = torch.randn(30, size, size, dtype=torch.float64) * 4
    for first, which in (("col", "f"), ("row", "g")):
        plan, info = fastdsm.sinkhorn(logits, solver="newton", first=first, return_info=True)
        again = fastdsm.sinkhorn(logits, solver="newton", first=first, f0=getattr(info, which), tol=1e-10, return_info=True)
        assert again[1].sweeps.tolist() == [1] * 30
        torch.testing.assert_close(again[0], plan)
        check(logits, first=first, f0=torch.randn(30, size) * 5)


@pytest.mark.parametrize("size", [3, 4, 6, 9])
def test_each_matrix_is_alone(size: int) -> None:
    """To the last bit where matrices are lanes; a batched product may depend on the size of its batch, as the layout does."""
    batch = 600
    logits = torch.randn(batch, size, size) * torch.linspace(0.1, 9, batch)[:, None, None]
    options: dict[str, Any] = {"solver": "newton", "n_iters": 60, "return_info": True}
    plan, info = fastdsm.sinkhorn(logits, **options)
    assert info.sweeps.unique().numel() > 4

    def check_same(found: tuple[Tensor, fastdsm.SinkhornInfo], kept: slice | Tensor, count: int) -> None:
        if size <= system.LANES_MAX_SIDE and choose_layout(logits[:count], logits.dtype) is BatchLast:
            assert torch.equal(found[0], plan[kept])
        check_found(logits[kept], *found)

    for kept in (slice(0, batch, 7), slice(10, 11), slice(120, batch)):
        check_same(fastdsm.sinkhorn(logits[kept], **options), kept, len(logits[kept]))
    broken = logits.clone()
    broken[5, 0, 1], broken[6, 1, 1] = torch.nan, torch.inf
    found, info = fastdsm.sinkhorn(broken, **options)
    assert bool(found[5:7].isnan().all())
    assert bool(info.residual[5:7].isnan().all())
    assert not bool(info.converged[5:7].any())
    keep = (torch.arange(batch) < 5) | (torch.arange(batch) > 6)
    check_same((found[keep], of(info, keep)), keep, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_support_it_ends_finite_and_flagged(dtype: torch.dtype) -> None:
    """No positive diagonal: rows 0 and 1 have one column between them; and support but no total support: slow, not wrong."""
    for size in (3, 4, 10):
        mask = torch.ones(size, size, dtype=torch.bool)
        mask[:2, 1:] = False
        logits = (torch.randn(40, size, size, dtype=dtype) * 3).requires_grad_()
        for n_iters in (20, 200):
            plan, info = fastdsm.sinkhorn(logits, mask=mask, solver="newton", n_iters=n_iters, return_info=True)
            assert not bool(info.converged.any())
            assert bool((info.residual > 0.4).all())  # at best columns 1.. share what two rows do not take
            assert all(bool(x.isfinite().all()) for x in (plan, *info))
            torch.testing.assert_close(plan.sum(-1), torch.ones(40, size, dtype=dtype))
            (slope,) = torch.autograd.grad(plan.square().sum(), logits)
            assert bool(slope.isfinite().all())
        triangle = torch.ones(size, size, dtype=torch.bool).tril()
        plan, info = fastdsm.sinkhorn(logits, mask=triangle, solver="newton", n_iters=200, return_info=True)
        assert bool((info.residual < 1e-5).all())
        torch.testing.assert_close(plan, torch.eye(size, dtype=dtype).expand_as(plan), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [4, 8])
def test_huge_logits(size: int) -> None:
    _, info = fastdsm.sinkhorn(torch.randn(500, size, size) * 100, solver="newton", n_iters=60, return_info=True)
    assert bool(info.converged.all())
    check(torch.randn(8, size, size) + 1e4)


def test_n_iters_caps_the_steps() -> None:
    logits = torch.randn(200, 4, 4) * 8
    for n_iters in (1, 3):
        _, info = fastdsm.sinkhorn(logits, solver="newton", n_iters=n_iters, return_info=True)
        assert info.sweeps.max() == n_iters
    torch.testing.assert_close(
        fastdsm.sinkhorn(logits, solver="newton", n_iters=1), fastdsm.sinkhorn(logits, n_iters=1), atol=2e-6, rtol=1e-4
    )
    torch.testing.assert_close(fastdsm.sinkhorn(logits, solver="newton", n_iters=0), logits.softmax(-1))


def test_info_is_the_plan_s_own() -> None:
    for size in ((4, 6), (9, 5)):
        logits = torch.randn(9, *size, dtype=torch.float64) * 3
        plan, info = fastdsm.sinkhorn(logits, solver="newton", tol=1e-4, return_info=True)
        target = size[0] / size[1]
        torch.testing.assert_close((logits + info.f.unsqueeze(-1) + info.g.unsqueeze(-2)).exp(), plan)
        torch.testing.assert_close((plan.sum(-2) / target - 1).abs().amax(-1), info.residual, atol=1e-14, rtol=1e-6)
        assert info.sweeps.dtype == torch.int32
        assert bool((info.residual <= 1e-4).all())
        assert bool((info.residual > 1e-12).any())


def test_sigma2_of_converged_plans() -> None:
    for size in (4, 12):
        logits = torch.randn(50, size, size) * 3
        found = fastdsm.sinkhorn_sigma2(logits, solver="newton")
        truth = reference.sinkhorn_sigma2(logits.double(), solver="newton")
        torch.testing.assert_close(found.sigma2.double(), truth.sigma2, atol=1e-4, rtol=1e-4)
        assert bool((found.sigma2 <= 1 + 1e-6).all())


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 9, 3), (4, 4), (2, 1, 3, 4, 4)])
def test_batch_shapes(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    found = fastdsm.sinkhorn_sigma2(logits, solver="newton")
    assert found.plan.shape == shape
    assert found.f.shape == shape[:-1]
    assert torch.autograd.grad(found.plan.sum() + found.sigma2.sum(), logits)[0].shape == shape


def test_everything_masked_gives_zeros() -> None:
    logits = torch.randn(3, 4, 4, requires_grad=True)
    plan, info = fastdsm.sinkhorn(logits, mask=torch.zeros(4, 4, dtype=torch.bool), solver="newton", return_info=True)
    assert bool((plan == 0).all())
    assert bool(info.converged.all())
    (slope,) = torch.autograd.grad(plan.sum(), logits)
    assert bool((slope == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(5, 6), (30, 24)])
def test_every_solver_of_the_laplacian(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Elimination, Cholesky factors and conjugate gradients against a pseudo-inverse in float64."""
    n, m = size
    P = torch.rand(7, n, m, dtype=dtype) ** 3
    inverse_r = 1 / P.sum(-1)
    w = P.mT.double() @ (P.double() * inverse_r.double().unsqueeze(-1))
    w.diagonal(dim1=-2, dim2=-1).zero_()
    H = torch.diag_embed(w.sum(-1)) - w
    b = torch.randn(7, m, dtype=dtype)
    b = b - b.mean(-1, keepdim=True)
    accuracy = torch.full((7,), torch.finfo(dtype).eps, dtype=dtype)
    truth = (torch.linalg.pinv(H, hermitian=True) @ b.double().unsqueeze(-1)).squeeze(-1)
    none, ground = torch.zeros_like(b), torch.rand_like(b)
    lanes = P.permute(1, 2, 0), inverse_r.T, b.T
    for d in (
        laplacian._eliminate(*lanes, none.T).T,
        laplacian._factorise(P, inverse_r, b, none),
        laplacian._iterate(P, inverse_r, b, none, accuracy),
    ):
        error = d.double() - d.double().mean(-1, keepdim=True) - truth
        assert error.abs().amax() / truth.abs().amax() <= 2000 * torch.finfo(dtype).eps  # the ridge alone is 400
    grounded = torch.linalg.solve(H + torch.diag_embed(ground.double()), b.double())
    torch.testing.assert_close(laplacian._eliminate(*lanes, ground.T).T, grounded.to(dtype))


def test_elimination_keeps_the_smallest_weights() -> None:
    """Two pairs of columns joined by weights of 1e-12: float32 finds the potential between them all the same."""
    P = torch.block_diag(torch.rand(2, 2) + 0.5, torch.rand(2, 2) + 0.5).clamp(min=1e-12)
    r = P.sum(-1)
    b = torch.tensor([0.5, 0.25, -0.5, -0.25])
    d = laplacian._eliminate(P.unsqueeze(-1), (1 / r).unsqueeze(-1), b.unsqueeze(-1), torch.zeros(4, 1)).squeeze(-1)
    wide = P.double()
    weights = wide.T @ (wide / r.double().unsqueeze(-1))
    weights.fill_diagonal_(0.0)
    grounded = (torch.diag(weights.sum(-1)) - weights)[:3, :3]
    truth = torch.cat([torch.linalg.solve(grounded, b.double()[:3]), torch.zeros(1)])
    torch.testing.assert_close(d[:2].double(), truth[:2], rtol=1e-5, atol=0)


def test_beyond_the_direct_solvers() -> None:
    check(torch.randn(2, laplacian.DIRECT_MAX_SIDE + 8, laplacian.DIRECT_MAX_SIDE + 8) * 3)


@pytest.mark.parametrize("size", [12, 40])
def test_conjugate_gradients_serve_as_factors_do(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplacian, "DIRECT_MAX_SIDE", 6)
    for std in (1.0, 4.0):
        check(torch.randn(4, size, size) * std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("size", [5, 40])
def test_sweeps_serve_where_they_arrive(size: int, first: str, dtype: torch.dtype) -> None:
    """And Newton's steps the others, each from where its sweeps led: the batch comes back in its order."""
    std = torch.tensor([0.2, 6.0, 0.3, 0.1, 8.0, 6.0], dtype=dtype)[:, None, None]
    logits = torch.randn(6, size, size, dtype=dtype) * std
    logits[3, 4, 1] = torch.nan
    hard = std.flatten() > 1
    tol = None if size == 5 else 1e-6 if dtype == torch.float32 else 1e-12
    plan, info = fastdsm.sinkhorn(logits, solver="newton", first=first, return_info=True)
    swept, known = fastdsm.sinkhorn(logits, n_iters=first_step.SWEEPS, tol=tol, first=first, return_info=True)
    sound = torch.arange(6) != 3
    easy = sound & ~hard
    assert known.converged.tolist() == easy.tolist()
    assert info.converged.tolist() == sound.tolist()
    assert (info.sweeps > 1).tolist() == hard.tolist()
    for found, expected in zip((plan, info.f, info.g), (swept, known.f, known.g), strict=True):
        assert torch.equal(found[easy], expected[easy])
    assert bool(plan[3].isnan().all())
    check_found(logits[hard], plan[hard], of(info, hard), first=first)
    check(logits[hard], first=first)


def test_layouts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 5, 4, dtype=torch.float64) * 4
    plans = []
    for side, layout in ((6, BatchLast), (1, BatchFirst)):
        monkeypatch.setattr(system, "LANES_MAX_SIDE", side)
        plans.append(fastdsm.sinkhorn(logits, solver="newton"))
        problem = Problem(logits, 5)
        assert next(iter(system.pieces(problem, torch.float64)))[1].at is layout
    torch.testing.assert_close(*plans, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [4, 9, 12])
def test_nobody_looks_at_values_off_the_cpu(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have none: what would stall an accelerator's host raises here. 12: conjugate gradients."""
    monkeypatch.setattr(laplacian, "_DIRECT_MAX_SIDE_ELSEWHERE", 10)
    monkeypatch.setattr(laplacian, "_MOST_STEPS", 3)
    logits = torch.empty(3, size, size, device="meta")
    vectors = torch.empty(4, 3, size, device="meta").unbind(0)
    scalars = torch.empty(3, device="meta"), torch.empty(3, device="meta", dtype=torch.int32)
    marginal = torch.ones(3, size, device="meta")
    problem = Problem(logits, 4, temperature=scalars[0], f0=vectors[3], row_marginal=marginal, mask=logits > 0, tol=1e-6)
    pytorch.newton_forward(problem, Outputs(torch.empty_like(logits), *scalars, *vectors[:2]))
    pytorch.implicit_backward(problem, logits, vectors[0], Gradients(torch.empty_like(logits), *vectors[1:]))


def test_those_that_are_done_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where none leaves before the last step."""
    for size in (4, 9):
        logits = torch.randn(100, size, size) * 4
        leaving = fastdsm.sinkhorn(logits, solver="newton", return_info=True)
        with monkeypatch.context() as patch:
            patch.setattr(newton, "_DROP_BELOW", 0.0)
            staying = fastdsm.sinkhorn(logits, solver="newton", return_info=True)
        torch.testing.assert_close(staying[0], leaving[0], rtol=0, atol=0 if size == 4 else 2e-6)
        assert torch.equal(staying[1].sweeps, leaving[1].sweeps)


def test_inputs_stay_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(100, 4, 4) * 4
    for x in (logits, torch.randn(5, 9, 9)):
        kept = x.clone()
        whole = fastdsm.sinkhorn(x.requires_grad_(), solver="newton")
        whole.square().sum().backward()
        assert torch.equal(x, kept)
    logits = logits.detach()
    whole = fastdsm.sinkhorn(logits, solver="newton")
    monkeypatch.setattr(system, "_PIECE_ENTRIES", 300)
    assert torch.equal(fastdsm.sinkhorn(logits, solver="newton"), whole)
