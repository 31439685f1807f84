"""What only a CUDA device can show: the compiled kernels against the oracle, graphs, silence towards the host, offsets.

Where the same bits are asserted they are those of one kernel run again, in a graph, or on fewer matrices. Variants of a kernel
(with and without info, packed and strided) have them on Hopper and before; on Blackwell they differ in the last place, as
``tests/kernels/test_newton.py`` says, and no test here compares them so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import fastdsm
from fastdsm import reference
from fastdsm._verify.attention import attention_cases, verify_attention_case
from fastdsm._verify.sinkhorn import Target, cases, verify_case

from ..kernels import test_configuration as tuples
from ..tolerances import assert_within

pytestmark = pytest.mark.gpu
KERNELS = Target("triton", "cuda")


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_kernels_against_the_oracle() -> None:
    missed = [record for case in cases(KERNELS, quick=True) for record in verify_case(case, KERNELS) if not record.ok]
    assert not missed


def test_attention_against_the_oracle() -> None:
    grid = attention_cases(KERNELS)
    missed = [record for case in grid for record in verify_attention_case(case, KERNELS) if not record.ok]
    assert not missed


def attention_operands(lines: int) -> list[torch.Tensor]:
    shape = (2, 3, lines, 64)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


@pytest.mark.usefixtures("_no_synchronisation")
def test_attention_does_not_synchronise() -> None:
    query, key, value = attention_operands(200)
    padding = torch.zeros(2, 200, device="cuda", dtype=torch.bool)
    for options in ({}, {"tol": 1e-3, "n_iters": 20, "grad": "implicit"}, {"dropout_p": 0.1, "first": "row"}):
        fastdsm.sinkhorn_attention(query, key, value, key_padding_mask=padding, **options).sum().backward()
    fastdsm.sinkhorn_attention_sigma2(query, key, return_bounds=True)[0].sum().backward()


def test_attention_in_a_graph() -> None:
    operands = attention_operands(200)
    expected = torch.autograd.grad(fastdsm.sinkhorn_attention(*operands).square().sum(), operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(fastdsm.sinkhorn_attention(*operands).square().sum(), operands)
    for x in found:
        x.zero_()
    graph.replay()
    for x, known in zip(found, expected, strict=True):
        torch.testing.assert_close(x, known)


def test_attention_of_65536_lines_keeps_to_its_memory() -> None:
    lines = 65_536
    query, key, value = (
        torch.randn(1, 1, lines, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fastdsm.sinkhorn_attention(query, key, value)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.cuda.max_memory_allocated() - before < 256 * lines * 8  # 134 MB; a float32 plan takes 17 GB


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.parametrize("size", [4, 20, 100, 200, 300])
def test_no_call_synchronises(size: int) -> None:
    logits = torch.randn(5, size, size, device="cuda", requires_grad=True)
    temperature = torch.full((5,), 0.5, device="cuda")
    found = fastdsm.sinkhorn_sigma2(logits, temperature=temperature, tol=1e-3, mask=logits.detach() > -3)
    (found.plan.square().sum() + found.sigma2.sum()).backward()
    fastdsm.sigma2_bounds(found.plan)


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.parametrize("size", [4, 8, 20, 64])
def test_newton_does_not_synchronise(size: int) -> None:
    logits = torch.randn(5, size, size, device="cuda", requires_grad=True)
    plan, _ = fastdsm.sinkhorn(logits, solver="newton", return_info=True)
    plan.square().sum().backward()


@pytest.mark.parametrize("size", [4, 8, 20, 64, 100, 300])
def test_newton_of_easy_and_hard_matrices(size: int) -> None:
    """Some are done by the first sweeps, others by steps; 100 and 300 lines go on in PyTorch. The same bits in a second run."""
    std = torch.linspace(0.2, 6.0, 60, device="cuda")[:, None, None]
    logits = (torch.randn(60, size, size, device="cuda") * std).requires_grad_()
    cotangent = torch.randn(60, size, size, device="cuda")
    found = []
    for leaf in (logits, logits, logits.detach().double().cpu().requires_grad_()):
        plan, info = fastdsm.sinkhorn(leaf, solver="newton", n_iters=40, return_info=True)
        assert bool(info.converged.all())
        found.append([plan.detach(), *torch.autograd.grad(plan, leaf, cotangent.to(leaf))])
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    gap = 1 - reference.sigma2(found[2][0]).square()[:, None, None].clamp(max=1 - 1e-6)
    for x, truth, power in zip(found[0], found[2], (1, 2), strict=True):
        assert bool(((x.cpu().double() - truth).abs() <= 1e-5 * (1 + truth.abs()) / gap**power).all())


@pytest.mark.parametrize("size", [4, 8, 20, 64])
def test_newton_in_a_graph(size: int) -> None:
    logits = torch.randn(6, size, size, device="cuda") * 3
    expected = fastdsm.sinkhorn(logits, solver="newton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = fastdsm.sinkhorn(logits, solver="newton")
    plan.zero_()
    graph.replay()
    assert torch.equal(plan, expected)


@pytest.mark.parametrize("size", [4, 16, 40, 64])
def test_a_temperature_is_found_without_synchronising(size: int) -> None:
    """And is that of the search in float64, whose sigma2 and this one's end 3e-6 apart."""
    logits, target = torch.randn(50, size, size, device="cuda"), torch.linspace(0.1, 0.8, 50, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    found, reached = fastdsm.temperature_for_sigma2(logits, target)
    torch.cuda.set_sync_debug_mode("default")
    known, there = fastdsm.temperature_for_sigma2(logits.double().cpu(), target.double().cpu())
    assert torch.equal(reached.cpu(), there)
    torch.testing.assert_close(found.cpu().double(), known, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [4, 20, 100, 200, 300])
def test_graph_capture(size: int) -> None:
    logits = torch.randn(6, size, size, device="cuda", requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn_sigma2(logits).plan.square().sum(), logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fastdsm.sinkhorn_sigma2(logits)
        (gradient,) = torch.autograd.grad(found.plan.square().sum(), logits)
    gradient.zero_()
    graph.replay()
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(found.sigma2, reference.sinkhorn_sigma2(logits.double()).sigma2.float(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("n_iters", [20, 50])
def test_histories_of_many_matrices_of_8x8(n_iters: int) -> None:
    """Two and four segments; programs use their history again. The same bits in a second run and in a graph."""
    logits = (3 * torch.randn(60_000, 8, 8, device="cuda")).requires_grad_()
    cotangent = torch.randn(60_000, 8, 8, device="cuda")

    def gradient(leaf: torch.Tensor, **options: str) -> torch.Tensor:
        plan = fastdsm.sinkhorn(leaf, n_iters=n_iters, **options)
        return torch.autograd.grad(plan, leaf, cotangent.to(leaf.dtype))[0]

    found, truth = gradient(logits), gradient(logits.detach().double().requires_grad_(), backend="torch")
    assert_within(found, truth, gradient(logits, backend="torch"), cotangent=cotangent)
    assert torch.equal(gradient(logits), found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gradient(logits)
    replayed.zero_()
    graph.replay()
    assert torch.equal(replayed, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lines", [5, 6, 7])
def test_runs_of_any_length_by_way_of_shared_memory(lines: int, dtype: torch.dtype) -> None:
    """Right for a thousand packed matrices, and each has the same bits wherever their run ends, by Newton's method too."""
    logits = (2 * torch.randn(1000, lines, lines, device="cuda")).to(dtype)
    cotangent = torch.randn(1000, lines, lines, device="cuda").to(dtype)

    def both(count: int, to: torch.dtype, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits[:count].to(to, copy=True).requires_grad_()
        plan = fastdsm.sinkhorn(leaf, **options)
        return plan.detach(), torch.autograd.grad(plan, leaf, cotangent[:count].to(to))[0]

    truths, plains = (both(1000, to, n_iters=20, backend="torch") for to in (torch.float64, torch.float32))
    for options in ({"n_iters": 20}, {"solver": "newton"}):
        plan, gradient = both(1000, dtype, **options)
        if "n_iters" in options:
            assert_within(plan, truths[0], plains[0])
            assert_within(gradient, truths[1], plains[1], cotangent=cotangent)
        for count in (1, 2, 3, 31, 33, 127, 131, 999):
            found = both(count, dtype, **options)
            assert torch.equal(found[0], plan[:count])
            assert torch.equal(found[1], gradient[:count])


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.parametrize("first", ["col", "row"])
def test_large_matrices_do_not_synchronise(first: str) -> None:
    logits = torch.randn(3, 700, 300, device="cuda", requires_grad=True)
    mask = torch.rand(3, 700, 300, device="cuda") < 0.9
    plan, _ = fastdsm.sinkhorn(logits, first=first, tol=1e-3, mask=mask, return_info=True)
    plan.square().sum().backward()


@pytest.mark.parametrize("shape", [(2, 300, 257), (1, 40, 9000), (1, 3000, 40), (2, 1024, 1024), (1, 600, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["col", "row"])
def test_large_matrices_against_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, first: str) -> None:
    """And the same bits in a second run."""
    logits, cotangent = (torch.randn(shape, device="cuda") * 3).to(dtype), torch.randn(shape, device="cuda").to(dtype)
    found = plan_and_gradient(fastdsm.sinkhorn, logits, cotangent, first)
    truth = plan_and_gradient(reference.sinkhorn, logits.double(), cotangent.double(), first)
    plain = plan_and_gradient(reference.sinkhorn, logits.float(), cotangent.float(), first)
    assert_within(found[0], truth[0], plain[0])
    assert_within(found[1], truth[1], plain[1], cotangent=cotangent)
    again = plan_and_gradient(fastdsm.sinkhorn, logits, cotangent, first)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def plan_and_gradient(
    function: Callable[..., torch.Tensor], logits: torch.Tensor, cotangent: torch.Tensor, first: str
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    plan = function(logits, n_iters=10, first=first)
    return plan.detach(), torch.autograd.grad(plan, logits, cotangent)[0]


def sigma2_and_gradient(plan: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = fastdsm.sigma2(plan)
    return value.detach(), torch.autograd.grad(value.sum(), plan)[0]


@pytest.mark.parametrize("shape", [(1, 2700, 2700), (1, 3000, 2500), (300, 400, 390), (1, 1500, 9000)])
def test_sigma2_of_large_plans(shape: tuple[int, ...]) -> None:
    """From passes over the plan: within its tolerance of the float64 value, the same bits in a second run, in a graph too."""
    plan = fastdsm.sinkhorn(torch.randn(shape, device="cuda")).requires_grad_()
    value, gradient = sigma2_and_gradient(plan)
    M = reference.deflated_plan(plan.detach()[:4].double(), None, None, None)
    size = torch.linalg.svdvals(M)
    torch.testing.assert_close(value[:4].double(), size[:, 0], rtol=1e-4, atol=0)
    whole = (gradient.double() * plan.detach().double()).sum((-2, -1))
    torch.testing.assert_close(whole, value.double(), rtol=1e-4, atol=0)  # sigma2 is homogeneous
    assert all(torch.equal(x, y) for x, y in zip(sigma2_and_gradient(plan), (value, gradient), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = fastdsm.sigma2(plan.detach())
    again.zero_()
    graph.replay()
    torch.testing.assert_close(again, value, rtol=1e-4, atol=0)


def test_a_large_matrix_in_a_graph() -> None:
    logits = torch.randn(2, 600, 400, device="cuda", requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn(logits).square().sum(), logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(fastdsm.sinkhorn(logits).square().sum(), logits)
    gradient.zero_()
    graph.replay()
    assert torch.equal(gradient, expected)


def test_a_large_matrix_beyond_int32() -> None:
    """2^31 + 2^16 logits, 0 in all rows but the last: those rows together are one of their mass."""
    n, m = 2**16 + 2, 2**15
    logits = torch.zeros(1, n, m, device="cuda", dtype=torch.float16)
    logits[0, -1, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda")
    plan = fastdsm.sinkhorn(logits.requires_grad_(), n_iters=2)
    rows = torch.zeros(2, m, device="cuda", dtype=torch.float64)
    rows[1] = logits[0, -1].detach()
    masses = torch.tensor([n - 1.0, 1.0], device="cuda", dtype=torch.float64)
    expected = reference.sinkhorn(rows + masses.log().unsqueeze(-1), n_iters=2, row_marginal=masses)
    # float16 has steps of 6e-8 at 1 / m.
    torch.testing.assert_close(plan[0, -1].double(), expected[1], rtol=2e-3, atol=6e-8)
    torch.testing.assert_close(plan[0, 0].double(), expected[0] / (n - 1), rtol=2e-3, atol=6e-8)
    cotangent = torch.zeros_like(plan)
    cotangent[0, -1, 0] = 1.0
    (gradient,) = torch.autograd.grad(plan, logits, cotangent)
    share = expected[1, 0].item()
    assert gradient[0, -1, 0].item() == pytest.approx(share * (1 - share), rel=1e-2)
    assert gradient[0, ::4096].abs().max() < 1e-6


def test_offsets_beyond_int32() -> None:
    batch = 2**31 // 16 + 1000
    logits = torch.zeros(batch, 4, 4, device="cuda", dtype=torch.float16)
    logits[-1] = torch.arange(16.0).view(4, 4) % 5
    plan = fastdsm.sinkhorn(logits)
    expected = reference.sinkhorn(logits[-1:].double()).half()
    torch.testing.assert_close(plan[-1:], expected, rtol=0, atol=2**-11)  # one unit below 1: each side rounds once
    torch.testing.assert_close(plan[0], torch.full((4, 4), 0.25, device="cuda", dtype=torch.float16))


def test_members_of_tuples_arrive() -> None:
    configuration = tuples.configuration()
    for value in tuples.VALUES:
        tuples.check(configuration, value, "cuda")
    assert len(configuration.compiled) == 1
