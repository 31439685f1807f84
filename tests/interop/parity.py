"""What a swap is held to: the origin's value to 1e-6 and its gradients to 1e-5; in float64 to 1e-12 and 1e-10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def value_tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


def gradient_tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-5


def assert_close(found: Tensor, origin: Tensor, tolerance: float) -> None:
    """Equal to ``tolerance``, of the largest entry where that is above 1; infinities where the origin has them."""
    assert found.shape == origin.shape
    assert not origin.isnan().any()
    finite = origin.isfinite()
    assert torch.equal(found[~finite], origin[~finite])
    error = (found[finite].double() - origin[finite].double()).abs().max()
    size = max(1.0, float(origin[finite].abs().max()))
    assert error <= tolerance * size, f"off by {error:.3e} where {tolerance * size:.1e} are allowed"


def assert_same(
    found: Tensor,
    origin: Tensor,
    leaves: Sequence[Tensor],
    theirs: Sequence[Tensor] | None = None,
    *,
    value: float | None = None,
    gradient: float | None = None,
) -> None:
    """Two results have one value and, with a random cotangent, one gradient in each of the ``leaves`` they are computed of.

    A leaf that a result does not depend on has the gradient 0.

    theirs: the origin's leaves where they are others, the parameters of another module.
    value, gradient: tolerances other than those of the result's dtype.
    """
    assert_close(found.detach(), origin.detach(), value_tolerance(origin.dtype) if value is None else value)
    cotangent = torch.where(origin.detach().isfinite(), torch.randn_like(origin), 0.0)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad(found, leaves, cotangent, **options)
    right = torch.autograd.grad(origin, leaves if theirs is None else theirs, cotangent, **options)
    for x, y in zip(ours, right, strict=True):
        assert_close(x, y, gradient_tolerance(origin.dtype) if gradient is None else gradient)


def leaves_of(*shapes: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Standard normal tensors times ``scale`` that require gradients."""
    return [(torch.randn(shape, dtype=dtype) * scale).requires_grad_() for shape in shapes]


def randomised(module: Any, scale: float = 0.5) -> Any:
    """The module with every parameter moved by random numbers, so that none of its terms is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return module
