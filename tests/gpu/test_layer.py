"""What only a CUDA device can show of the mHC layer: the kernels against the oracle, graphs, silence towards the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdsm import mhc, nn
from fastdsm._verify.mhc import mhc_cases, verify_mhc_case
from fastdsm._verify.sinkhorn import Target

pytestmark = pytest.mark.gpu
KERNELS = Target("triton", "cuda")


def test_against_the_oracle() -> None:
    missed = [record for case in mhc_cases(KERNELS) for record in verify_mhc_case(case, KERNELS) if not record.ok]
    assert not missed


def operands(tokens: int, n: int = 4, channels: int = 512) -> tuple[Tensor, ...]:
    """Streams, and fn, scale and base of a layer."""
    X = torch.randn(tokens, n, channels, device="cuda", dtype=torch.bfloat16)
    fn = torch.randn(n * (n + 2), n * channels, device="cuda") / (n * channels) ** 0.5
    return X, fn, torch.tensor([1.0, 1.0, 2.0], device="cuda"), torch.randn(n * (n + 2), device="cuda")


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_inference_in_a_graph(tokens: int) -> None:
    """Pre, post and the next pre into buffers; replayed on other streams, the graph computes theirs."""
    X, *layer = operands(tokens)
    h, mixed, following = torch.empty_like(X[:, 0]), torch.empty_like(X), torch.empty_like(X[:, 0])

    def step() -> None:
        _, (post, comb), _ = mhc.mhc_pre(X, *layer, return_info=True, out=h)
        mhc.mhc_post_pre(torch.tanh(h), X, post, comb, *layer, out=(mixed, following))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    X.copy_(torch.randn_like(X))
    step()
    expected = [x.clone() for x in (h, mixed, following)]
    for x in (h, mixed, following):
        x.zero_()
    graph.replay()
    for x, known in zip((h, mixed, following), expected, strict=True):
        assert torch.equal(x, known)


def test_training_in_a_graph() -> None:
    layer = nn.HyperConnection(torch.nn.Linear(256, 256), streams=4, dim=256).cuda().to(torch.bfloat16)
    X = torch.randn(2, 50, 4, 256, device="cuda", dtype=torch.bfloat16)
    leaves = list(layer.parameters())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = torch.autograd.grad(layer(X).float().square().sum(), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(layer(X).float().square().sum(), leaves)
    graph.replay()
    for x, known in zip(found, expected, strict=True):
        torch.testing.assert_close(x, known)


def test_no_call_synchronises() -> None:
    X, *layer = operands(100)
    leaves = [x.requires_grad_() for x in (X, *layer)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        h, (post, comb), info = mhc.mhc_pre(*leaves, return_info=True)
        mixed, following, _ = mhc.mhc_post_pre(h, X, post, comb, *leaves[1:])
        (mixed.sum() + following.sum() + mhc.mhc_post(h, X, post, comb).sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((info.sigma2 <= info.singular_values[:, 0] + 1e-5).all())
