"""compat.pot's sinkhorn and sinkhorn2, against the package: values, gradients, its dictionary, warning and stopping rule."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdsm.compat import pot

from ..interop.parity import DTYPES, assert_close, assert_same
from ..tolerances import drift

ot = pytest.importorskip("ot", reason="the extra parity")

METHODS = pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])


def transport(dtype: torch.dtype = torch.float64, *, total: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masses a (12,) and b (9,), of this total, a cost (12, 9) and reg, with gradients."""
    a, b = torch.randn(12, dtype=dtype).softmax(-1), total * torch.randn(9, dtype=dtype).softmax(-1)
    M = torch.cdist(torch.rand(12, 2, dtype=dtype), torch.rand(9, 2, dtype=dtype)).square()
    return a.requires_grad_(), b.requires_grad_(), M.requires_grad_(), torch.tensor(0.2, dtype=dtype, requires_grad=True)


def quietly(function: Any, *args: Any, **options: Any) -> Any:
    """What a function returns that may warn."""
    with warnings.catch_warnings(action="ignore"):
        return function(*args, **options)


@DTYPES
@METHODS
@pytest.mark.parametrize("sweeps", [1, 10, 37])
@pytest.mark.parametrize("total", [1.0, 1.5])
def test_so_many_sweeps(total: float, sweeps: int, method: str, dtype: torch.dtype) -> None:
    """Of totals that differ too, by which potentials drift, in float32 by a rounding per sweep besides, in both packages."""
    inputs = transport(dtype, total=total)
    options = {"method": method, "numItermax": sweeps, "stopThr": 0.0, "log": True, "warn": False}
    found, ours = pot.sinkhorn(*inputs, **options)
    origin, theirs = ot.sinkhorn(*inputs, **options)
    assert_same(found, origin, inputs)
    assert ours.keys() == theirs.keys()
    assert ours["niter"] == theirs["niter"] == sweeps - 1
    assert_close(
        torch.stack(ours["err"]).detach(), torch.stack(theirs["err"]).detach(), 1e-6 if dtype == torch.float32 else 1e-12
    )
    value, gradient = (max(1e-6, drift(sweeps)), 1e-5 + drift(sweeps)) if dtype == torch.float32 else (None, None)
    for name in sorted(theirs.keys() - {"err", "niter"}):  # of a factor the gradient has the factor's own error
        assert_same(ours[name], theirs[name], inputs, value=value, gradient=gradient)


@METHODS
@pytest.mark.parametrize("stop", [1e-3, 1e-6, 1e-9])
def test_ends_with_the_same_sweep(stop: float, method: str) -> None:
    inputs = transport()
    origin, theirs = ot.sinkhorn(*inputs, method=method, stopThr=stop, log=True)
    with warnings.catch_warnings(action="error"):
        found, ours = pot.sinkhorn(*inputs, method=method, stopThr=stop, log=True)
        assert_same(pot.sinkhorn(*inputs, method=method, stopThr=stop), origin, inputs)
    assert ours["niter"] == theirs["niter"] > 0
    assert len(ours["err"]) == len(theirs["err"])
    assert_same(found, origin, inputs)


@METHODS
def test_without_a_gradient(method: str) -> None:
    inputs = [x.detach() for x in transport()]
    assert_close(pot.sinkhorn(*inputs, method=method), ot.sinkhorn(*inputs, method=method), 1e-12)


@METHODS
def test_warns_where_the_error_is_not_reached(method: str) -> None:
    inputs = transport()
    with pytest.warns(UserWarning, match="Sinkhorn did not converge to stopThr; increase numItermax or reg"):
        pot.sinkhorn(*inputs, method=method, numItermax=3)
    with warnings.catch_warnings(action="error"):
        pot.sinkhorn(*inputs, method=method, numItermax=3, warn=False)
        pot.sinkhorn2(*inputs, method=method, numItermax=3)


@METHODS
def test_warm_start(method: str) -> None:
    inputs = transport()
    start = tuple(torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (12, 9))
    options = {"method": method, "numItermax": 4, "stopThr": 0.0, "warn": False, "warmstart": start}
    assert_same(pot.sinkhorn(*inputs, **options), ot.sinkhorn(*inputs, **options), [*inputs, start[0]])


