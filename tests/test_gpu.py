"""What only a CUDA device can show: the compiled kernels against the oracle, graphs, silence towards the host, offsets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastdsm
from fastdsm import reference
from fastdsm.verification import Target, cases, verify_case

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


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.parametrize("size", [4, 20, 100, 200, 300])
def test_no_call_synchronises(size: int) -> None:
    logits = torch.randn(5, size, size, device="cuda", requires_grad=True)
    temperature = torch.full((5,), 0.5, device="cuda")
    found = fastdsm.sinkhorn_sigma2(logits, temperature=temperature, tol=1e-3, mask=logits.detach() > -3)
    (found.plan.square().sum() + found.sigma2.sum()).backward()
    fastdsm.sigma2_bounds(found.plan)


@pytest.mark.parametrize("size", [4, 20, 100, 200, 300])
def test_graph_capture(size: int) -> None:
    logits = torch.randn(6, size, size, device="cuda", requires_grad=True)
    (expected,) = torch.autograd.grad(fastdsm.sinkhorn(logits).square().sum(), logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fastdsm.sinkhorn_sigma2(logits)
        (gradient,) = torch.autograd.grad(found.plan.square().sum(), logits)
    gradient.zero_()
    graph.replay()
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(found.sigma2, reference.sinkhorn_sigma2(logits.double()).sigma2.float(), rtol=2e-4, atol=1e-6)


def test_offsets_beyond_int32() -> None:
    batch = 2**31 // 16 + 1000
    logits = torch.zeros(batch, 4, 4, device="cuda", dtype=torch.float16)
    logits[-1] = torch.arange(16.0).view(4, 4) % 5
    plan = fastdsm.sinkhorn(logits)
    expected = reference.sinkhorn(logits[-1:].double()).half()
    torch.testing.assert_close(plan[-1:], expected, rtol=0, atol=2**-11)  # one unit below 1: each side rounds once
    torch.testing.assert_close(plan[0], torch.full((4, 4), 0.25, device="cuda", dtype=torch.float16))
