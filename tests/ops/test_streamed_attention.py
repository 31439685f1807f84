"""Streamed attention's gradient of wild logits, every draw within the policy, and potentials counted as passes count them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdsm
from fastdsm import reference
from fastdsm._ops.streamed.potentials import base_near, counted
from fastdsm._verify.sinkhorn import FLOOR
from fastdsm.kernels.attention import launch
from fastdsm.pytorch import attention as pytorch_attention
from fastdsm.pytorch import passes

DRAWS = 20


def draws(n: int, m: int, std: float) -> tuple[dict[str, Tensor], Tensor]:
    """Operands of one head a draw, whose logits have this standard deviation, and cotangents of their outputs."""
    d, e = 5, 3
    shapes = {"query": (n, d), "key": (m, d), "value": (m, e), "attn_mask": (n, m)}
    operands = {name: torch.randn(DRAWS, 1, *shape) for name, shape in shapes.items()}
    operands["query"] *= math.sqrt(0.8) * std
    operands["attn_mask"] *= math.sqrt(0.2) * std
    operands["temperature"] = 0.8 + 0.4 * torch.rand(DRAWS, 1)
    return operands, torch.randn(DRAWS, 1, n, e)


def gradients(call: Callable[..., Any], operands: dict[str, Tensor], cotangent: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in operands.items()}
    out = call(**leaves, **options)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True))


def sizes(operands: dict[str, Tensor], cotangent: Tensor, **options: Any) -> dict[str, Tensor]:
    """s of the policy for each gradient, by draw: its terms' largest sum of absolute values.

    The gradient of the logits is a difference, dS = P * dP - P * (what sweeps take away), of terms of the size of
    T = P * |dP|. Where a plan is saturated these cancel, and dS has the rounding of T. So a gradient that is a sum of dS times
    numbers x is as good as it can be within units in the last place of the sum of T |x|; ``gradient_size`` knows neither x nor
    dP, which for logits of hundreds are of hundreds. The float32 oracle has that rounding too, but of one draw it may be any
    number, nothing included: where all but one entry of a line vanish, its terms cancel exactly.
    """
    query, key, value, bias, tau = (operands[x].double() for x in ("query", "key", "value", "attn_mask", "temperature"))
    S, tau, scale = query @ key.mT / math.sqrt(query.shape[-1]) + bias, tau[..., None, None], query.shape[-1] ** -0.5
    plan = reference.sinkhorn(S / tau, **options)
    terms = plan * (cotangent.double() @ value.mT).abs() / tau
    found = {
        "query": terms @ key.abs() * scale,
        "key": terms.mT @ query.abs() * scale,
        "value": plan.mT @ cotangent.double().abs(),
        "attn_mask": terms,
        "temperature": (terms * S.abs()).sum((-2, -1)) / tau[..., 0, 0],
    }
    return {name: x.flatten(1).amax(1) for name, x in found.items()}


def moved(x: Tensor) -> Tensor:
    """Within a unit in the last place of float32."""
    return x.double() * (1 + (2 * torch.rand(x.shape, dtype=torch.float64) - 1) * 2**-23)


def worst(backend: str, std: float, own: dict[str, Any] | None = None, **options: Any) -> dict[str, float]:
    """The largest error over budget in any draw, by gradient; ``own``: options of the call that the oracle is not given.

    e of the policy is the oracle's error in float32 or, if that is more, what moving inputs by a unit in the last place does
    to the truth: logits are rounded as a product, scaled and biased, whatever follows, and of one draw one run may happen to
    be nearer.
    """
    operands, cotangent = draws(9, 7, std)
    found = gradients(fastdsm.sinkhorn_attention, operands, cotangent, backend=backend, **options, **(own or {}))
    oracle = partial(gradients, reference.sinkhorn_attention, **options)
    truth = oracle({name: x.double() for name, x in operands.items()}, cotangent.double())
    others = [oracle({name: moved(x) for name, x in operands.items()}, cotangent.double()) for _ in range(8)]
    others.append(oracle(operands, cotangent))
    terms = sizes(operands, cotangent, **options)

    def largest(x: Tensor) -> Tensor:
        return x.abs().flatten(1).amax(1)

    shares = {}
    for name, exact in truth.items():
        e = torch.stack([largest(other[name] - exact) for other in others]).amax(0)
        s = torch.maximum(terms[name], largest(exact))
        shares[name] = (largest(found[name].double() - exact) / (2 * e + FLOOR[torch.float32] * s)).max().item()
    return shares


@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("std", [30.0, 200.0])
@pytest.mark.parametrize("n_iters", [1, 3, 20])
def test_gradients_of_wild_logits_are_within_budget_in_every_draw(
    monkeypatch: pytest.MonkeyPatch, n_iters: int, std: float, first: str
) -> None:
    monkeypatch.setattr(pytorch_attention, "DENSE_ENTRIES", 0)
    shares = worst("torch", std, n_iters=n_iters, first=first)
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize(("std", "n_iters", "first"), [(30.0, 1, "row"), (200.0, 2, "col"), (200.0, 2, "row")])
def test_gradients_of_kernels_are_within_budget_in_every_draw(std: float, n_iters: int, first: str) -> None:
    """Few sweeps: the first bases, which kernels round once more, tell the most."""
    shares = worst("triton", std, n_iters=n_iters, first=first)
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("first", ["col", "row"])
def test_implicit_gradients_of_stored_plans_are_within_budget_in_every_draw(first: str) -> None:
    shares = worst("torch", 10.0, {"grad": "implicit", "tol": 1e-7}, n_iters=500, first=first)
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", ["col", "row"])
@pytest.mark.parametrize("std", [30.0, 200.0])
def test_implicit_gradients_of_plans_in_parts_are_finite(std: float, first: str, dtype: torch.dtype) -> None:
    """Each part has a null vector, which conjugate gradients must not divide by."""
    operands, cotangent = draws(9, 7, std)
    operands = {name: x.to(dtype) for name, x in operands.items()}
    options = {"grad": "implicit", "tol": 1e-4, "n_iters": 100, "first": first, "backend": "torch"}
    found = gradients(fastdsm.sinkhorn_attention, operands, cotangent.to(dtype), **options)
    assert all(x.isfinite().all() for x in found.values())


def test_value_gradient_of_one_line_has_no_rounding_of_logits() -> None:
    """The plan is its marginals, whatever logits of 1e4 and their potentials are rounded to."""
    query, key, value, bias = torch.randn(1, 1, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 3), 1e4 * torch.randn(1, 5)
    value.requires_grad_()
    out = fastdsm.sinkhorn_attention(query, key, value, bias, first="row", backend="torch")
    (found,) = torch.autograd.grad(out.sum(), value)
    assert (found - 0.2).abs().max() <= 1e-6


def test_a_base_is_found_again_in_what_it_counts_as() -> None:
    """All mantissas; in base 2 another base may be found, one that counts as the same."""
    base = torch.arange(2**23, 2**24, dtype=torch.int32).float()
    for unit in (passes.UNIT, launch.UNIT):
        ground = counted(base, unit)
        assert torch.equal(counted(base_near(ground, unit, base.dtype), unit), ground)
    assert not torch.equal(base_near(ground, launch.UNIT, base.dtype), base)
