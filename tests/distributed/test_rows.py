"""Projections of matrices whose rows two processes share: values and gradients of the whole matrix in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastdsm

from .pool import SIZE, Pool

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
BATCH, ROWS, COLUMNS = 2, 7, 5
SHARED = ("temperature", "col_marginal")

CALLS = (
    "plain", "row first", "no sweeps", "no sweeps, row first", "half steps", "half steps, row first", "tol", "tol, row first",
    "temperatures", "marginals", "marginals, row first", "mask", "mask, row first", "f0", "f0, row first", "hard", "excluded",
    "one matrix", "newton", "newton, row first", "newton, marginals", "newton, mask", "newton, hard", "implicit",
)  # fmt: skip


def given(name: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A call's floating tensors, whole, and the other options."""
    torch.manual_seed(4)
    spread = {"hard": 8.0, "newton, hard": 3.0}.get(name, 1.0)
    tensors = {"logits": torch.randn(BATCH, ROWS, COLUMNS, dtype=torch.float64) * spread}
    options: dict[str, Any] = {"first": "row" if "row first" in name else "col", "n_iters": 6}
    if name.startswith("newton"):
        options |= {"solver": "newton", "n_iters": 60}
    if name == "implicit":
        options |= {"grad": "implicit", "n_iters": 200}
    if name.startswith("no sweeps"):
        options["n_iters"] = 0
    if name.startswith("half steps"):
        options = {"first": options["first"], "half_steps": 5}
    if name.startswith("tol"):
        options |= {"tol": 1e-6, "n_iters": 200}
    if name == "temperatures":
        tensors["temperature"] = torch.tensor([0.7, 1.6], dtype=torch.float64)
    if "marginals" in name or name == "excluded":
        tensors["row_marginal"] = torch.rand(BATCH, ROWS, dtype=torch.float64) + 0.1
        tensors["col_marginal"] = torch.rand(BATCH, COLUMNS, dtype=torch.float64) + 0.1
        if name == "excluded":
            tensors["row_marginal"][:, 2] = 0
            tensors["col_marginal"][0, 1] = 0
        scale = tensors["row_marginal"].sum(1) / tensors["col_marginal"].sum(1)
        tensors["col_marginal"] *= scale[:, None]
    if "mask" in name:
        mask = torch.rand(BATCH, ROWS, COLUMNS) > 0.2
        mask[0, 6] = mask[1, :, 3] = False
        options["mask"] = mask
    if name.startswith("f0"):
        tensors["f0"] = torch.randn(BATCH, COLUMNS if "row" in name else ROWS, dtype=torch.float64)
    if name == "one matrix":
        tensors["logits"] = tensors["logits"][0]
    return {key: x.to(dtype) for key, x in tensors.items()}, options


def part(name: str, x: Any, where: slice, call: str) -> Any:
    """What one process is given of an argument."""
    if name in ("logits", "mask"):
        return x[..., where, :]
    if name == "row_marginal" or (name == "f0" and "row" not in call):
        return x[..., where]
    return x