@DTYPES
@METHODS
def test_loss(method: str, dtype: torch.dtype) -> None:
    inputs = transport(dtype)
    options = {"method": method, "numItermax": 20, "stopThr": 0.0, "log": True}
    (found, ours), (origin, theirs) = pot.sinkhorn2(*inputs, **options), ot.sinkhorn2(*inputs, **options)
    assert_same(found, origin, inputs)
    assert ours.keys() == theirs.keys()
    assert torch.equal(pot.sinkhorn2(*inputs, **options | {"log": False}), found)


@DTYPES
@METHODS
@pytest.mark.parametrize("stop", [0.0, 1e-4])
def test_many_histograms(stop: float, method: str, dtype: torch.dtype) -> None:
    a, _, M, reg = transport(dtype)
    b = torch.randn(9, 4, dtype=dtype).softmax(0).requires_grad_()
    inputs = (a, b, M, reg)
    options = {"method": method, "numItermax": 40, "stopThr": stop, "log": True}
    (found, ours), (origin, theirs) = (quietly(module.sinkhorn, *inputs, **options) for module in (pot, ot))
    assert_same(found, origin, inputs)
    assert ours.keys() == theirs.keys()
    value, gradient = (drift(40), 1e-5 + drift(40)) if dtype == torch.float32 else (None, None)
    # The gradient in reg is one sum over all entries, whose terms cancel: of float32 neither package has five digits.
    leaves = inputs[:3] if dtype == torch.float32 else inputs
    for name in sorted(theirs.keys() - {"err", "niter"}):
        assert_same(ours[name], theirs[name], leaves, value=value, gradient=gradient)
    assert_close(
        quietly(pot.sinkhorn2, *inputs, **options)[0].detach(), origin.detach(), 1e-6 if dtype == torch.float32 else 1e-12
    )


