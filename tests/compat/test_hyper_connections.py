"""compat.hyper_connections, against the package; tests/interop has it inside the modules."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastdsm.compat import hyper_connections as compat

from ..interop.parity import DTYPES, assert_close, assert_same, leaves_of
from .oracles import log_projection

pytest.importorskip("hyper_connections", reason="the extra parity")
from hyper_connections import manifold_constrained_hyper_connections as first_version
from hyper_connections import mHCv2 as second_version  # noqa: N813

NAMES = pytest.mark.parametrize("name", ["sinkhorn_knopps", "log_domain_sinkhorn_knopps"])


@DTYPES
@NAMES
@pytest.mark.parametrize("shape", [(32, 4, 4), (1, 8, 8), (2, 3, 5, 5)])
@pytest.mark.parametrize("iters", [0, 1, 20])
def test_the_package(iters: int, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    """It computes float64 in float32, hence the tolerance."""
    (logits,) = leaves_of(shape, dtype=dtype)
    found, origin = getattr(compat, name)(logits, iters), getattr(second_version, name)(logits, iters)
    assert found.dtype == origin.dtype
    assert_same(found, origin, [logits], value=1e-6, gradient=1e-5)


@DTYPES
@NAMES
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_definition(scale: float, name: str, dtype: torch.dtype) -> None:
    (logits,) = leaves_of((32, 4, 4), dtype=dtype, scale=scale)
    origin = log_projection(logits, 40, "col").exp().to(dtype)
    value, gradient = (None, None) if dtype == torch.float64 else (2e-6, 1e-5)
    assert_same(getattr(compat, name)(logits), origin, [logits], value=value, gradient=gradient)


def test_where_the_package_underflows() -> None:
    logits = torch.randn(256, 4, 4) * 20
    truth = log_projection(logits, 40, "col").exp()
    assert (first_version.sinkhorn_knopps(logits) - truth).abs().max() > 1e-3
    assert_close(compat.sinkhorn_knopps(logits), truth, 2e-6)


@NAMES
@pytest.mark.parametrize("shape", [(6, 3, 5), (6, 5, 3)])
def test_rectangular_as_the_first_version(shape: tuple[int, ...], name: str) -> None:
    (logits,) = leaves_of(shape, dtype=torch.float32)
    assert_same(getattr(compat, name)(logits, 5), getattr(first_version, name)(logits, 5), [logits])


@NAMES
def test_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (compat, second_version))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_half_precision_strides_and_an_empty_batch() -> None:
    logits = torch.randn(4, 32, 8).bfloat16().permute(1, 0, 2)[..., ::2]
    found = compat.triton_sinkhorn(logits)
    assert found.dtype == torch.bfloat16
    assert_close(found, second_version.log_domain_sinkhorn_knopps(logits), 2.0**-8)
    assert compat.sinkhorn_knopps(logits[:0]).shape == (0, 4, 4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="iters must be >= 0, got -1"):
        compat.sinkhorn_knopps(torch.randn(4, 4), -1)
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        compat.sinkhorn_knopps([[0.0]])  # type: ignore[arg-type]