def own(call: str, sizes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The rows of one process, info, gradients with a cotangent that depends on the entry."""
    import fastdsm.distributed

    rank = dist.get_rank()
    where = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
    tensors, options = given(call, dtype)
    leaves = {name: part(name, x, where, call).clone().requires_grad_() for name, x in tensors.items()}
    options = {name: part(name, x, where, call) for name, x in options.items()}
    plan, info = fastdsm.distributed.sinkhorn(**leaves, **options, return_info=True)
    (plan * cotangent(tensors["logits"])[..., where, :]).sum().backward()
    return plan.detach(), [x.detach() for x in info], {name: x.grad for name, x in leaves.items()}


def cotangent(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(like.dtype)


@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_one_process(workers: Pool, call: str, sizes: tuple[int, int]) -> None:
    tensors, options = given(call)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    plan, info = fastdsm.sinkhorn(**leaves, **options, return_info=True)
    if "tol" in call:  # every matrix goes on until all are there
        options = {"first": options["first"], "n_iters": int(info.sweeps.max())}
        plan, info = fastdsm.sinkhorn(**leaves, **options, return_info=True)
    (plan * cotangent(plan)).sum().backward()
    found = workers.run(own, call, sizes, torch.float64)
    converged = "newton" in call or call == "implicit"
    allowed = 1e-11 if converged else 1e-12
    torch.testing.assert_close(torch.cat([x for x, _, _ in found], -2), plan.detach(), rtol=0, atol=allowed)
    for _, theirs, _ in found:
        torch.testing.assert_close(theirs[0], info.residual, rtol=1e-9, atol=1e-12)
        assert torch.equal(theirs[2], info.sweeps) or "newton" in call
    f, g = torch.cat([theirs[3] for _, theirs, _ in found], -1), found[0][1][4]
    there = plan.detach().sum(-1) > 0  # of others the potential is 0 in any gauge
    right = info.f.detach() + info.g[..., :1].detach()
    torch.testing.assert_close((f + g[..., :1])[there], right[there], rtol=0, atol=1e-10)
    for name, x in leaves.items():
        parts = [slopes[name] for _, _, slopes in found]
        if name in SHARED or (name == "f0" and "row" in call):
            grad = sum(parts)
        else:
            grad = torch.cat(parts, -2 if name == "logits" else -1)
        assert x.grad is not None
        torch.testing.assert_close(grad, x.grad, rtol=1e-9, atol=1e-9 if converged else 1e-11, msg=name)


@pytest.mark.parametrize("call", ["plain", "hard", "temperatures"])
def test_in_float32(workers: Pool, call: str) -> None:
    """To 1e-6 of the plan in float64, also at logits of standard deviation 8."""
    tensors, options = given(call, torch.float32)
    leaves = {name: x.double().requires_grad_() for name, x in tensors.items()}
    plan = fastdsm.sinkhorn(**leaves, **options)
    (plan * cotangent(tensors["logits"]).double()).sum().backward()
    found = workers.run(own, call, (4, 3), torch.float32)
    torch.testing.assert_close(torch.cat([x for x, _, _ in found], -2).double(), plan.detach(), rtol=0, atol=1e-6)
    grad = torch.cat([slopes["logits"] for _, _, slopes in found], -2).double()
    torch.testing.assert_close(grad, leaves["logits"].grad, rtol=0, atol=1e-6)


def counted() -> tuple[list[int], list[int]]:
    """Numbers that each all-reduce sends, forward and backward."""
    import fastdsm.distributed
    from fastdsm.distributed import collectives, gradient, rows

    sent: list[int] = []

    def noted(x: Tensor, operation: str, group: Any) -> Tensor:
        assert x.dtype == torch.float64
        sent.append(x.numel())
        return collectives.reduced(x, operation, group)

    rows.reduced = gradient.reduced = noted
    try:
        x = torch.randn(2, 6, 5, requires_grad=True)
        plan = fastdsm.distributed.sinkhorn(x, n_iters=20)
        forward = list(sent)
        sent.clear()
        plan.square().sum().backward()
    finally:
        rows.reduced = gradient.reduced = collectives.reduced
    return forward, sent


def test_what_is_exchanged(workers: Pool) -> None:
    """2 matrices of 5 columns: a maximum, sums with the rows' total, then sums; as many sums back."""
    for forward, backward in workers.run(counted):
        assert forward == [10, 12, *[10] * 19]
        assert backward == [10] * 20


def assigned() -> list[bool]:
    """SwAV's and DINOv2's calls with the samples of this process, beside the origins' loop over all of them; and sigma2."""
    import fastdsm.distributed
    from fastdsm.compat import dinov2, swav

    torch.manual_seed(0)
    rank, scores = dist.get_rank(), torch.randn(12, 6)
    Q = (scores.double() / 0.05).exp().T
    for _ in range(3):
        Q = Q / Q.sum(1, keepdim=True) / 6
        Q = Q / Q.sum(0, keepdim=True) / 12
    expected = (Q * 12).T.chunk(SIZE)[rank].float()
    mine = scores.chunk(SIZE)[rank]
    plans = torch.stack([fastdsm.sinkhorn(torch.randn(12, 12), n_iters=5), torch.full((12, 12), 1 / 12)])
    sigma2 = fastdsm.distributed.sigma2(plans.chunk(SIZE, 1)[rank], tol=1e-8)
    broken = plans.clone()
    broken[0, 0, 0] = torch.nan
    bad = fastdsm.distributed.sigma2(broken.chunk(SIZE, 1)[rank])
    with pytest.raises(ValueError, match="square over all processes"):
        fastdsm.distributed.sigma2(torch.randn(3, 5))
    return [
        torch.allclose(swav.sinkhorn(mine), expected, atol=1e-6),
        torch.allclose(dinov2.sinkhorn_knopp_teacher(mine, 0.05), expected, atol=1e-6),
        torch.allclose(sigma2, fastdsm.sigma2(plans, tol=1e-8), atol=1e-6),
        bool(bad[0].isnan()) and abs(float(bad[1])) < 1e-6,
    ]


def test_assignments_and_sigma2(workers: Pool) -> None:
    assert workers.run(assigned) == [[True] * 4] * SIZE


def extremes() -> list[bool]:
    import fastdsm.distributed

    rank, found = dist.get_rank(), []
    torch.manual_seed(0)
    for x in (1e4 * torch.randn(6, 5), torch.randn(6, 5) + 1e3, torch.randn(6, 5).half() * 50):
        whole = fastdsm.sinkhorn(x.double(), n_iters=30)
        mine = fastdsm.distributed.sinkhorn(x.chunk(SIZE)[rank], n_iters=30)
        assert mine.dtype == x.dtype
        found.append(
            torch.allclose(mine.double(), whole.chunk(SIZE)[rank], rtol=0, atol=1e-3 if x.dtype == torch.half else 1e-6)
        )
    broken = torch.randn(2, 6, 5)
    broken[0, 0, 0] = torch.nan
    plan = fastdsm.distributed.sinkhorn(broken.chunk(SIZE, 1)[rank])
    return [*found, bool(plan[0].isnan().all()), bool(plan[1].isfinite().all())]


def test_extremes(workers: Pool) -> None:
    assert workers.run(extremes) == [[True] * 5] * SIZE


def refusals() -> list[str]:
    import fastdsm.distributed

    x, texts = torch.randn(3, 4), []
    for kind, options in (
        (ValueError, {"row_marginal": 2.0, "col_marginal": 1.0}),
        (ValueError, {"first": "both"}),
        (ValueError, {"temperature": -1.0}),
        (TypeError, {"mask": torch.ones(3, 4)}),
        (ValueError, {"n_iters": 3, "half_steps": 2}),
    ):
        with pytest.raises(kind) as raised:
            fastdsm.distributed.sinkhorn(x, **options)
        texts.append(str(raised.value))
    return texts


def test_bad_input(workers: Pool) -> None:
    for texts in workers.run(refusals):
        assert "equal totals" in texts[0]


def below_nothing() -> tuple[list[str], Tensor]:
    import fastdsm.distributed

    rank, texts = torch.distributed.get_rank(), []
    rows = torch.ones(3)
    if rank == 1:
        rows[2] = -0.5
    for name, options in (
        ("row_marginal", {"row_marginal": rows}),
        ("row_marginal", {"row_marginal": rows, "first": "row"}),
        ("row_marginal", {"row_marginal": rows, "solver": "newton"}),
        ("row_marginal", {"row_marginal": rows, "half_steps": 1, "first": "row", "return_info": True}),
        ("col_marginal", {"col_marginal": torch.tensor([1.0, 1.0, -1.0, 1.0])}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be >= 0") as raised:
            fastdsm.distributed.sinkhorn(torch.randn(3, 4), **options)
        texts.append(str(raised.value))
    return texts, fastdsm.distributed.sinkhorn(torch.randn(3, 4), row_marginal=rows, half_steps=1, first="row")


def test_a_mass_below_nothing_on_one_process_is_an_error_on_all(workers: Pool) -> None:
    (texts, plan), (others, broken) = workers.run(below_nothing)
    assert [text.split(" must")[0] for text in texts] == [text.split(" must")[0] for text in others]
    assert plan.isfinite().all()
    assert broken[:2].isfinite().all()
    assert broken[2].isnan().all()


def test_without_a_group() -> None:
    import fastdsm.distributed

    for call in (fastdsm.distributed.sinkhorn, lambda x: fastdsm.distributed.sinkhorn_attention(x, x, x)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call(torch.randn(1, 2, 3, 3))