@METHODS
def test_many_histograms_warm_started(method: str) -> None:
    a, _, M, reg = transport()
    b = torch.randn(9, 3, dtype=torch.float64).softmax(0)
    u, v = torch.randn(12, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    start = (u, v) if method == "sinkhorn" else list(zip(u.unbind(1), v.unbind(1), strict=True))
    options = {"method": method, "numItermax": 3, "stopThr": 0.0, "warmstart": start}
    found, origin = (quietly(module.sinkhorn, a, b, M, reg, **options) for module in (pot, ot))
    assert_same(found, origin, [a, M, reg])


def test_one_histogram_of_many() -> None:
    """At k = 1 the origin's log form fails."""
    a, b, M, reg = transport()
    with pytest.raises(TypeError):
        ot.sinkhorn(a, b[:, None], M, reg, method="sinkhorn_log")
    for method in ("sinkhorn", "sinkhorn_log"):
        found = pot.sinkhorn(a, b[:, None], M, reg, method=method)
        assert_same(found, ot.sinkhorn2(a, b, M, reg)[None], [a, b, M, reg])


@METHODS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy(dtype: type, method: str) -> None:
    a, b, M = (x.detach().numpy().astype(dtype) for x in transport()[:3])
    options = {"method": method, "numItermax": 20, "stopThr": 0.0, "log": True, "warn": False}
    (found, ours), (origin, theirs) = pot.sinkhorn(a, b, M, 0.2, **options), ot.sinkhorn(a, b, M, 0.2, **options)
    tolerance = 1e-6 if dtype is np.float32 else 1e-12
    assert isinstance(found, np.ndarray)
    assert found.dtype == origin.dtype == dtype
    assert np.abs(found - origin).max() < tolerance
    for name in ("u", "v"):
        assert ours[name].dtype == dtype
        assert np.abs(ours[name] / theirs[name] - 1).max() < 10 * tolerance
    assert np.abs(np.array(ours["err"]) - np.array(theirs["err"])).max() < tolerance
    loss = pot.sinkhorn2(a, b, M, 0.2, **options | {"log": False})
    assert isinstance(loss, np.floating)
    assert abs(loss - (origin * M).sum()) < tolerance


def test_lists_and_uniform_masses() -> None:
    M = [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]
    found = pot.sinkhorn([], [], M, 1)
    assert isinstance(found, np.ndarray)
    assert np.abs(found - ot.sinkhorn([], [], M, 1)).max() < 1e-12
    tensor = torch.tensor(M)
    assert_close(pot.sinkhorn([0.5, 0.5], [], tensor, 1, warn=False), torch.from_numpy(found).float(), 1e-6)
    assert_close(pot.sinkhorn(torch.empty(0), torch.empty(0), tensor, 1, warn=False), torch.from_numpy(found).float(), 1e-6)


def test_masses_of_zero() -> None:
    """In the origin's first sweep such rows count, so that the limit is what agrees, and potentials up to a constant."""
    a, b, M, _ = (x.detach() for x in transport())
    a, b = a.index_fill(0, torch.tensor([2]), 0.0), b.index_fill(0, torch.tensor([0, 5]), 0.0)
    a, b = a / a.sum(), b / b.sum()
    options = {"method": "sinkhorn_log", "log": True, "stopThr": 1e-15}
    (found, ours), (origin, theirs) = (quietly(module.sinkhorn, a, b, M, 0.2, **options) for module in (pot, ot))
    assert_close(found, origin, 1e-12)
    assert_close(ours["log_u"][:, None] + ours["log_v"], theirs["log_u"][:, None] + theirs["log_v"], 1e-12)
    assert_close(ours["u"][:, None] * ours["v"], theirs["u"][:, None] * theirs["v"], 1e-12)
    for name, masses in (("u", a), ("v", b)):
        assert torch.equal(ours[name] == 0, masses == 0)


@METHODS
def test_small_reg(method: str) -> None:
    """Where float32's exponentials underflow the origin's default form gives up at once; the truth is float64's log form."""
    a, b, M = (x.detach() for x in transport(torch.float32)[:3])
    wide = [x.double() for x in (a, b, M)]
    truth = ot.sinkhorn(*wide, 1e-3, method="sinkhorn_log", numItermax=200, stopThr=0.0, warn=False)
    assert (quietly(ot.sinkhorn, a, b, M, 1e-3, numItermax=200, stopThr=0.0) - truth).abs().max() > 1e-3
    found = pot.sinkhorn(a, b, M, 1e-3, method=method, numItermax=200, stopThr=0.0, warn=False)
    assert_close(found, truth, 1e-5)  # logits of 1,000 are rounded by 6e-5 as float32


def test_strides() -> None:
    a, b, M, reg = (x.detach() for x in transport())
    wide = torch.stack([M.mT, M.mT], -1)[..., 0].mT
    assert not wide.is_contiguous()
    assert_close(pot.sinkhorn(a, b, wide, reg), ot.sinkhorn(a, b, M, reg), 1e-12)


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = transport()
    for module in (pot, ot):
        module.sinkhorn(*inputs, method="sinkhorn_log", stopThr=1e-3, verbose=True)
    ours = capsys.readouterr().out.splitlines()
    assert ours[: len(ours) // 2] == ours[len(ours) // 2 :]
    assert ours[0].startswith("It.")


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2", "bregman.sinkhorn_knopp", "bregman.sinkhorn_log"])
def test_signatures(name: str) -> None:
    """But for **kwargs, of which the origin's forms use none: here they are an error."""

    def parameters(module: Any) -> list[tuple[str, Any]]:
        for part in name.split("."):
            module = getattr(module, part)
        return [(p.name, p.default) for p in inspect.signature(module).parameters.values() if p.kind != p.VAR_KEYWORD]

    assert parameters(pot) == parameters(ot)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        pot.sinkhorn(*transport(), tau=1e3)


def test_bad_input() -> None:
    a, b, M, _ = transport()
    with pytest.raises(ValueError, match="method must be one of 'sinkhorn', 'sinkhorn_log', got 'greenkhorn'"):
        pot.sinkhorn(a, b, M, 0.1, method="greenkhorn")
    with pytest.raises(ValueError, match="reg must be > 0"):
        pot.sinkhorn(a, b, M, 0)
    with pytest.raises(ValueError, match="numItermax must be >= 1"):
        pot.sinkhorn(a, b, M, 0.1, numItermax=0)
    with pytest.raises(ValueError, match=r"a must have shape \(12,\) and b \(9,\) or \(9, k\), got \(9,\) and \(12,\)"):
        pot.sinkhorn(b, a, M, 0.1)
    with pytest.raises(TypeError, match="got both: Tensor, ndarray"):
        pot.sinkhorn(a, b.detach().numpy(), M, 0.1)
    with pytest.raises(TypeError, match="got dict"):
        pot.sinkhorn({}, [], [[1.0]], 0.1)
    with pytest.raises(ValueError, match=r"M must have shape \(n, m\)"):
        pot.sinkhorn(a, b, M[None], 0.1)
    with pytest.raises(ValueError, match="warmstart must be 2 pairs"):
        pot.sinkhorn(a, torch.stack([b, b], 1), M, 0.1, method="sinkhorn_log", warmstart=(a, b, a))
