"""compat.pot.batch, against ot.batch."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdsm.compat.pot import batch

from ..interop.parity import DTYPES, assert_close, assert_same
from ..tolerances import drift

origin = pytest.importorskip("ot.batch", reason="POT since 0.9.6, of the extra parity")
NAMES = ["solve_batch", "bregman_log_projection_batch", "bregman_projection_batch"]
NAMED = {"bregman_projection_batch": "ot.batch._utils"}


def of_origin(name: str) -> Any:
    import ot.batch._utils

    return getattr(origin, name) if hasattr(origin, name) else getattr(ot.batch._utils, name)


def transport(dtype: torch.dtype = torch.float64, *, total: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """M (5, 12, 9) and masses a (5, 12), of this total, and b (5, 9), with gradients."""
    a, b = total * torch.randn(5, 12, dtype=dtype).softmax(-1), torch.randn(5, 9, dtype=dtype).softmax(-1)
    M = torch.cdist(torch.rand(5, 12, 2, dtype=dtype), torch.rand(5, 9, 2, dtype=dtype)).square()
    return M.requires_grad_(), a.requires_grad_(), b.requires_grad_()


def compared(ours: batch.OTResult, theirs: Any) -> list[tuple[Any, Any]]:
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in ("plan", "value", "value_linear")]
    return [*pairs, *zip(ours.potentials, theirs.potentials, strict=True)]


@DTYPES
@pytest.mark.parametrize("method", ["log_sinkhorn", "sinkhorn"])
@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("total", [1.0, 1.5])
@pytest.mark.parametrize("sweeps", [1, 13])
def test_unrolled(sweeps: int, total: float, reg_type: str, method: str, dtype: torch.dtype) -> None:
    """All that it returns, of totals that differ too; in float32 potentials drift by a rounding per sweep, in both packages."""
    M, a, b = transport(dtype, total=total)
    options = {"max_iter": sweeps, "tol": 0.0, "method": method, "reg_type": reg_type, "grad": "autodiff"}
    if (method, dtype) == ("sinkhorn", torch.float64):
        torch.set_default_dtype(torch.float64)  # the origin's factors begin in the default dtype
    try:
        found, theirs = batch.solve_batch(M, 0.2, a, b, **options), origin.solve_batch(M, 0.2, a, b, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.log["n_iter"] == theirs.log["n_iter"] == sweeps - 1
    plan, value, linear, *potentials = compared(found, theirs)
    for ours, right in (plan, value, linear):
        assert_same(ours, right, [M, a, b])
    for ours, right in potentials:
        assert_same(ours, right, [M, a, b], value=max(1e-6, drift(sweeps)) if dtype == torch.float32 else None)


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-8])
def test_ends_with_the_same_sweep(tol: float) -> None:
    M, a, b = transport()
    found, theirs = (solve(M, 0.1, a, b, tol=tol, grad="autodiff") for solve in (batch.solve_batch, origin.solve_batch))
    assert found.log["n_iter"] == theirs.log["n_iter"] > 0
    assert_same(found.plan, theirs.plan, [M, a, b])


@DTYPES
def test_envelope_is_the_default(dtype: torch.dtype) -> None:
    M, a, b = transport(dtype)
    options = {"max_iter": 50, "tol": 0.0, "reg_type": "kl"}
    found, theirs = (solve(M, 0.2, a, b, **options) for solve in (batch.solve_batch, origin.solve_batch))
    assert not found.plan.requires_grad
    assert_same(found.value, theirs.value, [M, a, b])
    assert_same(found.value_linear, theirs.value_linear, [M])


def test_no_gradient() -> None:
    M, _, _ = transport()
    found, theirs = (solve(M, 0.2, grad="detach", max_iter=20) for solve in (batch.solve_batch, origin.solve_batch))
    for ours, right in compared(found, theirs):
        assert not ours.requires_grad
        assert_close(ours, right, 1e-12)


def test_the_last_step() -> None:
    """One sweep more from constants. The origin's plan keeps its logits constant besides, and so its gradient is another."""
    M, a, b = transport()
    options = {"max_iter": 20, "tol": 0.0, "grad": "last_step"}
    found, theirs = (solve(M, 0.2, a, b, **options) for solve in (batch.solve_batch, origin.solve_batch))
    assert found.log["n_iter"] == theirs.log["n_iter"]
    for ours, right in compared(found, theirs):
        assert_close(ours.detach(), right.detach(), 1e-12)
    S, v = -M / 0.2, origin.solve_batch(M, 0.2, a, b, max_iter=20, tol=0.0, grad="detach").potentials[1].detach()
    u = a.log() - (S + v.unsqueeze(-2)).logsumexp(-1)
    v = b.log() - (S + u.unsqueeze(-1)).logsumexp(-2)
    right = (S + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()
    assert_same(found.plan, right, [M, a, b])
    cotangent = torch.randn_like(right)
    ours, wrong = (torch.autograd.grad(x.plan, M, cotangent)[0] for x in (found, theirs))
    assert (ours - wrong).abs().max() > 1e-3


@DTYPES
@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
def test_projections(grad: str, dtype: torch.dtype) -> None:
    M, a, b = transport(dtype)
    options = {"max_iter": 7, "tol": 0.0, "grad": grad}
    found, theirs = (module.bregman_log_projection_batch(-M / 0.2, a, b, **options) for module in (batch, origin))
    assert found.keys() == theirs.keys()
    assert found["n_iters"] == theirs["n_iters"]
    for name in ("T", "log_T"):
        assert_same(found[name], theirs[name], [M, a, b])
    for ours, right in zip(found["potentials"], theirs["potentials"], strict=True):
        assert_same(ours, right, [M, a, b])
    kernel = batch.bregman_projection_batch((-M / 0.2).exp(), a, b, **options)
    assert kernel.keys() == {"T", "n_iters", "potentials"}
    assert_same(kernel["T"], theirs["T"], [M, a, b])
    assert_same(kernel["potentials"][0], theirs["potentials"][0].exp(), [M, a, b])


def test_a_logarithm_that_underflows() -> None:
    M = torch.rand(2, 4, 4, dtype=torch.float64) * 1e4
    found, theirs = (module.bregman_log_projection_batch(-M, max_iter=20, tol=0.0) for module in (batch, origin))
    assert theirs["log_T"].min() < -1000
    assert_close(found["log_T"], theirs["log_T"], 1e-12)


def test_numpy_strides_one_and_none() -> None:
    M, a, b = (x.detach().numpy() for x in transport())
    found, theirs = batch.solve_batch(M, 0.2, a, b), origin.solve_batch(M, 0.2, a, b)
    for ours, right in compared(found, theirs):
        assert isinstance(ours, np.ndarray)
        assert np.abs(ours - right).max() < 1e-12
    turned = torch.from_numpy(M).mT.contiguous().mT[:1]
    assert_close(batch.solve_batch(turned, 0.2).plan, origin.solve_batch(turned, 0.2).plan, 1e-12)
    assert batch.solve_batch(turned[:0], 0.2).plan.shape == (0, 12, 9)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(x).parameters for x in (getattr(batch, name), of_origin(name)))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_bad_input() -> None:
    M, a, b = transport()
    for options in ({}, {"reg": 0}, {"reg": 0.1, "method": "proximal"}):
        with pytest.raises(NotImplementedError, match="proximal method is not served; give reg > 0"):
            batch.solve_batch(M, **options)
    with pytest.raises(ValueError, match="inner_iter and inner_reg are the proximal method's"):
        batch.solve_batch(M, 0.1, inner_iter=3)
    with pytest.raises(ValueError, match="grad must be one of"):
        batch.solve_batch(M, 0.1, grad="unrolled")
    with pytest.raises(ValueError, match="nx must be None"):
        batch.bregman_log_projection_batch(M, nx=torch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unsqueeze\(0\) makes one"):
        batch.solve_batch(M[0], 0.1)
    with pytest.raises(ValueError, match=r"a must be broadcastable to \(5, 12\)"):
        batch.solve_batch(M, 0.1, b, a)
