"""Few sweeps on a CPU, and sides of very different length: one K for logits that many sweeps would need another for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference

from ..tolerances import assert_within


def check(logits: Tensor, n_iters: int) -> None:
    """Plans with and without a gradient, and the gradient."""
    cotangent = torch.randn(logits.shape)

    def both(call: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = logits.to(dtype, copy=True).requires_grad_()
        plan = call(leaf, n_iters=n_iters)  # type: ignore[operator]
        return plan.detach(), torch.autograd.grad(plan, leaf, cotangent.to(dtype))[0]

    found, truth, plain = (
        both(fastdsm.sinkhorn, torch.float32),
        *(both(reference.sinkhorn, x) for x in (torch.float64, torch.float32)),
    )
    for plan in (found[0], fastdsm.sinkhorn(logits, n_iters=n_iters)):
        assert_within(plan, truth[0], plain[0])
    assert_within(found[1], truth[1], plain[1], cotangent=cotangent)


@pytest.mark.parametrize("shape", [(1, 2000, 20), (1, 20, 2000), (3, 300, 2), (2, 2, 300), (40, 1, 30), (1, 1500, 40)])
def test_sides_of_very_different_length(shape: tuple[int, int, int]) -> None:
    """A factor n / m that sweeps leave in u and take out of v would be its 60th power."""
    for n_iters in (2, 20, 60):
        check(torch.randn(shape), n_iters)


def matrices(kind: str, shape: tuple[int, int, int], span: float) -> Tensor:
    """Logits that differ by at most ``span``."""
    batch, n, m = shape
    below = torch.arange(n).unsqueeze(-1) > torch.arange(m)
    if kind == "uniform":
        return torch.rand(shape) * span
    if kind == "two values":
        return torch.where(torch.rand(shape) > 0.5, span, 0.0)
    if kind == "triangular":
        return torch.where(below, 1.0 - span, torch.rand(shape))
    if kind == "one row":
        return torch.where(torch.arange(n).unsqueeze(-1) == 0, 0.0, 1.0 - span) + torch.rand(shape) / 2
    offsets = torch.rand(batch, n, 1) if kind == "rows" else torch.rand(batch, 1, m)
    return torch.randn(shape).clamp(-4, 4) + offsets * (span - 8)


@pytest.mark.parametrize("kind", ["uniform", "two values", "triangular", "one row", "rows", "columns"])
@pytest.mark.parametrize("shape", [(200, 4, 4), (30, 8, 8), (300, 5, 3), (4, 64, 64), (1, 64, 64), (1, 64, 3000)])
def test_logits_within_sixty_nats(shape: tuple[int, int, int], kind: str) -> None:
    most = int(45 / math.log2(max(shape[1:]))) + 1
    for span in (25.0, 59.0):
        for n_iters in {1, 2, most, most + 1}:
            check(matrices(kind, shape, span), n_iters)
