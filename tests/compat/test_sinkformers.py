"""compat.sinkformers, against its half steps in float64: no package index has it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdsm.compat import sinkformers

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of

STEPS = pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 21])


def distance(c: Tensor, eps: float, steps: int, detach: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """pi, U, V: u = eps log(1 / n) - eps LSE((c + v) / eps), then v likewise; v constant, 0 above 9e8, if ``detach``."""
    c = c.double()
    n, m = c.shape[-2:]
    u, v = torch.zeros_like(c[..., 0]), torch.zeros_like(c[..., 0, :])
    for k in range(steps):
        if k % 2 == 0:
            u = eps * (-math.log(n) - ((c + v.unsqueeze(-2)) / eps).logsumexp(-1))
        else:
            v = eps * (-math.log(m) - ((c + u.unsqueeze(-1)) / eps).logsumexp(-2))
            if detach:
                v = v.detach().masked_fill(v.detach() > 9e8, 0.0)
    return ((c + u.unsqueeze(-1) + v.unsqueeze(-2)) / eps).exp(), u, v


@DTYPES
@STEPS
@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 20, 6), (1, 5, 7)])
@pytest.mark.parametrize("detach", [False, True])
def test_all_it_returns(detach: bool, shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> None:
    (c,) = leaves_of(shape, dtype=dtype)
    pi, C, U, V = sinkformers.SinkhornDistance(0.7, steps, detach=detach)(c)
    assert torch.equal(C, -c)
    right = distance(c, 0.7, steps, detach)
    for found, origin in zip((pi, U), right[:2], strict=True):
        assert_same(found, origin.to(dtype), [c])
    if steps == 1:
        assert not V.any()
    elif detach:
        assert not V.requires_grad
        assert_close(V, right[2], 1e-12 if dtype == torch.float64 else 1e-6)
    else:
        assert_same(V, right[2].to(dtype), [c])


@DTYPES
@STEPS
@pytest.mark.parametrize("eps", [1.0, 0.5])
def test_padding_of_the_encoder(eps: float, steps: int, dtype: torch.dtype) -> None:
    """masked_fill_(mask, -1e9) on padded keys, of which the origin keeps a mass of 1 / m each in its totals."""
    (scores,) = leaves_of((3, 6, 6), dtype=dtype)
    padded = (torch.arange(6) >= torch.tensor([6, 4, 1])[:, None])[:, None]
    c = scores.masked_fill(padded, -1e9)
    pi, _, U, V = sinkformers.SinkhornDistance(eps, steps, detach=True)(c)
    right = distance(c, eps, steps, detach=True)
    assert_same(pi, right[0].to(dtype), [scores])
    assert_same(U, right[1].to(dtype), [scores])
    assert_close(V, right[2].detach(), 1e-12 if dtype == torch.float64 else 2e-6)
    assert not pi.masked_select(padded).any()


def test_a_detached_potential_has_another_gradient() -> None:
    (c,) = leaves_of((2, 6, 6), dtype=torch.float64)
    cotangent = torch.randn_like(c)
    constant, whole = (
        torch.autograd.grad(sinkformers.SinkhornDistance(1.0, 5, detach=detach)(c)[0], c, cotangent)[0]
        for detach in (True, False)
    )
    assert (constant - whole).abs().max() > 1e-4


def test_strides_and_a_batch_of_heads() -> None:
    c = torch.randn(2, 7, 3, 6, dtype=torch.float64).permute(0, 2, 1, 3)[..., ::2, :]
    module = sinkformers.SinkhornDistance(1, max_iter=3)
    assert_close(module(c)[0], distance(c, 1.0, 3)[0], 1e-12)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_half_precision(steps: int, detach: bool) -> None:
    c = torch.randn(3, 6, 6).bfloat16()
    pi = sinkformers.SinkhornDistance(1.0, steps, detach=detach)(c)[0]
    assert pi.dtype == torch.bfloat16
    assert_close(36 * pi.float(), 36 * distance(c, 1.0, steps)[0], 2.0**-8)


def test_large_scores() -> None:
    c = torch.randn(4, 6, 6) * 40
    assert_close(sinkformers.SinkhornDistance(1.0, 5)(c)[0], distance(c, 1.0, 5)[0], 1e-6)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="reduction must be one of 'none', got 'mean'"):
        sinkformers.SinkhornDistance(1.0, 3, reduction="mean")
    with pytest.raises(ValueError, match="max_iter must be >= 1"):
        sinkformers.SinkhornDistance(1.0, 0)
    with pytest.raises(ValueError, match="eps must be > 0"):
        sinkformers.SinkhornDistance(0.0, 3)
    with pytest.raises(ValueError, match="n >= 1"):
        sinkformers.SinkhornDistance(1.0, 3)(torch.zeros(2, 0, 4))
