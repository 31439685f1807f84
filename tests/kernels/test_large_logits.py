"""Logits of any size on kernels of 9 lines and more: what float64 sweeps make of them, forward and backward."""

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference

SHAPES = {"registers": (4, 4), "rectangles": (3, 4), "packed": (8, 8)}
SHAPES |= {"tile": (16, 16), "odd": (33, 20), "panel": (130, 21), "stream": (257, 20), "wide": (3, 8200)}
FAMILIES = [pytest.param(x, marks=pytest.mark.slow) if x == "wide" else x for x in SHAPES]
SIZES = (pytest.param(1e4, marks=pytest.mark.slow), 1e7, 1e9)
N_ITERS = 4


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(logits: Tensor, size: float) -> Tensor:
    """To a spacing that float32 resolves at ``size``, so that what stands there is what was meant."""
    spacing = 2.0 ** max(-8, torch.tensor(size).log2().floor().item() - 22)
    return (logits / spacing).round() * spacing


def large(kind: str, n: int, m: int, size: float) -> Tensor:
    """Two matrices, entries to ``size``, whose rows or columns lie as far apart by padding, or as they come."""
    logits = noise(2, n, m, seed=1)
    if "offset" in kind:
        logits = rounded(logits, size)
    if kind in ("padded rows", "padded both"):
        logits[:, -(n // 3) :] = -size
    if kind in ("padded columns", "padded both"):
        logits[:, :, -(m // 3) :] = -size
    if kind in ("row offsets", "both offsets"):
        logits += rounded(size / 2 * noise(2, n, 1, seed=2).erf(), size)
    if kind in ("column offsets", "both offsets"):
        logits += rounded(size / 2 * noise(2, 1, m, seed=3).erf(), size)
    return logits


OFTEN = ("padded rows", "both offsets")
SELDOM = ("padded columns", "padded both", "row offsets", "column offsets")
KINDS = [*OFTEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SELDOM)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_plans_and_gradients_are_those_of_float64(family: str, kind: str, size: float) -> None:
    logits = large(kind, *SHAPES[family], size)
    cotangent = noise(*logits.shape, seed=4)
    single = logits.clone().requires_grad_()
    double = logits.double().requires_grad_()
    plan = fastdsm.sinkhorn(single, n_iters=N_ITERS, backend="triton")
    expected = reference.sinkhorn(double, n_iters=N_ITERS)
    (gradient,) = torch.autograd.grad(plan, single, cotangent)
    (expected_gradient,) = torch.autograd.grad(expected, double, cotangent.double())
    torch.testing.assert_close(plan.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=4e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_temperature_that_rounds(family: str) -> None:
    """Logits over 0.7 are no multiples of what they were: only bases on a grid have exact sums."""
    logits = large("both offsets", *SHAPES[family], 1e6)
    plan = fastdsm.sinkhorn(logits, n_iters=N_ITERS, temperature=0.7, backend="triton")
    expected = reference.sinkhorn(logits.double(), n_iters=N_ITERS, temperature=0.7)
    torch.testing.assert_close(plan.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "tolerance"), [(1e9, 1e-6), (1e11, 2e-4)])
def test_random_logits(family: str, size: float, tolerance: float) -> None:
    logits = size * noise(3, *SHAPES[family], seed=5).erf()
    plan = fastdsm.sinkhorn(logits, n_iters=N_ITERS, backend="triton")
    torch.testing.assert_close(plan.double(), reference.sinkhorn(logits.double(), n_iters=N_ITERS), rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_the_largest_logits_have_a_finite_plan_with_exact_rows(family: str, size: float) -> None:
    n, m = SHAPES[family]
    logits = (size * noise(3, n, m, seed=6)).clamp(-size, size)
    logits[1] = -size
    logits[2, : n // 2] = -size
    plan = fastdsm.sinkhorn(logits, n_iters=N_ITERS, backend="triton").double()
    level = fastdsm.sinkhorn(torch.zeros(3, n, m, dtype=torch.float64), n_iters=N_ITERS)
    torch.testing.assert_close(plan.sum(-1), level.sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(plan[1], level[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_potentials(family: str) -> None:
    logits = large("both offsets", *SHAPES[family], 1e6)
    info = fastdsm.sinkhorn(logits, n_iters=N_ITERS, backend="triton", return_info=True)[1]
    expected = reference.sinkhorn(logits.double(), n_iters=N_ITERS, return_info=True)[1]
    torch.testing.assert_close(info.f.double(), expected.f, rtol=2e-7, atol=1e-5)
    torch.testing.assert_close(info.g.double(), expected.g, rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("n", [4, 8])
def test_segments_of_sweeps(n: int) -> None:
    """Excluded rows let factors drift, so that a K made anew must take what columns have moved by."""
    logits = large("both offsets", n, n, 1e7)
    logits[:, : n // 4] = -torch.inf
    cotangent = noise(*logits.shape, seed=4).masked_fill(logits == -torch.inf, 0.0)
    single = logits.clone().requires_grad_()
    double = logits.double().requires_grad_()
    n_iters = 20 if n == 4 else 40  # what a backward of 4 lines holds is shorter than a segment
    forward = fastdsm.sinkhorn(logits, n_iters=50, backend="triton")
    expected = reference.sinkhorn(logits.double(), n_iters=50)
    torch.testing.assert_close(forward.double(), expected, rtol=0, atol=1e-6)
    plan = fastdsm.sinkhorn(single, n_iters=n_iters, backend="triton")
    (gradient,) = torch.autograd.grad(plan, single, cotangent)
    (expected_gradient,) = torch.autograd.grad(reference.sinkhorn(double, n_iters=n_iters), double, cotangent.double())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=4e-6)
