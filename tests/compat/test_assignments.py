"""compat.swav and compat.dinov2, against their loop in float64: no package index has them."""

from __future__ import annotations

import pytest
import torch

from fastdsm.compat import dinov2, swav

from ..interop.parity import DTYPES, assert_close, value_tolerance
from .oracles import assignments

SHAPES = pytest.mark.parametrize("shape", [(16, 50), (50, 16), (1, 8), (8, 1)])


@DTYPES
@SHAPES
@pytest.mark.parametrize("sweeps", [1, 3, 10])
def test_swav(sweeps: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = torch.randn(shape, dtype=dtype, requires_grad=True)
    found = swav.sinkhorn(scores, 0.5, sweeps)
    assert found.dtype == dtype
    assert not found.requires_grad
    assert_close(found, assignments(scores.detach(), 0.5, sweeps), value_tolerance(dtype))
    assert torch.equal(found, swav.distributed_sinkhorn(scores, 0.5, sweeps))


def test_defaults_of_swav() -> None:
    scores = torch.randn(16, 50, dtype=torch.float64).clamp(-1, 1)
    assert_close(swav.sinkhorn(scores), assignments(scores, 0.05, 3), 1e-12)


def test_no_iteration_of_swav_is_a_softmax() -> None:
    scores = torch.randn(16, 50, dtype=torch.float64)
    assert_close(swav.sinkhorn(scores, 0.5, 0), (scores / 0.5).softmax(-1), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@SHAPES
def test_dinov2_is_float32(shape: tuple[int, int], dtype: torch.dtype) -> None:
    output = torch.randn(shape).to(dtype).requires_grad_()
    found = dinov2.sinkhorn_knopp_teacher(output, 0.3)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert_close(found, assignments(output.detach(), 0.3, 3), 1e-6)


def test_half_precision_of_swav_gives_float32() -> None:
    scores = torch.randn(16, 50, dtype=torch.bfloat16)
    assert swav.sinkhorn(scores, 0.5).dtype == torch.float32
    assert_close(swav.sinkhorn(scores, 0.5), assignments(scores, 0.5, 3), 1e-6)


def test_strides_and_an_empty_batch() -> None:
    scores = torch.randn(50, 32).mT[::2]
    assert_close(dinov2.sinkhorn_knopp_teacher(scores, 0.5, 2), assignments(scores, 0.5, 2), 1e-6)
    assert swav.sinkhorn(torch.empty(0, 50)).shape == (0, 50)


def test_where_the_origin_overflows() -> None:
    """exp(scores / temperature) is inf in float32 above 88, and everything NaN; in float64 it is not."""
    scores = torch.randn(16, 50) * 4
    assert (scores / 0.05).exp().isinf().any()
    for found in (swav.sinkhorn(scores), dinov2.sinkhorn_knopp_teacher(scores, 0.05)):
        assert_close(found, assignments(scores, 0.05, 3), 2e-6)


def test_bad_input() -> None:
    scores = torch.randn(4, 8)
    with pytest.raises(ValueError, match="n_iterations must be >= 1, got 0"):
        dinov2.sinkhorn_knopp_teacher(scores, 0.1, 0)
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        swav.sinkhorn(scores, 0.0)
    with pytest.raises(TypeError, match=r"scores must be a torch\.Tensor"):
        swav.sinkhorn(scores.numpy())  # type: ignore[arg-type]
